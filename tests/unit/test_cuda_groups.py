"""Two groups of one engine on a driver made of threads: what one of them does, the other must not spoil.

Each group has a pool, streams and threads of its own. They share gates, whose layers both may have, the slots
that the device computes, and the link.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cuda_path
from fake_cuda import Dam, FakeCuda, Pool, Rig
from test_cuda_path import BIG_ROW, NAMES, PLACES, Forward, Late, ints, store_on_ssd

from sglang_flexkv import _core

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which builds the driver, is missing"
)
# As names of this module fixtures are its own; imports would be hidden by arguments.
cuda, make_rig = test_cuda_path.cuda, test_cuda_path.make_rig
stream, schedules = test_cuda_path.stream, test_cuda_path.schedules

T = _core.TransferType
S = _core.OpStatus
MakeRig = Callable[..., Rig]
Layers = tuple[int, ...]
RANDOM_RUNS = 3  # of the random test, for each pair of gate layers; more of them find what is rarer
RANDOM_COPIES = 300  # at least, in each run

# The layers of the model that each group has.
GATE_LAYERS: dict[str, tuple[Layers, Layers]] = {
    "disjoint": ((0, 2, 4), (1, 3)),
    "overlapping": ((0, 1, 2), (0, 1, 2)),  # as Falcon-H1, which has attention and Mamba in every layer
    "partly": ((0, 1, 4), (1, 2, 3, 4)),
}
ATTENTION: dict[str, Any] = {"row_bytes": (512, 512)}  # 4 KiB a layer, as an SSD likes it
STATES: dict[str, Any] = {"tokens": 1, "row_bytes": (200, 72), "device_blocks": 10, "host_slots": 8}


def make_groups(
    make_rig: MakeRig, gate_layers: tuple[Layers, Layers], first: dict[str, Any], second: dict[str, Any]
) -> Rig:
    rig = make_rig(layers=len(gate_layers[0]), gate_layers=gate_layers[0], **first)
    rig.add_group(layers=len(gate_layers[1]), gate_layers=gate_layers[1], **second)
    return rig


@pytest.fixture(params=GATE_LAYERS)
def gate_layers(request: pytest.FixtureRequest) -> tuple[Layers, Layers]:
    return GATE_LAYERS[request.param]


@pytest.fixture
def rig(make_rig: MakeRig, gate_layers: tuple[Layers, Layers]) -> Rig:
    return make_groups(make_rig, gate_layers, ATTENTION, STATES)


def num_gate_layers(rig: Rig) -> int:
    return 1 + max(layer for pool in rig.pools for layer in pool.gate_layers)


def make_gate(rig: Rig, loads: int) -> _core.LayerGate:
    """For loads of the layers of both groups; every op is one."""
    gate = rig.engine.make_gate(num_gate_layers(rig))
    gate.expect(loads)
    return gate


def load(
    pool: Pool, slots: Sequence[int], blocks: Sequence[int], *, rows: np.ndarray | None = None, **options: Any
) -> _core.OpSpec:
    """Args: rows: see ``store``."""
    to = pool.token_slots(*blocks) if rows is None else rows
    return _core.OpSpec(T.H2D, ints(*slots), to, group=pool.group, **options)


def store(
    pool: Pool, blocks: Sequence[int], slots: Sequence[int], *, rows: np.ndarray | None = None, **options: Any
) -> _core.OpSpec:
    """Args: rows: of the blocks, or their places among the slots that are awaited; None: as in the pool."""
    of = pool.token_slots(*blocks) if rows is None else rows
    return _core.OpSpec(T.D2H, of, ints(*slots), group=pool.group, **options)


def awaiting(rig: Rig, stream: int, pool: Pool, *blocks: int) -> dict[str, Any]:
    """What makes a load or a store one whose slots the device computes, on this stream."""
    awaited = rig.awaited_slots(stream, pool.token_slots(*blocks))
    return {"rows": PLACES(len(blocks)), "awaited": awaited}


def clear(rig: Rig) -> None:
    """Nobody finds on the device by chance what is yet to be loaded."""
    for buffer in (buffer for pool in rig.pools for layer in pool.device for buffer in layer):
        buffer[:] = 0


class Contents:
    """What every byte of all groups is to be, on the device and in memory.

    What is loaded or stored is said before it is, or when nothing runs."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._device = [pool.copy_of_device() for pool in rig.pools]
        self._host = [
            [pool.host.slot_view(slot).copy() for slot in range(pool.host.num_slots)] for pool in rig.pools
        ]

    def load(self, pool: Pool, slots: Sequence[int], blocks: Sequence[int]) -> None:
        pool.expect_loaded(self._device[pool.group], ints(*slots), [pool.rows(block) for block in blocks])

    def store(self, pool: Pool, blocks: Sequence[int], slots: Sequence[int]) -> None:
        for block, slot in zip(blocks, slots, strict=True):
            self._host[pool.group][slot][: pool.block_bytes] = pool.bytes_of(pool.rows(block))

    def read(self, pool: Pool, slot: int, held: np.ndarray) -> None:
        """Into memory, from a lower tier."""
        self._host[pool.group][slot][:] = held

    def forget(self, pool: Pool, slot: int, block: int) -> None:
        """They are nobody's after a failure: now they are what they are to be."""
        self.read(pool, slot, pool.host.slot_view(slot))
        for expected, layer in zip(self._device[pool.group], pool.device, strict=True):
            for buffer, actual in zip(expected, layer, strict=True):
                buffer[pool.rows(block)] = actual[pool.rows(block)]

    def check(self) -> None:
        for pool in self._rig.pools:
            for at, layer in enumerate(self._device[pool.group]):
                for buffer, actual in zip(layer, pool.device[at], strict=True):
                    assert np.array_equal(actual, buffer), f"layer {at} of group {pool.group}"
            for slot, held in enumerate(self._host[pool.group]):
                assert np.array_equal(pool.host.slot_view(slot), held), f"slot {slot} of group {pool.group}"


Reads = list[list[np.ndarray]]  # of a block of each pool, layer by layer


def read_groups(rig: Rig, stream: int, gate: _core.LayerGate, blocks: Sequence[int]) -> list[Reads]:
    """A forward: waits for each layer on its stream, and reads a block of every group that has the layer."""
    found: list[Reads] = [[[] for _ in range(pool.num_layers)] for pool in rig.pools]
    for layer in range(num_gate_layers(rig)):
        assert gate.stream_wait(layer, stream, 20.0), "a layer is never queued"
        for pool, block, of_pool in zip(rig.pools, blocks, found, strict=True):
            if layer in pool.gate_layers:
                at = pool.gate_layers.index(layer)
                runs = pool.runs(pool.rows(block), at)
                of_pool[at] = [rig.cuda.read(stream, address, size) for address, size in runs]
    return found


def check_read(pool: Pool, found: list[Reads], slot: int) -> None:
    """A forward has read what the host slot holds."""
    held, at = pool.slot(slot), 0
    for layer, runs in enumerate(found[pool.group]):
        for got in runs:
            want = held[at : at + len(got)]
            assert np.array_equal(got, want), f"layer {layer} of group {pool.group} was read too early"
            at += len(got)
    assert at == pool.block_bytes


# ---- slots that the device computes -------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", [T.H2D, T.D2H])
def test_slots_that_only_one_group_awaits_come(
    rig: Rig, cuda: FakeCuda, schedules: int, kind: _core.TransferType, number: int
) -> None:
    pool, contents = rig.pools[number], Contents(rig)
    for turn in range(3):
        slots, blocks = (2 + turn, 1), (5, 3 + 3 * turn)
        dam = Dam(cuda, schedules)
        of_device = awaiting(rig, schedules, pool, *blocks)
        if kind == T.H2D:
            op = load(pool, slots, blocks, **of_device)
            contents.load(pool, slots, blocks)
        else:
            op = store(pool, blocks, slots, **of_device)
            contents.store(pool, blocks, slots)
        graph = rig.engine.submit([op])
        assert not rig.engine.wait(graph, 0.01)
        dam.open()
        assert rig.finish(graph).done
        contents.check()


@pytest.mark.parametrize("number", [0, 1])
def test_a_forward_waits_for_slots_that_only_one_group_awaits(
    rig: Rig, cuda: FakeCuda, stream: int, schedules: int, number: int
) -> None:
    """The other group's load knows its slots and is done long before."""
    clear(rig)
    contents, gate = Contents(rig), make_gate(rig, 2)
    dam = Dam(cuda, schedules)
    ops = []
    for pool in rig.pools:
        ops.append(
            load(pool, (3,), (6,), **awaiting(rig, schedules, pool, 6) if pool.group == number else {})
        )
        contents.load(pool, (3,), (6,))
    graph = rig.engine.submit(ops, gate=gate)
    forward = Forward(lambda: read_groups(rig, stream, gate, (6, 6)))
    assert not rig.engine.wait(graph, 0.02)
    dam.open()
    assert rig.finish(graph).done
    found = forward.reads()
    cuda.synchronize(stream)
    for pool in rig.pools:
        check_read(pool, found, 3)
    contents.check()


@pytest.mark.parametrize("why", ["the tier is away", "the first layer is damaged"])
def test_slots_come_when_the_read_of_the_first_group_fails(
    rig: Rig, cuda: FakeCuda, stream: int, schedules: int, tmp_path: Path, why: str
) -> None:
    first, second = rig.pools
    if why == "the first layer is damaged":
        store_on_ssd(rig, tmp_path)
        with (tmp_path / "slots").open("r+b") as file:
            file.seek(_core.SSD_SLOTS_OFFSET + 3 * rig.slot_bytes)
            file.write(b"\xff\x00" * 64)
    clear(rig)
    contents, gate = Contents(rig), make_gate(rig, 2)
    contents.load(second, (1,), (6,))
    dam = Dam(cuda, schedules)
    ops = [
        _core.OpSpec(T.LOWER2H, ints(3), ints(5), keys=NAMES[:1], tier=1),
        load(first, (5,), (9,), after_layers=0, **awaiting(rig, schedules, first, 9)),
        load(second, (1,), (6,), **awaiting(rig, schedules, second, 6)),
    ]
    graph = rig.engine.submit(ops, gate=gate)
    forward = Forward(lambda: read_groups(rig, stream, gate, (9, 6)))
    assert not rig.engine.wait(graph, 0.1)
    dam.open()
    result = rig.finish(graph)
    assert [op.status for op in result.ops] == [S.FAILED, S.CANCELLED, S.DONE]
    found = forward.reads()
    cuda.synchronize(stream)
    check_read(second, found, 1)
    assert gate.open_layers == num_gate_layers(rig)
    if why == "the first layer is damaged":
        contents.forget(first, 5, 9)
        rig.engine.detach(1)
    contents.check()


def test_more_slots_than_the_first_pool_has_are_waited_for(
    make_rig: MakeRig, cuda: FakeCuda, schedules: int
) -> None:
    """The room for slots on their way goes by the first pool."""
    rig = make_groups(make_rig, ((0,), (0, 1)), {"device_blocks": 2}, {**STATES, "device_blocks": 60})
    pool, contents = rig.pools[1], Contents(rig)
    blocks = np.random.default_rng(3).permutation(60)[:40].tolist()
    dam = Dam(cuda, schedules)
    read = Forward(lambda: [rig.awaited_slots(schedules, pool.token_slots(*blocks)) for _ in range(3)])
    dam.open()
    for slot, awaited in enumerate(read.reads()):
        place = 7 + 11 * slot
        contents.load(pool, (slot,), (blocks[place],))
        assert rig.run(load(pool, (slot,), (), rows=ints(place), awaited=awaited)).done
        contents.check()


# ---- what a forward reads -----------------------------------------------------------------------


@pytest.mark.parametrize("held_up", [0, 1])
def test_a_forward_waits_for_every_group_that_has_a_layer(
    rig: Rig, cuda: FakeCuda, stream: int, held_up: int
) -> None:
    """One group's copies are on a stream that is held up when the other group's have landed, which were
    queued last."""
    clear(rig)
    contents, gate = Contents(rig), make_gate(rig, 2)
    for pool in rig.pools:
        contents.load(pool, (1,), (4 + pool.group,))
    late, early = rig.pools[held_up], rig.pools[1 - held_up]
    before = cuda.stream()
    dam = Dam(cuda, before)
    graph = rig.engine.submit(
        [load(late, (1,), (4 + late.group,))], gate=gate, wait_events=[cuda.record(before)]
    )
    while cuda.calls("cuStreamWaitEvent") == 0:
        time.sleep(0.001)
    assert not rig.engine.wait(graph, 0.02)
    assert rig.run(load(early, (1,), (4 + early.group,)), gate=gate).done
    found = read_groups(rig, stream, gate, (4, 5))  # all of it is queued: the host waits for nothing
    assert not rig.engine.wait(graph, 0.02)
    dam.open()
    cuda.synchronize(stream)
    for pool in rig.pools:
        check_read(pool, found, 1)
    assert rig.finish(graph).done
    contents.check()
    assert gate.open_layers == num_gate_layers(rig)
    cuda.synchronize(before)
    cuda.end_stream(before)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ATTENTION, STATES),
        ({"tokens": 1, "row_bytes": (BIG_ROW,)}, STATES),
        ({"row_bytes": (33, 35), "row_padding": 5}, {**STATES, "row_bytes": (BIG_ROW,)}),
        (ATTENTION, {"tokens": 8, "row_bytes": (96, 6), "tokens_per_row": (1, 8), "device_blocks": 12}),
        (ATTENTION, {**STATES, "pinned": False}),
    ],
    ids=["kernels", "engine beside kernel", "kernel beside engine", "by page", "not pinned"],
)
def test_a_forward_finds_loaded_bytes_only(
    make_rig: MakeRig,
    cuda: FakeCuda,
    stream: int,
    gate_layers: tuple[Layers, Layers],
    first: dict[str, Any],
    second: dict[str, Any],
) -> None:
    rig = make_groups(make_rig, gate_layers, first, second)
    pools, num_slots = rig.pools, [pool.host.num_slots for pool in rig.pools]
    for seed in range(12):
        cuda.reset(seed=seed, delay_us=200)
        clear(rig)
        contents, gate = Contents(rig), make_gate(rig, 6)
        slots = [[(3 * seed + i) % n for i in range(4)] for n in num_slots]
        loads = {0: ([0, 1], [5, 7]), 1: ([2], [8]), 2: ([3], [9])}  # by request: of the slots, to blocks
        for places, blocks in loads.values():
            for pool, of_pool in zip(pools, slots, strict=True):
                contents.load(pool, [of_pool[i] for i in places], blocks)
        # A request of both groups, and two of which each group's part comes by itself.
        specs = [
            [load(pool, [slots[pool.group][i] for i in loads[r][0]], loads[r][1]) for pool in groups]
            for r, groups in ((0, pools), (1, pools[:1]), (2, pools[1:]), (1, pools[1:]), (2, pools[:1]))
        ]
        if seed % 2:
            specs.reverse()
        forwards = []
        if seed % 3:
            forwards.append(Forward(lambda gate=gate: read_groups(rig, stream, gate, (7, 8))))
        events = [cuda.record(stream)] if seed % 4 == 0 else []
        graphs = [rig.engine.submit(ops, gate=gate, wait_events=events) for ops in specs]
        if not forwards:
            forwards.append(Forward(lambda gate=gate: read_groups(rig, stream, gate, (7, 8))))
        found = forwards[0].reads()
        cuda.synchronize(stream)
        for pool, of_pool in zip(pools, slots, strict=True):
            check_read(pool, found, of_pool[1 + pool.group])
        assert rig.engine.drain(20.0), "a load hangs"
        assert sorted(result.graph for result in rig.engine.poll() if result.done) == graphs
        contents.check()
        assert gate.open_layers == num_gate_layers(rig)


@pytest.mark.parametrize("other", ["comes at once", "awaits its slots", "is held up"])
def test_layers_from_ssd_beside_a_group_from_memory(
    rig: Rig, cuda: FakeCuda, stream: int, schedules: int, tmp_path: Path, other: str
) -> None:
    """The layers of a read go on to the device one after the other; what the other group has of them comes
    from memory, and so does another request. What is held up is so until the forward has been queued."""
    first, second = rig.pools
    from_ssd = [first.host.slot_view(slot).copy() for slot in (0, 1)]
    store_on_ssd(rig, tmp_path)
    before = cuda.stream()
    for turn in range(3):
        cuda.reset(seed=turn, delay_us=100)
        clear(rig)
        contents, gate = Contents(rig), make_gate(rig, 4)
        contents.read(first, 5, from_ssd[0])
        contents.read(first, 6, from_ssd[1])
        contents.load(first, (0, 1, 2), (8, 9, 10))
        contents.load(second, (3, 4, 5), (7, 6, 9))
        dams = [Dam(cuda, before), Dam(cuda, schedules)]
        events = [cuda.record(before)] if other == "is held up" else []
        known = {
            (pool.group, *blocks): awaiting(rig, schedules, pool, *blocks)
            if other == "awaits its slots"
            else {}
            for pool, blocks in ((first, (8, 9)), (second, (7, 6)), (first, (10,)))
        }
        forward = Forward(lambda gate=gate: read_groups(rig, stream, gate, (9, 6)))
        reads = [
            _core.OpSpec(T.LOWER2H, ints(3, 4), ints(5, 6), keys=NAMES),
            load(first, (5, 6), (8, 9), after_layers=0, **known[0, 8, 9]),
        ]
        graphs = [
            rig.engine.submit(
                [load(second, (3, 4), (7, 6), **known[1, 7, 6])], gate=gate, wait_events=events
            ),
            rig.engine.submit(
                [load(first, (2,), (10,), **known[0, 10]), load(second, (5,), (9,))], gate=gate
            ),
            rig.engine.submit(reads, gate=gate),
        ]
        dams[1].open()
        found = forward.reads()
        dams[0].open()
        assert all(rig.engine.wait(graph, 20.0) for graph in graphs), "a load hangs"
        assert all(result.done for result in rig.engine.poll())
        cuda.synchronize(stream)
        check_read(first, found, 1)
        check_read(second, found, 4)
        contents.check()
    cuda.synchronize(before)
    cuda.end_stream(before)
    rig.engine.detach(1)


# ---- stores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_up", [0, 1])
def test_slots_are_reused_behind_the_stores_of_both_groups(
    rig: Rig, cuda: FakeCuda, stream: int, held_up: int
) -> None:
    """A write-back: a gate of one layer that both groups' stores have. The forward overwrites everything."""
    for _ in range(2):
        for pool in rig.pools:
            pool.device[0][0][:] ^= 0x55  # what is stored is new each time
        contents = Contents(rig)
        for pool in rig.pools:
            contents.store(pool, (3, 7), (2, 5))
        before = cuda.stream()
        dam = Dam(cuda, before)
        gate = rig.engine.make_gate(1)
        gate.expect(2)
        cuda.forget_calls()
        late, early = rig.pools[held_up], rig.pools[1 - held_up]
        graph = rig.engine.submit([store(late, (3, 7), (2, 5))], gate=gate, wait_events=[cuda.record(before)])
        while cuda.calls("cuStreamWaitEvent") == 0:
            time.sleep(0.001)
        assert not rig.engine.wait(graph, 0.02)
        assert rig.run(store(early, (3, 7), (2, 5)), gate=gate).done
        assert gate.stream_wait(0, stream, 20.0)
        kept = [(buffer, buffer.copy()) for pool in rig.pools for layer in pool.device for buffer in layer]
        for pool in rig.pools:
            for layer, addresses in enumerate(pool.addresses):
                for buffer, address in zip(pool.device[layer], addresses, strict=True):
                    cuda.fill(stream, address, 0, buffer.nbytes)
        time.sleep(0.02)
        for buffer, copy in kept:
            assert np.array_equal(buffer, copy), "overwritten before it was read"
        dam.open()
        assert rig.finish(graph).done
        cuda.synchronize(stream)
        assert gate.open_layers == 1
        for buffer, copy in kept:
            assert not buffer.any()
            buffer[:] = copy
        contents.check()
        cuda.synchronize(before)
        cuda.end_stream(before)


def test_a_forward_waits_once_for_the_layers_of_a_piece(
    make_rig: MakeRig, cuda: FakeCuda, stream: int
) -> None:
    """Whatever layers of the model they are."""
    rig = make_groups(make_rig, ((0, 2, 4), (1, 3)), {}, {})
    before = cuda.stream()
    dam = Dam(cuda, before)
    gate = make_gate(rig, 2)
    held_up = [cuda.record(before)]
    ops = [load(pool, [1], [2]) for pool in rig.pools]
    graphs = [rig.engine.submit([op], gate=gate, wait_events=held_up) for op in ops]
    assert gate.stream_wait(0, stream, 20.0)
    assert gate.stream_wait(1, stream, 20.0)
    waits = cuda.calls("cuStreamWaitEvent")
    for layer in range(5):
        assert gate.stream_wait(layer, stream, 20.0)
    assert cuda.calls("cuStreamWaitEvent") == waits
    dam.open()
    assert all(rig.engine.wait(graph, 20.0) for graph in graphs)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("layers", [2, 5])
def test_a_store_has_a_gate_of_one_layer(
    rig: Rig, cuda: FakeCuda, stream: int, number: int, layers: int
) -> None:
    pool, contents = rig.pools[number], Contents(rig)
    gate = rig.engine.make_gate(layers)
    gate.expect(1)
    with pytest.raises(ValueError, match="one layer"):
        rig.engine.submit([store(pool, (4,), (1,))], gate=gate)
    assert rig.engine.drain(20.0)
    assert rig.engine.poll() == []
    contents.check()
    gate = rig.engine.make_gate(1)
    gate.expect(1)
    contents.store(pool, (4,), (1,))
    graph = rig.engine.submit([store(pool, (4,), (1,))], gate=gate)
    assert gate.stream_wait(0, stream, 20.0)
    assert rig.finish(graph).done
    contents.check()
    assert gate.open_layers == 1


@pytest.mark.parametrize("gate_layers", [((3, 4, 5), (0, 1, 2)), ((1, 2), (2, 1))], ids=str)
def test_a_gated_store_of_a_group_without_the_first_layer(
    make_rig: MakeRig, cuda: FakeCuda, stream: int, gate_layers: tuple[Layers, Layers]
) -> None:
    """Its gate has one layer whatever layers of the model the group has, and in whatever order."""
    rig = make_groups(make_rig, gate_layers, ATTENTION, STATES)
    contents = Contents(rig)
    for turn in range(20):
        for pool in rig.pools:
            slot, block = turn % 8, (3 * turn) % 10
            contents.store(pool, (block,), (slot,))
            gate = rig.engine.make_gate(1)
            gate.expect(1)
            graph = rig.engine.submit([store(pool, (block,), (slot,))], gate=gate)
            assert gate.stream_wait(0, stream, 20.0)
            assert rig.finish(graph).done
            assert gate.open_layers == 1
    contents.check()


# ---- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(8, 3), (1, 8)], ids=["the first is longer", "the second is longer"])
def test_the_link_is_busy_for_as_long_as_the_longest_group(
    make_rig: MakeRig, cuda: FakeCuda, gate_layers: tuple[Layers, Layers], blocks: tuple[int, int]
) -> None:
    """By the device's clock. They share the link: the sum would be more than it can be busy."""
    cuda.speeds(0.25)
    rig = make_groups(
        make_rig,
        gate_layers,
        {"tokens": 64, "row_bytes": (2048, 2048)},  # pieces of 128 KiB
        {**STATES, "row_bytes": (BIG_ROW,)},
    )
    loads = [load(pool, range(n), range(n)) for pool, n in zip(rig.pools, blocks, strict=True)]
    assert rig.run(*loads).done
    stores = [store(pool, range(n), range(n)) for pool, n in zip(rig.pools, blocks, strict=True)]
    assert rig.run(*stores).done
    of_groups = [
        n * pool.num_layers * pieces * (0.25e-6 + size / 55e9)
        for pool, n, pieces, size in zip(rig.pools, blocks, (2, 1), (128 << 10, BIG_ROW), strict=True)
    ]
    assert (of_groups[0] > of_groups[1]) == (blocks[0] > blocks[1])
    stats = rig.engine.stats()
    for name in ("H2D", "D2H"):
        assert stats[name]["busy_s"] == pytest.approx(max(of_groups), rel=1e-3)
        assert stats[name]["ops_done"] == 2
        assert stats[name]["bytes"] == sum(
            n * pool.block_bytes for pool, n in zip(rig.pools, blocks, strict=True)
        )


# ---- whatever comes -----------------------------------------------------------------------------

RANDOM_POOLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (ATTENTION, STATES),
    (ATTENTION, {"tokens": 1, "row_bytes": (BIG_ROW,)}),
    ({**ATTENTION, "row_padding": 5}, {"tokens": 8, "row_bytes": (96, 6), "tokens_per_row": (1, 8)}),
    (ATTENTION, {**STATES, "pinned": False}),
]


class RandomTraffic:
    """Rounds as a scheduler's thread makes them. Blocks of both groups leave the device, others are loaded
    for the next forward, which reads some of them layer by layer and writes to what has left. Slots are known
    or awaited, parts of requests come together or late, some of the first group from SSD; some are given up.

    All of it is in the order of one stream, so each byte's value is known at each time. What was given up may
    have been copied or not: such bytes have two values that are right, until somebody looks."""

    def __init__(self, rig: Rig, stream: int, seed: int, on_ssd: list[np.ndarray]) -> None:
        self.rig, self.stream, self.copies = rig, stream, 0
        self.rng = np.random.default_rng(seed)
        self.on_ssd = on_ssd
        # By group: for each block or slot what it may hold.
        self.blocks = [
            [[pool.bytes_of(self.rows(pool, block))] for block in range(pool.num_blocks)]
            for pool in rig.pools
        ]
        self.slots = [
            [[pool.host.slot_view(slot).copy()] for slot in range(pool.host.num_slots)] for pool in rig.pools
        ]
        self.padding = self.read_padding()
        self.value = 0
        self.begin()

    def rows(self, pool: Pool, block: int) -> np.ndarray:
        """Two neighbours share their tokens, one by one, where rows are tokens and a block has several."""
        if pool.by_page or pool.tokens_per_block == 1 or block % 4 < 2:
            return pool.rows(block)
        first = block - block % 2
        return pool.token_slots(first, first + 1)[block % 2 :: 2].copy()

    def read_padding(self) -> list[np.ndarray]:
        """What is between the rows."""
        return [
            buffer[:, size:].copy()
            for pool in self.rig.pools
            for layer in pool.device
            for buffer, size in zip(layer, pool.row_bytes, strict=True)
        ]

    def begin(self) -> None:
        """Of a few rounds: what is loaded is not stored to meanwhile, and nothing is stored twice."""
        self.late = Late(self.rig)
        self.sources, self.targets = [], []
        for pool in self.rig.pools:
            slots = self.rng.permutation(pool.host.num_slots).tolist()
            self.sources.append(slots[: len(slots) // 3])
            self.targets.append(slots[len(slots) // 3 :])
        self.num_graphs = 0
        self.given_up: set[int] = set()
        self.found: list[tuple[list[np.ndarray], list[np.ndarray]]] = []

    def settle(self) -> None:
        """Everything has ended: looks at every byte."""
        self.late.close()
        assert self.rig.engine.drain(60.0), "a copy hangs"
        self.rig.cuda.synchronize(self.stream, 60.0)
        results = self.rig.engine.poll()
        assert len({result.graph for result in results}) == len(results) == self.num_graphs
        for result in results:
            assert result.done or result.graph in self.given_up, result.error
            for op in result.ops:
                assert op.status in ((S.DONE, S.CANCELLED) if result.graph in self.given_up else (S.DONE,))
        for reads, may_be in self.found:
            self.check(np.concatenate(reads), may_be, "read too early")
        for pool in self.rig.pools:
            for slot, may_be in enumerate(self.slots[pool.group]):
                self.check(pool.host.slot_view(slot), may_be, f"slot {slot} of group {pool.group}")
                may_be[:] = [pool.host.slot_view(slot).copy()]
            for block, may_be in enumerate(self.blocks[pool.group]):
                actual = pool.bytes_of(self.rows(pool, block))
                self.check(actual, may_be, f"block {block} of group {pool.group}")
                may_be[:] = [actual]
        for was, actual in zip(self.padding, self.read_padding(), strict=True):
            assert np.array_equal(was, actual), "somebody else's bytes"

    @staticmethod
    def check(actual: np.ndarray, may_be: list[np.ndarray], what: str) -> None:
        right = np.zeros(len(actual), bool)
        for value in may_be:
            right |= actual == value
        assert right.all(), what

    def device_side(self, pool: Pool, block: int) -> dict[str, Any]:
        rows = self.rows(pool, block)
        if self.rng.random() < 0.5:
            return {"rows": rows}
        return {"rows": PLACES(1), "awaited": self.rig.awaited_slots(self.stream, rows)}

    def submit(self, ops: list[_core.OpSpec], gate: _core.LayerGate, events: list[int]) -> bool:
        """True if it was given up."""
        self.num_graphs += 1
        if self.rng.random() < 0.25:
            self.late.submit(ops, gate=gate, wait_events=events)
            return False
        graph = self.rig.engine.submit(ops, gate=gate, wait_events=events)
        if self.rng.random() < 0.1 and self.rig.engine.cancel(graph):
            self.given_up.add(graph)
            return True
        return False

    def store(self, leaving: list[tuple[Pool, int]]) -> list[_core.LayerGate]:
        """Of both groups, in one graph or in one for each block."""
        together, gates = self.rng.random() < 0.5, []
        events = [self.rig.cuda.record(self.stream)]
        for part in [leaving] if together and leaving else [[each] for each in leaving]:
            gate, ops, stored = self.rig.engine.make_gate(1), [], []
            gate.expect(len(part))
            for pool, block in part:
                slot = self.targets[pool.group].pop()
                ops.append(store(pool, (), (slot,), **self.device_side(pool, block)))
                new = self.slots[pool.group][slot][0].copy()
                new[: pool.block_bytes] = self.blocks[pool.group][block][0]
                stored.append((self.slots[pool.group][slot], new))
            given_up = self.submit(ops, gate, events)
            for may_be, new in stored:
                may_be[:] = [*may_be, new] if given_up else [new]
            self.copies += len(part)
            gates.append(gate)
        return gates

    def load(self, blocks: list[list[int]]) -> _core.LayerGate:
        """Requests with a part in each group or in one, all behind one gate. Takes the blocks they go to."""
        wanted: list[list[tuple[Pool, int]]] = []
        for _ in range(int(self.rng.integers(1, 5))):
            pools = (self.rig.pools, *([pool] for pool in self.rig.pools))[int(self.rng.integers(3))]
            parts = [(pool, blocks[pool.group].pop()) for pool in pools]
            wanted.extend([parts] if self.rng.random() < 0.5 else [[part] for part in parts])
        gate = make_gate(self.rig, sum(len(parts) for parts in wanted))
        events = [self.rig.cuda.record(self.stream)]
        for parts in wanted:
            ops: list[_core.OpSpec] = []
            moved: list[tuple[list[np.ndarray], np.ndarray]] = []
            for pool, block in parts:
                slot = int(self.rng.choice(self.sources[pool.group]))
                held, after = self.slots[pool.group][slot][0], -1
                if pool.group == 0 and self.targets[0] and self.rng.random() < 0.2:
                    slot, number, after = self.targets[0].pop(), int(self.rng.integers(2)), len(ops)
                    held = self.on_ssd[number]
                    keys = NAMES[number : number + 1]
                    ops.append(_core.OpSpec(T.LOWER2H, ints(3 + number), ints(slot), keys=keys))
                    moved.append((self.slots[0][slot], held))
                of_device = self.device_side(pool, block)
                ops.append(load(pool, (slot,), (), after_layers=after, **of_device))
                moved.append((self.blocks[pool.group][block], held[: pool.block_bytes]))
            given_up = self.submit(ops, gate, events)
            for may_be, new in moved:
                may_be[:] = [*may_be, new] if given_up else [new]
            self.copies += len(parts)
        return gate

    def forward(self, gate: _core.LayerGate, leaving: list[tuple[Pool, int]]) -> None:
        cuda = self.rig.cuda
        looked_at = [
            (pool, int(block)) for pool in self.rig.pools for block in self.rng.choice(pool.num_blocks, 3)
        ]
        reads: list[list[list[np.ndarray]]] = [[[] for _ in range(pool.num_layers)] for pool, _ in looked_at]
        for layer in range(num_gate_layers(self.rig)):
            assert gate.stream_wait(layer, self.stream, 60.0), "a layer is never queued"
            for (pool, block), of_block in zip(looked_at, reads, strict=True):
                if layer in pool.gate_layers:
                    at = pool.gate_layers.index(layer)
                    runs = pool.runs(self.rows(pool, block), at)
                    of_block[at] = [cuda.read(self.stream, address, size) for address, size in runs]
            kind = self.rng.random()
            if kind < 0.03:
                cuda.first_launch(self.stream)
            elif kind < 0.06:
                cuda.free(cuda.allocate(64)[0])
        for (pool, block), of_block in zip(looked_at, reads, strict=True):
            may_be = list(self.blocks[pool.group][block])
            self.found.append(([run for runs in of_block for run in runs], may_be))
        for pool, block in leaving:
            self.value = (self.value + 1) % 251
            for layer in range(pool.num_layers):
                for address, size in pool.runs(self.rows(pool, block), layer):
                    cuda.fill(self.stream, address, self.value, size)
            self.blocks[pool.group][block] = [np.full(pool.block_bytes, self.value, np.uint8)]

    def round(self) -> None:
        blocks = [self.rng.permutation(pool.num_blocks).tolist() for pool in self.rig.pools]
        leaving = []
        for pool in self.rig.pools:
            known = [block for block in blocks[pool.group] if len(self.blocks[pool.group][block]) == 1]
            for block in known[: int(self.rng.integers(0, 3))]:
                blocks[pool.group].remove(block)
                leaving.append((pool, block))
        for gate in self.store(leaving):
            assert gate.stream_wait(0, self.stream, 60.0), "a store is never queued"
        self.forward(self.load(blocks), leaving)

    def has_room(self) -> bool:
        return all(len(targets) > 6 for targets in self.targets)


def test_copies_are_measured_once_for_all_groups(make_rig: MakeRig, cuda: FakeCuda) -> None:
    """By the time a further group comes memory is being registered, and the answer is the same."""
    rig = make_rig()
    pool = Pool(cuda, **STATES)
    pool.group = rig.engine.add_group(pool.layout, pool.host, [])
    rig.pools.append(pool)
    assert cuda.calls("cuEventElapsedTime") == 0  # since the first group is there
    assert rig.engine.cuda_note.count("measured") == 1
    pool.wait_until_pinned()


@pytest.mark.parametrize("seed", range(RANDOM_RUNS))
def test_random_traffic_of_two_groups(
    make_rig: MakeRig,
    cuda: FakeCuda,
    gate_layers: tuple[Layers, Layers],
    tmp_path: Path,
    seed: int,
) -> None:
    """Streams share three hardware queues. Every byte is what it is to be, and nothing hangs."""
    number = seed + list(GATE_LAYERS.values()).index(gate_layers)
    cuda.reset(seed=seed, delay_us=30)
    cuda.queues(3)
    first, second = RANDOM_POOLS[number % len(RANDOM_POOLS)]
    of_device = {"device_blocks": 24, "host_slots": 40}
    rig = make_groups(make_rig, gate_layers, {**first, **of_device}, {**second, **of_device})
    stream = cuda.stream()
    on_ssd = [rig.host.slot_view(slot).copy() for slot in (0, 1)]
    store_on_ssd(rig, tmp_path).clear_faults()
    traffic = RandomTraffic(rig, stream, seed, on_ssd)
    while traffic.copies < RANDOM_COPIES:
        while traffic.has_room():
            traffic.round()
        traffic.settle()
        traffic.begin()
    traffic.settle()
    rig.engine.detach(1)
    cuda.end_stream(stream)
