"""The data plane on real memory and real files: bytes, order, failures, and that every op ends once."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_flexkv import _core
from sglang_flexkv.common.storage import DeviceBuffers

T = _core.TransferType
LAYERS, ROWS, ROW_BYTES, TOKENS = 3, 256, 96, 4
SLOTS = 32


class Rig:
    """A device pool in CPU memory, a host pool, two slot files, and an engine over them."""

    def __init__(self, directory: Path, io_engine: _core.IoEngineKind) -> None:
        generator = torch.Generator().manual_seed(7)
        self.device = [
            [torch.randint(0, 256, (ROWS, ROW_BYTES), dtype=torch.uint8, generator=generator) for _ in "kv"]
            for _ in range(LAYERS)
        ]
        layout = DeviceBuffers(self.device, tokens_per_row=1).block_layout(TOKENS)
        self.host = _core.HostPool(SLOTS, 4096)
        self.paths = [directory / "a", directory / "b"]
        self.fds = []
        for path in self.paths:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
            os.posix_fallocate(fd, 0, SLOTS * 4096)
            self.fds.append(fd)
        self.engine = _core.TransferEngine(
            layout,
            self.host,
            ssd_fds=self.fds,
            ssd_slots=2 * SLOTS,
            copy_threads=2,
            cuda_device=-1,
            io_engine=io_engine,
            io_depth=8,
        )

    def tokens(self, *blocks: int) -> np.ndarray:
        return np.concatenate([np.arange(b * TOKENS, (b + 1) * TOKENS) for b in blocks]).astype(np.int64)

    def block_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """What a host slot must hold for these token slots."""
        return torch.cat([buffer[tokens].flatten() for layer in self.device for buffer in layer]).numpy()

    def run(self, *ops: _core.OpSpec, gate: _core.LayerGate | None = None) -> _core.GraphResult:
        graph = self.engine.submit(list(ops), gate=gate)
        assert self.engine.wait(graph, 20.0)
        (result,) = self.engine.poll()
        assert result.graph == graph
        return result

    def close(self) -> None:
        del self.engine
        for fd in self.fds:
            os.close(fd)


@pytest.fixture(params=["IO_URING", "THREADS"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path, getattr(_core.IoEngineKind, request.param))
    yield rig
    rig.close()


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_block_survives_device_host_disk_and_back(rig: Rig) -> None:
    source = rig.tokens(5, 9, 2)
    expected = [rig.block_bytes(rig.tokens(b)) for b in (5, 9, 2)]
    out = rig.run(
        _core.OpSpec(T.D2H, source, ints(7, 3, 11)),
        _core.OpSpec(T.H2DISK, ints(7, 3, 11), ints(40, 1, 22), after=[0]),
    )
    assert out.done
    for slot, want in zip((7, 3, 11), expected, strict=True):
        assert np.array_equal(rig.host.slot_view(slot)[: len(want)], want)
        rig.host.slot_view(slot)[:] = 0
    target = rig.tokens(60, 61, 62)
    for layer in rig.device:
        for buffer in layer:
            buffer[target] = 0
    out = rig.run(
        _core.OpSpec(T.DISK2H, ints(40, 1, 22), ints(8, 9, 10)),
        _core.OpSpec(T.H2D, ints(8, 9, 10), target, after=[0]),
    )
    assert out.done
    assert [op.status for op in out.ops] == [_core.OpStatus.DONE] * 2
    for block, want in zip((60, 61, 62), expected, strict=True):
        assert np.array_equal(rig.block_bytes(rig.tokens(block)), want)


def test_scattered_tokens_are_copied_one_by_one(rig: Rig) -> None:
    scattered = ints(3, 77, 12, 200)
    expected = rig.block_bytes(scattered)
    assert rig.run(_core.OpSpec(T.D2H, scattered, ints(0))).done
    assert np.array_equal(rig.host.slot_view(0)[: len(expected)], expected)
    assert rig.run(_core.OpSpec(T.H2D, ints(0), rig.tokens(50))).done
    assert np.array_equal(rig.block_bytes(rig.tokens(50)), expected)


def test_one_layer_can_be_copied_alone(rig: Rig) -> None:
    assert rig.run(_core.OpSpec(T.D2H, rig.tokens(1), ints(0))).done
    before = [[b[rig.tokens(40)].clone() for b in layer] for layer in rig.device]
    assert rig.run(_core.OpSpec(T.H2D, ints(0), rig.tokens(40), layer_begin=1, layer_end=2)).done
    for index, layer in enumerate(rig.device):
        for part, buffer in enumerate(layer):
            want = buffer[rig.tokens(1)] if index == 1 else before[index][part]
            assert torch.equal(buffer[rig.tokens(40)], want)


def test_a_gate_opens_in_order_and_only_for_all_loads(rig: Rig) -> None:
    gate = _core.LayerGate(LAYERS)
    gate.expect(2)
    assert rig.run(_core.OpSpec(T.H2D, ints(0), rig.tokens(1)), gate=gate).done
    assert gate.open_layers == 0
    assert not gate.wait(0, 0.01)
    assert rig.run(_core.OpSpec(T.H2D, ints(1), rig.tokens(2)), gate=gate).done
    assert gate.open_layers == LAYERS
    assert gate.wait(LAYERS - 1, 0.0)


def test_early_layers_open_while_later_ones_are_still_copied(tmp_path: Path) -> None:
    """The overlap that a layerwise load is for: seen from the waiting side, without a clock."""
    layers, rows = 24, 16384
    device = [[torch.zeros(rows, 1024, dtype=torch.uint8)] for _ in range(layers)]
    layout = DeviceBuffers(device, tokens_per_row=1).block_layout(64)
    host = _core.HostPool(rows // 64, layout.block_bytes)
    engine = _core.TransferEngine(
        layout, host, [], 0, copy_threads=1, cuda_device=-1, io_engine=_core.IoEngineKind.AUTO, io_depth=1
    )
    gate = _core.LayerGate(layers)
    gate.expect(1)
    slots = np.arange(rows // 64, dtype=np.int64)
    graph = engine.submit([_core.OpSpec(T.H2D, slots, np.arange(rows, dtype=np.int64))], gate=gate)
    open_when_first_was_usable = []
    for layer in range(layers):
        assert gate.wait(layer, 30.0)
        open_when_first_was_usable.append(gate.open_layers)
    assert engine.wait(graph, 30.0)
    # At the time the first layer could be used, most others were still on their way.
    assert open_when_first_was_usable[0] < layers
    assert open_when_first_was_usable == sorted(open_when_first_was_usable)


def test_a_short_file_fails_the_read_and_what_depends_on_it(rig: Rig) -> None:
    assert rig.run(_core.OpSpec(T.H2DISK, ints(0, 1, 2), ints(0, 1, 2))).done
    os.truncate(rig.paths[0], 0)  # slots 0 and 2 are in the first file
    gate = _core.LayerGate(LAYERS)
    gate.expect(1)
    out = rig.run(
        _core.OpSpec(T.DISK2H, ints(0, 1, 2), ints(4, 5, 6)),
        _core.OpSpec(T.H2D, ints(4, 5, 6), rig.tokens(1, 2, 3), after=[0]),
        gate=gate,
    )
    assert not out.done
    assert [op.status for op in out.ops] == [_core.OpStatus.FAILED, _core.OpStatus.CANCELLED]
    assert out.ops[0].ok.tolist() == [0, 1, 0]
    assert "shorter" in out.error
    assert gate.failed
    assert not gate.wait(0, 0.0)


def test_a_bad_descriptor_is_a_failure_and_not_a_hang(rig: Rig, tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "a", os.O_RDONLY)
    os.dup2(read_only, rig.fds[0])
    os.close(read_only)
    out = rig.run(_core.OpSpec(T.H2DISK, ints(0, 1), ints(0, 1)))
    assert not out.done
    assert out.ops[0].ok.tolist() == [0, 1]
    assert "write failed" in out.error


def test_an_op_past_its_deadline_is_cancelled(rig: Rig) -> None:
    graph = rig.engine.submit(
        [
            _core.OpSpec(T.H2DISK, np.arange(SLOTS), np.arange(SLOTS)),
            _core.OpSpec(T.DISK2H, np.arange(SLOTS), np.arange(SLOTS), after=[0]),
        ],
        timeout_s=1e-9,
    )
    assert rig.engine.wait(graph, 20.0)
    (result,) = rig.engine.poll()
    assert not result.done
    assert result.ops[1].status == _core.OpStatus.CANCELLED


@pytest.mark.parametrize(
    "make",
    [
        lambda rig: _core.OpSpec(T.H2D, ints(SLOTS), rig.tokens(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(-1), rig.tokens(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), ints(0, 1, 2, ROWS)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), ints(0, 1, 2)),
        lambda rig: _core.OpSpec(T.DISK2H, ints(2 * SLOTS), ints(0)),
        lambda rig: _core.OpSpec(T.DISK2H, ints(0, 1), ints(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), rig.tokens(0), layer_begin=2, layer_end=9),
        lambda rig: _core.OpSpec(T.H2D, ints(0), rig.tokens(0), after=[0]),
    ],
    ids=["host", "negative", "device", "tokens", "disk", "uneven", "layers", "self"],
)
def test_an_index_that_does_not_exist_is_refused_before_anything_moves(rig: Rig, make) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        rig.engine.submit([make(rig)])
    assert rig.engine.num_pending == 0


def test_the_event_fd_says_when_there_is_something_to_poll(rig: Rig) -> None:
    assert not select.select([rig.engine.event_fd], [], [], 0)[0]
    graph = rig.engine.submit([_core.OpSpec(T.H2D, ints(0), rig.tokens(0))])
    assert select.select([rig.engine.event_fd], [], [], 20)[0]
    assert [r.graph for r in rig.engine.poll()] == [graph]
    assert not select.select([rig.engine.event_fd], [], [], 0)[0]


def test_random_graphs_with_cancels_end_every_op_exactly_once(rig: Rig) -> None:
    rng = random.Random(3)
    submitted: dict[int, int] = {}
    ended: dict[int, _core.GraphResult] = {}

    def collect() -> None:
        for result in rig.engine.poll():
            assert result.graph not in ended, "a graph was reported twice"
            ended[result.graph] = result

    for _ in range(300):
        ops = []
        for i in range(rng.randint(0, 6)):
            count = rng.randint(0, 5)
            host = ints(*(rng.randrange(SLOTS) for _ in range(count)))
            disk = ints(*(rng.randrange(2 * SLOTS) for _ in range(count)))
            device = rig.tokens(*(rng.randrange(60) for _ in range(count))) if count else ints()
            kind = rng.choice([T.H2D, T.D2H, T.DISK2H, T.H2DISK])
            src, dst = {
                T.H2D: (host, device),
                T.D2H: (device, host),
                T.DISK2H: (disk, host),
                T.H2DISK: (host, disk),
            }[kind]
            after = [j for j in range(i) if rng.random() < 0.4]
            ops.append(_core.OpSpec(kind, src, dst, after=after))
        graph = rig.engine.submit(ops)
        submitted[graph] = len(ops)
        if rng.random() < 0.3:
            rig.engine.cancel(rng.choice(list(submitted)))
        if rng.random() < 0.2:
            collect()
    assert rig.engine.drain(60.0)
    collect()
    assert set(ended) == set(submitted)
    pending = [op for r in ended.values() for op in r.ops if op.status == _core.OpStatus.PENDING]
    assert pending == []
    assert all(len(ended[g].ops) == n for g, n in submitted.items())
    stats = rig.engine.stats()
    counted = sum(s["ops_done"] + s["ops_failed"] + s["ops_cancelled"] for s in stats.values())
    assert counted == sum(submitted.values())


def test_a_host_pool_serves_one_engine(rig: Rig) -> None:
    with pytest.raises(ValueError, match="pinning was started already"):
        _core.TransferEngine(
            DeviceBuffers(rig.device, tokens_per_row=1).block_layout(TOKENS),
            rig.host,
            [],
            0,
            copy_threads=1,
            cuda_device=-1,
            io_engine=_core.IoEngineKind.AUTO,
            io_depth=1,
        )


def test_the_host_pool_takes_what_was_asked_and_is_faulted_in_behind_the_scenes(tmp_path: Path) -> None:
    import psutil

    size = 256 << 20
    before = psutil.Process().memory_info().rss
    rig_device = [[torch.zeros(64, 64, dtype=torch.uint8)]]
    host = _core.HostPool(size // 4096, 4096)
    index = _core.PrefixIndex(size // 4096, 0)
    keys = np.random.default_rng(0).integers(0, 2**63, size=(size // 4096, 2), dtype=np.uint64)
    index.commit(index.reserve(_core.Tier.CPU, None, keys)[0])
    engine = _core.TransferEngine(
        DeviceBuffers(rig_device, tokens_per_row=1).block_layout(16),
        host,
        [],
        0,
        copy_threads=1,
        cuda_device=-1,
        io_engine=_core.IoEngineKind.AUTO,
        io_depth=1,
    )
    for _ in range(2000):
        if host.populated_bytes >= size:
            break
        select.select([], [], [], 0.01)
    assert host.populated_bytes == size
    used = psutil.Process().memory_info().rss - before
    assert size * 0.95 < used < size * 1.05  # a full index included, at the smallest slot there is
    assert index.stats(_core.Tier.CPU).ready == size // 4096
    del engine
