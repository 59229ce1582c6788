"""The CUDA path of the transfer engine on a driver made of threads: bytes, stream order, faults, no deadlock.

What this cannot show is in docs/verification.md: that a GPU does what the stand-in does, and how fast.
"""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_cuda import ALWAYS, NEVER, PIN_CHUNK_BYTES, Dam, FakeCuda, Rig, build
from sglang_flexkv_testing import FaultyDisk

from sglang_flexkv import _core

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which builds the driver, is missing"
)

T = _core.TransferType
S = _core.OpStatus
MakeRig = Callable[..., Rig]
BIG_ROW = 300 << 10  # a page of this size goes by the copy engines


@pytest.fixture(params=[13])
def cuda(request: pytest.FixtureRequest) -> Iterator[FakeCuda]:
    fake = FakeCuda(build(request.param), request.param)
    fake.reset()
    yield fake
    assert fake.violations == ""


@pytest.fixture
def make_rig(cuda: FakeCuda) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**options) -> Rig:
        rigs.append(Rig(cuda, **options))
        return rigs[-1]

    yield make
    wind_up(cuda)
    for rig in rigs:
        rig.close()


def wind_up(cuda: FakeCuda) -> None:
    """After a test, which may have failed: no stream is held up, and no thread goes on to use one."""
    for dam in cuda.dams:
        dam.open()
    while Forward.begun:
        Forward.begun.pop().join(30.0)


@pytest.fixture
def stream(cuda: FakeCuda) -> Iterator[int]:
    """The forward's."""
    stream = cuda.stream()
    yield stream
    wind_up(cuda)
    cuda.synchronize(stream)
    cuda.end_stream(stream)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def check_round_trip(rig: Rig) -> None:
    """Stores blocks and loads them elsewhere, in one op per layer range and in one for all, and compares the
    whole pools with a naive copy."""
    sources, slots, targets = (5, 0, 9, 2), ints(7, 3, 12, 1), (20, 14, 11, 22)
    before = {slot: rig.slot(slot).copy() for slot in range(rig.host.num_slots)}
    out = rig.run(_core.OpSpec(T.D2H, rig.token_slots(*sources), slots))
    assert out.done, out.error
    for slot in range(rig.host.num_slots):
        index = np.flatnonzero(slots == slot)
        want = rig.bytes_of(rig.rows(sources[index[0]])) if len(index) else before[slot]
        assert np.array_equal(rig.slot(slot), want)
    expected = rig.copy_of_device()
    rig.expect_loaded(expected, slots, [rig.rows(t) for t in targets])
    cut = rig.num_layers // 2
    for begin, end in ((0, cut), (cut, rig.num_layers)):
        if begin < end:
            op = _core.OpSpec(T.H2D, slots, rig.token_slots(*targets), layer_begin=begin, layer_end=end)
            assert rig.run(op).done
    for layer in range(rig.num_layers):
        for got, want in zip(rig.device[layer], expected[layer], strict=True):
            assert np.array_equal(got, want)


@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
@pytest.mark.parametrize(
    "row_bytes", [(256, 256), (1152,), (96, 48), (72, 72), (20,), (33, 35)], ids=lambda sizes: f"rows{sizes}"
)
@pytest.mark.parametrize("row_padding", [0, 16, 5])
def test_bytes_are_those_of_a_naive_copy(
    make_rig: MakeRig, cuda: FakeCuda, tokens: int, row_bytes: tuple[int, ...], row_padding: int
) -> None:
    rig = make_rig(tokens=tokens, row_bytes=row_bytes, row_padding=row_padding)
    check_round_trip(rig)
    assert cuda.calls("cuLaunchKernel") == 3


@pytest.mark.parametrize("seed", range(30))
def test_random_layouts(make_rig: MakeRig, cuda: FakeCuda, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cuda.reset(seed=seed, delay_us=20)
    unit = int(rng.choice([1, 2, 4, 8, 16]))
    check_round_trip(
        make_rig(
            tokens=int(rng.integers(1, 40)),
            layers=int(rng.integers(1, 12)),
            row_bytes=tuple(unit * int(n) for n in rng.integers(1, 60, rng.integers(1, 4))),
            row_padding=unit * int(rng.integers(0, 4)),
        )
    )


@pytest.mark.parametrize("row_padding", [0, 64])
def test_pools_that_are_laid_out_by_page(make_rig: MakeRig, cuda: FakeCuda, row_padding: int) -> None:
    check_round_trip(make_rig(tokens=16, tokens_per_row=16, row_padding=row_padding))
    assert cuda.calls("cuLaunchKernel") == 3


PAGES_BESIDE_TOKENS = {
    # K and V by token, their scales by page; a latent by token, its index keys by page.
    "scales": {"row_bytes": (96, 96, 6, 6), "tokens_per_row": (1, 1, 16, 16)},
    "index keys": {"row_bytes": (1152, 132), "tokens_per_row": (1, 16)},
    "index keys of some layers": {
        "row_bytes": (1152, 132),
        "tokens_per_row": (1, 16),
        "layers": 5,
        "buffers_of": (2, 1, 1, 2, 1),
    },
    "rows of three sizes": {"row_bytes": (24, 8, 33), "tokens_per_row": (4, 1, 16)},
    "large": {"row_bytes": (BIG_ROW // 16, BIG_ROW // 64), "tokens_per_row": (1, 16)},
}


@pytest.mark.parametrize("pool", PAGES_BESIDE_TOKENS)
@pytest.mark.parametrize("row_padding", [0, 64, 5])
def test_buffers_by_page_beside_buffers_by_token(make_rig: MakeRig, row_padding: int, pool: str) -> None:
    check_round_trip(make_rig(tokens=16, row_padding=row_padding, **PAGES_BESIDE_TOKENS[pool]))


@pytest.mark.parametrize("pool", PAGES_BESIDE_TOKENS)
@pytest.mark.parametrize("row_padding", [0, 64])
def test_blocks_of_several_pages(make_rig: MakeRig, row_padding: int, pool: str) -> None:
    rig = make_rig(tokens=48, row_padding=row_padding, **PAGES_BESIDE_TOKENS[pool])
    if not row_padding:
        return check_round_trip(rig)
    # The order of rows in a slot is another one here.
    stored = rig.bytes_of(rig.rows(3))
    assert rig.run(_core.OpSpec(T.D2H, rig.token_slots(3), ints(1))).done
    assert rig.run(_core.OpSpec(T.H2D, ints(1), rig.token_slots(8))).done
    assert np.array_equal(rig.bytes_of(rig.rows(8)), stored)


@pytest.mark.parametrize("tokens", [(3, 4), (17, 0)], ids=["scattered", "not from the start of a page"])
def test_where_rows_are_pages_blocks_are(make_rig: MakeRig, tokens: tuple[int, int]) -> None:
    rig = make_rig(tokens=2, row_bytes=(96, 24), tokens_per_row=(1, 2))
    with pytest.raises(ValueError, match="whole pages"):
        rig.engine.submit([_core.OpSpec(T.D2H, ints(*tokens), ints(1))])


@pytest.mark.parametrize("cuda", [11, 12, 13], indirect=True)
@pytest.mark.parametrize("row_padding", [0, 4096])
def test_large_pieces_go_by_the_copy_engines(make_rig: MakeRig, cuda: FakeCuda, row_padding: int) -> None:
    rig = make_rig(tokens=1, row_bytes=(BIG_ROW, BIG_ROW), layers=2, row_padding=row_padding)
    check_round_trip(rig)
    assert cuda.calls("cuLaunchKernel") == 0
    calls = {11: "cuMemcpyHtoDAsync_v2", 12: "cuMemcpyBatchAsync", 13: "cuMemcpyBatchAsync_v2"}
    assert cuda.calls(calls[cuda.version]) > 0
    assert all(cuda.calls(call) == 0 for version, call in calls.items() if version > cuda.version)


@pytest.mark.parametrize("tokens", [1, 16])
def test_memory_that_is_not_pinned_goes_by_the_copy_engines(
    make_rig: MakeRig, cuda: FakeCuda, tokens: int
) -> None:
    check_round_trip(make_rig(tokens=tokens, pinned=False))
    assert cuda.calls("cuLaunchKernel") == 1  # which gathers what is stored, on the device
    assert cuda.calls("cuMemcpyBatchAsync_v2") == 0


def test_a_batch_that_the_driver_does_not_support_is_copied_one_by_one(
    make_rig: MakeRig, cuda: FakeCuda
) -> None:
    cuda.fail("cuMemcpyBatchAsync_v2", ALWAYS, 801)
    rig = make_rig(tokens=1, row_bytes=(BIG_ROW, BIG_ROW), layers=2)
    check_round_trip(rig)
    assert cuda.calls("cuMemcpyBatchAsync_v2") == 0  # it was tried when copies were measured
    assert cuda.calls("cuMemcpyHtoDAsync_v2") > 0


@pytest.mark.parametrize("row_bytes", [(96, 96), (40 << 10, 40 << 10)], ids=["kernel", "engine"])
def test_tokens_that_do_not_follow_one_another(make_rig: MakeRig, row_bytes: tuple[int, int]) -> None:
    rig = make_rig(tokens=8, row_bytes=row_bytes, device_blocks=8, host_slots=4)
    scattered, others = ints(3, 60, 12, 41, 5, 6, 7, 33), rig.token_slots(1)
    assert rig.run(_core.OpSpec(T.D2H, np.concatenate([scattered, others]), ints(2, 0))).done
    assert np.array_equal(rig.slot(2), rig.bytes_of(scattered))
    assert np.array_equal(rig.slot(0), rig.bytes_of(others))
    target = ints(20, 19, 18, 17, 63, 62, 0, 48)
    assert rig.run(_core.OpSpec(T.H2D, ints(2), target)).done
    assert np.array_equal(rig.bytes_of(target), rig.bytes_of(scattered))


@pytest.mark.parametrize("row_bytes", [(2500, 2500), (BIG_ROW, BIG_ROW)], ids=["kernel", "engine"])
def test_a_slot_in_two_registrations(make_rig: MakeRig, row_bytes: tuple[int, int]) -> None:
    chunk = 64 << 20
    slot_bytes = -(-2 * sum(row_bytes) // 4096) * 4096
    rig = make_rig(tokens=1, layers=2, row_bytes=row_bytes, host_slots=chunk // slot_bytes + 3)
    slot = chunk // slot_bytes
    assert slot * slot_bytes < chunk < (slot + 1) * slot_bytes, "the slot is to lie across"
    slots = ints(slot, slot + 1, 0)
    assert rig.run(_core.OpSpec(T.D2H, rig.token_slots(3, 4, 5), slots)).done
    for at, block in zip(slots, (3, 4, 5), strict=True):
        assert np.array_equal(rig.slot(int(at)), rig.bytes_of(rig.rows(block)))
    assert rig.run(_core.OpSpec(T.H2D, slots, rig.token_slots(9, 10, 11))).done
    assert np.array_equal(rig.bytes_of(rig.rows(9)), rig.slot(slot))


def test_many_copies_at_once(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """More descriptors than the ring holds, in both directions."""
    rig = make_rig(tokens=8, layers=1, row_bytes=(16,), device_blocks=5_000, host_slots=2_500)
    rows = np.arange(20_000).reshape(-1, 8)[:, ::-1].ravel()  # none follows the one before: all are listed
    dam = Dam(cuda, stream)
    events = [cuda.record(stream)]
    store = [
        rig.engine.submit([_core.OpSpec(T.D2H, rows, np.arange(2_500))], wait_events=events)
        for _ in range(60)
    ]
    dam.open()
    for graph in store:
        assert rig.engine.wait(graph, 60.0)
    assert all(result.done for result in rig.engine.poll())
    load = [rig.engine.submit([_core.OpSpec(T.H2D, np.arange(2_500), rows + 20_000)]) for _ in range(100)]
    for graph in load:
        assert rig.engine.wait(graph, 60.0)
    assert all(result.done for result in rig.engine.poll())
    pool = rig.device[0][0]
    assert np.array_equal(pool[:20_000], pool[20_000:])


# ---- pinning ----


def engine_over(cuda: FakeCuda, host: _core.HostPool) -> _core.TransferEngine:
    """An engine that pins the pool, over a device pool that nobody asks for anything."""
    buffer = _core.DeviceBuffer(base=1 << 20, num_rows=1, row_bytes=64, row_stride=64)
    layout = _core.BlockLayout([[buffer]], 1)
    return _core.TransferEngine(layout, host, copy_threads=1, cuda_device=0, cuda_library=cuda.library)


def wait_until_pinned(host: _core.HostPool) -> None:
    deadline = time.monotonic() + 20
    while host.pinned_bytes < host.total_bytes:
        assert time.monotonic() < deadline, "its turn never comes"
        time.sleep(0.001)


@pytest.mark.parametrize("shared", [False, True], ids=["its_own", "shared"])
def test_memory_is_populated_before_it_is_registered(cuda: FakeCuda, shared: bool) -> None:
    """Or the driver does it, under its locks, which is a violation. Huge pages need an address that fits."""
    file = _core.HostPool.make_file() if shared else -1
    host = _core.HostPool(1024, 4096, file)  # which nobody has written to
    if shared:
        os.close(file)
    engine = engine_over(cuda, host)
    wait_until_pinned(host)
    assert host.slot_view(0).ctypes.data % (2 << 20) == 0
    assert cuda.violations == ""
    del engine


def test_pinning_rests_between_chunks(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """Or launches wait all the time while a large pool is pinned; see the rule of the stand-in."""
    cuda.registration(150)
    rig = make_rig(
        tokens=1, layers=2, row_bytes=(BIG_ROW,), host_slots=2 * PIN_CHUNK_BYTES // (2 * BIG_ROW) + 4
    )
    assert rig.host.pinned_bytes > 2 * PIN_CHUNK_BYTES


def test_copies_are_measured_before_memory_is_registered(cuda: FakeCuda) -> None:
    """While memory is registered the driver does nothing else: what is measured meanwhile is its lock."""
    host = _core.HostPool(8, 4096)
    engine = engine_over(cuda, host)
    assert cuda.calls("cuEventElapsedTime") > 0
    wait_until_pinned(host)
    assert cuda.calls("cuMemHostRegister_v2") == 1
    assert cuda.registrations_when_timed == 0
    del engine


def test_one_process_pins_at_a_time(cuda: FakeCuda) -> None:
    deadline = time.monotonic() + 20
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another_process:
        while True:  # a third one may have its turn, say another test
            try:
                another_process.bind(f"\0sglang-flexkv-pins-{os.getuid()}")
                break
            except OSError:
                assert time.monotonic() < deadline, "its turn never comes"
                time.sleep(0.001)
        host = _core.HostPool(8, 4096)
        engine = engine_over(cuda, host)
        time.sleep(0.05)
        assert host.pinned_bytes == 0
    wait_until_pinned(host)
    del engine


# ---- stream order ------------------------------------------------------------------------------


def read_layers(rig: Rig, stream: int, gate: _core.LayerGate, block: int) -> list[list[np.ndarray]]:
    """A forward: waits for each layer on its stream, twice as attention does, and reads it."""
    reads = []
    rows = rig.rows(block)
    for layer in range(rig.num_layers):
        reads.append([])
        for buffer, address in zip(rig.device[layer], rig.addresses[layer], strict=True):
            assert gate.stream_wait(layer, stream, 20.0)
            stride = buffer.shape[1]
            reads[-1].append(rig.cuda.read(stream, address + int(rows[0]) * stride, len(rows) * stride))
    return reads


class Forward:
    """A forward that a thread of its own queues, while its loads come or do not come."""

    begun: ClassVar[list[threading.Thread]] = []

    def __init__(self, read: Callable[[], Any]) -> None:
        self._reads: Any = None
        self._thread = threading.Thread(target=self._run, args=(read,), daemon=True)
        self.begun.append(self._thread)
        self._thread.start()

    def _run(self, read: Callable[[], Any]) -> None:
        self._reads = read()

    def reads(self) -> Any:
        """What it reads, when all of it has been queued."""
        self._thread.join(30.0)
        assert not self._thread.is_alive(), "a forward is never queued"
        assert self._reads is not None, "a forward failed"
        return self._reads


def check_reads(rig: Rig, reads: list[list[np.ndarray]], block: int) -> None:
    for layer, buffers in enumerate(reads):
        for got, buffer in zip(buffers, rig.device[layer], strict=True):
            assert np.array_equal(got, buffer[rig.rows(block)].ravel()), f"layer {layer} was read too early"


@pytest.mark.parametrize("row_bytes", [(96, 96), (BIG_ROW,)], ids=["kernel", "engine"])
def test_a_forward_waits_on_its_stream_for_each_layer(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, row_bytes: tuple[int, ...]
) -> None:
    for seed in range(10):
        cuda.reset(seed=seed, delay_us=300)
        rig = make_rig(tokens=1, layers=6, row_bytes=row_bytes)
        gate = rig.engine.make_gate(6)
        gate.expect(2)
        assert not gate.stream_wait(0, stream, 0.001)  # nothing has been queued yet
        forward = Forward(lambda rig=rig, gate=gate: read_layers(rig, stream, gate, 9))
        graphs = [
            rig.engine.submit([_core.OpSpec(T.H2D, ints(slot), rig.token_slots(block))], gate=gate)
            for slot, block in ((1, 8), (2, 9))
        ]
        reads = forward.reads()
        cuda.synchronize(stream)
        assert rig.engine.drain(20.0)
        assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
        assert np.array_equal(rig.bytes_of(rig.rows(9)), rig.slot(2))
        check_reads(rig, reads, 9)
        assert gate.open_layers == 6


def test_the_host_does_not_wait_for_a_copy_that_is_queued(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    rig = make_rig()
    before = cuda.stream()
    dam = Dam(cuda, before)
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    graph = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(1), rig.token_slots(9))], gate=gate, wait_events=[cuda.record(before)]
    )
    reads = read_layers(rig, stream, gate, 9)
    assert gate.open_layers == 0
    dam.open()
    assert rig.finish(graph).done
    cuda.synchronize(stream)
    check_reads(rig, reads, 9)
    cuda.synchronize(before)
    cuda.end_stream(before)


def test_a_stream_waits_once_for_the_layers_of_a_group(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    rig = make_rig()  # with layers so small that they are copied together
    before = cuda.stream()
    dam = Dam(cuda, before)
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    graph = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(1), rig.token_slots(2))], gate=gate, wait_events=[cuda.record(before)]
    )
    for layer in (0, 0, 1, 1, 0, 2):
        assert gate.stream_wait(layer, stream, 20.0)
    # The copy's for what was before it, the kernel's for the copy engines, and the forward's.
    assert cuda.calls("cuStreamWaitEvent") == 1 + 1 + 1
    dam.open()
    assert rig.finish(graph).done
    assert gate.stream_wait(2, cuda.stream(), 1.0)  # open: nothing to wait for
    assert cuda.calls("cuStreamWaitEvent") == 1 + 1 + 1
    cuda.synchronize(before)
    cuda.end_stream(before)


@pytest.mark.parametrize(
    ("pool", "num_loads"),
    [
        ({"layers": 8}, 300),
        # More than a stream's queue holds.
        ({"layers": 32, "tokens": 1, "row_bytes": (BIG_ROW,), "device_blocks": 6, "host_slots": 7}, 31),
    ],
    ids=["kernel", "engine"],
)
def test_layers_that_come_late_find_a_way(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, pool: dict[str, object], num_loads: int
) -> None:
    """The layers of batch A come late, from SSD. The loads of the batches behind it wait for what is on the
    stream of A's forward by then, which waits for those layers: none of them may stand in their way."""
    cuda.reset(seed=1, delay_us=10)
    cuda.queues(2)
    rig = make_rig(**pool)
    late = rig.engine.make_gate(rig.num_layers)
    late.expect(1)
    early = [_core.OpSpec(T.H2D, ints(1), rig.token_slots(0), layer_begin=0, layer_end=2)]
    rig.engine.submit(early, gate=late, wait_events=[cuda.record(stream)])
    forward = Forward(lambda: read_layers(rig, stream, late, 0))
    batches = []
    for block in range(1, 6):
        gate = rig.engine.make_gate(rig.num_layers)
        loads = range(num_loads if block == 1 else 10)
        gate.expect(len(loads))
        events = [cuda.record(stream)]  # behind the waits of all batches before
        for load in loads:
            cut = 1 + load % (rig.num_layers - 1)  # what has other layers does not go along with the others
            ops = [
                _core.OpSpec(T.H2D, ints(1 + block), rig.token_slots(block), layer_begin=begin, layer_end=end)
                for begin, end in ((0, cut), (cut, rig.num_layers))
            ]
            rig.engine.submit(ops, gate=gate, wait_events=events)
        batches.append(read_layers(rig, stream, gate, block))
    rest = _core.OpSpec(T.H2D, ints(1), rig.token_slots(0), layer_begin=2, layer_end=rig.num_layers)
    rig.engine.submit([rest], gate=late)
    assert rig.engine.drain(20.0), "a load hangs"
    cuda.synchronize(stream)
    assert all(result.done for result in rig.engine.poll())
    reads = forward.reads()
    cuda.synchronize(stream)
    for block, seen in enumerate([reads, *batches]):
        assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(1 + block))
        check_reads(rig, seen, block)


def test_memory_that_is_not_pinned_blocks_nobody_behind_an_event(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    rig = make_rig(pinned=False)
    dam = Dam(cuda, stream)
    behind = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(5), rig.token_slots(4))], wait_events=[cuda.record(stream)]
    )
    assert not rig.engine.wait(behind, 0.02)
    assert rig.run(_core.OpSpec(T.H2D, ints(2), rig.token_slots(3))).done  # and no call into the driver waits
    dam.open()
    assert rig.finish(behind).done
    assert np.array_equal(rig.bytes_of(rig.rows(4)), rig.slot(5))


def test_copies_wait_for_the_callers_events(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    rig = make_rig()
    dam = Dam(cuda, stream)
    cuda.fill(stream, rig.addresses[0][0], 7, rig.device[0][0].nbytes)  # the forward that computes the KV
    graph = rig.engine.submit(
        [_core.OpSpec(T.D2H, rig.token_slots(3), ints(2))], wait_events=[cuda.record(stream)]
    )
    assert not rig.engine.wait(graph, 0.05)
    dam.open()
    assert rig.finish(graph).done
    assert (rig.slot(2)[: 4 * 96] == 7).all()


@pytest.mark.parametrize("row_bytes", [(96, 96), (BIG_ROW,)], ids=["kernel", "engine"])
def test_slots_are_reused_in_stream_order_behind_a_store(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, row_bytes: tuple[int, ...]
) -> None:
    """A write-back: the forward may overwrite the slots only when the copy has read them; no host waits."""
    rig = make_rig(tokens=1, row_bytes=row_bytes)
    held_up = cuda.stream()
    dam = Dam(cuda, held_up)
    expected = rig.bytes_of(rig.rows(3))
    gate = rig.engine.make_gate(1)
    gate.expect(1)
    graph = rig.engine.submit(
        [_core.OpSpec(T.D2H, rig.token_slots(3), ints(2))], gate=gate, wait_events=[cuda.record(held_up)]
    )
    assert gate.stream_wait(0, stream, 20.0)
    for layer, addresses in enumerate(rig.addresses):
        for buffer, address in zip(rig.device[layer], addresses, strict=True):
            cuda.fill(stream, address, 0, buffer.nbytes)
    time.sleep(0.02)
    assert np.array_equal(rig.bytes_of(rig.rows(3)), expected), "overwritten before it was read"
    dam.open()
    assert rig.finish(graph).done
    cuda.synchronize(stream)
    assert np.array_equal(rig.slot(2), expected)
    assert not rig.device[0][0].any()
    cuda.end_stream(held_up)


def test_a_load_of_64_layers_takes_few_calls(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """Time is measured on a GPU; how many calls it takes can be counted here."""
    rig = make_rig(tokens=64, layers=64, row_bytes=(2048, 2048), host_slots=6, device_blocks=9)
    gate = rig.engine.make_gate(64)
    gate.expect(1)
    assert rig.run(_core.OpSpec(T.H2D, ints(*range(6)), rig.token_slots(*range(6))), gate=gate).done
    assert cuda.calls("cuLaunchKernel") == 22
    # Behind the copy engines and behind the kernel, behind parts of the queue, and at both ends.
    assert cuda.calls("cuEventRecord") <= 2 * 22 + 8
    assert gate.open_layers == 64


def test_the_layer_counter_makes_the_current_stream_wait(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    from sglang_flexkv.integration.layer_counter import LayerLoadCounter

    rig = make_rig()
    before = cuda.stream()
    dam = Dam(cuda, before)
    counter = LayerLoadCounter(rig.num_layers, rig.engine.make_gate, lambda: None, lambda: stream)
    index, gate = counter.open_batch()
    gate.expect(1)
    graph = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(2), rig.token_slots(3))], gate=gate, wait_events=[cuda.record(before)]
    )
    # At both ends, and behind the layers, which are small, in the buffer and in the pool.
    while cuda.calls("cuEventRecord") < 4:
        time.sleep(0.001)
    counter.wait_until(0)  # no batch is loading, as while a CUDA graph is captured: nothing is issued
    assert cuda.calls("cuStreamWaitEvent") == 1 + 1
    counter.set_consumer(index)
    for layer in (0, 0, 1, 1, 2, 2):
        counter.wait_until(layer)
    assert cuda.calls("cuStreamWaitEvent") == 1 + 1 + 1
    dam.open()
    assert rig.finish(graph).done
    cuda.synchronize(before)
    cuda.end_stream(before)


def test_where_attention_does_not_ask_a_forward_waits_for_all_layers(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    from sglang_flexkv.integration.layer_counter import LayerLoadCounter

    rig = make_rig()
    before = cuda.stream()
    dam = Dam(cuda, before)
    counter = LayerLoadCounter(
        rig.num_layers, rig.engine.make_gate, lambda: None, lambda: stream, by_layer=False
    )
    index, gate = counter.open_batch()
    gate.expect(1)
    stored = rig.slot(2).copy()
    graph = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(2), rig.token_slots(3))], gate=gate, wait_events=[cuda.record(before)]
    )
    counter.set_consumer(index)
    # What the forward reads last of all layers, without asking for any.
    last, rows = rig.device[-1][-1], rig.rows(3)
    read = cuda.read(stream, rig.addresses[-1][-1] + int(rows[0]) * last.shape[1], len(rows) * last.shape[1])
    dam.open()
    assert rig.finish(graph).done
    cuda.synchronize(stream)
    assert np.array_equal(read, stored[-len(read) :])
    counter.set_consumer(-1)  # nothing is loading: it goes on at once
    cuda.synchronize(before)
    cuda.end_stream(before)


NAMES = np.array([(1, 1), (2, 2)], np.uint64)  # of two blocks in SSD slots 3 and 4


def store_on_ssd(rig: Rig, directory: Path) -> FaultyDisk:
    """Puts an SSD tier that is read layer by layer under the rig, and host slots 0 and 1 into it."""
    disk = FaultyDisk(1)
    store = _core.SsdStore(
        [(str(directory), str(directory / "slots"), str(directory / "journal"))],
        b"namespace of rig",
        16,
        [rig.slot_bytes // rig.num_layers] * rig.num_layers,
        "a rig",
        False,
        0.01,
        disk,
    )
    rig.engine.attach(1, _core.SsdTier(store, _core.IoEngineKind.THREADS, 2), slices_per_read=1)
    assert rig.run(_core.OpSpec(T.H2LOWER, ints(0, 1), ints(3, 4), keys=NAMES)).done
    store.publish(NAMES, np.zeros_like(NAMES), ints(3, 4))
    disk.set_fault("read", 1.0, delay_s=0.01)
    return disk


def test_a_forwards_stream_waits_for_layers_that_come_from_ssd(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, tmp_path: Path
) -> None:
    """The layers of a read go on to the device one after the other, beside a load from memory that has the
    same gate."""
    rig = make_rig(layers=6, row_bytes=(512, 512))
    store_on_ssd(rig, tmp_path)
    gate = rig.engine.make_gate(6)
    gate.expect(2)
    forward = Forward(lambda: read_layers(rig, stream, gate, 9))
    before = rig.copy_of_device()
    rig.expect_loaded(before, ints(0, 1, 2), [rig.rows(8), rig.rows(9), rig.rows(10)])
    graphs = [
        rig.engine.submit(
            [
                _core.OpSpec(T.LOWER2H, ints(3, 4), ints(5, 6), keys=NAMES),
                _core.OpSpec(T.H2D, ints(5, 6), rig.token_slots(8, 9), after_layers=0),
            ],
            gate=gate,
        ),
        rig.engine.submit([_core.OpSpec(T.H2D, ints(2), rig.token_slots(10))], gate=gate),
    ]
    assert all(rig.engine.wait(graph, 20.0) for graph in graphs)
    assert all(result.done for result in rig.engine.poll())
    reads = forward.reads()
    cuda.synchronize(stream)
    check_reads(rig, reads, 9)
    for layer, buffers in enumerate(before):
        for buffer, want in zip(rig.device[layer], buffers, strict=True):
            assert np.array_equal(buffer, want)
    rig.engine.detach(1)


def test_events_are_used_again_and_again(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    cuda.reset(seed=1, delay_us=50)
    rig = make_rig()
    for turn in range(200):
        slot, block = turn % 16, turn % 24
        gate = rig.engine.make_gate(rig.num_layers)
        gate.expect(1)
        rig.engine.submit([_core.OpSpec(T.H2D, ints(slot), rig.token_slots(block))], gate=gate)
        reads = read_layers(rig, stream, gate, block)
        del gate  # the engine holds it until the load has ended
        cuda.synchronize(stream)
        check_reads(rig, reads, block)
    assert rig.engine.drain(20.0)
    assert cuda.calls("cuEventCreate") <= 12


def test_speeds_are_of_the_copies_not_of_what_they_wait_for(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    cuda.speeds(0.25)
    rig = make_rig(tokens=64, row_bytes=(2048, 2048), layers=6)  # pieces of 128 KiB
    dam = Dam(cuda, stream)
    loaded, stored = ints(*range(8)), ints(*range(8, 16))
    graphs = [
        rig.engine.submit([op], wait_events=[cuda.record(stream)])
        for op in (
            _core.OpSpec(T.H2D, loaded, rig.token_slots(*loaded)),
            _core.OpSpec(T.D2H, rig.token_slots(*stored), stored),
        )
    ]
    assert not rig.engine.wait(graphs[0], 0.2)
    dam.open()
    assert all(rig.engine.wait(graph, 20.0) for graph in graphs)
    for name, stats in rig.engine.stats().items():
        if name in ("H2D", "D2H"):
            # By the device's clock, which knows what copies take and nothing else: 96 pieces.
            assert stats["busy_s"] == pytest.approx(96 * (0.25e-6 + (128 << 10) / 55e9), rel=1e-3)
            assert stats["bytes"] == 8 * rig.block_bytes


@pytest.mark.parametrize(
    ("piece_us", "load_kib", "store_kib"), [(0.01, 8, 8), (0.05, 16, 32), (0.15, 32, 64), (2.0, 256, 256)]
)
def test_from_which_size_on_copy_engines_go_alone_is_measured(
    make_rig: MakeRig, cuda: FakeCuda, piece_us: float, load_kib: int, store_kib: int
) -> None:
    cuda.speeds(piece_us)
    rig = make_rig(tokens=16, row_bytes=(2048,), layers=2)  # pieces of 32 KiB
    note = (
        f"loads of pieces from {load_kib} KiB on, for stores from {store_kib} KiB on (measured); pieces have"
    )
    assert note in rig.engine.cuda_note
    check_round_trip(rig)  # two loads and a store
    assert cuda.calls("cuLaunchKernel") == 2 * (load_kib > 32) + (store_kib > 32)


def test_where_no_pieces_are_small_there_is_no_buffer(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """As states of recurrent models are: each is one piece, and a buffer is much memory."""
    rig = make_rig(tokens=1, row_bytes=(256 << 10,), layers=2)
    assert "a buffer" not in rig.engine.cuda_note
    check_round_trip(rig)
    assert cuda.calls("cuLaunchKernel") == 0


@pytest.mark.parametrize("call", ["cuEventElapsedTime", "cuMemcpyBatchAsync_v2"])
def test_what_cannot_be_measured_is_assumed(make_rig: MakeRig, cuda: FakeCuda, call: str) -> None:
    cuda.fail(call, 0)
    rig = make_rig()
    assert "from 256 KiB on, for stores from 256 KiB on (not measured: " in rig.engine.cuda_note
    cuda.fail(call, NEVER)
    check_round_trip(rig)


@pytest.mark.parametrize(("tokens", "layers_in_pieces"), [(16, [1, 4, 4, 4, 3]), (1, [16]), (4, [4, 12])])
def test_layers_go_through_the_buffer_in_pieces_that_copy_engines_like(
    make_rig: MakeRig, cuda: FakeCuda, tokens: int, layers_in_pieces: list[int]
) -> None:
    """Of 256 KiB, or 64 where a forward waits for them, however small a page is."""
    cuda.speeds(2.0)
    rig = make_rig(tokens=tokens, row_bytes=(2048, 2048), layers=16, host_slots=40, device_blocks=40)
    cuda.reset()
    blocks = np.random.default_rng(5).permutation(32)
    gate = rig.engine.make_gate(16)
    gate.expect(1)
    assert rig.run(_core.OpSpec(T.H2D, blocks, rig.token_slots(*blocks)), gate=gate).done
    assert cuda.calls("cuLaunchKernel") == len(layers_in_pieces)
    seen = [layer for layer in layers_and_events(rig) if layer is not None]
    assert sorted(set(seen), key=seen.index) == list(range(16))
    for block in blocks:
        assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(block))


def test_a_forward_waits_for_both_ways_of_a_copy(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """A load that comes late and goes by copy engines alone says nothing of one of its gate that is still on
    its way through the buffer: each way has a stream."""
    rig = make_rig(tokens=8, row_bytes=(33000,), layers=1, device_blocks=40, host_slots=8)
    scattered = np.arange(64).reshape(8, 8).T.ravel().copy()  # small pieces
    slots = ints(0, 1, 3, 4, 5, 6, 7, 0)
    gate = rig.engine.make_gate(1)
    gate.expect(2)
    before = cuda.stream()
    dam = Dam(cuda, before)
    first = rig.engine.submit(
        [_core.OpSpec(T.H2D, slots, scattered)], gate=gate, wait_events=[cuda.record(before)]
    )
    while cuda.calls("cuLaunchKernel") == 0:  # until it is not held back for the other one any more
        time.sleep(0.001)
    second = rig.engine.submit([_core.OpSpec(T.H2D, ints(2), rig.token_slots(39))], gate=gate)
    assert gate.stream_wait(0, stream, 20.0)
    address, size = rig.addresses[0][0], 33000
    reads = [cuda.read(stream, address + int(row) * size, size) for row in scattered]
    dam.open()
    cuda.synchronize(stream)
    assert np.array_equal(np.concatenate(reads), np.concatenate([rig.slot(int(slot)) for slot in slots]))
    assert rig.engine.wait(first, 20.0)
    assert rig.engine.wait(second, 20.0)
    assert all(result.done for result in rig.engine.poll())


def test_a_gate_with_fewer_layers_than_a_load_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig(layers=3)
    gate = rig.engine.make_gate(2)
    gate.expect(1)
    with pytest.raises(ValueError, match="the gate has fewer layers than the group"):
        rig.engine.submit([_core.OpSpec(T.H2D, ints(1), rig.token_slots(2))], gate=gate)


def test_slots_that_follow_one_another_are_one_piece(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """Where all layers of a block go at once, as when it is stored."""
    rig = make_rig(tokens=16, row_bytes=(2048, 2048), layers=4, host_slots=40, device_blocks=40)
    blocks = np.random.default_rng(6).permutation(40)[:8]
    for slots, call in (
        (ints(*range(8)), "cuMemcpyDtoHAsync_v2"),
        (ints(0, 1, 2, 9, 8, 12, 13, 14), "cuMemcpyBatchAsync_v2"),
    ):
        cuda.forget_calls()
        assert rig.run(_core.OpSpec(T.D2H, rig.token_slots(*blocks), slots)).done
        assert cuda.calls("cuMemcpyDtoHAsync_v2") + cuda.calls("cuMemcpyBatchAsync_v2") == 1
        assert cuda.calls(call) == 1
        for block, slot in zip(blocks, slots, strict=True):
            assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(slot))


# ---- what a driver and a device may do to who waits --------------------------------------------


@pytest.mark.parametrize("queues", [1, 2, 8])
@pytest.mark.parametrize("meanwhile", ["a first launch", "memory is freed", "a full queue", "nothing"])
def test_no_stream_waits_for_what_is_not_on_a_stream(
    make_rig: MakeRig, cuda: FakeCuda, meanwhile: str, queues: int
) -> None:
    """A forward is queued before its loads are, and its thread is in a driver call that takes until the
    device has nothing left to do, or that waits for room in a queue: with a lock that the loads need. Or the
    loads share the forward's hardware queue and come behind it."""
    cuda.reset(seed=queues, delay_us=100)
    cuda.queues(queues)
    rig = make_rig(layers=4)
    stream = cuda.stream()
    for turn in range(6):
        gate = rig.engine.make_gate(4)
        gate.expect(1)
        began = threading.Event()

        def forward(
            gate: _core.LayerGate = gate, began: threading.Event = began, first: bool = turn == 0
        ) -> list[list[np.ndarray]]:
            began.set()
            reads: list[list[np.ndarray]] = []
            for layer, addresses in enumerate(rig.addresses):
                assert gate.stream_wait(layer, stream, 20.0)
                reads.append([rig.cuda.read(stream, address + 9 * 384, 384) for address in addresses])
                if meanwhile == "a first launch":
                    cuda.first_launch(stream)
                elif meanwhile == "memory is freed":
                    cuda.free(cuda.allocate(64)[0])
                elif meanwhile == "a full queue":
                    for _ in range(1100 if layer == 0 and first else 10):
                        cuda.fill(stream, addresses[0], 0, 1)
            return reads

        running = Forward(forward)
        assert began.wait(20.0)
        for begin, end in ((0, 2), (2, 4)):
            op = _core.OpSpec(T.H2D, ints(turn), rig.token_slots(9), layer_begin=begin, layer_end=end)
            rig.engine.submit([op], gate=gate, wait_events=[cuda.record(stream)])
        reads = running.reads()
        assert rig.engine.drain(20.0), "a load hangs"
        cuda.synchronize(stream)
        assert np.array_equal(np.concatenate([x for layer in reads for x in layer]), rig.slot(turn))
    cuda.end_stream(stream)


# ---- slots that the device computes -------------------------------------------------------------

PLACES = np.arange  # of the blocks among the slots that are awaited


@pytest.fixture
def schedules(cuda: FakeCuda) -> Iterator[int]:
    """The stream on which the scheduler's allocator computes slots."""
    stream = cuda.stream()
    yield stream
    wind_up(cuda)
    cuda.synchronize(stream)
    cuda.end_stream(stream)


@pytest.mark.parametrize(
    "pool",
    [{}, {"tokens": 1, "row_bytes": (BIG_ROW,)}, {"pinned": False}],
    ids=["kernel", "engine", "not pinned"],
)
def test_nobody_waits_for_slots_that_the_device_computes(
    make_rig: MakeRig, cuda: FakeCuda, schedules: int, pool: dict[str, object]
) -> None:
    """Behind a forward that does not end: whoever asks for them goes on, and so does who submits copies. A
    call that waits would never return here."""
    rig = make_rig(**pool)
    sources, targets = rig.token_slots(4, 9, 2), rig.token_slots(20, 3)
    expected = [rig.bytes_of(rig.rows(block)) for block in (9, 4)]
    dam = Dam(cuda, schedules)

    def schedule() -> list[int]:
        stored = rig.awaited_slots(schedules, sources)
        loaded = rig.awaited_slots(schedules, targets)
        store = rig.engine.submit([_core.OpSpec(T.D2H, ints(1, 0), ints(7, 5), awaited=stored)])
        load = rig.engine.submit([_core.OpSpec(T.H2D, ints(2, 1), PLACES(2), awaited=loaded)])
        return [store, load]

    try:
        graphs = Forward(schedule).reads()
        before = rig.copy_of_device()
        assert not any(rig.engine.wait(graph, 0.02) for graph in graphs)
        assert rig.run(_core.OpSpec(T.H2D, ints(3), rig.token_slots(11))).done  # what has its slots goes on
    finally:
        dam.open()
    assert rig.engine.drain(20.0)
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    for slot, want in zip((7, 5), expected, strict=True):
        assert np.array_equal(rig.slot(slot), want)
    rig.expect_loaded(before, ints(2, 1, 3), [rig.rows(20), rig.rows(3), rig.rows(11)])
    for layer, buffers in enumerate(before):
        for got, want in zip(rig.device[layer], buffers, strict=True):
            assert np.array_equal(got, want)


def test_stores_keep_their_order_while_one_awaits_its_slots(
    make_rig: MakeRig, cuda: FakeCuda, schedules: int
) -> None:
    rig = make_rig()
    dam = Dam(cuda, schedules)
    first = rig.engine.submit(
        [_core.OpSpec(T.D2H, PLACES(1), ints(2), awaited=rig.awaited_slots(schedules, rig.token_slots(5)))]
    )
    second = rig.engine.submit([_core.OpSpec(T.D2H, rig.token_slots(6), ints(2))])
    assert not rig.engine.wait(second, 0.02)
    dam.open()
    assert rig.engine.drain(20.0)
    assert [result.graph for result in rig.engine.poll() if result.done] == [first, second]
    assert np.array_equal(rig.slot(2), rig.bytes_of(rig.rows(6)))


def test_the_loads_of_a_batch_whose_slots_are_awaited_go_layer_by_layer(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, schedules: int
) -> None:
    """Their slots come one after the other, and one load had its slots all the time."""
    rig = make_rig(**LARGE_LAYERS)
    cuda.reset()
    streams = [cuda.stream() for _ in range(2)]
    dams = [Dam(cuda, held_up) for held_up in streams]
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(3)
    ops = [
        _core.OpSpec(
            T.H2D, ints(0, 1), PLACES(2), awaited=rig.awaited_slots(streams[0], rig.token_slots(7, 8))
        ),
        _core.OpSpec(T.H2D, ints(2), rig.token_slots(9)),
        _core.OpSpec(T.H2D, ints(3), PLACES(1), awaited=rig.awaited_slots(streams[1], rig.token_slots(10))),
    ]
    forward = Forward(lambda: read_layers(rig, stream, gate, 10))
    graphs = [rig.engine.submit([op], gate=gate) for op in ops]
    for dam in dams:
        assert not any(rig.engine.wait(graph, 0.01) for graph in graphs)
        dam.open()
    assert rig.engine.drain(20.0)
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    reads = forward.reads()
    cuda.synchronize(stream)
    check_reads(rig, reads, 10)
    for slot, block in enumerate((7, 8, 9, 10)):
        assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(slot))
    assert cuda.calls("cuLaunchKernel") == rig.num_layers
    check_order(rig)
    for held_up in streams:
        cuda.end_stream(held_up)


def test_layers_from_ssd_await_their_slots(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, schedules: int, tmp_path: Path
) -> None:
    rig = make_rig(layers=6, row_bytes=(512, 512))
    store_on_ssd(rig, tmp_path)
    gate = rig.engine.make_gate(6)
    gate.expect(1)
    dam = Dam(cuda, schedules)
    awaited = rig.awaited_slots(schedules, rig.token_slots(9, 8))
    graph = rig.engine.submit(
        [
            _core.OpSpec(T.LOWER2H, ints(3, 4), ints(5, 6), keys=NAMES),
            _core.OpSpec(T.H2D, ints(5, 6), ints(1, 0), after_layers=0, awaited=awaited),
        ],
        gate=gate,
    )
    forward = Forward(lambda: read_layers(rig, stream, gate, 9))
    assert not rig.engine.wait(graph, 0.1)
    dam.open()
    assert rig.finish(graph).done
    reads = forward.reads()
    cuda.synchronize(stream)
    check_reads(rig, reads, 9)
    for block, slot in ((8, 0), (9, 1)):
        assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(slot))
    rig.engine.detach(1)


@pytest.mark.parametrize("kind", [T.H2D, T.D2H])
def test_a_copy_that_awaits_its_slots_can_be_cancelled(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, schedules: int, kind: _core.TransferType
) -> None:
    """At once, and the slots that come later are nobody's any more."""
    rig = make_rig()
    before, slots = rig.copy_of_device(), [rig.slot(slot).copy() for slot in range(16)]
    dam = Dam(cuda, schedules)
    gate = rig.engine.make_gate(rig.num_layers if kind == T.H2D else 1)
    gate.expect(1)
    awaited = rig.awaited_slots(schedules, rig.token_slots(9))
    sides = (ints(2), PLACES(1)) if kind == T.H2D else (PLACES(1), ints(2))
    graph = rig.engine.submit([_core.OpSpec(kind, *sides, awaited=awaited)], gate=gate)
    del awaited
    forward = Forward(lambda: gate.stream_wait(0, stream, 20.0))
    assert rig.engine.cancel(graph)
    assert rig.finish(graph).ops[0].status == S.CANCELLED
    assert forward.reads()
    dam.open()
    cuda.synchronize(schedules)
    assert all(np.array_equal(rig.slot(slot), held) for slot, held in enumerate(slots))
    for layer, buffers in enumerate(before):
        for got, want in zip(rig.device[layer], buffers, strict=True):
            assert np.array_equal(got, want)
    check_round_trip(rig)


@pytest.mark.parametrize("bad", [-1, 24 * 4], ids=["no slot", "behind the pool"])
def test_slots_that_turn_out_wrong_fail_their_copy(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, schedules: int, bad: int
) -> None:
    rig = make_rig()
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(2)
    wrong, right = rig.token_slots(9), rig.token_slots(8)
    wrong[2] = bad
    graphs = [
        rig.engine.submit(
            [_core.OpSpec(T.H2D, ints(1), PLACES(1), awaited=rig.awaited_slots(schedules, slots))], gate=gate
        )
        for slots in (wrong, right)
    ]
    assert gate.stream_wait(rig.num_layers - 1, stream, 20.0)
    assert rig.engine.drain(20.0)
    results = {result.graph: result for result in rig.engine.poll()}
    assert results[graphs[0]].ops[0].status == S.FAILED
    assert f"token slot {bad} is outside the pool" in results[graphs[0]].error
    assert results[graphs[1]].done
    assert np.array_equal(rig.bytes_of(rig.rows(8)), rig.slot(1))
    assert gate.open_layers == rig.num_layers


def test_places_are_checked_at_once(make_rig: MakeRig, schedules: int) -> None:
    rig = make_rig()
    awaited = rig.awaited_slots(schedules, rig.token_slots(9, 8))
    assert len(awaited) == 8
    for places in (ints(0, 2), ints(-1, 0), ints(0)):
        with pytest.raises(ValueError, match="slot"):
            rig.engine.submit([_core.OpSpec(T.H2D, ints(1, 2), places, awaited=awaited)])


@pytest.mark.parametrize("call", ["cuMemcpyDtoHAsync_v2", "cuEventRecord", "cuEventQuery", "cuEventCreate"])
def test_slots_that_cannot_be_read_fail_their_copy(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, schedules: int, call: str
) -> None:
    rig = make_rig()
    dam = Dam(cuda, schedules)
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    forward = Forward(lambda: gate.stream_wait(0, stream, 20.0))
    cuda.fail(call, ALWAYS)
    awaited = rig.awaited_slots(schedules, rig.token_slots(9))
    graph = rig.engine.submit([_core.OpSpec(T.H2D, ints(1), PLACES(1), awaited=awaited)], gate=gate)
    result = rig.finish(graph)
    assert result.ops[0].status == S.FAILED
    assert "token slots could not be read" in result.error
    assert call.removesuffix("_v2") in result.error
    assert forward.reads()
    cuda.fail(call, NEVER)
    # Those that come next get no memory that the failed one may still write to.
    others = [rig.awaited_slots(schedules, rig.token_slots(block)) for block in (4, 5)]
    dam.open()
    for slot, awaited in enumerate(others):
        assert rig.run(_core.OpSpec(T.H2D, ints(slot), PLACES(1), awaited=awaited)).done
        assert np.array_equal(rig.bytes_of(rig.rows(4 + slot)), rig.slot(slot))


@pytest.mark.parametrize("call", [None, "cuMemHostAlloc"], ids=["too many", "no pinned memory"])
def test_slots_that_find_no_room_are_waited_for(
    make_rig: MakeRig, cuda: FakeCuda, schedules: int, call: str | None
) -> None:
    if call is not None:
        cuda.fail(call, ALWAYS)
    rig = make_rig()
    if call is not None:
        cuda.fail(call, NEVER)
    rng = np.random.default_rng(3)
    lists = [rng.permutation(24)[: rng.integers(1, 24)] for _ in range(40)]
    dam = Dam(cuda, schedules)
    read = Forward(lambda: [rig.awaited_slots(schedules, rig.token_slots(*blocks)) for blocks in lists])
    dam.open()
    for blocks, awaited in zip(lists, read.reads(), strict=True):
        place = len(blocks) - 1
        assert rig.run(_core.OpSpec(T.H2D, ints(3), ints(place), awaited=awaited)).done
        assert np.array_equal(rig.bytes_of(rig.rows(int(blocks[place]))), rig.slot(3))


# ---- the loads of a batch ----------------------------------------------------------------------

# A layer of one block is 256 KiB: below a megabyte, launches move several layers.
LARGE_LAYERS: dict[str, object] = {"tokens": 64, "row_bytes": (2048, 2048), "layers": 6, "host_slots": 24}
ENGINE_LAYERS: dict[str, object] = {
    "tokens": 1,
    "row_bytes": (BIG_ROW, BIG_ROW),
    "layers": 6,
    "host_slots": 24,
}
# The first slots are pinned, the last ones are not.
HALF_PINNED: dict[str, object] = {
    "tokens": 64,
    "row_bytes": (16384, 16384),
    "layers": 4,
    "host_slots": 20,
    "device_blocks": 20,
    "pinned_chunks": 1,
}


def submit_batch(
    rig: Rig, loads: list[list[int]], *, behind: int | None = None, cancel: int | None = None
) -> tuple[_core.LayerGate, list[int], Callable[[], None]]:
    """Loads of blocks into the same blocks of the device, submitted as SGLang's plugin does. They are held
    together only while they follow each other closely, so this tries again where something came between.

    Args:
        behind: a stream that is held up, and that the loads wait for.
        cancel: the load that is cancelled at once.

    Returns:
        The gate, the graphs, and what lets the stream go on.
    """
    for _ in range(50):
        rig.cuda.reset(seed=len(loads), delay_us=20)
        for buffer in (buffer for layer in rig.device for buffer in layer):
            buffer[:] = 0
        dam = Dam(rig.cuda, behind) if behind is not None else None
        events = [rig.cuda.record(behind)] if behind is not None else []
        started = time.monotonic()
        gate = rig.engine.make_gate(rig.num_layers)
        gate.expect(len(loads))
        graphs = [
            rig.engine.submit(
                [_core.OpSpec(T.H2D, ints(*load), rig.token_slots(*load))], gate=gate, wait_events=events
            )
            for load in loads
        ]
        if cancel is not None:
            assert rig.engine.cancel(graphs[cancel])
        if time.monotonic() - started < 0.003:
            return gate, graphs, dam.open if dam is not None else lambda: None
        if dam is not None:
            dam.open()
        assert rig.engine.drain(20.0)
        rig.engine.poll()
    pytest.skip("the machine is too busy to submit a batch at once")


def layers_and_events(rig: Rig) -> list[int | None]:
    """The layers that copies wrote to, in order, and None for an event that others may wait for."""
    layer_of = {address: layer for layer, addresses in enumerate(rig.addresses) for address in addresses}
    trace = rig.cuda.trace()
    return [layer_of.get(address) for address in trace if address == 0 or address in layer_of]


def check_order(rig: Rig) -> None:
    """Every layer of all loads comes before the next layer of any, events behind the first and the last."""
    seen = layers_and_events(rig)
    layers = [layer for layer in seen if layer is not None]
    copies = layers.count(0)
    assert copies > 0
    assert layers == [layer for layer in range(rig.num_layers) for _ in range(copies)]
    assert None in seen[seen.index(0) : seen.index(1)]
    assert seen[-1] is None


@pytest.mark.parametrize("pool", [LARGE_LAYERS, ENGINE_LAYERS], ids=["kernel", "engine"])
@pytest.mark.parametrize(
    "sizes", [(4, 4), (4, 1, 6), (1, 1, 1, 5), (4, 1, 2, 5, 3)], ids=lambda sizes: f"loads{sizes}"
)
def test_the_loads_of_a_batch_go_layer_by_layer(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, pool: dict[str, object], sizes: tuple[int, ...]
) -> None:
    rig = make_rig(**pool)
    blocks = iter(range(24))
    loads = [[next(blocks) for _ in range(size)] for size in sizes]
    gate, graphs, _ = submit_batch(rig, loads)
    reads = read_layers(rig, stream, gate, loads[-1][-1])
    assert rig.engine.drain(20.0)
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    cuda.synchronize(stream)
    check_reads(rig, reads, loads[-1][-1])
    for load in loads:
        for block in load:
            assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(block))
    assert gate.open_layers == rig.num_layers
    check_order(rig)


def test_the_loads_of_a_batch_take_the_calls_of_one(make_rig: MakeRig, cuda: FakeCuda) -> None:
    rig = make_rig(**LARGE_LAYERS)
    submit_batch(rig, [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9], [10]])
    assert rig.engine.drain(20.0)
    assert cuda.calls("cuLaunchKernel") == rig.num_layers


def test_a_batch_behind_the_forward_before_goes_layer_by_layer(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    """The usual case: all loads are queued while the forward before, whose slots they may write to, runs."""
    rig = make_rig(**LARGE_LAYERS)
    _, graphs, let_go = submit_batch(rig, [[0, 1], [2, 3, 4, 5, 6], [7]], behind=stream)
    while cuda.calls("cuStreamWaitEvent") == 0:
        time.sleep(0.001)
    assert not rig.bytes_of(rig.rows(3)).any()
    let_go()
    assert rig.engine.drain(20.0)
    # For the forward once; the kernel for the copy engines, and these for a buffer that was left.
    assert cuda.calls("cuStreamWaitEvent") <= 1 + 2 * cuda.calls("cuLaunchKernel")
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    assert np.array_equal(rig.bytes_of(rig.rows(3)), rig.slot(3))
    check_order(rig)


def test_a_scattered_load_goes_along_through_the_buffer(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """Pieces that are large where a block's tokens follow one another, and small where they do not."""
    rig = make_rig(tokens=8, row_bytes=(40 << 10, 40 << 10), layers=4, device_blocks=12, host_slots=4)
    cuda.reset()
    scattered = ints(70, 12, 41, 5, 6, 7, 33, 60)
    gate = rig.engine.make_gate(4)
    gate.expect(3)
    ops = [
        _core.OpSpec(T.H2D, ints(0, 1), rig.token_slots(2, 3)),
        _core.OpSpec(T.H2D, ints(2), scattered),
        _core.OpSpec(T.H2D, ints(3), rig.token_slots(9)),
    ]
    assert rig.run(*ops, gate=gate).done
    for slot, rows in enumerate((rig.rows(2), rig.rows(3), scattered, rig.rows(9))):
        assert np.array_equal(rig.bytes_of(rows), rig.slot(slot))
    assert gate.open_layers == 4
    check_order(rig)
    assert cuda.calls("cuLaunchKernel") == rig.num_layers


def test_a_load_that_does_not_come_holds_up_nobody(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    rig = make_rig(**LARGE_LAYERS)
    gate = rig.engine.make_gate(6)
    gate.expect(3)
    forward = Forward(lambda: read_layers(rig, stream, gate, 4))
    graphs = [
        rig.engine.submit([_core.OpSpec(T.H2D, ints(block), rig.token_slots(block))], gate=gate)
        for block in (3, 4)
    ]
    assert rig.engine.drain(20.0)
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    assert gate.open_layers == 0
    assert rig.run(_core.OpSpec(T.H2D, ints(5), rig.token_slots(5)), gate=gate).done
    assert gate.open_layers == 6
    reads = forward.reads()
    cuda.synchronize(stream)
    check_reads(rig, reads, 4)


def test_one_load_of_a_batch_is_cancelled(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """Before it was queued, or after: the others land, and the forward goes on."""
    rig = make_rig(**LARGE_LAYERS)
    for wait in (False, True):
        held_up = cuda.stream()
        loads = [[0, 1], [2, 3], [4]]
        gate, graphs, let_go = submit_batch(rig, loads, behind=held_up, cancel=None if wait else 1)
        assert gate.stream_wait(5, stream, 20.0) or not wait
        if wait:
            while cuda.calls("cuEventRecord") == 0:
                time.sleep(0.001)
            assert rig.engine.cancel(graphs[1])
        let_go()
        assert rig.engine.drain(20.0)
        results = {result.graph: result.ops[0].status for result in rig.engine.poll()}
        assert results == dict(zip(graphs, (S.DONE, S.CANCELLED, S.DONE), strict=True))
        assert gate.open_layers == 6
        cuda.synchronize(stream)
        for block in (0, 1, 4):
            assert np.array_equal(rig.bytes_of(rig.rows(block)), rig.slot(block))
        cuda.synchronize(held_up)
        cuda.end_stream(held_up)


@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuEventRecord", "cuMemcpyHtoDAsync_v2"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_failure_in_the_middle_of_a_batch_ends_each_load_once(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, call: str, after: int
) -> None:
    rig = make_rig(**LARGE_LAYERS)
    gate = rig.engine.make_gate(6)
    gate.expect(3)
    forward = Forward(lambda: gate.stream_wait(5, stream, 20.0))
    calls = cuda.calls(call)
    cuda.fail(call, after)
    ops = [
        _core.OpSpec(T.H2D, ints(block, block + 1), rig.token_slots(block, block + 1)) for block in (0, 2, 4)
    ]
    graphs = [rig.engine.submit([op], gate=gate) for op in ops]
    assert rig.engine.drain(20.0)
    results = rig.engine.poll()
    assert sorted(result.graph for result in results) == graphs
    assert forward.reads()
    cuda.synchronize(stream)
    if cuda.calls(call) - calls > after + (call == "cuEventRecord"):  # the first one is for measuring only
        assert S.FAILED in [result.ops[0].status for result in results]
        assert all(call.removesuffix("_v2") in result.error for result in results if not result.done)
    else:
        assert all(result.done for result in results)
    cuda.reset()
    assert rig.run(*ops).done
    assert np.array_equal(rig.bytes_of(rig.rows(3)), rig.slot(3))


def test_memory_that_is_not_pinned_raises_no_flag_for_others(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    """While the pool is being pinned a batch has loads of both kinds."""
    rig = make_rig(**HALF_PINNED)
    for seed in range(10):
        cuda.reset(seed=seed, delay_us=2000)
        before = cuda.stream()
        dam = Dam(cuda, before)
        events = [cuda.record(before)]
        gate = rig.engine.make_gate(4)
        gate.expect(2)
        forward = Forward(lambda gate=gate: read_layers(rig, stream, gate, 0))
        for buffer in (buffer for layer in rig.device for buffer in layer):
            buffer[:] = 0
        graphs = [
            rig.engine.submit(
                [_core.OpSpec(T.H2D, ints(block), rig.token_slots(block))], gate=gate, wait_events=events
            )
            for block in (0, 19)
        ]
        while cuda.calls("cuEventRecord") == 0:
            time.sleep(0.001)
        dam.open()
        assert rig.engine.drain(20.0)
        assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
        reads = forward.reads()
        cuda.synchronize(stream)
        check_reads(rig, reads, 0)
        assert np.array_equal(rig.bytes_of(rig.rows(19)), rig.slot(19))
        cuda.synchronize(before)
        cuda.end_stream(before)


def test_memory_that_is_not_pinned_is_copied_after_the_others_of_its_gate(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    """It waits for no event itself. Copied at once, its call into the driver would wait for the others."""
    rig = make_rig(**HALF_PINNED)
    before = cuda.stream()
    dam = Dam(cuda, before)
    gate = rig.engine.make_gate(4)
    gate.expect(2)
    forward = Forward(lambda: read_layers(rig, stream, gate, 0))
    graphs = [
        rig.engine.submit(
            [_core.OpSpec(T.H2D, ints(block), rig.token_slots(block))], gate=gate, wait_events=events
        )
        for block, events in ((0, [cuda.record(before)]), (19, []))
    ]
    time.sleep(0.05)
    dam.open()
    assert rig.engine.drain(20.0)
    assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
    reads = forward.reads()
    cuda.synchronize(stream)
    check_reads(rig, reads, 0)
    cuda.synchronize(before)
    cuda.end_stream(before)


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(make_rig: MakeRig, cuda: FakeCuda, stream: int, seed: int) -> None:
    """Batches of loads, some of them in parts of their layers, some cancelled: a forward has read what the
    host holds wherever the load concerned was not cancelled."""
    cuda.reset(seed=seed, delay_us=50)
    rng = np.random.default_rng(seed)
    pinned_chunks = 1 if seed % 4 == 3 else None
    row_bytes = ((96, 96), (BIG_ROW,), (8192, 8192), (60_000, 60_000))[seed % 4]
    rig = make_rig(
        layers=5,
        tokens=1 if seed % 4 == 1 else 4,
        row_bytes=row_bytes,
        host_slots=32,
        pinned_chunks=pinned_chunks,
    )
    slots = [slot for slot in range(32) if pinned_chunks is None or slot % 7 == 0]
    running: dict[int, bool] = {}
    ended: dict[int, bool] = {}
    forwards = []
    for _ in range(25):
        gate = rig.engine.make_gate(5)
        num_loads = int(rng.integers(1, 6))
        gate.expect(num_loads)
        blocks = [int(block) for block in rng.permutation(24)]
        read_block, read_slot = blocks[0], 0
        early = None
        if rng.random() < 0.5:
            early = Forward(lambda gate=gate, block=read_block: read_layers(rig, stream, gate, block))
        events = [cuda.record(stream)] if rng.random() < 0.7 else []
        rest: list[tuple[list[int], list[int]]] = []
        read_by: list[int] = []  # graphs that bring what the forward looks at
        for load in range(num_loads):
            count = int(rng.integers(1, 4))
            to = [blocks.pop(0) for _ in range(count)]
            sources = [int(rng.choice(slots)) for _ in to]
            read_slot = sources[0] if load == 0 else read_slot
            in_parts = rng.random() < 0.3
            layers = {"layer_begin": 0, "layer_end": 2 if in_parts else 5}
            graph = rig.engine.submit(
                [_core.OpSpec(T.H2D, ints(*sources), rig.token_slots(*to), **layers)],
                gate=gate,
                wait_events=events,
            )
            running[graph] = rng.random() < 0.05 and rig.engine.cancel(graph)
            if read_block in to:
                read_by.append(graph)
            if in_parts:
                rest.append((sources, to))
        for sources, to in rest:
            op = _core.OpSpec(T.H2D, ints(*sources), rig.token_slots(*to), layer_begin=2, layer_end=5)
            graph = rig.engine.submit([op], gate=gate)
            running[graph] = False
            if read_block in to:
                read_by.append(graph)
        reads = early.reads() if early else read_layers(rig, stream, gate, read_block)
        assert read_by
        forwards.append((read_by, reads, read_slot))
        cuda.synchronize(stream)
        assert rig.engine.drain(30.0), "a load hangs"
        for result in rig.engine.poll():
            assert result.graph not in ended
            ended[result.graph] = result.done
    assert ended.keys() == running.keys()
    assert all(done for graph, done in ended.items() if not running[graph])
    for read_by, reads, slot in forwards:
        if not all(ended[graph] for graph in read_by):
            continue
        got = np.concatenate([buffer for layer in reads for buffer in layer])
        assert np.array_equal(got, rig.slot(slot))


class Late:
    """Submits by a thread of its own, as the ends of reads from SSD do."""

    def __init__(self, rig: Rig) -> None:
        self._engine = rig.engine
        self._work: queue.SimpleQueue[tuple[list[_core.OpSpec], dict[str, Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, ops: list[_core.OpSpec], **options: Any) -> None:
        self._work.put((ops, options))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._engine.submit(work[0], **work[1])

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(20.0)
        assert not self._thread.is_alive(), "a submission hangs"


def test_ten_thousand_loads_and_write_backs(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """As a scheduler's thread does it: loads of a batch, some of them late and in parts; nodes that leave,
    whose slots the next forward overwrites; forwards that read layer by layer. Slots are known, or come from
    the device. Streams share three hardware queues, and calls come between that take until the device has
    nothing left to do."""
    cuda.queues(3)
    rng = np.random.default_rng(11)
    rig = make_rig(layers=4, tokens=2, row_bytes=(48, 16), device_blocks=24, host_slots=80)
    stream = cuda.stream()
    late = Late(rig)
    held = [rig.bytes_of(rig.rows(block)) for block in range(24)]  # by each block, in the order of the stream
    sources = {slot: rig.slot(slot).copy() for slot in range(16)}
    copies, stored_slot, value = 0, 16, 0
    stored: dict[int, np.ndarray] = {}
    found: list[tuple[list[np.ndarray], np.ndarray]] = []

    def settle() -> None:
        nonlocal stored_slot
        late.close()
        assert rig.engine.drain(60.0), "a copy hangs"
        cuda.synchronize(stream, 60.0)
        assert all(result.done for result in rig.engine.poll())
        for slot, expected in stored.items():
            assert np.array_equal(rig.slot(slot), expected), "stored after it was overwritten"
        for reads, expected in found:
            assert np.array_equal(np.concatenate(reads), expected), "read before its layer"
        stored.clear()
        found.clear()
        stored_slot = 16

    def device_side(block: int) -> tuple[dict[str, Any], np.ndarray]:
        if rng.random() < 0.5:
            return {}, rig.token_slots(block)
        return {"awaited": rig.awaited_slots(stream, rig.token_slots(block))}, PLACES(1)

    while copies < 10_000:
        if stored_slot > 76:
            settle()
            late = Late(rig)
        blocks = [int(block) for block in rng.permutation(24)]
        leaving = []
        for _ in range(int(rng.integers(0, 4))):
            block, gate = blocks.pop(), rig.engine.make_gate(1)
            gate.expect(1)
            known, slots = device_side(block)
            op = _core.OpSpec(T.D2H, slots, ints(stored_slot), **known)
            rig.engine.submit([op], gate=gate, wait_events=[cuda.record(stream)])
            stored[stored_slot] = held[block]
            leaving.append((block, gate))
            stored_slot += 1
        for _, gate in leaving:
            assert gate.stream_wait(0, stream, 60.0)
        events = [cuda.record(stream)]
        gate, loads = rig.engine.make_gate(4), int(rng.integers(1, 6))
        gate.expect(loads)
        for block in [block for block, _ in leaving][:loads] + blocks[: max(0, loads - len(leaving))]:
            slot = int(rng.integers(16))
            held[block] = sources[slot]
            cut = int(rng.integers(1, 4)) if rng.random() < 0.4 else 4
            known, slots = device_side(block)
            ops = [
                _core.OpSpec(T.H2D, ints(slot), slots, layer_begin=begin, layer_end=end, **known)
                for begin, end in ((0, cut), (cut, 4))
                if begin < end
            ]
            for op in ops:
                submit = late.submit if rng.random() < 0.4 else rig.engine.submit
                submit([op], gate=gate, wait_events=events)
        read_block = int(rng.integers(24))
        reads: list[np.ndarray] = []
        for layer, addresses in enumerate(rig.addresses):
            assert gate.stream_wait(layer, stream, 60.0), "a layer is never queued"
            for address, size in zip(addresses, rig.row_bytes, strict=True):
                reads.append(cuda.read(stream, address + 2 * read_block * size, 2 * size))
            kind = rng.random()
            if kind < 0.02:
                cuda.first_launch(stream)
            elif kind < 0.04:
                cuda.free(cuda.allocate(64)[0])
        found.append((reads, held[read_block]))
        for block, _ in leaving:  # the forward writes to what was given back
            value = (value + 1) % 251
            held[block] = np.full(rig.block_bytes, value, np.uint8)
            for addresses in rig.addresses:
                for address, size in zip(addresses, rig.row_bytes, strict=True):
                    cuda.fill(stream, address + 2 * block * size, value, 2 * size)
        copies += loads + len(leaving)
    settle()
    cuda.end_stream(stream)


def test_a_callers_thread_keeps_its_context(cuda: FakeCuda, stream: int) -> None:
    """It may work with another device."""
    cuda.context = theirs = 0x77
    try:
        rig = Rig(cuda)
        check_round_trip(rig)
        awaited = rig.awaited_slots(stream, rig.token_slots(1))
        assert rig.run(_core.OpSpec(T.H2D, ints(2), PLACES(1), awaited=awaited)).done
        del awaited
        rig.close()
        assert cuda.context == theirs
    finally:
        cuda.context = None


def test_a_gpu_that_is_not_the_first_one(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """As the ranks of tensor parallelism have. Every call is made in the context of its stream, by whatever
    thread, or the stand-in notes it."""
    before = [cuda.uses_of_device(number) for number in range(8)]
    rig = make_rig(cuda_device=3)
    more = [cuda.uses_of_device(number) - uses for number, uses in enumerate(before)]
    assert more == [0, 0, 0, 1, 0, 0, 0, 0]
    check_round_trip(rig)
    awaited = rig.awaited_slots(stream, rig.token_slots(1))
    assert rig.run(_core.OpSpec(T.H2D, ints(2), PLACES(1), awaited=awaited)).done
    assert np.array_equal(rig.bytes_of(rig.rows(1)), rig.slot(2))


def test_a_gpu_that_is_not_there(make_rig: MakeRig, cuda: FakeCuda) -> None:
    with pytest.raises(OSError, match="cuDeviceGet"):
        make_rig(cuda_device=8)


def test_nothing_loses_a_graph_that_is_captured(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """SGLang captures so that calls of other threads that could belong into its graph lose it: to ask for an
    event, to register memory. Ours go on all the same, and do not."""
    cuda.registration(20)
    rig = make_rig(
        tokens=4,
        layers=2,
        row_bytes=(64 << 10, 512),
        host_slots=3 * PIN_CHUNK_BYTES // (512 << 10),
        wait=False,
    )
    pinned_before = rig.host.pinned_bytes
    cuda.capture(True)
    try:
        graphs = []
        for turn in range(6):
            graphs.append(rig.engine.submit([_core.OpSpec(T.D2H, rig.token_slots(turn), ints(turn))]))
            gate = rig.engine.make_gate(2)
            gate.expect(1)
            load = _core.OpSpec(T.H2D, ints(6 + turn), rig.token_slots(6 + turn))
            graphs.append(rig.engine.submit([load], gate=gate))
            assert gate.stream_wait(1, stream, 20.0)
        assert all(rig.engine.wait(graph, 20.0) for graph in graphs)
        assert all(result.done for result in rig.engine.poll())
        rig.wait_until_pinned()
    finally:
        cuda.capture(False)
    assert rig.host.pinned_bytes > pinned_before
    assert cuda.calls("cuEventQuery") > 0
    assert cuda.violations == ""


# ---- faults ------------------------------------------------------------------------------------

# What runs while a copy is queued and followed; in words what becomes of the copy if it fails once.
RUNTIME_CALLS = {
    "cuLaunchKernel": "fails",
    "cuMemcpyHtoDAsync_v2": "fails",  # of the kernel's descriptors
    "cuStreamWaitEvent": "fails",
    "cuEventQuery": "fails",
    # At the ends of a copy they only measure it, or its stream is followed; behind layers they are needed.
    "cuEventCreate": "may fail",
    "cuEventRecord": "may fail",
}


@pytest.mark.parametrize("call", RUNTIME_CALLS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_of_the_driver_ends_the_copy_and_holds_nobody_up(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, call: str, after: int
) -> None:
    rig = make_rig(layers=8, tokens=64, row_bytes=(2048, 2048))
    slots, tokens = ints(*range(8)), rig.token_slots(*range(8))
    held_up = cuda.stream()
    dam = Dam(cuda, held_up)
    event = cuda.record(held_up)
    gate = rig.engine.make_gate(8)
    gate.expect(1)
    forward = Forward(lambda: gate.stream_wait(7, stream, 20.0))
    calls = cuda.calls(call)
    cuda.fail(call, after)
    graph = rig.engine.submit([_core.OpSpec(T.H2D, slots, tokens)], gate=gate, wait_events=[event])
    time.sleep(0.01)
    dam.open()
    out = rig.finish(graph)
    happened = cuda.calls(call) - calls > after
    if happened and RUNTIME_CALLS[call] == "fails":
        assert out.ops[0].status == S.FAILED
        assert call.removesuffix("_v2") in out.error
    elif not happened:
        assert out.done, out.error
    assert gate.open_layers == 8
    assert happened or after > 0
    assert forward.reads()
    cuda.synchronize(stream)
    cuda.reset()
    assert rig.run(_core.OpSpec(T.H2D, slots, tokens)).done  # and the engine goes on
    assert np.array_equal(rig.bytes_of(rig.rows(3)), rig.slot(3))
    cuda.end_stream(held_up)


def read_gate(rig: Rig, stream: int, gate: _core.LayerGate, blocks: list[int]) -> list[list[np.ndarray]]:
    """A forward over several requests: what it finds of each block, layer by layer."""
    found: list[list[np.ndarray]] = [[] for _ in blocks]
    for layer in range(rig.num_layers):
        assert gate.stream_wait(layer, stream, 20.0)
        for buffer, address in zip(rig.device[layer], rig.addresses[layer], strict=True):
            stride = buffer.shape[1]
            for block, of_block in zip(blocks, found, strict=True):
                rows = rig.rows(block)
                of_block.append(rig.cuda.read(stream, address + int(rows[0]) * stride, len(rows) * stride))
    return found


@pytest.mark.parametrize("call", [*RUNTIME_CALLS, "a cancel"])
def test_loads_that_fail_spoil_no_other_of_their_gate(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, call: str
) -> None:
    rig = make_rig(layers=4, tokens=2)
    outcomes: set[int] = set()
    for turn in range(24):
        cuda.reset(seed=turn, delay_us=200)
        gate = rig.engine.make_gate(4)
        gate.expect(3)
        slots, blocks = [(3 * turn + i) % 16 for i in range(3)], [(3 * turn + i) % 24 for i in range(3)]
        events = [cuda.record(stream)]
        # Before its loads are queued, or when some may have failed.
        early = None
        if turn % 2 == 0:
            early = Forward(lambda gate=gate, blocks=blocks: read_gate(rig, stream, gate, blocks))
        graphs = []
        for i, (slot, block) in enumerate(zip(slots, blocks, strict=True)):
            calls, after = cuda.calls(call), turn % 4
            fails = call in RUNTIME_CALLS and i == turn % 3
            if fails:
                cuda.fail(call, after)
            op = _core.OpSpec(T.H2D, ints(slot), rig.token_slots(block))
            graphs.append(rig.engine.submit([op], gate=gate, wait_events=events))
            deadline = time.monotonic() + 0.005
            while fails and cuda.calls(call) - calls <= after and time.monotonic() < deadline:
                pass
            if fails:
                cuda.fail(call, NEVER)
            elif call not in RUNTIME_CALLS and i == turn % 3:
                rig.engine.cancel(graphs[-1])
        found = early.reads() if early else read_gate(rig, stream, gate, blocks)
        assert rig.engine.drain(20.0)
        cuda.synchronize(stream)
        assert gate.open_layers == 4
        done = {result.graph: result.done for result in rig.engine.poll()}
        for graph, slot, of_block in zip(graphs, slots, found, strict=True):
            if done[graph]:
                assert np.array_equal(np.concatenate(of_block), rig.slot(slot))
        outcomes.add(sum(done.values()))
    if call == "a cancel":  # a call that fails is the same for all of a batch that are queued as one
        assert {1, 2} & outcomes, "no batch with both"


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("damaged_first", [True, False])
def test_a_read_that_is_damaged_spoils_no_other_load_of_its_gate(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, tmp_path: Path, slow: bool, damaged_first: bool
) -> None:
    rig = make_rig(layers=6, row_bytes=(512, 512))
    disk = store_on_ssd(rig, tmp_path)
    if not slow:
        disk.clear_faults()
    with (tmp_path / "slots").open("r+b") as file:
        file.seek(_core.SSD_SLOTS_OFFSET + 3 * rig.slot_bytes + 2 * rig.slot_bytes // 6)  # the third layer
        file.write(b"\xff\x00" * 64)
    gate = rig.engine.make_gate(6)
    gate.expect(3)
    forward = Forward(lambda: read_gate(rig, stream, gate, [9, 10]))
    from_ssd = [
        [
            _core.OpSpec(T.LOWER2H, ints(at), ints(5 + i), keys=NAMES[i : i + 1]),
            _core.OpSpec(T.H2D, ints(5 + i), rig.token_slots(8 + i), after_layers=0),
        ]
        for i, at in enumerate((3, 4))
    ]
    specs = [*from_ssd, [_core.OpSpec(T.H2D, ints(2), rig.token_slots(10))]]
    graphs = {i: rig.engine.submit(specs[i], gate=gate) for i in ((0, 1, 2) if damaged_first else (2, 1, 0))}
    assert rig.engine.drain(20.0)
    found = forward.reads()
    cuda.synchronize(stream)
    done = {result.graph: result.done for result in rig.engine.poll()}
    assert [done[graphs[i]] for i in range(3)] == [False, True, True]
    assert np.array_equal(np.concatenate(found[0]), rig.slot(1))
    assert np.array_equal(np.concatenate(found[1]), rig.slot(2))
    rig.engine.detach(1)


@pytest.mark.parametrize("call", ["cuMemcpyBatchAsync_v2", "cuMemcpyDtoHAsync_v2"])
def test_a_failure_of_a_copy_engine(make_rig: MakeRig, cuda: FakeCuda, stream: int, call: str) -> None:
    rig = make_rig(tokens=1, row_bytes=(BIG_ROW,))
    blocks = (3, 4) if call == "cuMemcpyBatchAsync_v2" else (3,)  # one piece is no batch
    gate = rig.engine.make_gate(1)
    gate.expect(1)
    cuda.fail(call, 0)
    graph = rig.engine.submit(
        [_core.OpSpec(T.D2H, rig.token_slots(*blocks), ints(*range(len(blocks))), layer_end=1)], gate=gate
    )
    gate.stream_wait(0, stream, 1.0)
    out = rig.finish(graph)
    assert out.ops[0].status == S.FAILED
    assert call.removesuffix("_v2") in out.error
    assert gate.open_layers == 1
    cuda.synchronize(stream)


@pytest.mark.parametrize("call", ["cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode"])
def test_a_thread_without_a_context_fails_its_copies(make_rig: MakeRig, cuda: FakeCuda, call: str) -> None:
    cuda.fail(call, ALWAYS)
    rig = make_rig(pinned=False)
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    out = rig.run(_core.OpSpec(T.H2D, ints(2), rig.token_slots(3)), gate=gate)
    assert out.ops[0].status == S.FAILED
    assert call in out.error
    assert gate.open_layers == rig.num_layers


@pytest.mark.parametrize("call", ["cuInit", "cuDevicePrimaryCtxRetain", "cuStreamCreateWithPriority"])
def test_a_device_that_cannot_be_used_is_an_error(make_rig: MakeRig, cuda: FakeCuda, call: str) -> None:
    cuda.fail(call, ALWAYS)
    with pytest.raises(OSError, match=call):
        make_rig()


@pytest.mark.parametrize(
    "call", ["cuModuleLoadData", "cuModuleGetFunction", "cuMemHostAlloc", "cuLaunchKernel"]
)
def test_what_a_device_cannot_do_is_done_otherwise(make_rig: MakeRig, cuda: FakeCuda, call: str) -> None:
    cuda.fail(call, ALWAYS)
    rig = make_rig()
    assert "copy engines" in rig.engine.cuda_note
    cuda.fail(call, NEVER)
    check_round_trip(rig)
    assert cuda.calls("cuLaunchKernel") <= 1  # which was to load it


def test_everything_fails(make_rig: MakeRig, cuda: FakeCuda, stream: int) -> None:
    """A GPU that fell off the bus."""
    rig = make_rig()
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    forward = Forward(lambda: gate.stream_wait(1, stream, 20.0))
    event = cuda.record(stream)
    for call in RUNTIME_CALLS:
        cuda.fail(call, ALWAYS)
    graphs = [
        rig.engine.submit([_core.OpSpec(T.H2D, ints(2), rig.token_slots(3))], gate=gate, wait_events=[event]),
        rig.engine.submit([_core.OpSpec(T.D2H, rig.token_slots(3), ints(2))], wait_events=[event]),
    ]
    assert rig.engine.drain(20.0)
    results = rig.engine.poll()
    assert sorted(result.graph for result in results) == graphs
    assert all(result.ops[0].status == S.FAILED for result in results)
    assert forward.reads()
    cuda.synchronize(stream)


@pytest.mark.parametrize("pinned", [True, False], ids=["on a stream", "waiting"])
def test_a_cancelled_load_lets_the_forward_go(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, pinned: bool
) -> None:
    rig = make_rig(pinned=pinned)
    held_up = cuda.stream()
    dam = Dam(cuda, held_up)
    gate = rig.engine.make_gate(rig.num_layers)
    gate.expect(1)
    graph = rig.engine.submit(
        [_core.OpSpec(T.H2D, ints(2), rig.token_slots(3))], gate=gate, wait_events=[cuda.record(held_up)]
    )
    forward = Forward(lambda: gate.stream_wait(0, stream, 20.0))
    while pinned and cuda.calls("cuEventRecord") < 3:
        time.sleep(0.001)
    assert rig.engine.cancel(graph)
    if pinned:  # it is on its way: it ends by itself, and nobody gets its slots before
        assert not rig.engine.wait(graph, 0.02)
        dam.open()
    assert rig.finish(graph).ops[0].status == S.CANCELLED
    assert gate.open_layers == rig.num_layers
    assert forward.reads()
    cuda.synchronize(stream)
    dam.open()
    cuda.synchronize(held_up)
    cuda.end_stream(held_up)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_ends_every_op_once(make_rig: MakeRig, cuda: FakeCuda, stream: int, seed: int) -> None:
    """Loads and forwards with cancels, with every other seed failures, too: everything ends once, nothing is
    written that should not be, and the engine goes on."""
    cuda.reset(seed=seed, delay_us=100)
    rng = np.random.default_rng(seed)
    rig = make_rig(layers=4, tokens=2)
    reference = {slot: rig.slot(slot).copy() for slot in range(16)}
    calls = [*RUNTIME_CALLS, "cuStreamQuery", "cuMemcpyDtoHAsync_v2"]
    running: dict[int, tuple[_core.LayerGate, int]] = {}
    ended: list[int] = []
    for turn in range(120):
        gate = rig.engine.make_gate(4)
        gate.expect(1)
        slot, block = int(rng.integers(16)), turn % 24
        events = [cuda.record(stream)] if rng.random() < 0.7 else []
        op = _core.OpSpec(T.H2D, ints(slot), rig.token_slots(block))
        if rng.random() < 0.5:
            awaited = rig.awaited_slots(stream, rig.token_slots(block))
            op = _core.OpSpec(T.H2D, ints(slot), PLACES(1), awaited=awaited)
        graph = rig.engine.submit([op], gate=gate, wait_events=events)
        running[graph] = (gate, slot)
        if rng.random() < 0.5:
            gate.stream_wait(int(rng.integers(4)), stream, 20.0)
        if rng.random() < 0.2:
            rig.engine.cancel(graph)
        if seed % 2 and rng.random() < 0.2:
            cuda.fail(calls[rng.integers(len(calls))], int(rng.integers(4)))
        ended += [result.graph for result in rig.engine.poll()]
    assert rig.engine.drain(30.0), "a copy hangs"
    cuda.synchronize(stream)
    ended += [result.graph for result in rig.engine.poll()]
    assert sorted(ended) == sorted(running)
    assert all(np.array_equal(rig.slot(slot), reference[slot]) for slot in reference)
    cuda.reset()
    check_round_trip(rig)
