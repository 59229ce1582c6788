"""The data plane on real memory and real files: bytes, order, failures, and that every op ends once."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import HANG_S

from sglang_flexkv import _core
from sglang_flexkv.common.storage import DeviceBuffers

T = _core.TransferType
FAILED = _core.OpStatus.FAILED
LAYERS, ROWS, ROW_BYTES, TOKENS = 3, 256, 96, 4
SLOTS = 32  # in memory; twice as many on SSD


class Rig:
    """A device pool in CPU memory, a host pool, an SSD store, and an engine over them.

    Args:
        row_bytes: of one of the two buffers of a layer. With 512 a layer is a slice of its own.
    """

    def __init__(
        self,
        directory: Path,
        io_engine: _core.IoEngineKind,
        *,
        row_bytes: int = ROW_BYTES,
        num_directories: int = 2,
        io_depth: int = 8,
        write_bytes_per_s: float = 0.0,
        slices_per_read: int = 0,
        queue_bytes: int = 0,
        disk: _core.Disk | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self.device = [
            [torch.randint(0, 256, (ROWS, row_bytes), dtype=torch.uint8, generator=generator) for _ in "kv"]
            for _ in range(LAYERS)
        ]
        layout = DeviceBuffers(self.device, tokens_per_row=1).block_layout(TOKENS)
        self.slot_bytes = -(-layout.block_bytes // 4096) * 4096
        self.host = _core.HostPool(SLOTS, self.slot_bytes)
        self.paths = [directory / name for name in "abcdef"[:num_directories]]
        self.store = _core.SsdStore(
            [(str(directory), str(path), f"{path}.journal") for path in self.paths],
            b"namespace of rig",
            2 * SLOTS,
            _core.slice_bytes(layout, self.slot_bytes),
            "a rig",
            False,
            0.01,
            disk or _core.Disk(),
        )
        self.engine = _core.TransferEngine(
            layout, self.host, copy_threads=2, cuda_device=-1, queue_bytes=queue_bytes, lower_tiers=["DISK"]
        )
        self.engine.attach(
            1,
            _core.SsdTier(self.store, io_engine, io_depth, _core.WriteLimit(write_bytes_per_s)),
            slices_per_read,
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

    def fill(self, *slots: int) -> list[np.ndarray]:
        """Random bytes into host slots; returns what they hold now."""
        rng = np.random.default_rng(slots[0])
        for slot in slots:
            self.host.slot_view(slot)[:] = rng.integers(0, 256, self.slot_bytes, dtype=np.uint8)
        return [self.host.slot_view(slot).copy() for slot in slots]

    def publish(self, names: np.ndarray, slots: np.ndarray) -> None:
        self.store.publish(names, np.zeros_like(names), slots)

    def save(self, names: np.ndarray, host: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
        """Writes random blocks by way of these host slots, as the tier does; returns their bytes."""
        blocks = self.fill(*host)
        assert self.run(_core.OpSpec(T.H2LOWER, host, slots, keys=names)).done
        self.publish(names, slots)
        for slot in host:
            self.host.slot_view(slot)[:] = 0
        return blocks

    def load(self, names: np.ndarray, slots: np.ndarray, host: np.ndarray) -> _core.GraphResult:
        return self.run(_core.OpSpec(T.LOWER2H, slots, host, keys=names))

    def place(self, slot: int) -> tuple[Path, int]:
        """File and offset of a slot."""
        shards = len(self.paths)
        return self.paths[slot % shards], _core.SSD_SLOTS_OFFSET + slot // shards * self.slot_bytes

    def close(self) -> None:
        del self.engine, self.store


MakeRig = Callable[..., Rig]


@pytest.fixture(params=["IO_URING", "THREADS"])
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(**options) -> Rig:
        directory = tmp_path / str(len(rigs))
        directory.mkdir()
        rigs.append(Rig(directory, getattr(_core.IoEngineKind, request.param), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig()


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def keys(*names: int) -> np.ndarray:
    return np.array([(name + 1, name + 1000) for name in names], dtype=np.uint64).reshape(-1, 2)


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_block_survives_device_host_disk_and_back(rig: Rig) -> None:
    source = rig.tokens(5, 9, 2)
    expected = [rig.block_bytes(rig.tokens(b)) for b in (5, 9, 2)]
    assert rig.run(_core.OpSpec(T.D2H, source, ints(7, 3, 11))).done
    assert rig.run(_core.OpSpec(T.H2LOWER, ints(7, 3, 11), ints(40, 1, 22), keys=keys(5, 9, 2))).done
    rig.publish(keys(5, 9, 2), ints(40, 1, 22))
    for slot, want in zip((7, 3, 11), expected, strict=True):
        assert np.array_equal(rig.host.slot_view(slot)[: len(want)], want)
        rig.host.slot_view(slot)[:] = 0
    target = rig.tokens(60, 61, 62)
    for layer in rig.device:
        for buffer in layer:
            buffer[target] = 0
    out = rig.run(
        _core.OpSpec(T.LOWER2H, ints(40, 1, 22), ints(8, 9, 10), keys=keys(5, 9, 2)),
        _core.OpSpec(T.H2D, ints(8, 9, 10), target, after_layers=0),
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
    engine = _core.TransferEngine(layout, host, copy_threads=1, cuda_device=-1)
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


@pytest.mark.parametrize("tokens_per_block", [1, 4])
@pytest.mark.parametrize("row_bytes", [1, 63, 255, 256, 257, 576, 1152, 5000])
@pytest.mark.parametrize("stride", [0, 1, 64], ids=["dense", "unaligned", "padded"])
def test_rows_of_any_size_in_any_order_arrive_whole_and_nothing_beside_them(
    tokens_per_block: int, row_bytes: int, stride: int
) -> None:
    """Small rows of several layers are copied together, and blocks in the order of their rows."""
    layers, blocks = 7, 40
    rows = 2 * blocks * tokens_per_block
    rng = np.random.default_rng(row_bytes)
    memory = [
        [torch.from_numpy(rng.integers(0, 256, (rows, row_bytes + stride), dtype=np.uint8)) for _ in "kv"]
        for _ in range(layers)
    ]
    device = [[buffer[:, :row_bytes] for buffer in layer] for layer in memory]
    layout = DeviceBuffers(device, tokens_per_row=1).block_layout(tokens_per_block)
    host = _core.HostPool(blocks, -(-layout.block_bytes // 4096) * 4096)
    engine = _core.TransferEngine(layout, host, copy_threads=2, cuda_device=-1)

    def run(op: _core.OpSpec, gate: _core.LayerGate | None = None) -> None:
        graph = engine.submit([op], gate=gate)
        assert engine.wait(graph, 20.0)
        (result,) = engine.poll()
        assert result.done

    def tokens(of_blocks: np.ndarray) -> np.ndarray:
        return (of_blocks[:, None] * tokens_per_block + np.arange(tokens_per_block)).ravel()

    source, slots = rng.permutation(blocks), rng.permutation(blocks)
    run(_core.OpSpec(T.D2H, tokens(source), slots))
    for block, slot in zip(source, slots, strict=True):
        at = tokens(np.array([block]))
        want = torch.cat([buffer[at].flatten() for layer in device for buffer in layer]).numpy()
        assert np.array_equal(host.slot_view(slot)[: len(want)], want)

    # Some of the layers, then the others: the pool beside the rows that were asked for stays as it was.
    target = tokens(blocks + rng.permutation(blocks))
    for begin, end in ((2, 6), (0, 2), (6, layers)):
        expected = [[buffer.clone() for buffer in layer] for layer in memory]
        for layer in range(begin, end):
            for want, buffer in zip(expected[layer], device[layer], strict=True):
                want[target, :row_bytes] = buffer[tokens(source)]
        gate = _core.LayerGate(layers)
        gate.expect(1)
        run(_core.OpSpec(T.H2D, slots, target, layer_begin=begin, layer_end=end), gate)
        assert gate.open_layers == (end if begin == 0 else 0)
        for layer, wanted in zip(memory, expected, strict=True):
            assert all(torch.equal(buffer, want) for buffer, want in zip(layer, wanted, strict=True))


@pytest.mark.parametrize("way", range(len(_core.stream_ways())), ids=_core.stream_ways())
@pytest.mark.parametrize("size", [0, 1, 63, 255, 256, 257, 300, 319, 320, 640, 1000, 4097])
def test_a_streamed_copy_writes_what_it_was_asked_to_and_no_more(size: int, way: int) -> None:
    """Each way that this processor has, not only the one it would choose."""
    rng = np.random.default_rng(size)
    source = rng.integers(0, 256, size + 64, dtype=np.uint8)
    for to in (0, 1, 31, 32, 33, 63):
        for start in (0, 1, 32, 63):
            target = np.full(size + 256, 0xEE, dtype=np.uint8)
            _core.stream_copy(target[64 + to :][:size], source[start:][:size], way)
            expected = np.full_like(target, 0xEE)
            expected[64 + to :][:size] = source[start:][:size]
            assert np.array_equal(target, expected)


# ---- blocks on SSD ----


def test_what_was_written_can_be_read_once_it_is_published(rig: Rig) -> None:
    (block,) = rig.fill(3)
    assert rig.run(_core.OpSpec(T.H2LOWER, ints(3), ints(5), keys=keys(1))).done
    assert rig.load(keys(1), ints(5), ints(4)).ops[0].corrupt == 1
    rig.publish(keys(1), ints(5))
    assert rig.load(keys(1), ints(5), ints(4)).done
    assert np.array_equal(rig.host.slot_view(4), block)
    # A slot that is written anew holds nothing until it is published anew.
    rig.fill(3)
    assert rig.run(_core.OpSpec(T.H2LOWER, ints(3), ints(5), keys=keys(2))).done
    for name in (1, 2):
        assert rig.load(keys(name), ints(5), ints(4)).ops[0].corrupt == 1
    # One that is dropped, neither.
    rig.publish(keys(2), ints(5))
    assert rig.load(keys(2), ints(5), ints(4)).done
    rig.store.drop(ints(5))
    assert rig.load(keys(2), ints(5), ints(4)).ops[0].corrupt == 1


def test_another_block_than_was_asked_for_is_corrupt(rig: Rig) -> None:
    blocks = rig.save(keys(0, 1, 2), ints(0, 1, 2), ints(10, 11, 12))
    out = rig.load(keys(0, 7, 2), ints(10, 11, 12), ints(3, 4, 5))
    assert not out.done
    assert out.ops[0].status == FAILED
    assert out.ops[0].ok.tolist() == [1, 0, 1]
    assert out.ops[0].corrupt == 1
    assert "a block is not what was written" in out.error
    assert rig.engine.stats()["DISK2H"]["corrupt_blocks"] == 1
    assert np.array_equal(rig.host.slot_view(3), blocks[0])
    assert np.array_equal(rig.host.slot_view(5), blocks[2])


@pytest.mark.parametrize("at", [0, 2000, -1], ids=["first byte", "middle", "padding"])
def test_a_flipped_bit_costs_its_block_and_no_other(rig: Rig, at: int) -> None:
    blocks = rig.save(keys(0, 1, 2, 3), ints(0, 1, 2, 3), ints(6, 7, 8, 9))
    path, offset = rig.place(8)
    flip_bit(path, offset + at % rig.slot_bytes)
    out = rig.load(keys(0, 1, 2, 3), ints(6, 7, 8, 9), ints(10, 11, 12, 13))
    assert out.ops[0].status == FAILED
    assert out.ops[0].ok.tolist() == [1, 1, 0, 1]
    assert out.ops[0].corrupt == 1
    for position in (0, 1, 3):
        assert np.array_equal(rig.host.slot_view(10 + position), blocks[position])
    flip_bit(path, offset + at % rig.slot_bytes)
    assert rig.load(keys(2), ints(8), ints(12)).done
    assert np.array_equal(rig.host.slot_view(12), blocks[2])


def test_the_right_bytes_in_the_wrong_place_are_wrong(rig: Rig) -> None:
    rig.save(keys(0, 1), ints(0, 1), ints(0, 1))
    (a, offset), (b, other) = rig.place(0), rig.place(1)
    with a.open("r+b") as file, b.open("r+b") as file_b:
        file.seek(offset)
        file_b.seek(other)
        first, second = file.read(rig.slot_bytes), file_b.read(rig.slot_bytes)
        file.seek(offset)
        file_b.seek(other)
        file.write(second)
        file_b.write(first)
    assert rig.load(keys(0, 1), ints(0, 1), ints(4, 5)).ops[0].corrupt == 2
    assert rig.load(keys(1, 0), ints(0, 1), ints(4, 5)).ops[0].corrupt == 2


def test_slices_of_layers_are_written_and_read_by_themselves(make_rig: MakeRig) -> None:
    rig = make_rig(row_bytes=512)
    layer_bytes = 4096
    assert rig.slot_bytes == LAYERS * layer_bytes

    def op(kind: _core.TransferType, host: int, slot: int, begin: int, end: int) -> _core.OpSpec:
        src, dst = (host, slot) if kind == T.H2LOWER else (slot, host)
        return _core.OpSpec(kind, ints(src), ints(dst), layer_begin=begin, layer_end=end, keys=keys(4))

    (block,) = rig.fill(0)
    assert rig.run(op(T.H2LOWER, 0, 9, 2, 3), op(T.H2LOWER, 0, 9, 0, 2)).done
    path, offset = rig.place(9)
    assert np.array_equal(np.fromfile(path, np.uint8, rig.slot_bytes, offset=offset), block)
    rig.publish(keys(4), ints(9))
    # One layer, and nothing beside it.
    for layer in range(LAYERS):
        view = rig.host.slot_view(1 + layer)
        view[:] = 7
        assert rig.run(op(T.LOWER2H, 1 + layer, 9, layer, layer + 1)).done
        want = np.full_like(block, 7)
        want[layer * layer_bytes : (layer + 1) * layer_bytes] = block[
            layer * layer_bytes : (layer + 1) * layer_bytes
        ]
        assert np.array_equal(view, want)
    # A layer that is bad is bad alone.
    flip_bit(path, offset + 2 * layer_bytes - 1)
    assert rig.run(op(T.LOWER2H, 5, 9, 0, 1)).done
    assert rig.run(op(T.LOWER2H, 5, 9, 2, 3)).done
    assert rig.run(op(T.LOWER2H, 5, 9, 1, 2)).ops[0].corrupt == 1
    assert rig.run(op(T.LOWER2H, 5, 9, 1, 3)).ops[0].corrupt == 1
    assert rig.run(op(T.LOWER2H, 5, 9, 0, 3)).ops[0].ok.tolist() == [0]
    # What only a part was written of is not whole: the other layers are another block's.
    flip_bit(path, offset + 2 * layer_bytes - 1)
    part = _core.OpSpec(T.H2LOWER, ints(0), ints(9), layer_begin=1, layer_end=2, keys=keys(5))
    assert rig.run(part).done
    rig.publish(keys(5), ints(9))
    assert rig.load(keys(5), ints(9), ints(5)).ops[0].corrupt == 1


@pytest.mark.parametrize(("num_directories", "io_depth"), [(1, 1), (1, 4), (3, 2)])
def test_more_blocks_than_the_queue_is_deep(make_rig: MakeRig, num_directories: int, io_depth: int) -> None:
    rig = make_rig(num_directories=num_directories, io_depth=io_depth)
    order = np.random.default_rng(5).permutation(2 * SLOTS)[:SLOTS].astype(np.int64)
    host = np.arange(SLOTS, dtype=np.int64)
    blocks = rig.save(keys(*order), host, order)
    for slot, block in zip(order, blocks, strict=True):
        path, offset = rig.place(int(slot))
        assert np.array_equal(np.fromfile(path, np.uint8, rig.slot_bytes, offset=offset), block)
    back = np.random.default_rng(6).permutation(SLOTS)
    out = rig.load(keys(*order[back]), order[back], host)
    assert out.done
    assert len(out.ops[0].ok) == 0  # all
    for slot, position in zip(host, back, strict=True):
        assert np.array_equal(rig.host.slot_view(slot), blocks[position])


@pytest.mark.parametrize("left", [0, 2048, 4096], ids=["nothing", "half a block", "a block"])
def test_a_short_file_fails_the_read_and_what_depends_on_it(rig: Rig, left: int) -> None:
    rig.save(keys(0, 1, 2), ints(0, 1, 2), ints(0, 1, 2))
    os.truncate(rig.paths[0], _core.SSD_SLOTS_OFFSET + left)  # slots 0 and 2 are in the first file
    gate = _core.LayerGate(LAYERS)
    gate.expect(1)
    out = rig.run(
        _core.OpSpec(T.LOWER2H, ints(0, 1, 2), ints(4, 5, 6), keys=keys(0, 1, 2)),
        _core.OpSpec(T.H2D, ints(4, 5, 6), rig.tokens(1, 2, 3), after_layers=0),
        gate=gate,
    )
    assert not out.done
    assert [op.status for op in out.ops] == [FAILED, _core.OpStatus.CANCELLED]
    assert out.ops[0].ok.tolist() == [int(left == 4096), 1, 0]
    assert out.ops[0].corrupt == 0  # the disk is to blame, not the bytes
    assert "shorter" in out.error
    assert gate.wait(LAYERS - 1, 0.0)  # whoever waits goes on: what landed is in the results


def test_an_error_of_the_disk_is_a_failure_and_not_a_hang(make_rig: MakeRig) -> None:
    disk = FaultyDisk(1)
    rig = make_rig(disk=disk)
    rig.save(keys(0, 1), ints(0, 1), ints(0, 1))
    assert rig.store.sync(20.0)
    for kind, operation in ((T.H2LOWER, "write"), (T.LOWER2H, "read")):
        disk.set_fault(operation, 1.0, errno.EIO)
        out = rig.run(_core.OpSpec(kind, ints(2, 3), ints(2, 3), keys=keys(2, 3)))
        assert not out.done
        assert out.ops[0].status == FAILED
        assert out.ops[0].ok.tolist() == [0, 0]
        assert out.ops[0].corrupt == 0
        assert f"{operation} failed: {os.strerror(errno.EIO)}" in out.error
        disk.clear_faults()
    assert rig.load(keys(0, 1), ints(0, 1), ints(4, 5)).done


def test_an_op_past_its_deadline_is_cancelled(rig: Rig) -> None:
    every = np.arange(SLOTS)
    graph = rig.engine.submit(
        [
            _core.OpSpec(T.H2LOWER, every, every, keys=keys(*every)),
            _core.OpSpec(T.LOWER2H, every, every, keys=keys(*every)),
        ],
        timeout_s=1e-9,
    )
    assert rig.engine.wait(graph, 20.0)
    (result,) = rig.engine.poll()
    assert not result.done
    assert result.ops[1].status == _core.OpStatus.CANCELLED


def test_cancelled_disk_graphs_end_once_and_leave_the_slots_usable(make_rig: MakeRig) -> None:
    rig = make_rig(io_depth=2)
    written, read_back = np.arange(SLOTS // 2), np.arange(SLOTS // 2, SLOTS)
    names = keys(*written)
    rig.save(keys(*read_back), read_back, read_back)
    ended: list[int] = []
    submitted: list[int] = []
    for round_ in range(20):
        write = _core.OpSpec(T.H2LOWER, written, written, keys=names)
        read = _core.OpSpec(T.LOWER2H, read_back, read_back, keys=keys(*read_back))
        graph = rig.engine.submit([write, read])
        submitted.append(graph)
        if round_ % 2:
            time.sleep(0.0005)
        rig.engine.cancel(graph)
        assert rig.engine.wait(graph, 20.0)
        for result in rig.engine.poll():
            ended.append(result.graph)
            assert result.ops[0].status in (_core.OpStatus.CANCELLED, _core.OpStatus.DONE)
            assert result.ops[0].corrupt == 0
    assert ended == submitted
    every = np.arange(SLOTS)
    blocks = rig.save(keys(*every), every, every)
    assert rig.load(keys(*every), every, every).done
    assert all(np.array_equal(rig.host.slot_view(s), block) for s, block in enumerate(blocks))


def test_the_limit_on_writes_holds_writes_back_and_nothing_else(make_rig: MakeRig) -> None:
    rate = 100_000
    rig = make_rig(write_bytes_per_s=rate)
    count = 12
    start = time.monotonic()
    rig.save(keys(*range(count)), np.arange(count), np.arange(count))
    # A short burst is free, and the last block may go into debt.
    assert time.monotonic() - start > (count - 1) * rig.slot_bytes / rate - 0.1
    # Under a limit that the first block is in debt to for hours, it can be read.
    rig = make_rig(write_bytes_per_s=1)
    rig.save(keys(0), ints(0), ints(0))
    for _ in range(10):
        assert rig.load(keys(0), ints(0), ints(0)).done


def test_cancelled_writes_do_not_wait_for_the_limit(make_rig: MakeRig) -> None:
    rig = make_rig(write_bytes_per_s=4096.0)  # a block per second
    every = np.arange(SLOTS, dtype=np.int64)
    graph = rig.engine.submit([_core.OpSpec(T.H2LOWER, every, every, keys=keys(*every))])
    rig.engine.cancel(graph)
    assert rig.engine.wait(graph, 3.0)
    assert [r.graph for r in rig.engine.poll()] == [graph]


def test_the_ssd_tier_can_be_taken_away_and_given_back(rig: Rig) -> None:
    (block,) = rig.save(keys(1), ints(0), ints(1))
    read = _core.OpSpec(T.LOWER2H, ints(1), ints(2), keys=keys(1))
    with pytest.raises(ValueError, match="attached already"):
        rig.engine.attach(1, _core.SsdTier(rig.store, _core.IoEngineKind.AUTO, 8))
    rig.engine.detach(1)
    # A plan that was made before: a failed read, not a mistake of the caller.
    result = rig.run(read)
    assert result.ops[0].status == _core.OpStatus.FAILED
    assert "the tier is away" in result.error
    assert rig.run(_core.OpSpec(T.D2H, rig.tokens(3), ints(4))).done
    rig.engine.attach(1, _core.SsdTier(rig.store, _core.IoEngineKind.THREADS, 2))
    assert rig.run(read).done
    assert np.array_equal(rig.host.slot_view(2), block)


def test_a_store_of_another_shape_is_refused(make_rig: MakeRig) -> None:
    small, large = make_rig(), make_rig(row_bytes=512)
    small.engine.detach(1)
    with pytest.raises(ValueError, match="slots of another shape"):
        small.engine.attach(1, _core.SsdTier(large.store, _core.IoEngineKind.AUTO, 8))


# ---- loads that follow a read layer by layer ----


def layered_load(rig: Rig, names: np.ndarray, slots: np.ndarray, host: np.ndarray, *blocks: int):
    return [
        _core.OpSpec(T.LOWER2H, slots, host, keys=names),
        _core.OpSpec(T.H2D, host, rig.tokens(*blocks), after_layers=0),
    ]


def open_gate(loads: int = 1) -> _core.LayerGate:
    gate = _core.LayerGate(LAYERS)
    gate.expect(loads)
    return gate


@pytest.mark.parametrize("slices_per_read", [1, 2, 3, 0], ids=["one", "uneven", "whole", "measured"])
def test_layers_of_a_read_go_on_to_the_device(make_rig: MakeRig, slices_per_read: int) -> None:
    rig = make_rig(row_bytes=512, slices_per_read=slices_per_read)
    count = 12
    blocks = rig.save(keys(*range(count)), np.arange(count), np.arange(count) + 7)
    gate = open_gate()
    out = rig.run(
        *layered_load(
            rig, keys(*range(count)), np.arange(count) + 7, np.arange(count), *range(20, 20 + count)
        ),
        gate=gate,
    )
    assert out.done
    assert gate.open_layers == LAYERS
    for position, block in enumerate(blocks):
        assert np.array_equal(rig.host.slot_view(position), block)
        assert np.array_equal(rig.block_bytes(rig.tokens(20 + position)), block)
    if slices_per_read:
        assert rig.engine.stats()["DISK2H"]["layers_per_read"] == slices_per_read


def test_early_layers_are_used_while_later_ones_are_still_read(make_rig: MakeRig) -> None:
    disk = FaultyDisk(3)
    rig = make_rig(row_bytes=512, slices_per_read=1, num_directories=1, io_depth=1, disk=disk)
    rig.save(keys(0, 1), ints(0, 1), ints(0, 1))
    disk.set_fault("read", 1.0, delay_s=HANG_S, after=2)  # once the first layer of both blocks is read
    gate = open_gate()
    graph = rig.engine.submit(layered_load(rig, keys(0, 1), ints(0, 1), ints(2, 3), 5, 6), gate=gate)
    assert gate.wait(0, 20.0)
    assert gate.open_layers == 1
    assert np.array_equal(rig.device[0][0][rig.tokens(5)], rig.host.slot_view(2)[:2048].reshape(4, 512))
    disk.clear_faults()
    assert gate.wait(LAYERS - 1, 20.0)
    assert rig.engine.wait(graph, 20.0)
    assert rig.engine.poll()[0].done


@pytest.mark.parametrize("bad_layer", range(LAYERS))
def test_a_layer_that_is_bad_never_reaches_the_device(make_rig: MakeRig, bad_layer: int) -> None:
    rig = make_rig(row_bytes=512, slices_per_read=1)
    rig.save(keys(0, 1, 2), ints(0, 1, 2), ints(0, 1, 2))
    path, offset = rig.place(1)
    flip_bit(path, offset + bad_layer * 4096 + 77)
    before = rig.device[bad_layer][0][rig.tokens(11)].clone()
    gate = open_gate()
    out = rig.run(*layered_load(rig, keys(0, 1, 2), ints(0, 1, 2), ints(4, 5, 6), 10, 11, 12), gate=gate)
    assert [op.status for op in out.ops] == [FAILED, _core.OpStatus.CANCELLED]
    assert out.ops[0].ok.tolist() == [1, 0, 1]
    assert out.ops[0].corrupt == 1
    assert gate.open_layers == LAYERS
    assert torch.equal(rig.device[bad_layer][0][rig.tokens(11)], before)


def test_a_gate_opens_for_all_loads_of_a_batch_layer_by_layer(make_rig: MakeRig) -> None:
    """What is in memory waits for what is read, and only for that layer of it."""
    rig = make_rig(row_bytes=512, slices_per_read=1)
    blocks = rig.save(keys(*range(6)), np.arange(6), np.arange(6))
    gate = open_gate(3)
    graphs = [
        rig.engine.submit(layered_load(rig, keys(0, 1, 2), ints(0, 1, 2), ints(0, 1, 2), 1, 2, 3), gate=gate),
        rig.engine.submit([_core.OpSpec(T.H2D, ints(20), rig.tokens(30))], gate=gate),
        rig.engine.submit(layered_load(rig, keys(3, 4, 5), ints(3, 4, 5), ints(3, 4, 5), 4, 5, 6), gate=gate),
    ]
    assert gate.wait(LAYERS - 1, 20.0)
    assert all(rig.engine.wait(graph, 20.0) for graph in graphs)
    for position, block in enumerate(blocks):
        assert np.array_equal(rig.block_bytes(rig.tokens(1 + position)), block)


@pytest.mark.parametrize("bad_layer", range(LAYERS))
@pytest.mark.parametrize("bad_first", [True, False])
def test_a_load_that_fails_spoils_no_other_of_its_gate(
    make_rig: MakeRig, bad_layer: int, bad_first: bool
) -> None:
    """It ends while the others are on their way: no layer of theirs opens too early."""
    disk = FaultyDisk(3)
    rig = make_rig(row_bytes=512, slices_per_read=1, num_directories=1, io_depth=1, disk=disk)
    blocks = rig.save(keys(0, 1), ints(0, 1), ints(0, 1))
    path, offset = rig.place(1)
    flip_bit(path, offset + bad_layer * 4096 + 77)
    disk.set_fault("read", 1.0, delay_s=0.03)
    blocks += rig.fill(8)
    gate = open_gate(3)
    good = layered_load(rig, keys(0), ints(0), ints(2), 5)
    bad = layered_load(rig, keys(1), ints(1), ints(3), 6)
    in_memory = [_core.OpSpec(T.H2D, ints(8), rig.tokens(7))]
    specs = [bad, good, in_memory] if bad_first else [good, in_memory, bad]
    graphs = [rig.engine.submit(ops, gate=gate) for ops in specs]
    for layer in range(LAYERS):
        assert gate.wait(layer, 20.0)
        for tokens, block in ((rig.tokens(5), blocks[0]), (rig.tokens(7), blocks[2])):
            want = block[layer * 4096 : layer * 4096 + 2048]
            assert np.array_equal(rig.device[layer][0][tokens].numpy().ravel(), want)
    assert rig.engine.drain(20.0)
    done = {result.graph: result.done for result in rig.engine.poll()}
    assert [done[graph] for graph in graphs] == [ops is not bad for ops in specs]


def test_a_load_without_blocks_follows_too(make_rig: MakeRig) -> None:
    rig = make_rig()
    gate = open_gate()
    empty = np.empty(0, np.int64)
    out = rig.run(
        _core.OpSpec(T.LOWER2H, empty, empty, keys=keys()),
        _core.OpSpec(T.H2D, empty, empty, after_layers=0),
        gate=gate,
    )
    assert out.done
    assert gate.open_layers == LAYERS


@pytest.mark.parametrize(
    "second",
    [
        lambda rig: _core.OpSpec(T.D2H, rig.tokens(0), ints(0), after_layers=0),
        lambda rig: _core.OpSpec(T.H2D, ints(0), rig.tokens(0), after_layers=1),
        lambda rig: _core.OpSpec(T.H2D, ints(0), rig.tokens(0), layer_end=1, after_layers=0),
        lambda rig: _core.OpSpec(T.H2D, ints(1), rig.tokens(0), after_layers=0),
    ],
    ids=["a store", "itself", "other layers", "other blocks"],
)
def test_what_cannot_follow_by_layers_is_refused(rig: Rig, second) -> None:
    read = _core.OpSpec(T.LOWER2H, ints(0), ints(0), keys=keys(0))
    with pytest.raises(ValueError, match="follow"):
        rig.engine.submit([read, second(rig)])


# ---- what a read costs ----

SLICES = [64 << 10] * 32


def read_cost(transfer_s: float, byte_s: float, rounds: int = 20) -> _core.CostFit:
    """What reads of whole blocks and of single slices teach about such a disk."""
    cost = _core.CostFit(10e-6, 0.5e-9)
    for _ in range(rounds):
        for transfers, size in ((100, 100 * 2**21), (1000, 1000 * 2**16)):
            cost.observe(transfers, size, transfers * transfer_s + size * byte_s)
    return cost


def test_slices_are_read_alone_where_that_costs_no_more() -> None:
    cost = read_cost(20e-6, 2**-30)  # a slice takes 84 µs, a block 2 ms
    assert cost.seconds(1, 2**20) == pytest.approx(20e-6 + 2**-10, rel=0.1)
    assert cost.seconds(1000, 1) == pytest.approx(20e-3, rel=0.1)
    assert 1 < _core.slices_per_read(cost, 100, SLICES) < 32  # one at a time would take a third longer
    assert _core.slices_per_read(read_cost(10e-3, 2**-30), 100, SLICES) == 32  # a disk that seeks
    cheap = read_cost(1e-6, 2**-30)
    assert _core.slices_per_read(cheap, 100, SLICES) == 1
    assert _core.slices_per_read(cheap, 1, SLICES) > 1  # steps too short to be worth a wake-up


@pytest.mark.parametrize(
    ("slices", "per_read", "ends"),
    [
        (32, 1, list(range(1, 33))),
        (7, 2, [1, 3, 5, 7]),
        (32, 8, [1, 3, 7, 15, 23, 31, 32]),
        (5, 4, [1, 3, 5]),
        (5, 5, [5]),
        (5, 64, [5]),
        (1, 1, [1]),
    ],
)
def test_steps_of_a_read_grow(slices: int, per_read: int, ends: list[int]) -> None:
    assert _core.steps_of_read(slices, per_read) == ends


def test_what_a_read_costs_is_learned_anew_when_the_disk_changes() -> None:
    cost = _core.CostFit(10e-6, 0.5e-9)
    assert cost.seconds(1, 1) == pytest.approx(10e-6 + 0.5e-9)
    for byte_s in (2**-30, 2**-28):
        for _ in range(60):
            cost.observe(100, 100 * 2**21, 100 * 2**21 * byte_s)
        assert cost.seconds(100, 100 * 2**21) == pytest.approx(100 * 2**21 * byte_s, rel=0.1)
    assert cost.num_observed == 120
    cost.observe(0, 1, 1)
    cost.observe(1, 1, 0)
    assert cost.num_observed == 120


# ---- back pressure ----


def test_background_graphs_are_refused_when_too_much_is_queued(make_rig: MakeRig) -> None:
    disk = FaultyDisk(3)
    rig = make_rig(row_bytes=512, queue_bytes=8 * LAYERS * 4096, disk=disk)
    rig.save(keys(*range(20)), np.arange(20), np.arange(20))
    disk.set_fault("read", 1.0, delay_s=HANG_S)

    def read(first: int, count: int, **options) -> int:
        names = np.arange(first, first + count)
        return rig.engine.submit([_core.OpSpec(T.LOWER2H, names, names, keys=keys(*names))], **options)

    assert read(0, 12, background=True)  # larger than the queue: it must get through some time
    assert read(12, 1, background=True) == 0
    assert read(12, 1)  # a forward waits for it
    # Another queue has room.
    assert rig.engine.submit([_core.OpSpec(T.D2H, rig.tokens(1), ints(30))], background=True)
    stats = rig.engine.stats()["DISK2H"]
    assert (stats["queued_bytes"], stats["refused_graphs"]) == (13 * LAYERS * 4096, 1)
    disk.clear_faults()
    assert rig.engine.drain(20.0)
    assert rig.engine.stats()["DISK2H"]["queued_bytes"] == 0
    assert read(12, 1, background=True)
    assert rig.engine.drain(20.0)
    assert len(rig.engine.poll()) == 4


# ---- everything ----


@pytest.mark.parametrize(
    "make",
    [
        lambda rig: _core.OpSpec(T.H2D, ints(SLOTS), rig.tokens(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(-1), rig.tokens(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), ints(0, 1, 2, ROWS)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), ints(0, 1, 2)),
        lambda rig: _core.OpSpec(T.LOWER2H, ints(2 * SLOTS), ints(0), keys=keys(0)),
        lambda rig: _core.OpSpec(T.LOWER2H, ints(0, 1), ints(0), keys=keys(0)),
        lambda rig: _core.OpSpec(T.LOWER2H, ints(0), ints(0)),
        lambda rig: _core.OpSpec(T.H2LOWER, ints(0), ints(0), keys=keys(0, 1)),
        lambda rig: _core.OpSpec(T.LOWER2H, ints(0), ints(0), layer_begin=1, keys=keys(0)),
        lambda rig: _core.OpSpec(T.H2D, ints(0), rig.tokens(0), layer_begin=2, layer_end=9),
    ],
    ids=[
        "host",
        "negative",
        "device",
        "tokens",
        "disk",
        "uneven",
        "no keys",
        "keys",
        "slices",
        "layers",
    ],
)
def test_an_index_that_does_not_exist_is_refused_before_anything_moves(rig: Rig, make) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        rig.engine.submit([make(rig)])


def test_random_graphs_with_faults_cancels_and_delays_end_every_op_exactly_once(make_rig: MakeRig) -> None:
    """2,000 graphs over a disk that fails, lies, stops half way and is slow, with cancels, deadlines, gates
    and back pressure."""
    disk = FaultyDisk(11)
    rig = make_rig(row_bytes=512, slices_per_read=1, queue_bytes=1, disk=disk)
    rig.save(keys(*range(SLOTS)), np.arange(SLOTS), np.arange(SLOTS))
    for operation in ("read", "write"):
        disk.set_fault(operation, 0.05, errno.EIO)
    disk.set_fault("short", 0.05)
    disk.set_fault("flip", 0.05)
    rng = random.Random(3)
    submitted: dict[int, int] = {}
    ended: dict[int, _core.GraphResult] = {}
    gates = [open_gate()]  # each expects one load more than it gets
    refused = 0

    def collect() -> None:
        for result in rig.engine.poll():
            assert result.graph not in ended, "a graph was reported twice"
            ended[result.graph] = result

    for round_ in range(2000):
        ops: list[_core.OpSpec] = []
        kinds: list[_core.TransferType] = []
        hosts: list[np.ndarray] = []
        loads = 0
        for _ in range(rng.randint(0, 6)):
            count = rng.randint(0, 5)
            host = ints(*(rng.randrange(SLOTS) for _ in range(count)))
            disk_slots = ints(*(rng.randrange(2 * SLOTS) for _ in range(count)))
            kind = rng.choice([T.H2D, T.D2H, T.LOWER2H, T.H2LOWER])
            reads = [j for j, before in enumerate(kinds) if before == T.LOWER2H]
            read = rng.choice(reads) if kind == T.H2D and reads and rng.random() < 0.7 else -1
            if read >= 0:
                host = hosts[read]
            device = rig.tokens(*(rng.randrange(60) for _ in host)) if len(host) else ints()
            src, dst = {
                T.H2D: (host, device),
                T.D2H: (device, host),
                T.LOWER2H: (disk_slots, host),
                T.H2LOWER: (host, disk_slots),
            }[kind]
            names = keys(*disk_slots) if kind in (T.LOWER2H, T.H2LOWER) else None
            if read >= 0:
                ops.append(_core.OpSpec(kind, src, dst, after_layers=read))
            else:
                ops.append(_core.OpSpec(kind, src, dst, keys=names))
            kinds.append(kind)
            hosts.append(host)
            loads += kind == T.H2D
        gate = None
        if T.D2H not in kinds and rng.random() < 0.7:
            if rng.random() < 0.5:
                gates.append(open_gate())
            gate = gates[-1]
            gate.expect(loads)
        graph = rig.engine.submit(
            ops,
            gate=gate,
            timeout_s=rng.choice([0.0, 0.0, 0.0, 1e-9, 0.001]),
            background=gate is None and rng.random() < 0.5,
        )
        if graph == 0:
            refused += 1
            continue
        submitted[graph] = len(ops)
        if rng.random() < 0.3:
            rig.engine.cancel(rng.choice(list(submitted)))
        if rng.random() < 0.2:
            collect()
        if round_ % 100 == 99:
            disk.set_fault("read", 0.05, errno.EIO, delay_s=rng.choice([0.0, 0.001]))
            assert rig.engine.drain(60.0)
    assert rig.engine.drain(60.0)
    assert rig.engine.drain_device(0.0)
    collect()
    assert refused > 0
    assert set(ended) == set(submitted)
    pending = [op for r in ended.values() for op in r.ops if op.status == _core.OpStatus.PENDING]
    assert pending == []
    assert all(len(ended[g].ops) == n for g, n in submitted.items())
    # However it ended, each load has passed each layer of its gate once: no gate opens before its last load.
    disk.clear_faults()
    assert [gate.open_layers for gate in gates] == [0] * len(gates)
    for gate in gates:
        assert rig.run(_core.OpSpec(T.H2D, ints(0), rig.tokens(0)), gate=gate).done
        assert gate.open_layers == LAYERS
    outcomes = {op.status for r in ended.values() for op in r.ops}
    assert outcomes == {_core.OpStatus.DONE, _core.OpStatus.FAILED, _core.OpStatus.CANCELLED}
    stats = rig.engine.stats()
    counted = sum(s["ops_done"] + s["ops_failed"] + s["ops_cancelled"] for s in stats.values())
    assert counted == sum(submitted.values()) + 1 + len(gates)  # and the one that saved the blocks
    assert all(s["queued_bytes"] == 0 for s in stats.values())


def test_a_host_pool_serves_one_engine(rig: Rig) -> None:
    with pytest.raises(ValueError, match="pinning was started already"):
        _core.TransferEngine(
            DeviceBuffers(rig.device, tokens_per_row=1).block_layout(TOKENS),
            rig.host,
            copy_threads=1,
            cuda_device=-1,
        )


def test_who_waits_for_its_turn_to_pin_opens_nothing_more() -> None:
    turn = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    deadline = time.monotonic() + 60
    while True:  # others of this user may be pinning
        try:
            turn.bind(f"\0sglang-flexkv-pins-{os.getuid()}")
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    host = _core.HostPool(16, 4096)
    before = len(os.listdir("/proc/self/fd"))
    engine = _core.TransferEngine(
        DeviceBuffers([[torch.zeros(64, 64, dtype=torch.uint8)]], 1).block_layout(16),
        host,
        copy_threads=1,
        cuda_device=-1,
    )
    opened = 0
    for _ in range(100):
        opened = max(opened, len(os.listdir("/proc/self/fd")) - before)
        time.sleep(0.002)  # it asks every 5 ms
    assert opened == 1
    assert host.populated_bytes == 0
    turn.close()
    del engine


def test_the_host_pool_takes_what_was_asked_and_is_faulted_in_behind_the_scenes(tmp_path: Path) -> None:
    import psutil

    size = 256 << 20
    before = psutil.Process().memory_info().rss
    rig_device = [[torch.zeros(64, 64, dtype=torch.uint8)]]
    host = _core.HostPool(size // 4096, 4096)
    index = _core.PrefixIndex([size // 4096, 0])
    keys = np.random.default_rng(0).integers(0, 2**63, size=(size // 4096, 2), dtype=np.uint64)
    index.commit(index.reserve(0, None, keys)[0])
    engine = _core.TransferEngine(
        DeviceBuffers(rig_device, tokens_per_row=1).block_layout(16),
        host,
        copy_threads=1,
        cuda_device=-1,
    )
    for _ in range(2000):
        if host.populated_bytes >= size:
            break
        select.select([], [], [], 0.01)
    assert host.populated_bytes == size
    used = psutil.Process().memory_info().rss - before
    assert size * 0.95 < used < size * 1.08  # a full index included, at the smallest slot there is
    assert index.stats(0).ready == size // 4096
    del engine


def test_pools_over_one_file_are_one_memory() -> None:
    """In two processes it is the same: what maps the file sees what another one writes, and its end."""
    file = _core.HostPool.make_file()
    first, second = _core.HostPool(8, 4096, file), _core.HostPool(8, 4096, file)
    os.close(file)
    first.slot_view(3)[:] = 7
    assert second.slot_view(3).tolist() == [7] * 4096
    assert not second.slot_view(2).any()
    child = os.fork()
    if not child:  # it has the addresses of neither
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del first
    assert second.slot_view(3).tolist() == [7] * 4096


def test_memory_that_is_no_file_is_refused() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(_core.CoreSystemError, match="cannot map 32768 bytes of shared memory"):
            _core.HostPool(8, 4096, write)
    finally:
        os.close(read)
        os.close(write)
