"""Gather (device pool to CPU tier, D2H) and scatter (back, H2D) against memcpy.

    python benchmarks/bench_copy.py [--smoke] [--json FILE|-]

The engine copies a LAYERWISE pool, pages in random order, into BLOCKWISE slots and back, through tasks of
``KVTaskEngine``: plan, graph, copy threads, completion, all of it on the clock.

The yardstick is plain ``memcpy``: the same bytes, between the same two memories, by as many threads. It need
not gather: each thread copies its share in straight pieces as long as the pool's buffers (several MiB).
Ratios are of neighbours in time, in changing order, and before each the destination is overwritten, so that
all find the processor's caches in the same state. The result is the worst shape's.

Whether memcpy goes past the caches depends on their size, so a second yardstick is the engine's own routine
over the same straight pieces, which always does: what that is ahead of us is the price of small rows.

The device is CPU memory here. Every byte is verified after every copy.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    GIB,
    MIB,
    Bytes,
    FlipOption,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    median,
    median_ratio,
    print_table,
    random_bytes,
    spread,
)

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys, make_namespace
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.kvtask import KVTask, KVTaskEngine

_TIMEOUT_S = 120.0
_NAMESPACE = make_namespace({"bench": "copy"})


@dataclass(frozen=True)
class Shape:
    """The KV of one token: ``layers`` times ``buffers`` rows of ``row_bytes``."""

    name: str
    layers: int
    buffers: int  # K and V, or MLA's latent
    row_bytes: int

    @property
    def token_bytes(self) -> int:
        return self.layers * self.buffers * self.row_bytes


SHAPES: tuple[Shape, ...] = (
    Shape("8 layers, 2 KiB rows", 8, 2, 2048),
    Shape("Llama-3-8B bf16", 32, 2, 8 * 128 * 2),
    Shape("Llama-3-8B bf16, TP 4", 32, 2, 2 * 128 * 2),
    Shape("Llama-3-70B bf16, TP 8", 80, 2, 128 * 2),
    Shape("DeepSeek-V2-Lite MLA bf16", 27, 1, 576 * 2),
)
PAGE_SIZES: tuple[int, ...] = (1, 16, 64)


def memory(address: int, size: int) -> Bytes:
    """A view of memory that somebody else owns."""
    view: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return view


def stream_copy(to: int, source: int, size: int) -> None:
    _core.stream_copy(memory(to, size), memory(source, size))


CopyPiece = Callable[[int, int, int], object]  # (to, from, bytes)
_YARDSTICKS: dict[str, CopyPiece] = {"memcpy": ctypes.memmove, "stream": stream_copy}


class Bench:
    """One pool and one CPU tier that are copied back and forth.

    Args:
        total_bytes: KV in one copy, rounded down to whole pages.
    """

    def __init__(self, shape: Shape, page_size: int, total_bytes: int, threads: int) -> None:
        self.shape, self.page_size, self.threads = shape, page_size, threads
        self.num_blocks = total_bytes // (shape.token_bytes * page_size)
        self.num_tokens = self.num_blocks * page_size
        self.num_bytes = self.num_tokens * shape.token_bytes
        self.original = random_bytes((shape.layers, shape.buffers, self.num_tokens, shape.row_bytes), 1)
        # Like SGLang's pool: one allocation by torch per layer and buffer.
        rows = (self.num_tokens, shape.row_bytes)
        tensors = [
            [torch.zeros(rows, dtype=torch.uint8) for _ in range(shape.buffers)] for _ in range(shape.layers)
        ]
        self.pool = [[tensor.numpy() for tensor in layer] for layer in tensors]
        config = CacheConfig(tokens_per_block=page_size, num_cpu_blocks=self.num_blocks, copy_threads=threads)
        self.engine = KVTaskEngine(config, DeviceBuffers(tensors, tokens_per_row=1), namespace=_NAMESPACE)
        host = self.engine.host_pool
        deadline = time.monotonic() + _TIMEOUT_S
        while host.populated_bytes < host.total_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        arena = memory(host.slot_view(0).ctypes.data, host.total_bytes)
        self.host: Bytes = arena.reshape(self.num_blocks, host.slot_bytes)
        self._memcpy_threads = ThreadPoolExecutor(threads)
        self._memcpy_pieces = self._pieces()
        self._rng = np.random.default_rng(2)

    def close(self) -> None:
        self._memcpy_threads.shutdown()
        self.engine.close()

    # ---- the engine ----

    def new_keys(self) -> BlockKeys:
        return self._rng.integers(1, 1 << 63, (self.num_blocks, 2), dtype=np.uint64)

    def new_slots(self) -> np.ndarray:
        """Token slots of all blocks: whole pages, in random order, as a paged allocator hands them out."""
        pages = self._rng.permutation(self.num_blocks)
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).ravel().astype(np.int64)

    def _run(self, task: KVTask, slots: np.ndarray) -> None:
        self.engine.launch(task, slots)
        if not self.engine.wait([task], _TIMEOUT_S) or task.error:
            raise RuntimeError(f"the copy did not end well: {task.status.value} {task.error}")
        self.engine.forget(task)

    def gather(self, keys: BlockKeys, slots: np.ndarray) -> float:
        """Seconds from the request to the end of a put of all blocks."""
        begin_s = time.perf_counter()
        task = self.engine.create_put(None, keys)
        self._run(task, slots)
        taken_s = time.perf_counter() - begin_s
        assert task.plan is not None
        (self._copied,) = task.plan.graph.ops
        return taken_s

    def scatter(self, keys: BlockKeys, slots: np.ndarray) -> float:
        begin_s = time.perf_counter()
        self._run(self.engine.create_get(keys), slots)
        return time.perf_counter() - begin_s

    # ---- the yardstick ----

    def _pieces(self) -> list[list[tuple[int, int, int]]]:
        """Per thread (host address, device address, bytes): equal shares, pieces as long as they can be."""
        share = -(-self.num_bytes // self.threads)
        pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(self.threads)]
        host, at = self.host.ctypes.data, 0
        for layer in self.pool:
            for buffer in layer:
                device, left = buffer.ctypes.data, buffer.nbytes
                while left:
                    thread = at // share
                    count = min(left, share * (thread + 1) - at)
                    pieces[thread].append((host + at, device, count))
                    at, device, left = at + count, device + count, left - count
        return pieces

    def linear(self, copy_piece: CopyPiece, *, to_host: bool) -> float:
        """Seconds for all bytes in straight pieces."""

        def copy(pieces: list[tuple[int, int, int]]) -> None:
            for host, device, count in pieces:
                if to_host:
                    copy_piece(host, device, count)
                else:
                    copy_piece(device, host, count)

        begin_s = time.perf_counter()
        list(self._memcpy_threads.map(copy, self._memcpy_pieces))
        return time.perf_counter() - begin_s

    # ---- verification ----

    def fill_device(self, slots: np.ndarray | None) -> None:
        """Puts the KV of the sequence where ``slots`` say; None: damages all of it instead."""
        for layer, buffers in enumerate(self.pool):
            for number, buffer in enumerate(buffers):
                if slots is None:
                    buffer.fill(0xEE)
                else:
                    buffer[slots] = self.original[layer, number]

    def check_device(self, report: Report, slots: np.ndarray) -> None:
        for layer, buffers in enumerate(self.pool):
            for number, buffer in enumerate(buffers):
                report.check_bytes("bytes after scatter", buffer[slots], self.original[layer, number])

    def check_host(self, report: Report) -> None:
        """Compares the CPU tier with the sequence, block by block where the last gather put it."""
        assert len(self._copied.block_positions) == self.num_blocks
        host_slots = self._copied.dst_block_ids
        part = self.page_size * self.shape.row_bytes
        for layer in range(self.shape.layers):
            for number in range(self.shape.buffers):
                begin = (layer * self.shape.buffers + number) * part
                report.check_bytes(
                    "bytes after gather",
                    self.host[host_slots, begin : begin + part].ravel(),
                    self.original[layer, number].ravel(),
                )


def measure(bench: Bench, report: Report, repeats: int, flip: bool) -> dict[str, Any]:
    """Copies there and back ``repeats`` times, next to the yardsticks. Returns a row of the report."""
    times: dict[str, list[float]] = {}
    ways = [*_YARDSTICKS, "engine"]
    for repeat in range(repeats + 1):
        keys, device_slots = bench.new_keys(), bench.new_slots()
        taken: dict[str, float] = {}
        order = ways[repeat % len(ways) :] + ways[: repeat % len(ways)]
        bench.fill_device(device_slots)
        for way in order:
            bench.host.fill(0xEE)
            if way != "engine":
                taken[f"gather_{way}"] = bench.linear(_YARDSTICKS[way], to_host=True)
                continue
            taken["gather"] = bench.gather(keys, device_slots)
            if flip and repeat == 1:
                bench.host[bench.num_blocks // 2, 0] ^= 1
            bench.check_host(report)
        # The yardsticks' straight copies left other bytes in the slots than the index believes.
        bench.engine.clear()
        bench.host.fill(0xEE)
        bench.gather(keys, device_slots)
        device_slots = bench.new_slots()
        for way in order:
            bench.fill_device(None)
            if way != "engine":
                taken[f"scatter_{way}"] = bench.linear(_YARDSTICKS[way], to_host=False)
                continue
            taken["scatter"] = bench.scatter(keys, device_slots)
            bench.check_device(report, device_slots)
        bench.engine.clear()
        if repeat > 0:  # the first one warms up: page faults, first use of threads
            for name, copy_s in taken.items():
                times.setdefault(name, []).append(copy_s)
    row: dict[str, Any] = {
        "shape": bench.shape.name,
        "page_size": bench.page_size,
        "row_bytes": bench.shape.row_bytes,
        "mib": bench.num_bytes / MIB,
    }
    for name, all_s in times.items():
        row[f"{name}_gib_s"] = bench.num_bytes / GIB / median(all_s)
        row[f"{name}_spread"] = spread(all_s)
    for way in ("gather", "scatter"):
        for name in _YARDSTICKS:
            row[f"{way}_ratio_{name}"] = median_ratio(times[f"{way}_{name}"], times[way])
    return row


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    mib: Annotated[int, typer.Option(help="MiB in one copy; at least 256 to be larger than caches.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Measured copies of each kind.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="Threads that copy, ours and memcpy's.")] = 2,
    flip_a_byte: FlipOption = False,
) -> None:
    """Gather and scatter of the engine against memcpy."""
    shapes, page_sizes = SHAPES, PAGE_SIZES
    if smoke:
        mib, repeats, shapes, page_sizes = 8, 2, SHAPES[:1], (1, 16)
    report = Report("copy", smoke, Machine.here(), {"mib": mib, "repeats": repeats, "threads": threads})
    for shape in shapes:
        for page_size in page_sizes:
            console.print(f"{shape.name}, pages of {page_size} ...")
            bench = Bench(shape, page_size, mib * MIB, threads)
            try:
                report.rows.append(measure(bench, report, repeats, flip_a_byte))
            finally:
                bench.close()
    for way in ("gather", "scatter"):
        columns = ["shape", "page_size", f"{way}_gib_s", f"{way}_memcpy_gib_s", f"{way}_stream_gib_s"]
        columns += [f"{way}_ratio_memcpy", f"{way}_ratio_stream", f"{way}_memcpy_spread"]
        print_table(f"{way}: GiB/s and ratios (medians)", report.rows, columns)
    for way, yardstick in itertools.product(("gather", "scatter"), _YARDSTICKS):
        name = f"{way}_ratio_{yardstick}"
        report.results[name] = min(row[name] for row in report.rows)
        report.results[f"{name}_median"] = median([row[name] for row in report.rows])
    report.goals.update(gather_ratio_memcpy="≥ 0.90", scatter_ratio_memcpy="≥ 0.90")
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
