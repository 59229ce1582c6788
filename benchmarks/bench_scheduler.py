"""What the cache costs SGLang's scheduler: the time of its thread, per request and per step.

    python benchmarks/bench_scheduler.py [--smoke] [--json FILE|-] [--repeats N]

SGLang's real radix cache (its Rust core) runs on a real pool on the CPU: with our class and a CPU tier, and,
on the same prompts, as stock ``UnifiedRadixCache``. No model runs: this is about the calls between forwards.
Blocks are small (2 layers, 16 tokens), so copies, which other threads make, hardly disturb.

Each prompt goes its way twice. *new*: it arrives and is matched, is matched again for admission, is inserted
when it has been computed (which stores it), and is evicted. *hit*: it comes back when the device forgot it,
is matched twice, admitted, loaded and inserted. Under stock the second time is like the first.

Times are CPU time of the calling thread: waiting for a copy is not counted, whatever the thread does is.

added_N: what our class takes longer than stock for a request of N tokens, the dearer one of *new* and *hit*.
_over_page_hash: over SGLang's own hashing of the prompt's pages (``get_storage_hash_str``) in the same round.
idle_step_over_stock: a step on which nothing is under way, over that of stock.
events_over_stock: what KV events for routers (``--kv-events-config``) add to a new request of 32 k tokens,
over what they add under stock, which tells of the device alone.
"""

from __future__ import annotations

import gc
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer
from common import ROOT, JsonOption, Machine, Report, SmokeOption, console, median, median_ratio, print_table

sys.path.append(str(ROOT / "tests" / "support"))

from kit import TIMEOUT_S, Rig, as_bytes, build_small_cache, make_pool, radix_key
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_flexkv.common.config import LoadPolicy

PAGE = 16
LENGTHS = {"8k": 8 * 1024, "32k": 32 * 1024, "128k": 128 * 1024}
IDLE_STEPS = 2000
STEPS = ("arrival", "attempt", "admission", "load", "landed", "insert", "stored", "evict", "events")

T = TypeVar("T")


class Clock:
    """CPU time of this thread, by step of a request."""

    def __init__(self) -> None:
        self.us = dict.fromkeys(STEPS, 0.0)

    def __call__(self, step: str, call: Callable[[], T]) -> T:
        before_ns = time.thread_time_ns()
        result = call()
        self.us[step] += (time.thread_time_ns() - before_ns) / 1e3
        return result

    @property
    def total_us(self) -> float:
        return sum(self.us.values())


class Driver:
    """Plays the scheduler's part for one cache: its calls between forwards, each timed.

    Args:
        rig: the engine under our cache; None for a stock cache.
    """

    def __init__(self, parts: tuple[Any, Any, Any], rig: Rig | None) -> None:
        self.cache, self.allocator, _ = parts
        self.rig = rig
        self._number = 0

    def run(self, tokens: Sequence[int], seed: int) -> tuple[Clock, int, list[torch.Tensor]]:
        """One request, from its arrival until the device has forgotten it.

        Returns:
            What it took, the tokens that came from the CPU tier, and of a cache of ours the bytes that the
            device held for it.
        """
        self._number += 1
        cache, clock = self.cache, Clock()
        req = Req(
            rid=f"request-{self._number}",
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        key = radix_key(tokens)
        asked = MatchPrefixParams(key=key, req=req)
        clock("arrival", lambda: cache.match_prefix(asked))
        if self.rig is not None:  # stock does not ask
            clock("attempt", lambda: cache.check_prefetch_progress(req.cache_request_handle))
        match = clock("attempt", lambda: cache.match_prefix(asked))
        req.last_node = match.last_device_node
        lock = clock("admission", lambda: cache.lock(match.last_device_node))
        req.prefix_len = match.device_prefix_len
        loaded = match.host_hit_length
        if loaded:
            back = InitLoadBackParams(
                best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=req
            )
            req.prefix_len += clock("admission", lambda: cache.init_load_back(back))[0]
        slots = clock("admission", lambda: cache.prefix_device_indices(req))
        if len(slots) < len(tokens):
            computed = self.allocator.alloc(len(tokens) - len(slots))
            slots = torch.cat([slots, computed.to(slots.dtype)])
            if self.rig is not None:
                self.rig.write(computed, seed)
        if self.rig is not None:
            clock("load", cache.ready_to_load_host_cache)
            self.rig.engine.drain(TIMEOUT_S)
            clock("landed", lambda: cache.finish_external_linker_loads([req]))
        held = self.rig.read(slots) if self.rig is not None else []
        done = InsertParams(key=radix_key(tokens), value=slots, prev_prefix_len=0)
        clock("insert", lambda: cache.insert(done))
        clock("insert", lambda: cache.unlock(lock))
        clock("insert", lambda: cache.on_release(req, checkpointed=True))
        if self.rig is not None:
            self.rig.engine.drain(TIMEOUT_S)
            clock("stored", cache.check_hicache_events)
        clock("evict", lambda: cache.evict(EvictParams(num_tokens=len(tokens))))
        clock("events", cache.take_events)
        return clock, loaded, held

    def idle_step_us(self, steps: int) -> float:
        """Of one of so many steps on which nothing is under way."""
        before_ns = time.thread_time_ns()
        for _ in range(steps):
            self.cache.check_hicache_events()
        return (time.thread_time_ns() - before_ns) / 1e3 / steps


def page_hash_us(tokens: Sequence[int]) -> float:
    key = radix_key(tokens)
    before_ns = time.thread_time_ns()
    hashes = get_storage_hash_str(key, None, page_size=PAGE)
    after_ns = time.thread_time_ns()
    assert len(hashes) == len(tokens) // PAGE
    return (after_ns - before_ns) / 1e3


def drivers(tokens: int, *, events: bool = False) -> tuple[Driver, Driver, Rig]:
    """Ours and stock, each over a pool of its own with room for one prompt of so many tokens.

    Args:
        events: routers are told what is stored.
    """
    pools = [make_pool("mha", torch.float16, PAGE, num_tokens=2 * tokens, num_layers=2) for _ in range(2)]
    options: dict[str, Any] = {"enable_kv_cache_events": events}
    stock = build_small_cache(pools[0], PAGE, cache_class=UnifiedRadixCache, **options)
    ours = build_small_cache(pools[1], PAGE, **options)
    rig = Rig(ours, num_cpu_blocks=4 * tokens // PAGE, load_policy=LoadPolicy.LOAD)
    return Driver(ours, rig), Driver(stock, None), rig


def measure(report: Report, name: str, tokens: int, repeats: int) -> None:
    """Prompts of one length."""
    ours, stock, rig = drivers(tokens)
    added: dict[str, list[float]] = {"new": [], "hit": []}
    hashes: list[float] = []
    clocks: dict[str, list[Clock]] = {way: [] for way in ("new", "hit", "stock")}
    rng = np.random.default_rng(tokens)
    with rig:
        for number in range(repeats + 1):
            prompt = rng.integers(0, 150_000, tokens).tolist()
            hash_us = page_hash_us(prompt)
            plain, _, _ = stock.run(prompt, 0)
            new, loaded, computed = ours.run(prompt, number)
            report.check("new prompts without a hit", loaded == 0)
            rig.scribble()
            hit, loaded, restored = ours.run(prompt, -1)
            report.check("prompts that came back from the CPU tier", loaded == tokens)
            for got, want in zip(restored, computed, strict=True):
                report.check_bytes("bytes that came back", as_bytes(got).numpy(), as_bytes(want).numpy())
            if number == 0:
                continue  # the first of everything
            hashes.append(hash_us)
            for way, clock in (("new", new), ("hit", hit)):
                added[way].append(clock.total_us - plain.total_us)
                clocks[way].append(clock)
            clocks["stock"].append(plain)
    for way, runs in clocks.items():
        by_step = {step: median([clock.us[step] for clock in runs]) for step in STEPS}
        total = median([clock.total_us for clock in runs])
        report.rows.append({"prompt": name, "way": way, "total_us": total, **by_step})
    report.results[f"page_hash_{name}_us"] = median(hashes)
    ratios = {way: median_ratio(times, hashes) for way, times in added.items()}
    for way, ratio in ratios.items():
        report.results[f"added_{name}_{way}_over_page_hash"] = ratio
    report.results[f"added_{name}_over_page_hash"] = max(ratios.values())


def measure_idle(report: Report, steps: int, repeats: int) -> None:
    ours, stock, rig = drivers(1024)
    pairs = []
    with rig:
        for _ in range(repeats + 1):
            pairs.append((ours.idle_step_us(steps), stock.idle_step_us(steps)))
    mine, plain = zip(*pairs[1:], strict=True)
    report.results["idle_step_us"] = median(mine)
    report.results["idle_step_over_stock"] = median_ratio(mine, plain)
    report.check("idle steps", True, steps * repeats)


def measure_events(report: Report, tokens: int, repeats: int) -> None:
    """New prompts of one length, with events and without."""
    quiet, quiet_stock, quiet_rig = drivers(tokens)
    telling, telling_stock, rig = drivers(tokens, events=True)
    added: list[float] = []
    added_to_stock: list[float] = []
    rng = np.random.default_rng(tokens)
    with quiet_rig, rig:
        for number in range(repeats + 1):
            prompt = rng.integers(0, 150_000, tokens).tolist()
            us = [
                driver.run(prompt, number)[0].total_us
                for driver in (quiet, telling, quiet_stock, telling_stock)
            ]
            if number:
                added.append(us[1] - us[0])
                added_to_stock.append(us[3] - us[2])
        report.check("blocks that routers know", len(rig.engine.take_sightings()[0]) == 0)
    report.results["events_us"] = median(added)
    report.results["events_of_stock_us"] = median(added_to_stock)
    report.results["events_over_stock"] = median_ratio(added, added_to_stock)


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 15,
) -> None:
    steps = 20 if smoke else IDLE_STEPS
    repeats = 1 if smoke else repeats
    report = Report("scheduler", smoke, Machine.here(), {"repeats": repeats, "page": PAGE})
    report.goals.update(
        added_128k_over_page_hash="≤ 0.5",
        added_8k_over_page_hash="≤ 0.6",
        idle_step_over_stock="≤ 1.1",
        events_over_stock="≤ 2",
    )
    gc.disable()  # whose pauses belong to whoever made the garbage
    for name, tokens in LENGTHS.items():
        measure(report, name, tokens // 16 if smoke else tokens, repeats)
        gc.collect()
    measure_idle(report, steps, repeats)
    measure_events(report, LENGTHS["32k"] // (16 if smoke else 1), repeats)
    print_table("microseconds of the scheduler's thread", report.rows, ["prompt", "way", "total_us", *STEPS])
    console.print(f"pages of {PAGE} tokens")
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
