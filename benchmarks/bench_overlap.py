"""How much of a load hides behind attention: a paged prefill over a pool that is being filled layer by layer.

    python benchmarks/bench_overlap.py [--smoke] [--json FILE|-] [--device cpu|cuda] [--dir DIRECTORY]

A prefix's KV comes back into the pool through ``KVTaskEngine`` (plan, graph, gate, completion) while a
prefill runs over it: every layer waits until it is loaded, attends to all tokens of the prefix, and
multiplies matrices that stay in the cache until a layer takes as long as the case asks for. Three things are
timed in the same run, in changing order, medians over rounds: the prefill alone, the load alone (until each
layer opens), and both together. Clocks start before the load is planned. On CUDA a stream beside the
prefill's waits for every layer as the prefill's does, and events on it say when each was there. Cases: a
prefix in the CPU tier, with a prefill that takes twice as long as its load; a prefix on SSD alone (O_DIRECT,
so no page cache), with prefills of 0.5, 1 and 2 times its load.

- ``exposed_over_first_group``: what of the load is not hidden / time until the first layers are there, CPU
  tier. On CUDA that is how much longer the prefill takes than alone. On the CPU, where both sides share cores
  and memory, it is the time for which the prefill stands still for its load, planning included; that it also
  computes more slowly is ``attention_slowdown``, and both are in the column ``longer_by_ms``.
- ``exposed_beyond_first_group_over_load``: what is exposed beyond those first layers, as a share of the load.
- ``ssd_pipeline_over_max``: together / the longer one of prefill and load alone, the worst case.
- ``attention_slowdown``: attention per layer while the load runs / the same layers alone, the worst case.

On the CPU both sides share cores and memory: torch computes with one thread and the engine copies with one,
the disk's where the prefix is on SSD.
Attention is made of torch's products and fetches each page from memory once, as kernels over paged KV do; on
CUDA it is FlashInfer's where that is installed.
Every byte is verified after every load, and attention must give the same result whether or not a load runs:
before each load the pool is overwritten, so a layer that is read too early is a wrong layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import (
    MIB,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    disk_directory,
    median,
    median_ratio,
    print_table,
)

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.integration.layer_counter import LayerLoadCounter
from sglang_flexkv.kvtask import KVTask, KVTaskEngine

_TIMEOUT_S = 120.0
_NAMESPACE = make_namespace({"bench": "overlap"})
_CPU_RATIO = 2.0  # prefill over load: longer than the load, layer by layer
_SSD_RATIOS = (0.5, 1.0, 2.0)
# Rows and size of the products that make a layer longer: from cache, as in a prefill. On a GPU small ones
# would measure launches.
_PRODUCT = {"cpu": (64, 256), "cuda": (4096, 4096)}
_TOKENS_IN_CACHE = 256  # of one layer's K or V, on a CPU
_FLASHINFER_WORKSPACE_BYTES = 128 * MIB

Attention = Callable[[int], torch.Tensor]  # of a layer: [new tokens, heads, head size]


@dataclass(frozen=True)
class Shape:
    """A prefix of ``tokens`` in pages, and ``new_tokens`` that attend to it."""

    layers: int
    tokens: int
    new_tokens: int
    heads: int
    dtype: torch.dtype
    kv_heads: int = 8
    head_size: int = 128
    page_size: int = 16

    @property
    def num_blocks(self) -> int:
        return self.tokens // self.page_size


# Prefixes of 512 MiB and 1 GiB. On the CPU few queries: attention has to leave room for a prefill that is
# shorter than a load from SSD.
_SHAPES = {
    "cpu": Shape(layers=32, tokens=2048, new_tokens=4, heads=8, dtype=torch.float32),
    "cuda": Shape(layers=32, tokens=8192, new_tokens=1024, heads=32, dtype=torch.bfloat16),
}
_SMOKE_SIZE: dict[str, Any] = {"layers": 4, "tokens": 256}


class Clock:
    """Points in the device's own time: work that is only queued has not been done yet."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class Pool:
    """A paged KV pool like SGLang's, one tensor per layer for K and one for V, and a prefix in it.

    Attributes:
        slots: token slots of the prefix: whole pages in random order, as a paged allocator hands them out.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        rows = (shape.tokens, shape.kv_heads, shape.head_size)
        self.tensors = [
            [torch.zeros(rows, dtype=shape.dtype, device=device) for _ in "kv"] for _ in range(shape.layers)
        ]
        self.pages = np.random.default_rng(1).permutation(shape.num_blocks)
        slots = self.pages[:, None] * shape.page_size + np.arange(shape.page_size)
        self.slots = slots.ravel().astype(np.int64)
        # Drawn on the CPU, so that no device's random numbers matter.
        generator = torch.Generator().manual_seed(2)
        self._original = [
            [torch.randn(rows, generator=generator).to(shape.dtype).to(device) for _ in layer]
            for layer in self.tensors
        ]

    @property
    def buffers(self) -> DeviceBuffers:
        return DeviceBuffers(self.tensors, tokens_per_row=1)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.tensors for tensor in layer)

    def fill(self) -> None:
        for layer, originals in zip(self.tensors, self._original, strict=True):
            for tensor, original in zip(layer, originals, strict=True):
                tensor.copy_(original)

    def damage(self) -> None:
        for tensor in (tensor for layer in self.tensors for tensor in layer):
            tensor.fill_(float("nan"))

    def check(self, report: Report) -> None:
        for layer, originals in zip(self.tensors, self._original, strict=True):
            for tensor, original in zip(layer, originals, strict=True):
                same = torch.equal(tensor.view(torch.uint8), original.view(torch.uint8))
                report.check("bytes after loading", same, tensor.nbytes)


def torch_attention(pool: Pool, queries: torch.Tensor) -> Attention:
    """Attention over the pages, a few at a time: as in a kernel that reads them where they are, each is
    fetched from memory once and used from the cache."""
    shape = pool.shape
    slots = torch.from_numpy(pool.slots).to(queries.device)
    # Without a mask, the heads that share a KV head are nothing but more queries of it.
    grouped = queries.view(shape.new_tokens, shape.kv_heads, -1, shape.head_size).transpose(0, 1)
    grouped = grouped.reshape(shape.kv_heads, -1, shape.head_size) / shape.head_size**0.5
    parts = slots.split(_TOKENS_IN_CACHE)
    scores = grouped.new_empty((*grouped.shape[:2], shape.tokens))
    gathered = queries.new_empty((_TOKENS_IN_CACHE, shape.kv_heads, shape.head_size))

    def heads(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Of some tokens: [heads, tokens, head size]."""
        return torch.index_select(tensor, 0, part, out=gathered[: len(part)]).transpose(0, 1)

    def attend(layer: int) -> torch.Tensor:
        keys, values = pool.tensors[layer]
        for part, out in zip(parts, scores.split(_TOKENS_IN_CACHE, dim=2), strict=True):
            out.copy_(torch.bmm(grouped, heads(keys, part).transpose(1, 2)))
        weights = torch.softmax(scores, dim=2).split(_TOKENS_IN_CACHE, dim=2)
        out = torch.zeros_like(grouped)
        for part, weight in zip(parts, weights, strict=True):
            out.baddbmm_(weight, heads(values, part))
        return out.view(shape.kv_heads, shape.new_tokens, -1, shape.head_size).transpose(0, 1)

    return attend


def flashinfer_attention(pool: Pool, queries: torch.Tensor) -> Attention:
    """FlashInfer's prefill over the pages where they are."""
    flashinfer = importlib.import_module("flashinfer")
    shape, device = pool.shape, queries.device
    workspace = torch.zeros(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    wrapper.plan(
        ints(0, shape.new_tokens),
        ints(0, shape.num_blocks),
        torch.from_numpy(pool.pages.astype(np.int32)).to(device),
        ints(shape.page_size),  # tokens in the last page
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        shape.page_size,
        causal=False,  # all queries come after the whole prefix
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    pages = (shape.num_blocks, shape.page_size, shape.kv_heads, shape.head_size)
    paged = [tuple(tensor.view(pages) for tensor in layer) for layer in pool.tensors]

    def attend(layer: int) -> torch.Tensor:
        out: torch.Tensor = wrapper.run(queries, paged[layer])
        return out

    return attend


@dataclass
class Load:
    """One that runs. ``counter`` is what SGLang's KV pool asks before each layer, here as there."""

    task: KVTask
    gate: _core.LayerGate
    counter: LayerLoadCounter
    index: int


@dataclass
class Run:
    """What one prefill took. ``attention_s`` has an entry per layer."""

    total_s: float
    waited_s: float  # for layers, on the host
    attention_s: list[float]
    layers_during_load: int


class LayerWatch:
    """When each layer of a load was there, on CUDA: a stream waits for one after the other, as a forward's
    does, and records an event behind each. A thread does the queueing, because that may wait on the host for
    what still comes from SSD."""

    def __init__(self, gate: _core.LayerGate, device: torch.device) -> None:
        self._gate, self._device = gate, device
        self._stream = torch.cuda.Stream(device)
        self._events: list[Any] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with torch.cuda.device(self._device):
            for layer in range(self._gate.num_layers):
                if not self._gate.stream_wait(layer, self._stream.cuda_stream, _TIMEOUT_S):
                    return
                event = torch.cuda.Event(enable_timing=True)
                event.record(self._stream)
                self._events.append(event)

    def finish(self) -> list[Any]:
        """The events, which have happened.

        Raises:
            RuntimeError: a layer was not loaded in time.
        """
        self._thread.join()
        if len(self._events) < self._gate.num_layers:
            raise RuntimeError(f"layer {len(self._events)} was not loaded")
        self._stream.synchronize()
        return self._events


class Prefill:
    """All layers of a forward: attention, then products of matrices that make a layer as long as asked."""

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.shape, self.device, self.clock = pool.shape, device, Clock(device)
        shape = pool.shape
        generator = torch.Generator().manual_seed(3)
        queries = torch.randn((shape.new_tokens, shape.heads, shape.head_size), generator=generator)
        queries = queries.to(shape.dtype).to(device)
        paged = device.type == "cuda" and importlib.util.find_spec("flashinfer") is not None
        self.attention_name = "flashinfer" if paged else "torch"
        self._attend = (flashinfer_attention if paged else torch_attention)(pool, queries)
        rows, size = _PRODUCT[device.type]
        dtype = shape.dtype if device.type == "cuda" else torch.float32
        self._hidden = torch.ones((rows, size), device=device, dtype=dtype)
        self._weights = torch.full((size, size), 1 / size, device=device, dtype=dtype)
        self.products_per_layer = 0
        self.outputs: list[torch.Tensor] = []

    def run(self, load: Load | None = None) -> Run:
        """Returns when the last layer was computed. With a load, each layer waits until it is there."""
        self.outputs = []
        marks = []
        waited_s = 0.0
        layers_during_load = 0
        self.clock.synchronize()
        on_cuda = self.device.type == "cuda"
        watch = LayerWatch(load.gate, self.device) if load is not None and on_cuda else None
        begin_s = time.perf_counter()
        for layer in range(self.shape.layers):
            if load is not None:
                asked_s = time.perf_counter()
                load.counter.wait_until(layer)
                waited_s += time.perf_counter() - asked_s
                layers_during_load += not on_cuda and load.gate.open_layers < self.shape.layers
            begin = self.clock.mark()
            self.outputs.append(self._attend(layer))
            marks.append((begin, self.clock.mark()))
            self._multiply(self.products_per_layer)
        self.clock.synchronize()
        total_s = time.perf_counter() - begin_s
        attention_s = [self.clock.between(*pair) for pair in marks]
        if watch is not None:
            last = watch.finish()[-1]
            layers_during_load = sum(self.clock.between(begin, last) > 0 for begin, _ in marks)
        return Run(total_s, waited_s, attention_s, layers_during_load)

    def _multiply(self, times: int) -> None:
        hidden = self._hidden
        for _ in range(times):
            hidden = hidden @ self._weights

    def last(self, total_s: float) -> None:
        """Sets the products per layer so that all layers take ``total_s``, or as long as attention takes."""
        self.products_per_layer = 0
        attention_s = median([self.run().total_s for _ in range(3)])
        steps = 50
        self._multiply(steps)
        self.clock.synchronize()
        begin_s = time.perf_counter()
        self._multiply(steps)
        self.clock.synchronize()
        product_s = (time.perf_counter() - begin_s) / steps
        wanted = (total_s - attention_s) / (self.shape.layers * product_s)
        self.products_per_layer = max(0, round(wanted))


class Bench:
    """A pool, its tiers and a prefix that all of them hold."""

    def __init__(self, shape: Shape, device: torch.device, directory: Path) -> None:
        self.shape, self.pool = shape, Pool(shape, device)
        config = CacheConfig(
            tokens_per_block=shape.page_size,
            num_cpu_blocks=shape.num_blocks,
            enable_ssd=True,
            num_ssd_blocks=shape.num_blocks,
            ssd_cache_dir=(directory,),
            copy_threads=1,
        )
        self.engine = KVTaskEngine(config, self.pool.buffers, namespace=_NAMESPACE)
        self.counter = LayerLoadCounter(
            shape.layers,
            self.engine.make_gate,
            self.engine.poll,
            (lambda: torch.cuda.current_stream().cuda_stream) if device.type == "cuda" else None,
        )
        try:
            self.prefill = Prefill(self.pool, device)
            self.keys = np.random.default_rng(4).integers(1, 1 << 63, (shape.num_blocks, 2), dtype=np.uint64)
            self.pool.fill()
            task = self.engine.create_put(None, self.keys)
            self.engine.launch(task, self.pool.slots)
            self._end(task)
            if not self.engine.sync(_TIMEOUT_S):
                raise RuntimeError("the prefix did not get to SSD")
            self._wait_for_memory()
        except BaseException:
            self.engine.close()
            raise

    def close(self) -> None:
        self.engine.close()

    def _wait_for_memory(self) -> None:
        """Until the CPU tier is pinned, or at least there: what happens once is not part of a load."""
        host = self.engine.host_pool
        deadline = time.monotonic() + _TIMEOUT_S
        while host.populated_bytes < host.total_bytes and time.monotonic() < deadline:
            time.sleep(0.01)

    def _end(self, task: KVTask) -> None:
        if not self.engine.wait([task], _TIMEOUT_S) or task.error:
            raise RuntimeError(f"a transfer did not end well: {task.status.value} {task.error}")
        self.engine.forget(task)

    def prepare(self, tier: str) -> None:
        """Leaves the prefix in the CPU tier, or on SSD alone, and nothing of it in the pool."""
        if tier == "ssd":
            self.engine.clear_tiers(0)
        else:
            task = self.engine.start_prefetch(self.keys)
            if task is not None:
                self._end(task)
        self.pool.damage()

    def _start(self, report: Report, tier: str) -> Load:
        task = self.engine.create_get(self.keys)
        plan = task.plan
        on_ssd = self.shape.num_blocks if tier == "ssd" else 0
        wanted = (self.shape.num_blocks, on_ssd)
        hit = plan is not None and (plan.num_blocks, plan.num_lower_blocks) == wanted
        report.check(f"loads came from {tier}", hit)
        index, gate = self.counter.open_batch()
        gate.expect(task.num_loads)
        self.engine.launch(task, self.pool.slots, gate=gate)
        self.counter.set_consumer(index)
        return Load(task, gate, self.counter, index)

    def _finish(self, report: Report, load: Load) -> None:
        self._end(load.task)
        if not self.counter.close_batch(load.index):
            raise RuntimeError("a layer was not waited for any longer")
        self.pool.check(report)

    def load(self, report: Report, tier: str) -> list[float]:
        """Seconds from the request until each layer was open."""
        clock = self.prefill.clock
        self.prepare(tier)
        clock.synchronize()
        begin = clock.mark()
        load = self._start(report, tier)
        if self.prefill.device.type == "cuda":
            opened = LayerWatch(load.gate, self.prefill.device).finish()
        else:
            opened = []
            for layer in range(self.shape.layers):
                if not load.gate.wait(layer, _TIMEOUT_S):
                    raise RuntimeError(f"layer {layer} was not loaded")
                opened.append(clock.mark())
        self._finish(report, load)
        return [clock.between(begin, mark) for mark in opened]

    def together(self, report: Report, tier: str) -> Run:
        """A prefill whose prefix is being loaded."""
        self.prepare(tier)
        self.prefill.clock.synchronize()
        begin_s = time.perf_counter()
        load = self._start(report, tier)
        planned_s = time.perf_counter() - begin_s
        run = self.prefill.run(load)
        run.total_s += planned_s
        run.waited_s += planned_s
        self._finish(report, load)
        return run


@dataclass
class Times:
    """What the rounds of one case took."""

    on_cuda: bool
    compute: list[Run] = field(default_factory=list)
    load: list[list[float]] = field(default_factory=list)
    together: list[Run] = field(default_factory=list)

    def attention_slowdown(self) -> float:
        """Of those layers that were computed while the load still ran; 1 if there were none."""
        ratios = []
        for alone, loading in zip(self.compute, self.together, strict=True):
            layers = loading.layers_during_load
            if layers:
                ratios.append(sum(loading.attention_s[:layers]) / sum(alone.attention_s[:layers]))
        return median(ratios) if ratios else 1.0

    def row(self) -> dict[str, Any]:
        compute_s = median([run.total_s for run in self.compute])
        load_s = median([open_s[-1] for open_s in self.load])
        first_s = median([open_s[0] for open_s in self.load])
        # Neighbours in time: what slows the machine down for a while slows all three of a round down.
        longer_by = [b.total_s - a.total_s for a, b in zip(self.compute, self.together, strict=True)]
        # Where copies take nothing from the model, it is longer by what it waits. On a CPU both sides share
        # cores and memory, which a load costs whether or not anybody waits for it.
        exposed = longer_by if self.on_cuda else [run.waited_s for run in self.together]
        longer = [max(a.total_s, open_s[-1]) for a, open_s in zip(self.compute, self.load, strict=True)]
        return {
            "compute_over_load": median_ratio(
                [run.total_s for run in self.compute], [open_s[-1] for open_s in self.load]
            ),
            "compute_ms": 1000 * compute_s,
            "load_ms": 1000 * load_s,
            "first_ms": 1000 * first_s,
            "together_ms": 1000 * median([run.total_s for run in self.together]),
            "longer_by_ms": 1000 * median(longer_by),
            "exposed_ms": 1000 * median(exposed),
            "exposed_over_first": median_ratio(exposed, [open_s[0] for open_s in self.load]),
            "exposed_beyond_first_over_load": (median(exposed) - first_s) / load_s,
            "over_max": median_ratio([run.total_s for run in self.together], longer),
            "attention_slowdown": self.attention_slowdown(),
        }


def measure(bench: Bench, report: Report, tier: str, ratio: float, rounds: int) -> dict[str, Any]:
    """Times a case; a row of the report.

    Args:
        ratio: how long a prefill should take, in times that its load takes alone.
    """
    bench.load(report, tier)  # warms up
    load_s = median([bench.load(report, tier)[-1] for _ in range(3)])
    bench.prefill.last(ratio * load_s)
    times = Times(bench.prefill.device.type == "cuda")
    expected: list[torch.Tensor] = []

    def compute() -> None:
        times.compute.append(bench.prefill.run())  # over what the last load brought
        expected[:] = bench.prefill.outputs

    def load() -> None:
        times.load.append(bench.load(report, tier))

    def together() -> None:
        times.together.append(bench.together(report, tier))
        same = all(torch.equal(got, want) for got, want in zip(bench.prefill.outputs, expected, strict=True))
        report.check("layers that attend to the same while loading", same, len(expected))

    compute()
    times.compute.clear()  # only for what to expect
    parts = [compute, load, together]
    for number in range(rounds):
        for part in parts[number % 3 :] + parts[: number % 3]:
            part()
    return {
        "tier": tier,
        "ratio": ratio,
        "products_per_layer": bench.prefill.products_per_layer,
        **times.row(),
    }


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    device_name: Annotated[str, typer.Option("--device", help="Where the pool is: cpu or cuda.")] = "cpu",
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the SSD tier goes, on a disk; default: build/ here.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each case.")] = 7,
) -> None:
    """How much of a load hides behind attention."""
    if device_name not in _SHAPES:
        raise typer.BadParameter(f"--device is cpu or cuda, not {device_name}")
    if device_name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch finds no CUDA device here; use --device cpu")
    shape = _SHAPES[device_name]
    if smoke:
        shape, rounds = replace(shape, **_SMOKE_SIZE), 1
    device = torch.device(device_name)
    torch.set_num_threads(1)
    with disk_directory(directory, "bench-overlap") as scratch, torch.inference_mode():
        report = Report("overlap", smoke, Machine.here(scratch))
        bench = Bench(shape, device, scratch)
        try:
            report.settings = {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "attention": bench.prefill.attention_name,
                "io_engine": bench.engine.describe_lower_tiers()["SSD"][1],
                "mib": bench.pool.num_bytes / MIB,
                "layers": shape.layers,
                "tokens": shape.tokens,
                "new_tokens": shape.new_tokens,
                "page_size": shape.page_size,
                "rounds": rounds,
                "torch_threads": 1,
                "copy_threads": 1,
            }
            for tier, ratio in [("cpu", _CPU_RATIO), *(("ssd", ratio) for ratio in _SSD_RATIOS)]:
                console.print(f"prefix in tier {tier}, prefill {ratio} x its load ...")
                report.rows.append(measure(bench, report, tier, ratio, rounds))
        finally:
            bench.close()
    print_table("prefill and load (medians)", report.rows, list(report.rows[0]))
    in_memory, on_ssd = report.rows[0], report.rows[1:]
    report.results = {
        "exposed_over_first_group": in_memory["exposed_over_first"],
        "exposed_beyond_first_group_over_load": in_memory["exposed_beyond_first_over_load"],
        "ssd_pipeline_over_max": max(row["over_max"] for row in on_ssd),
        "attention_slowdown": max(row["attention_slowdown"] for row in report.rows),
    }
    report.goals = {
        "exposed_over_first_group": "≤ 1.05",
        "exposed_beyond_first_group_over_load": "≤ 0.05",
        "ssd_pipeline_over_max": "≤ 1.15",
    }
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
