"""Everything that needs an NVIDIA GPU, in one run: is it right, and is it as fast as it should be?

    python benchmarks/verify_gpu.py [STEP ...] [--smoke] [--json FILE|-]

* bytes: MHA and MLA pools of every dtype, pages of 1 to 128 tokens and pieces up to 512 KiB, so by both ways
  of a copy, stored and loaded by the engine on the device, compared with PyTorch's own indexing.
* one-copy: what one process stores another one loads from the same memory, as ranks with MLA do.
* bandwidth: stores and loads from random slots of a host pool of 32 GiB, as a share of one contiguous copy of
  pinned memory by PyTorch, measured next to each other; and what a launch costs while that pool is pinned.
* queueing: the host's time for queueing a load of 64 layers.
* slowdown: what attention and a GEMM lose while loads or stores run, what those lose, what a launch takes
  meanwhile, and what stores cost tokens that come to the host.
* overlap: bench_overlap.py. tests, demo: ``make test`` and ``make demo``, on SGLang with FlashInfer.
* sanitizer: the bytes of a few shapes under compute-sanitizer.

Without STEPs all of them run, in this order. Each runs in a process of its own with a time limit, and every
line is printed when it is there: met, missed, measured (there is no goal) or not run, and why. Exit status 1
if anything was missed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from common import (
    GIB,
    MIB,
    ROOT,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    end_on_sigterm,
    median,
    median_ratio,
)
from steps import Job, Line, TotalOption, run_jobs, tell

from sglang_flexkv import _core
from sglang_flexkv.common.storage import DeviceBuffers

QUEUE_GOAL_US = 200.0
SLOWDOWN_GOAL = 1.03
_PIN_TIMEOUT_S = 120.0
_WAIT_S = 60.0

T = _core.TransferType


@dataclass(frozen=True)
class Bandwidth:
    """A case of the bandwidth: pages of so many tokens of 2 KiB per buffer, so pieces of twice as many KiB.

    Attributes:
        goal: share of one contiguous copy.
        host_bytes: of the host pool, whose slots are used in random order.
    """

    page: int
    goal: float
    host_bytes: int


# The first one is pinned under watch. Pages of 1 and of 256 go one way each, whatever the threshold is.
BANDWIDTHS = (
    Bandwidth(16, 0.95, 32 * GIB),
    Bandwidth(1, 0.85, 32 * GIB),
    Bandwidth(64, 0.95, 8 * GIB),
    Bandwidth(256, 0.95, 8 * GIB),
)
_ROW: dict[str, Any] = {"buffers": 2, "row": (8, 128), "dtype": torch.bfloat16}  # of Llama 3 8B
_LAYER_BYTES = 2 * 8 * 128 * 2
_LAYERS, _LAYERS_SMOKE = 32, 2


class Rig:
    """A pool of KV on a device and the engine over it.

    Args:
        row: shape of one token in one buffer.
        buffers: per layer: 2 for MHA, 1 for MLA.
        wait: until the host pool is pinned; else the caller does (``wait_until_pinned``).
        file: in memory, of the host pool; none: memory of its own.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        layers: int,
        buffers: int,
        row: tuple[int, ...],
        dtype: torch.dtype,
        page: int,
        device_pages: int,
        host_pages: int,
        wait: bool = True,
        file: int = -1,
    ) -> None:
        self.page, self.layers, self.device = page, layers, device
        nbytes = int(np.prod(row)) * dtype.itemsize
        # Random bytes, looked at as the dtype: what is copied is bytes.
        self.pools = [
            [
                torch.randint(0, 256, (device_pages * page, nbytes), dtype=torch.uint8, device=device)
                for _ in range(buffers)
            ]
            for _ in range(layers)
        ]
        typed = [[pool.view(dtype) for pool in layer] for layer in self.pools]
        self.buffers = DeviceBuffers(typed, tokens_per_row=1)
        layout = self.buffers.block_layout(page)
        self.block_bytes = layout.block_bytes
        slot_bytes = -(-layout.block_bytes // _core.IO_ALIGNMENT) * _core.IO_ALIGNMENT
        self.host = _core.HostPool(host_pages, slot_bytes, file)
        self.engine = _core.TransferEngine(
            layout, self.host, copy_threads=2, cuda_device=self.buffers.cuda_device
        )
        if wait:
            self.wait_until_pinned()

    @property
    def pinned(self) -> bool:
        """Whether the host pool is as ready as it will be: pinned for a GPU, populated for a CPU."""
        done = self.host.populated_bytes if self.device.type == "cpu" else self.host.pinned_bytes
        return done >= self.host.total_bytes

    def wait_until_pinned(self) -> None:
        """Raises: RuntimeError: it was not, in time."""
        deadline = time.monotonic() + _PIN_TIMEOUT_S
        while not self.pinned:
            if time.monotonic() > deadline:
                share = self.host.pinned_bytes / self.host.total_bytes
                raise RuntimeError(f"only {share:.0%} of the host pool was pinned; {self.engine.cuda_note}")
            time.sleep(0.005)

    def tokens(self, pages: np.ndarray) -> np.ndarray:
        return (pages[:, None] * self.page + np.arange(self.page)).ravel()

    def op(self, kind: _core.TransferType, pages: np.ndarray, slots: np.ndarray) -> _core.OpSpec:
        """Copies pages to slots or back."""
        tokens, slots = self.tokens(pages), slots.astype(np.int64)
        return _core.OpSpec(kind, *((tokens, slots) if kind == T.D2H else (slots, tokens)))

    def move(
        self,
        kind: _core.TransferType,
        pages: np.ndarray,
        slots: np.ndarray,
        gate: _core.LayerGate | None = None,
    ) -> float:
        """Copies pages to slots or back; returns the seconds from the call to the end."""
        op = self.op(kind, pages, slots)
        synchronize(self.device)
        begin_s = time.perf_counter()
        graph = self.engine.submit([op], gate=gate)
        if not self.engine.wait(graph, _WAIT_S):
            raise RuntimeError("a copy has not ended; the engine hangs")
        seconds = time.perf_counter() - begin_s
        (result,) = self.engine.poll()
        if not result.done:
            raise RuntimeError(f"a copy failed: {result.error}")
        return seconds

    def rows(self, pages: np.ndarray) -> torch.Tensor:
        """What the slots of these pages must hold, [page, bytes], by PyTorch's indexing."""
        index = torch.from_numpy(self.tokens(pages)).to(self.device)
        parts = [pool[index].view(len(pages), -1) for layer in self.pools for pool in layer]
        return torch.cat(parts, dim=1).cpu()

    def check_held(self, report: Report, what: str, pages: np.ndarray, slots: np.ndarray) -> None:
        """That slots hold what these pages do, every byte."""
        for slot, expected in zip(slots, self.rows(pages).numpy(), strict=True):
            report.check_bytes(what, self.host.slot_view(int(slot))[: self.block_bytes], expected)

    def check_same(self, report: Report, what: str, pages: np.ndarray, others: np.ndarray) -> None:
        """That these pages hold what the others hold, in every buffer, by PyTorch's indexing."""
        one, other = (torch.from_numpy(self.tokens(p)).to(self.device) for p in (pages, others))
        for pool in (pool for layer in self.pools for pool in layer):
            same = torch.equal(pool[one], pool[other])
            report.check(what, bool(same), len(one) * pool.shape[1])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def event_s(work: Callable[[], object], count: int = 1) -> float:
    """Seconds that ``count`` times this work takes on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


# Bytes.

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
_ROWS = (
    (2, (2, 64)),
    (1, (576,)),
    (2, (3, 7)),
)  # buffers per layer and a token's row: MHA, MLA, and odd sizes


def check_bytes(report: Report, device: torch.device, pages_of: Sequence[int] = (1, 16, 64, 128)) -> None:
    """Stores pages of these sizes, loads them elsewhere, and compares all of the pool."""
    for page in pages_of:
        for buffers, row in _ROWS:
            for dtype in _DTYPES:
                check_shape(report, device, page, buffers, row, dtype)


def check_large_pieces(report: Report, device: torch.device) -> None:
    """Pieces of 512 KiB, which go by the copy engines whatever the threshold is."""
    check_shape(report, device, 128, 2, (16, 128), torch.bfloat16)


def check_shape(
    report: Report,
    device: torch.device,
    page: int,
    buffers: int,
    row: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    rig = Rig(
        device,
        layers=3,
        buffers=buffers,
        row=row,
        dtype=dtype,
        page=page,
        device_pages=96,
        host_pages=64,
    )
    rng = np.random.default_rng(page)
    pages, slots = rng.permutation(96)[:40], rng.permutation(64)[:20]
    sources, targets = pages[:20], pages[20:]
    rig.move(T.D2H, sources, slots)
    rig.check_held(report, "bytes that were stored", sources, slots)
    expected_pools = [[pool.clone() for pool in layer] for layer in rig.pools]
    for layer in expected_pools:
        for pool in layer:
            pool[rig.tokens(targets)] = pool[rig.tokens(sources)]
    rig.move(T.H2D, targets, slots)
    for layer, expected_layer in zip(rig.pools, expected_pools, strict=True):
        for pool, want in zip(layer, expected_layer, strict=True):
            report.check("bytes that were loaded", bool(torch.equal(pool, want)), pool.nbytes)


def bytes_step(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    for page in (16,) if smoke else (1, 16, 64, 128):
        check_bytes(report, device, (page,))
        yield Line.judged(f"bytes: MHA and MLA, four dtypes, pages of {page}", report.verified)
    check_large_pieces(report, device)
    yield Line.judged("bytes: pieces of 512 KiB", report.verified)


_IN_COMMON: dict[str, Any] = {
    **{"layers": 3, "buffers": 1, "row": (576,), "dtype": torch.bfloat16, "page": 64},
    **{"device_pages": 64, "host_pages": 64},
}
# What the other process is given as its standard input: the file.
_FILE = 0


def one_copy(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    file = _core.HostPool.make_file()
    rig = Rig(device, **_IN_COMMON, file=file)
    pages, slots = np.random.default_rng(1).permutation(64), np.arange(64)
    rig.move(T.D2H, pages, slots)
    rig.check_held(report, "bytes that were stored in common memory", pages, slots)
    yield Line.judged("one copy: stores in memory that two processes have", report.verified)
    yield program("one copy: the other process", child("one-copy-loads", smoke), stdin=file)
    os.close(file)


def one_copy_loads(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    """In another process than what has stored: loads that, from memory that both have pinned."""
    rig = Rig(device, **_IN_COMMON, file=_FILE)
    pages, slots = np.random.default_rng(2).permutation(64), np.arange(64)
    for slot in slots:
        report.check("bytes of another process", bool(rig.host.slot_view(int(slot)).any()))
    rig.move(T.H2D, pages, slots)
    rig.check_held(report, "bytes of another process", pages, slots)
    yield Line.judged("one copy: loads of what another process has stored", report.verified)


def few_bytes(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    """What the sanitizer is given: everything takes fifty times as long there."""
    check_shape(report, device, 1, 2, (2, 64), torch.bfloat16)
    check_shape(report, device, 16, 1, (576,), torch.bfloat16)
    check_shape(report, device, 16, 2, (3, 7), torch.float8_e4m3fn)
    if not smoke:
        check_large_pieces(report, device)
    yield Line.judged("bytes of four shapes", report.verified)


# Speed.


def contiguous_s(device: torch.device, num_bytes: int) -> Iterator[tuple[float, float]]:
    """Seconds of one contiguous copy of pinned memory, to the host and to the device."""
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def timed(to: torch.Tensor, source: torch.Tensor) -> float:
        return event_s(lambda: to.copy_(source, non_blocking=True))

    timed(there, pinned)
    while True:
        yield timed(pinned, there), timed(there, pinned)


def bandwidth(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    moved_bytes = (4 * MIB) if smoke else 2 * GIB
    layers = _LAYERS_SMOKE if smoke else _LAYERS
    repeats = 3 if smoke else 7
    yardstick = contiguous_s(device, moved_bytes)
    for case in BANDWIDTHS:
        host_bytes = min(case.host_bytes, int(0.4 * psutil.virtual_memory().available))
        host_bytes = 2 * moved_bytes if smoke else host_bytes
        block_bytes = case.page * layers * _LAYER_BYTES
        count = max(1, moved_bytes // block_bytes)
        begin_s = time.perf_counter()
        rig = Rig(
            device,
            **_ROW,
            layers=layers,
            page=case.page,
            device_pages=2 * count,
            host_pages=max(2 * count, host_bytes // block_bytes),
            wait=False,
        )
        if case is BANDWIDTHS[0]:
            yield launches_while_pinning(rig, device)
        rig.wait_until_pinned()
        size = f"{rig.host.total_bytes / GIB:.0f} GiB"
        seconds = time.perf_counter() - begin_s
        yield Line("time to pin a host pool", "measured", f"{seconds:.1f} s for {size}")
        rng = np.random.default_rng(1)
        pages = rng.permutation(2 * count)
        slots = rng.permutation(rig.host.num_slots)[:count]
        sources, targets = pages[:count], pages[count:]
        rig.move(T.D2H, sources, slots)
        rig.move(T.H2D, targets, slots)
        rig.check_same(report, "bytes of the bandwidth's copies", targets, sources)
        took: dict[str, list[float]] = {"store": [], "load": [], "to host": [], "to device": []}
        for _ in range(repeats):
            to_host, to_device = next(yardstick)
            took["to host"].append(to_host)
            took["to device"].append(to_device)
            took["store"].append(rig.move(T.D2H, sources, slots))
            took["load"].append(rig.move(T.H2D, targets, slots))
        # The yardstick moves as many bytes, but for a part of a page.
        share = count * block_bytes / moved_bytes
        for name, base in (("store", "to host"), ("load", "to device")):
            ratio = share * median_ratio(took[base], took[name])
            rate = count * block_bytes / median(took[name]) / 1e9
            yield Line(
                f"{name}, pages of {case.page}, random slots of {size}, as a share of one contiguous copy",
                "met" if ratio >= case.goal else "missed",
                f"{ratio:.3f} ({rate:.1f} GB/s)",
                f">= {case.goal}",
                rig.engine.cuda_note,
                {f"{name}_ratio_page_{case.page}": ratio, f"{name}_gb_s_page_{case.page}": rate},
            )
        del rig


def launches_while_pinning(rig: Rig, device: torch.device) -> Line:
    """What a serving thread notices of the pool being pinned: the time of a launch and its end."""
    x = torch.ones(256, device=device)
    took_us = []

    def launch() -> None:
        begin_s = time.perf_counter()
        x.add_(1)
        synchronize(device)
        took_us.append(1e6 * (time.perf_counter() - begin_s))

    while not rig.pinned and len(took_us) < 1_000_000:
        launch()
    while_pinning, took_us = took_us or [0.0], []
    for _ in range(1000):
        launch()
    usual, worst = median(took_us), max(while_pinning)
    return Line(
        "a launch while the host pool is pinned",
        "measured",
        f"median {median(while_pinning):.0f} us, worst {worst / 1000:.1f} ms, of {len(while_pinning):,}; "
        f"afterwards {usual:.0f} us",
        results={"launch_us_pinning": median(while_pinning), "launch_us_pinning_worst": worst},
    )


def queueing(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    """How long a forward waits until it can queue its first layer, and how long queueing the last one takes.
    The thread that queues keeps a part of the driver's queue ahead of the link, so a large load takes it as
    long as the link."""
    counts = (16,) if smoke else (32, 512)
    rig = Rig(device, **_ROW, layers=64, page=16, device_pages=counts[-1], host_pages=counts[-1])
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    for count in counts:
        blocks = np.arange(count)
        first_us, all_us = [], []
        for _ in range(3 if smoke else 30):
            gate = rig.engine.make_gate(64)
            gate.expect(1)
            op = rig.op(T.H2D, blocks, blocks)
            synchronize(device)
            before_s, begin_s = rig.engine.stats()["H2D"]["queue_s"], time.perf_counter()
            graph = rig.engine.submit([op], gate=gate)
            if not gate.stream_wait(0, stream, _WAIT_S):
                raise RuntimeError("the first layer of a load does not open")
            first_us.append((time.perf_counter() - begin_s) * 1e6)
            if not rig.engine.wait(graph, _WAIT_S) or not rig.engine.poll()[0].done:
                raise RuntimeError("a load has not ended well")
            all_us.append((rig.engine.stats()["H2D"]["queue_s"] - before_s) * 1e6)
        value = median(all_us)
        tokens = 16 * count
        yield Line(
            f"host time for queueing a load of 64 layers ({tokens:,} tokens)",
            "met" if value <= QUEUE_GOAL_US else "missed",
            f"{value:.0f} us; a forward can queue its first layer after {median(first_us):.0f} us",
            f"<= {QUEUE_GOAL_US:.0f} us",
            results={f"queue_us_{tokens}_tokens": value, f"first_layer_us_{tokens}_tokens": median(first_us)},
        )


# What copies and computing take from each other.


@dataclass(frozen=True)
class Work:
    """Something that is computed; ``run`` queues it once."""

    key: str
    name: str
    run: Callable[[], object]


def attention(device: torch.device, smoke: bool) -> Work:
    """A prefill of 4,096 tokens over 16,384: FlashInfer on pages where it is installed, else PyTorch's."""
    new, held, heads, kv_heads, size = 4096, 16384, 32, 8, 128
    if smoke:
        new, held, heads = 64, 256, 8
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        page = 16
        cache = torch.randn(held // page, 2, page, kv_heads, size, **half)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD"
        )
        counts: dict[str, Any] = {"dtype": torch.int32, "device": device}
        wrapper.plan(
            torch.tensor([0, new], **counts),
            torch.tensor([0, held // page], **counts),
            torch.randperm(held // page, **counts),
            torch.tensor([page], **counts),
            heads,
            kv_heads,
            size,
            page,
            causal=True,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        query = torch.randn(new, heads, size, **half)
        return Work("attention", "attention (FlashInfer)", lambda: wrapper.run(query, cache))
    q = torch.randn(1, heads, new, size, **half)
    k, v = (torch.randn(1, heads, held, size, **half) for _ in "kv")
    attend = torch.nn.functional.scaled_dot_product_attention
    return Work("attention", "attention (PyTorch)", lambda: attend(q, k, v))


def gemm(device: torch.device, smoke: bool) -> Work:
    size = 64 if smoke else 4096
    a, b, out = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(3))
    return Work("gemm", f"a GEMM of {size} cubed", lambda: torch.matmul(a, b, out=out))


class Copying:
    """Copies in one direction, always two at least queued, for as long as it is entered.

    Attributes:
        rate: bytes a second that ended while it was entered.
    """

    _AHEAD = 4

    def __init__(self, rig: Rig, kind: _core.TransferType, pages: np.ndarray) -> None:
        self._rig, self._bytes = rig, len(pages) * rig.block_bytes
        self._op = rig.op(kind, pages, np.arange(len(pages)))
        self.rate = 0.0

    def __enter__(self) -> Copying:
        self._stop, self._ended, self._error = threading.Event(), 0, ""
        self._queued = [self._submit() for _ in range(self._AHEAD)]
        # They run when the caller begins to measure.
        if not self._rig.engine.wait(self._queued.pop(0), _WAIT_S):
            raise RuntimeError("a copy has not ended; the engine hangs")
        self._thread = threading.Thread(target=self._refill, daemon=True)
        self._begin_s = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.rate = self._ended * self._bytes / (time.perf_counter() - self._begin_s)
        for graph in self._queued:
            self._rig.engine.wait(graph, _WAIT_S)
        failed = [result.error for result in self._rig.engine.poll() if not result.done]
        if failed or self._error:
            raise RuntimeError(f"a copy did not end well: {(failed or [self._error])[0]}")

    def _submit(self) -> int:
        return self._rig.engine.submit([self._op])

    def _refill(self) -> None:
        while not self._stop.is_set():
            self._queued.append(self._submit())
            if not self._rig.engine.wait(self._queued.pop(0), _WAIT_S):
                self._error = "it hangs"
                return
            self._ended += 1


def small_copies_us(device: torch.device, smoke: bool) -> list[float]:
    """How long tokens that were generated take to the host, each time with the wait for them."""
    there = torch.ones(64, dtype=torch.int64, device=device)
    here = torch.empty(64, dtype=torch.int64, pin_memory=True)
    took_us = []
    for _ in range(3 if smoke else 200):
        begin_s = time.perf_counter()
        here.copy_(there, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()
        took_us.append(1e6 * (time.perf_counter() - begin_s))
    return took_us


def launches_us(device: torch.device, smoke: bool) -> list[float]:
    """The host's time for launches, which nobody waits for."""
    x = torch.ones(256, device=device)
    took_us = []
    for _ in range(10 if smoke else 500):
        begin_s = time.perf_counter()
        x.add_(1)
        took_us.append(1e6 * (time.perf_counter() - begin_s))
    synchronize(device)
    return took_us


def host_time(name: str, key: str, copies: Copying, measure: Callable[[], list[float]]) -> Line:
    """What something takes the host beside copies.

    Args:
        key: of the results, with a place for what they are.
        measure: microseconds of each time.
    """
    usual = median(measure())
    with copies:
        beside = measure()
    return Line(
        name,
        "measured",
        f"median {median(beside):.1f} us, worst {max(beside):.0f} us; alone {usual:.1f} us",
        results={key.format("_us"): median(beside), key.format("_worst_us"): max(beside)},
    )


def slowdown(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    """Computing beside copies against alone, and the copies beside it against alone; what launches take
    while copies are queued; and what comes to the host while stores go there."""
    works = [attention(device, smoke), gemm(device, smoke)]
    window_s, rounds = (0.01, 2) if smoke else (0.06, 5)
    layers, tokens = (_LAYERS_SMOKE, 64) if smoke else (_LAYERS, 1024)
    for page in (16, 1):
        count = tokens // page
        rig = Rig(device, **_ROW, layers=layers, page=page, device_pages=count, host_pages=count)
        pages = np.random.default_rng(2).permutation(count)
        rig.move(T.D2H, pages, np.arange(len(pages)))
        before = [pool.clone() for layer in rig.pools for pool in layer]
        for kind, name in ((T.H2D, "loads"), (T.D2H, "stores")):
            copies = Copying(rig, kind, pages)
            with copies:
                time.sleep(window_s)
            copies_alone = copies.rate
            what = f"beside {name} of pages of {page}"
            launches = partial(launches_us, device, smoke)
            yield host_time(f"a launch {what}", f"launch{{}}_{name}_page_{page}", copies, launches)
            if kind == T.D2H:
                small = partial(small_copies_us, device, smoke)
                key = f"small_copy{{}}_page_{page}"
                yield host_time(f"a copy of 512 bytes to the host {what}", key, copies, small)
            for work in works:
                work.run()
                times = max(3, round(window_s / event_s(work.run)))
                alone, beside, rates = [], [], []
                for _ in range(rounds):
                    alone.append(event_s(work.run, times))
                    with copies:
                        beside.append(event_s(work.run, times))
                    rates.append(copies.rate)
                ratio = median_ratio(beside, alone)
                copy_ratio = copies_alone / max(median(rates), 1.0)
                key = f"{work.key}_{name}_page_{page}"
                yield Line(
                    f"{work.name} beside {name} of pages of {page}, against alone",
                    "met" if ratio <= SLOWDOWN_GOAL else "missed",
                    f"{ratio:.3f} x; the {name} {copy_ratio:.3f} x of {copies_alone / 1e9:.1f} GB/s",
                    f"<= {SLOWDOWN_GOAL} x",
                    rig.engine.cuda_note,
                    {f"slowdown_{key}": ratio, f"copies_slowdown_{key}": copy_ratio},
                )
        pools = [pool for layer in rig.pools for pool in layer]
        for pool, want in zip(pools, before, strict=True):  # all of it was copied out and back
            report.check("bytes of copies beside computing", bool(torch.equal(pool, want)), pool.nbytes)


# Other programs.


def program(what: str, command: Sequence[str], stdin: int | None = None) -> Line:
    done = subprocess.run(command, cwd=ROOT, stdin=stdin, check=False)
    note = f"exit status {done.returncode}" if done.returncode else ""
    return Line.judged(what, not done.returncode, note=note)


def sanitizer(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    what = "bytes of four shapes under compute-sanitizer (memcheck)"
    folders = ["/usr/local/cuda/bin", *map(str, sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True))]
    tools = [shutil.which("compute-sanitizer"), *(shutil.which("compute-sanitizer", path=f) for f in folders)]
    tool = next(filter(None, tools), None)
    if tool is None:
        yield Line(what, "not run", note="compute-sanitizer is not installed")
        return
    yield program(what, [tool, "--tool", "memcheck", "--error-exitcode", "9", *child("few-bytes", smoke)])


def overlap(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    what = "bench_overlap.py on this GPU"
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "overlap.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_overlap.py"), "--device", "cuda"]
        command += ["--rounds", "3", "--json", str(out), *(["--smoke"] if smoke else [])]
        line = program(what, command)
        if line.verdict == "met":
            line.results = json.loads(out.read_text())["results"]
            line.value = ", ".join(f"{name} {value:.3f}" for name, value in line.results.items())
    yield line


def made(target: str, smoke: bool) -> Line:
    what = f"make {target} on SGLang with FlashInfer"
    missing = [name for name in ("sglang", "flashinfer") if importlib.util.find_spec(name) is None]
    if missing or smoke:
        return Line(what, "not run", note=f"{', '.join(missing)} not installed" if missing else "a smoke run")
    return program(what, ["make", target])


@dataclass(frozen=True)
class Step:
    """Part of the check, and how long it may take."""

    run: Callable[[Report, torch.device, bool], Iterator[Line]]
    limit_s: float
    by_default: bool = True


STEPS = {
    "bytes": Step(bytes_step, 60),
    "one-copy": Step(one_copy, 60),
    "bandwidth": Step(bandwidth, 120),
    "queueing": Step(queueing, 30),
    "slowdown": Step(slowdown, 60),
    "overlap": Step(overlap, 120),
    "tests": Step(lambda report, device, smoke: iter([made("test", smoke)]), 3600),
    "demo": Step(lambda report, device, smoke: iter([made("demo", smoke)]), 900),
    "sanitizer": Step(sanitizer, 300),
    "few-bytes": Step(few_bytes, 300, by_default=False),
    "one-copy-loads": Step(one_copy_loads, 60, by_default=False),
}


def child(name: str, smoke: bool) -> list[str]:
    """The command that runs one step."""
    return [sys.executable, __file__, name, "--alone", *(["--smoke"] if smoke else [])]


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[STEP ...]")] = None,
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    alone: Annotated[
        bool, typer.Option("--alone", hidden=True, help="Run one step in this process.")
    ] = False,
    total_s: TotalOption = float("inf"),
) -> None:
    end_on_sigterm()
    chosen = names or [name for name, step in STEPS.items() if step.by_default]
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        raise typer.BadParameter(f"there is no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        console.print(
            "verify_gpu: there is no NVIDIA GPU here (torch.cuda.is_available() is False); nothing was run"
        )
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report("verify_gpu", smoke, Machine.here(), {"gpu": torch.cuda.get_device_name(device)})
    if alone:
        tell(STEPS[chosen[0]].run(report, device, smoke), report)
        return
    jobs = [Job(name, child(name, smoke), STEPS[name].limit_s) for name in chosen]
    run_jobs(jobs, total_s, report, json_to)


if __name__ == "__main__":
    typer.run(main)
