"""What a GPU and its driver do that the engine has to live with, in a minute, before the rest is trusted.

    python benchmarks/probe_gpu.py [STEP ...] [--smoke] [--json FILE|-]

* hazards: does a stream that waits for a word in memory keep other threads from the driver, so that nobody
  can raise the word? A first launch of a kernel, a free of memory, a full launch queue, memory being pinned,
  and streams that share hardware queues.
* engine: loads that come late, under the same disturbances, by the project's own engine: do they end, and
  does every layer read what was loaded?
* sweep: copy engines against a kernel, both ways, pieces of 4 to 256 KiB; the kernel with 1 to 16 CTAs.
* beside: a GEMM and attention beside copies of both kinds, both ways, and the copies beside them.

Every case runs in a process of its own with a time limit, so one that hangs costs its own lines only. Where a
hazard is real the line says "hangs": that is measured, not missed, as nothing of the project was involved.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from common import (
    GIB,
    MIB,
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
from verify_gpu import Rig, T, attention, event_s, gemm

LATE_S = 0.3  # a load is asked for so long after the forward that needs it
RESCUE_S = 4.0  # after it a word is raised from the host, so that no stream is left hanging
_HAZARD_LIMIT_S = 20.0
_SWEEP_LIMIT_S = 45.0
_BESIDE_LIMIT_S = 30.0
_PINNED_BYTES = GIB
_SLEEP_CYCLES = 50_000_000  # some 30 ms
_DRIVER = os.environ.get("PROBE_CUDA_LIBRARY", "libcuda.so.1")  # tests bring a stand-in


class Driver:
    """The few driver calls of which PyTorch has no name, on its context."""

    class _Attributes(ctypes.Structure):
        """CUmemcpyAttributes: sources are read in stream order, beside computing."""

        _fields_ = (
            ("source_order", ctypes.c_int),
            ("locations", ctypes.c_int * 4),
            ("flags", ctypes.c_uint),
        )

    def __init__(self) -> None:
        torch.cuda.synchronize()  # PyTorch initializes the driver
        self._c = ctypes.CDLL(_DRIVER)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), torch.cuda.current_device())
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._batch = getattr(self._c, "cuMemcpyBatchAsync_v2", None)
        self._batch_12 = getattr(self._c, "cuMemcpyBatchAsync", None)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._c, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} returned {code}")

    def bind(self) -> None:
        """Makes the context current on the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def wait_value(self, stream: int, address: int, value: int) -> None:
        arguments = ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), 0
        self._call("cuStreamWaitValue32_v2", *arguments)

    def write_value(self, stream: int, address: int, value: int) -> None:
        arguments = ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint32(value), 0
        self._call("cuStreamWriteValue32_v2", *arguments)

    @property
    def has_batches(self) -> bool:
        return self._batch is not None or self._batch_12 is not None

    def copy_batch(self, to: np.ndarray, source: np.ndarray, sizes: np.ndarray, stream: int) -> None:
        """Many copies in one call. ``to`` and ``source`` are addresses, all arrays uint64."""
        attributes = self._Attributes(1, (ctypes.c_int * 4)(), 1)
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (to, source, sizes)]
        head = (*pointers, ctypes.c_size_t(len(to)), ctypes.byref(attributes), ctypes.byref(first))
        if self._batch is not None:
            code = self._batch(*head, ctypes.c_size_t(1), ctypes.c_void_p(stream))
        else:
            assert self._batch_12 is not None
            code = self._batch_12(*head, ctypes.c_size_t(1), ctypes.byref(failed), ctypes.c_void_p(stream))
        if code:
            raise RuntimeError(f"cuMemcpyBatchAsync returned {code}")


# Hazards.


# Each gets a tensor on the device, so that it allocates nothing but what it is about.


def first_launch(x: torch.Tensor) -> None:
    """Of a kernel that nothing has used: with lazy loading it is loaded now."""
    torch.special.erfcx(x, out=x)


def free_memory(x: torch.Tensor) -> None:
    torch.empty(256 * MIB, dtype=torch.uint8, device=x.device)
    torch.cuda.empty_cache()


def full_queue(x: torch.Tensor) -> None:
    for _ in range(4096):
        x.add_(1)


def pin_memory(x: torch.Tensor) -> None:
    torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)


def nothing(x: torch.Tensor) -> None:
    pass


@dataclass(frozen=True)
class Hazard:
    """What the host does while a stream waits.

    Attributes:
        connections: hardware queues; SGLang asks for 8.
    """

    what: str
    disturb: Callable[[torch.Tensor], None]
    connections: int = 8
    streams: int = 2


HAZARDS = {
    "nothing": Hazard("nothing else happens", nothing),
    "first-launch": Hazard("a kernel is launched for the first time", first_launch),
    "free": Hazard("memory is freed", free_memory),
    "full-queue": Hazard("the launch queue is full", full_queue),
    "pin": Hazard("memory is pinned", pin_memory),
    "queues": Hazard("all streams share one hardware queue", nothing, connections=1, streams=16),
    "eight-queues": Hazard("64 streams share eight hardware queues", nothing, streams=64),
}


def hazard(report: Report, device: torch.device, smoke: bool, case: str) -> Iterator[Line]:
    """A stream waits for a word that another thread's stream raises ``LATE_S`` later, behind a copy."""
    chosen = HAZARDS[case]
    driver = Driver()
    word = torch.zeros(16, dtype=torch.int32, pin_memory=True)
    there, seen = (torch.zeros(MIB, dtype=torch.uint8, device=device) for _ in "ab")
    here = torch.ones(MIB, dtype=torch.uint8, pin_memory=True)
    x = torch.ones(64, device=device).add_(1)  # loaded before anything waits
    streams = [torch.cuda.Stream(device) for _ in range(chosen.streams)]
    forward, copies = streams[0], streams[-1]
    for stream in streams:  # each has had something to do: it has its hardware queue
        with torch.cuda.stream(stream):
            x.add_(1)
    seen.copy_(there)
    torch.cuda.synchronize()
    errors: list[str] = []
    raised_s: list[float] = []
    ended = threading.Event()

    def copier() -> None:
        try:
            driver.bind()
            time.sleep(LATE_S)
            with torch.cuda.stream(copies):
                there.copy_(here, non_blocking=True)
            driver.write_value(copies.cuda_stream, word.data_ptr(), 1)
            raised_s.append(time.perf_counter())
        except Exception as error:
            errors.append(str(error))

    rescued: list[bool] = []
    words = word.numpy()

    def rescue() -> None:
        if not ended.wait(RESCUE_S):
            rescued.append(True)
            words[0] = 1  # a plain store: no driver call

    threads = [threading.Thread(target=work, daemon=True) for work in (copier, rescue)]
    begin_s = time.perf_counter()
    driver.wait_value(forward.cuda_stream, word.data_ptr(), 1)
    for thread in threads:
        thread.start()
    with torch.cuda.stream(forward):
        chosen.disturb(x)
        seen.copy_(there)
    launched_s = time.perf_counter() - begin_s
    forward.synchronize()
    took_s = time.perf_counter() - begin_s
    ended.set()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    what = f"a stream waits for a word, and {chosen.what}"
    if errors:
        yield Line(what, "missed", note=errors[0])
        return
    hangs = bool(rescued)
    if not hangs:
        report.check("bytes behind a word", bool((seen == 1).all()), MIB)
    queued_s = raised_s[0] - begin_s
    yield Line(
        what,
        "measured",
        "hangs until the host raises the word" if hangs else f"goes on after {1000 * took_s:.0f} ms",
        note=f"launches took {1000 * launched_s:.0f} ms, the raise was queued after {1000 * queued_s:.0f} ms",
        results={f"hangs_{case}": float(hangs)},
    )


def late_load(report: Report, device: torch.device, smoke: bool, case: str) -> Iterator[Line]:
    """The same with the project's engine: a forward whose layers are loaded late, as by a read from SSD."""
    chosen = HAZARDS[case]
    layers, count = 8, 32
    rig = Rig(
        device,
        layers=layers,
        buffers=2,
        row=(8, 128),
        dtype=torch.bfloat16,
        page=16,
        device_pages=2 * count,
        host_pages=count,
    )
    sources, targets = np.arange(count), count + np.arange(count)
    slots = np.arange(count)
    rig.move(T.D2H, sources, slots)
    rows = torch.from_numpy(rig.tokens(targets)).to(device)
    expected = [[pool[rows - count * 16].clone() for pool in layer] for layer in rig.pools]
    others = [torch.cuda.Stream(device) for _ in range(chosen.streams - 1)]
    forward = torch.cuda.Stream(device)
    x = torch.ones(64, device=device)
    for stream in (*others, forward):
        with torch.cuda.stream(stream):
            x.add_(1)
    with torch.cuda.stream(forward):  # the memory that the forward is going to use is there
        seen = [[pool[rows] for pool in layer] for layer in rig.pools]
        del seen
    torch.cuda.synchronize()
    gate = rig.engine.make_gate(layers)
    gate.expect(1)
    graphs: list[int] = []

    def load() -> None:
        time.sleep(LATE_S)
        graphs.append(rig.engine.submit([rig.op(T.H2D, targets, slots)], gate=gate))

    thread = threading.Thread(target=load, daemon=True)
    begin_s = time.perf_counter()
    thread.start()
    opened, seen = [], []
    with torch.cuda.stream(forward):
        for number, layer in enumerate(rig.pools):
            opened.append(gate.stream_wait(number, forward.cuda_stream, _HAZARD_LIMIT_S))
            if number == 0:
                chosen.disturb(x)
            seen.append([pool[rows] for pool in layer])
    forward.synchronize()
    took_s = time.perf_counter() - begin_s
    thread.join()
    good = all(opened) and rig.engine.wait(graphs[0], _HAZARD_LIMIT_S) and rig.engine.poll()[0].done
    same = all(
        torch.equal(got, want)
        for got_layer, want_layer in zip(seen, expected, strict=True)
        for got, want in zip(got_layer, want_layer, strict=True)
    )
    report.check("layers that read what a late load brought", good and same, layers)
    yield Line(
        f"the engine's late load, and {chosen.what}",
        "met" if good and same else "missed",
        f"{1000 * took_s:.0f} ms, of which {1000 * LATE_S:.0f} before the load was asked for",
        note="" if good else "a layer did not open, or the load failed",
        results={f"late_load_ms_{case}": 1000 * took_s},
    )


# Copies.


def copy_kernel() -> Callable[..., None]:
    """``copy(to, source, bytes, ctas)``: pieces between addresses in device arrays, by so many CTAs."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(to, source, words, pieces, BLOCK: tl.constexpr):
        for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
            t = tl.load(to + piece).to(tl.pointer_type(tl.int64))
            s = tl.load(source + piece).to(tl.pointer_type(tl.int64))
            for begin in range(0, words, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                inside = at < words
                tl.store(t + at, tl.load(s + at, mask=inside), mask=inside)

    def copy(to: torch.Tensor, source: torch.Tensor, num_bytes: int, ctas: int) -> None:
        words = num_bytes // 8
        block = min(4096, triton.next_power_of_2(words))
        kernel[(ctas,)](to, source, words, len(to), BLOCK=block, num_warps=max(1, block // 256))

    return copy


class Copies:
    """Pieces at random places of pinned and of device memory, and the ways to copy them."""

    def __init__(self, device: torch.device, pool_bytes: int) -> None:
        self.device, self.driver = device, Driver()
        self.host = torch.empty(pool_bytes, dtype=torch.uint8, pin_memory=True)
        self.there = torch.randint(0, 256, (pool_bytes,), dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device)
        self._kernel = copy_kernel()

    def choose(self, piece: int, count: int, seed: int = 1) -> None:
        """Which pieces; those of one side never overlap."""
        rng = np.random.default_rng(seed)
        places = len(self.host) // piece
        self.piece, self.count = piece, count
        here, there = (rng.permutation(places)[:count].astype(np.uint64) * piece for _ in "ab")
        self._host_at, self._device_at = here, there
        self._here, self._there = here + self.host.data_ptr(), there + self.there.data_ptr()
        self._sizes = np.full(count, piece, dtype=np.uint64)
        self._addresses = [
            torch.from_numpy(array.astype(np.int64)).to(self.device) for array in (self._here, self._there)
        ]

    @property
    def num_bytes(self) -> int:
        return self.piece * self.count

    def by_engine(self, to_device: bool) -> None:
        to, source = (self._there, self._here) if to_device else (self._here, self._there)
        self.driver.copy_batch(to, source, self._sizes, self.stream.cuda_stream)

    def by_kernel(self, to_device: bool, ctas: int) -> None:
        here, there = self._addresses
        to, source = (there, here) if to_device else (here, there)
        with torch.cuda.stream(self.stream):
            self._kernel(to, source, self.piece, ctas)

    def gb_s(self, copy: Callable[[], None], repeats: int) -> float:
        copy()
        with torch.cuda.stream(self.stream):
            times = [event_s(copy) for _ in range(repeats)]
        return self.num_bytes / median(times) / 1e9

    def check(self, report: Report, copy: Callable[[bool], None], name: str) -> None:
        """Copies out, changes the device's side, copies back, and compares."""
        rows = torch.from_numpy((self._device_at // self.piece).astype(np.int64)).to(self.device)
        whole = len(self.there) // self.piece * self.piece
        pieces = self.there[:whole].view(-1, self.piece)
        before = pieces[rows].clone()
        torch.cuda.synchronize()
        copy(False)
        self.stream.synchronize()
        pieces[rows] = 0
        torch.cuda.synchronize()
        copy(True)
        self.stream.synchronize()
        report.check(f"bytes by the {name}", bool(torch.equal(pieces[rows], before)), self.num_bytes)


_DIRECTIONS = ((True, "load"), (False, "store"))


def sweep(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    pool_bytes, total_max, repeats = (8 * MIB, 2 * MIB, 1) if smoke else (8 * GIB, 2 * GIB, 4)
    counts = (16,) if smoke else (512, 4096, 32768)
    copies = Copies(device, pool_bytes)
    contiguous = {
        True: lambda: copies.there.copy_(copies.host, non_blocking=True),
        False: lambda: copies.host.copy_(copies.there, non_blocking=True),
    }
    copies.piece, copies.count = pool_bytes, 1
    limit = {to_device: copies.gb_s(copy, 2) for to_device, copy in contiguous.items()}
    yield Line(
        "one contiguous copy",
        "measured",
        f"{limit[True]:.1f} GB/s to the device, {limit[False]:.1f} GB/s to the host",
        results={"contiguous_load_gb_s": limit[True], "contiguous_store_gb_s": limit[False]},
    )
    for kib in (4, 16, 32, 64, 128, 256):
        for count in counts:
            if (kib << 10) * count > total_max:
                continue
            copies.choose(kib << 10, count)
            ways: dict[str, Callable[[bool], None]] = {"kernel": partial(copies.by_kernel, ctas=8)}
            if copies.driver.has_batches:
                ways["copy engine"] = copies.by_engine
            for name, way in ways.items():
                if count == counts[0]:
                    copies.check(report, way, name)
                rates = {to: copies.gb_s(partial(way, to), repeats) for to, _ in _DIRECTIONS}
                shares = [(what, rates[to], rates[to] / limit[to]) for to, what in _DIRECTIONS]
                key = f"{name.replace(' ', '_')}_{kib}k_{count}"
                yield Line(
                    f"{count:,} pieces of {kib} KiB by the {name}",
                    "measured",
                    ", ".join(f"{what} {rate:.1f} GB/s ({share:.2f})" for what, rate, share in shares),
                    results={f"{what}_{key}_gb_s": rates[to] for to, what in _DIRECTIONS},
                )
    copies.choose(2 << 10, 16 if smoke else 65536)
    for ctas in (1, 2, 4, 8, 16):
        rates = {to: copies.gb_s(partial(copies.by_kernel, to, ctas), repeats) for to, _ in _DIRECTIONS}
        yield Line(
            f"pieces of 2 KiB by the kernel with {ctas} CTAs",
            "measured",
            ", ".join(f"{what} {rates[to]:.1f} GB/s" for to, what in _DIRECTIONS),
            results={f"{what}_kernel_{ctas}_ctas_gb_s": rates[to] for to, what in _DIRECTIONS},
        )


def beside(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    """Each work alone, then while copies run on another stream; and what these lose."""
    copies = Copies(device, 4 * MIB if smoke else 2 * GIB)
    copies.choose(32 << 10, 16 if smoke else 4096)
    ways: dict[str, Callable[[bool], None]] = {
        "the kernel with 4 CTAs": partial(copies.by_kernel, ctas=4),
        "the kernel with 16 CTAs": partial(copies.by_kernel, ctas=16),
    }
    if copies.driver.has_batches:
        ways = {"the copy engine": copies.by_engine, **ways}
    rounds, window_s = (2, 0.001) if smoke else (5, 0.02)
    for work in (gemm(device, smoke), attention(device, smoke)):
        work.run()
        count = max(3, round(window_s / event_s(work.run)))
        for name, way in ways.items():
            for to_device, what in _DIRECTIONS:
                alone_gb_s = copies.gb_s(partial(way, to_device), 2)
                # Enough of them to last a little longer than the work.
                num = 2 + round(1.2 * window_s * alone_gb_s * 1e9 / copies.num_bytes)
                alone, together, copied = [], [], []
                for _ in range(rounds):
                    alone.append(event_s(work.run, count))
                    first, last = (torch.cuda.Event(enable_timing=True) for _ in "ab")
                    torch.cuda.synchronize()
                    with torch.cuda.stream(copies.stream):
                        torch.cuda._sleep(_SLEEP_CYCLES)  # both begin when all of it is queued
                    first.record(copies.stream)
                    for _ in range(num):
                        way(to_device)
                    last.record(copies.stream)
                    torch.cuda.current_stream().wait_event(first)
                    together.append(event_s(work.run, count))
                    last.synchronize()
                    copied.append(first.elapsed_time(last) / 1e3)
                slower = median_ratio(together, alone)
                gb_s = num * copies.num_bytes / median(copied) / 1e9
                key = f"{work.key}_{what}_{name.removeprefix('the ').replace(' ', '_')}"
                yield Line(
                    f"{work.name} beside {what}s by {name}",
                    "measured",
                    f"{slower:.3f} x; the {what}s {gb_s:.1f} of {alone_gb_s:.1f} GB/s alone",
                    results={f"slowdown_{key}": slower, f"gb_s_{key}": gb_s},
                )


@dataclass(frozen=True)
class Case:
    """What one child does."""

    run: Callable[..., Iterator[Line]]
    limit_s: float
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _under(run: Callable[..., Iterator[Line]]) -> dict[str, Case]:
    return {
        name: Case(
            run,
            _HAZARD_LIMIT_S,
            (name,),
            (
                ("CUDA_DEVICE_MAX_CONNECTIONS", str(chosen.connections)),
                ("CUDA_MODULE_LOADING", "LAZY"),
            ),
        )
        for name, chosen in HAZARDS.items()
    }


STEPS: dict[str, dict[str, Case]] = {
    "hazards": _under(hazard),
    "engine": _under(late_load),
    "sweep": {"all": Case(sweep, _SWEEP_LIMIT_S)},
    "beside": {"all": Case(beside, _BESIDE_LIMIT_S)},
}


_TOGETHER = ("hazards", "engine")  # whether something goes on, not how fast


def main(
    names: Annotated[list[str] | None, typer.Argument(metavar="[STEP ...]")] = None,
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    case: Annotated[str, typer.Option("--case", hidden=True, help="Run this case in this process.")] = "",
    total_s: TotalOption = float("inf"),
) -> None:
    end_on_sigterm()
    chosen = names or list(STEPS)
    unknown = [name for name in chosen if name not in STEPS]
    if unknown:
        raise typer.BadParameter(f"there is no step {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        console.print("probe_gpu: there is no NVIDIA GPU here (torch.cuda.is_available() is False)")
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report("probe_gpu", smoke, Machine.here(), {"gpu": torch.cuda.get_device_name(device)})
    if case:
        one = STEPS[chosen[0]][case]
        tell(one.run(report, device, smoke, *one.arguments), report)
        return
    flags = ["--smoke"] if smoke else []
    jobs = [
        Job(
            f"{name}: {case_name}",
            [sys.executable, __file__, name, "--case", case_name, *flags],
            one.limit_s,
            dict(one.environment),
            together=name in _TOGETHER,
        )
        for name in chosen
        for case_name, one in STEPS[name].items()
    ]
    run_jobs(jobs, total_s, report, json_to)


if __name__ == "__main__":
    typer.run(main)
