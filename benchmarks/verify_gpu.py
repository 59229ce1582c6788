"""Everything that needs an NVIDIA GPU, in one run: is it right, and is it as fast as it should be?

    python benchmarks/verify_gpu.py [--smoke] [--json FILE|-]

* Bytes: MHA and MLA pools of every dtype and pages of 1 to 128 tokens, stored and loaded by the engine on
  the device, compared with PyTorch's own indexing. Again under compute-sanitizer where it is installed.
* Bandwidth of stores and loads, as a share of one contiguous copy of pinned memory by PyTorch, measured next
  to each other.
* The host's time for queueing a load of 64 layers, and what attention loses while one runs.
* bench_overlap.py, and the tests and the demo on SGLang with FlashInfer, where they are installed.

Each line says met, missed or not run, and why. Exit status 1 if anything was missed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    GIB,
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
from rich.table import Table

from sglang_flexkv import _core
from sglang_flexkv.common.storage import DeviceBuffers

BANDWIDTH_GOALS = {1: 0.85, 16: 0.95, 64: 0.95}  # by tokens per page
QUEUE_GOAL_US = 200.0
ATTENTION_GOAL = 1.03
_PIN_TIMEOUT_S = 120.0
_WAIT_S = 120.0

T = _core.TransferType


@dataclass
class Line:
    """One property and whether it holds."""

    what: str
    verdict: str  # met, missed, not run
    value: str = ""
    goal: str = ""
    note: str = ""


class Rig:
    """A pool of KV on a device and the engine over it.

    Args:
        row: shape of one token in one buffer.
        buffers: per layer: 2 for MHA, 1 for MLA.
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
    ) -> None:
        self.page, self.layers = page, layers
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
        self.host = _core.HostPool(host_pages, slot_bytes)
        self.engine = _core.TransferEngine(
            layout, self.host, copy_threads=2, cuda_device=self.buffers.cuda_device
        )
        deadline = time.monotonic() + _PIN_TIMEOUT_S
        while self.host.populated_bytes < self.host.total_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        self._device = device

    def tokens(self, pages: np.ndarray) -> np.ndarray:
        return (pages[:, None] * self.page + np.arange(self.page)).ravel()

    def move(
        self,
        kind: _core.TransferType,
        pages: np.ndarray,
        slots: np.ndarray,
        gate: _core.LayerGate | None = None,
    ) -> float:
        """Copies pages to slots or back; returns the seconds it took the engine."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        tokens, slots = self.tokens(pages), slots.astype(np.int64)
        op = _core.OpSpec(kind, *((tokens, slots) if kind == T.D2H else (slots, tokens)))
        graph = self.engine.submit([op], gate=gate)
        if not self.engine.wait(graph, _WAIT_S):
            raise RuntimeError("a copy has not ended; the engine hangs")
        (result,) = self.engine.poll()
        if not result.done:
            raise RuntimeError(f"a copy failed: {result.error}")
        return result.ops[0].end_s - result.ops[0].start_s

    def rows(self, pages: np.ndarray) -> torch.Tensor:
        """What the slots of these pages must hold, [page, bytes], by PyTorch's indexing."""
        index = torch.from_numpy(self.tokens(pages)).to(self._device)
        parts = [pool[index].view(len(pages), -1) for layer in self.pools for pool in layer]
        return torch.cat(parts, dim=1).cpu()


def check_bytes(report: Report, device: torch.device, pages_of: Sequence[int] = (1, 16, 64, 128)) -> None:
    """Stores pages of these sizes, loads them elsewhere, and compares all of the pool."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    for page in pages_of:
        for buffers, row in ((2, (2, 64)), (1, (576,)), (2, (3, 7))):
            for dtype in dtypes:
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
                stored = rig.rows(sources).numpy()
                for slot, expected in zip(slots, stored, strict=True):
                    held = rig.host.slot_view(int(slot))[: rig.block_bytes]
                    report.check_bytes("bytes that were stored", held, expected)
                expected_pools = [[pool.clone() for pool in layer] for layer in rig.pools]
                for layer in expected_pools:
                    for pool in layer:
                        pool[rig.tokens(targets)] = pool[rig.tokens(sources)]
                rig.move(T.H2D, targets, slots)
                for layer, expected_layer in zip(rig.pools, expected_pools, strict=True):
                    for pool, want in zip(layer, expected_layer, strict=True):
                        report.check("bytes that were loaded", bool(torch.equal(pool, want)), pool.nbytes)


def contiguous_s(device: torch.device, num_bytes: int) -> Iterator[tuple[float, float]]:
    """Seconds of one contiguous copy of pinned memory, to the host and to the device."""
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def timed(to: torch.Tensor, source: torch.Tensor) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        to.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    timed(there, pinned)
    while True:
        yield timed(pinned, there), timed(there, pinned)


def bandwidth(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    total = (64 << 20) if smoke else 2 * GIB
    repeats = 3 if smoke else 9
    for page, goal in BANDWIDTH_GOALS.items():
        shape = {"layers": 32, "buffers": 2, "row": (8, 128), "dtype": torch.bfloat16}
        pages = total // (page * 32 * 2 * 2048)
        rig = Rig(device, page=page, device_pages=2 * pages, host_pages=pages, **shape)
        chosen, slots = np.random.default_rng(1).permutation(2 * pages)[:pages], np.arange(pages)
        yardstick = contiguous_s(device, pages * rig.block_bytes)
        rig.move(T.D2H, chosen, slots)
        seconds: dict[str, list[float]] = {"store": [], "load": [], "to host": [], "to device": []}
        for _ in range(repeats):
            to_host, to_device = next(yardstick)
            seconds["to host"].append(to_host)
            seconds["to device"].append(to_device)
            seconds["store"].append(rig.move(T.D2H, chosen, slots))
            seconds["load"].append(rig.move(T.H2D, chosen, slots))
        for name, base in (("store", "to host"), ("load", "to device")):
            ratio = median_ratio(seconds[base], seconds[name])
            report.results[f"{name}_ratio_page_{page}"] = ratio
            rate = pages * rig.block_bytes / median(seconds[name]) / 1e9
            yield Line(
                f"{name}, pages of {page}, as a share of one contiguous copy",
                "met" if ratio >= goal else "missed",
                f"{ratio:.3f} ({rate:.1f} GB/s)",
                f">= {goal}",
                rig.engine.cuda_note,
            )


def queue_time(report: Report, device: torch.device) -> Line:
    rig = Rig(
        device,
        layers=64,
        buffers=2,
        row=(8, 128),
        dtype=torch.bfloat16,
        page=16,
        device_pages=512,
        host_pages=512,
    )
    microseconds = []
    for _ in range(50):
        gate = rig.engine.make_gate(64)
        gate.expect(1)
        before = rig.engine.stats()["H2D"]["queue_s"]
        rig.move(T.H2D, np.arange(512), np.arange(512), gate)
        microseconds.append((rig.engine.stats()["H2D"]["queue_s"] - before) * 1e6)
    value = median(microseconds)
    report.results["queue_us_64_layers"] = value
    return Line(
        "host time for queueing a load of 64 layers (8,192 tokens)",
        "met" if value <= QUEUE_GOAL_US else "missed",
        f"{value:.0f} us (best {min(microseconds):.0f})",
        f"<= {QUEUE_GOAL_US:.0f} us",
    )


def attention(device: torch.device) -> tuple[str, Callable[[], None]]:
    """A prefill of 4,096 tokens over 16,384: FlashInfer on pages where it is installed, else PyTorch's."""
    new, held, heads, kv_heads, size = 4096, 16384, 32, 8, 128
    half = {"dtype": torch.bfloat16, "device": device}
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        page = 16
        cache = torch.randn(held // page, 2, page, kv_heads, size, **half)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD"
        )
        counts = {"dtype": torch.int32, "device": device}
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
        )
        query = torch.randn(new, heads, size, **half)
        return "FlashInfer", lambda: wrapper.run(query, cache)
    q = torch.randn(1, heads, new, size, **half)
    k, v = (torch.randn(1, heads, held, size, **half) for _ in "kv")
    return "PyTorch SDPA", lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


@contextmanager
def loading(rig: Rig, pages: np.ndarray) -> Iterator[None]:
    """Loads run all the time, two at least are always queued."""
    op = _core.OpSpec(T.H2D, np.arange(len(pages)), rig.tokens(pages))
    graphs = [rig.engine.submit([op]) for _ in range(400)]
    try:
        yield
        if rig.engine.num_pending < 2:
            raise RuntimeError("the loads ended before attention did; nothing was measured")
    finally:
        for graph in graphs:
            rig.engine.cancel(graph)
        rig.engine.drain(_WAIT_S)
        rig.engine.poll()


def attention_slowdown(report: Report, device: torch.device, smoke: bool) -> Iterator[Line]:
    name, run = attention(device)
    for page in (1, 16):
        rig = Rig(
            device,
            layers=32,
            buffers=2,
            row=(8, 128),
            dtype=torch.bfloat16,
            page=page,
            device_pages=4096 // page,
            host_pages=4096 // page,
        )
        pages = np.random.default_rng(2).permutation(4096 // page)

        def timed(count: int = 5 if smoke else 20) -> float:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

        timed()
        alone, beside = [], []
        for _ in range(3 if smoke else 9):
            alone.append(timed())
            with loading(rig, pages):
                beside.append(timed())
        ratio = median_ratio(beside, alone)
        report.results[f"attention_slowdown_page_{page}"] = ratio
        yield Line(
            f"attention ({name}) while loading pages of {page}, against alone",
            "met" if ratio <= ATTENTION_GOAL else "missed",
            f"{ratio:.3f} x",
            f"<= {ATTENTION_GOAL} x",
        )


def sanitized() -> Line:
    what = "bytes under compute-sanitizer (memcheck)"
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return Line(what, "not run", note="compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--only-bytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return Line(
        what, "missed" if done.returncode else "met", note=done.stdout[-600:] if done.returncode else ""
    )


def overlap(smoke: bool) -> Line:
    what = "bench_overlap.py on this GPU"
    script = ROOT / "benchmarks" / "bench_overlap.py"
    if not script.exists():
        return Line(what, "not run", note="benchmarks/bench_overlap.py is not there")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "overlap.json"
        command = [sys.executable, str(script), "--device", "cuda", "--json", str(out)]
        done = subprocess.run([*command, *(["--smoke"] if smoke else [])], check=False)
        if done.returncode or not out.exists():
            return Line(what, "missed", note=f"exit status {done.returncode}")
        results = json.loads(out.read_text())["results"]
    return Line(what, "met", ", ".join(f"{name} {value:.3f}" for name, value in results.items()))


def real_sglang(smoke: bool) -> Iterator[Line]:
    for target in ("test", "demo"):
        what = f"make {target} on SGLang with FlashInfer"
        missing = [name for name in ("sglang", "flashinfer") if importlib.util.find_spec(name) is None]
        if missing or smoke:
            yield Line(
                what, "not run", note=f"{', '.join(missing)} not installed" if missing else "a smoke run"
            )
            continue
        done = subprocess.run(["make", target], cwd=ROOT, check=False)
        yield Line(what, "missed" if done.returncode else "met")


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    only_bytes: Annotated[
        bool, typer.Option("--only-bytes", help="Only compare bytes; what compute-sanitizer is given.")
    ] = False,
) -> None:
    end_on_sigterm()
    if not torch.cuda.is_available():
        console.print(
            "verify_gpu: there is no NVIDIA GPU here (torch.cuda.is_available() is False); nothing was run"
        )
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report("verify_gpu", smoke, Machine.here(), {"gpu": torch.cuda.get_device_name(device)})
    check_bytes(report, device)
    lines = [
        Line("bytes: MHA and MLA, four dtypes, pages of 1 to 128", "met" if report.verified else "missed")
    ]
    steps: dict[str, Callable[[], Line | Iterator[Line]]] = {
        "compute-sanitizer": sanitized,
        "bandwidth": lambda: bandwidth(report, device, smoke),
        "queueing": lambda: queue_time(report, device),
        "attention": lambda: attention_slowdown(report, device, smoke),
        "overlap": lambda: overlap(smoke),
        "SGLang": lambda: real_sglang(smoke),
    }
    for name, step in () if only_bytes else steps.items():
        try:
            made = step()
            lines += [made] if isinstance(made, Line) else made
        except Exception as error:  # the other lines are worth having
            lines.append(Line(name, "missed", note=f"{type(error).__name__}: {error}"[:600]))
    show(lines)
    report.rows = [asdict(line) for line in lines]
    missed = any(line.verdict == "missed" for line in lines)
    report.check("lines of the table", not missed and bool(lines), len(lines))
    report.finish(json_to)


def show(lines: list[Line]) -> None:
    table = Table(title="verify_gpu")
    for column in ("what", "verdict", "value", "goal", "note"):
        table.add_column(column)
    colours: dict[str, Any] = {"met": "green", "missed": "red", "not run": "yellow"}
    for line in lines:
        verdict = f"[{colours[line.verdict]}]{line.verdict}[/]"
        table.add_row(line.what, verdict, line.value, line.goal, line.note)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
