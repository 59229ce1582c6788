"""The control plane at a million blocks: what a prompt costs the scheduler, in microseconds.

    python benchmarks/bench_index.py [--smoke] [--json FILE|-] [--blocks N] [--policy NAME]

Everything is called from Python and timed there, as the scheduler sees it. Prompts are taken in turn from
all over the index, so their entries are not in the processor's caches. One block is 16 tokens, as in a peer's
figures (FlexKV, C++ alone: hash and match 14.5 µs for 8 k tokens and 201 µs for 128 k, insert 29 to 72 µs;
plans from Python 1.3 to 2.7 ms).

hash_match: token ids in, block keys and tiers out, all blocks held.
get_plan: token ids in, lease and transfer graph out, all blocks held in the CPU tier.
put_plan: token ids of a new prompt in, reserved slots and graph out; with room, and (_full) in a full tier.
insert: keys of a new prompt in, slots out (reserve and commit, no tokens kept).
evict: per block, a tier of leaves that were used in random order, a thousand at a time.
bytes_per_block: memory of the index without tokens, two full tiers, prompts of 2,048 tokens.

Microseconds say little about another processor. So each call is followed by a yardstick, and what is compared
with a goal are ratios of such neighbours, which mean the same everywhere:

_over_compare: ``memcmp`` of the prompt's tokens with a copy of them that lies as far away as the index's.
_over_sha256: SHA-256 of the prompt's tokens in one piece; SGLang names its pages by it.
_over_random_reads: so many reads at random places of an array of 96 bytes per block (``numpy.take``).
_over_hash_match: hash and match of as many tokens, all blocks held, in the same run.
_over_ordered_dict: per block, ``OrderedDict.popitem`` of as many keys that were used in random order: the
simplest queue for eviction there is.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from common import (
    FlipOption,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    median,
    median_ratio,
    print_table,
)

from sglang_flexkv import _core
from sglang_flexkv.cache.cache_engine import GlobalCacheEngine
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.common.config import CacheConfig, EvictionPolicy

CPU, SSD = 0, 1
TOKENS_PER_BLOCK = 16
LONG, SHORT = 128 * 1024, 8 * 1024
NAMESPACE = make_namespace({"what": "bench_index"})
EVICTED_AT_ONCE = 1000
BYTES_PER_BLOCK = 96


Call = Callable[[], Any]


def timed_us(call: Call) -> tuple[float, Any]:
    """Microseconds of a call, and its result."""
    begin_s = time.perf_counter()
    result = call()
    return (time.perf_counter() - begin_s) * 1e6, result


def prompts(count: int, tokens: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 150_000, tokens, dtype=np.int32) for _ in range(count)]


def sha256(ids: np.ndarray) -> bytes:
    return hashlib.sha256(ids).digest()


def pop_oldest(queue: OrderedDict[int, None], count: int) -> None:
    """Without a step of Python per key."""
    deque(map(queue.popitem, itertools.repeat(False, count)), maxlen=0)


class Bench:
    def __init__(self, report: Report, blocks: int, repeats: int, policy: EvictionPolicy, flip: bool) -> None:
        self.report = report
        self.blocks = blocks
        self.repeats = repeats
        self.policy = policy
        self.core_policy = getattr(_core.EvictionPolicy, policy.name)
        self.flip = flip
        self._memcmp = ctypes.CDLL(None).memcmp
        self._memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.per_long = LONG // TOKENS_PER_BLOCK
        self.held = prompts(max(2, blocks // self.per_long), LONG, seed=0)

    def note(self, name: str, times: Sequence[float], unit: str = "µs") -> None:
        self.report.results[name] = median(times)
        self.report.rows.append(
            {
                "what": name,
                "median": median(times),
                "fastest": min(times),
                "slowest": max(times),
                "unit": unit,
            }
        )

    def note_over(self, name: str, times: Sequence[float], yardstick: Sequence[float]) -> None:
        self.report.results[name] = median_ratio(times, yardstick)

    def engine(self, room: int) -> GlobalCacheEngine:
        """An engine that holds all prompts in its CPU tier."""
        cache = GlobalCacheEngine(
            CacheConfig(
                tokens_per_block=TOKENS_PER_BLOCK,
                num_cpu_blocks=len(self.held) * self.per_long + room,
                cpu_eviction_policy=self.policy,
            ),
            keep_tokens=True,
        )
        for tokens in self.held:
            self.store(cache, SequenceMeta(tokens, TOKENS_PER_BLOCK, NAMESPACE))
        return cache

    def note_storing(
        self,
        name: str,
        calls: Sequence[Call],
        after: Callable[[Any], None],
        over: str,
        yardsticks: Sequence[Call],
    ) -> None:
        times, yardstick_us = [], []
        for call, yardstick in zip(calls, yardsticks, strict=True):
            us, result = timed_us(call)
            times.append(us)
            after(result)
            yardstick_us.append(timed_us(yardstick)[0])
        self.note(f"{name}_us", times)
        self.note_over(f"{name}_over_{over}", times, yardstick_us)

    @staticmethod
    def store(cache: GlobalCacheEngine, sequence: SequenceMeta) -> None:
        plan = cache.plan_put(None, sequence.block_keys, sequence.token_ids)
        assert plan is not None
        cache.index.commit(plan.parts[0].txn)

    def in_turn(self, number: int) -> np.ndarray:
        """Prompts from all over the index."""
        return self.held[number * 37 % len(self.held)]

    def note_comparing(
        self, name: str, asked: Sequence[np.ndarray], call: Callable[[np.ndarray], Any]
    ) -> list[Any]:
        """Calls that recognise a prompt by its tokens. Returns their results."""
        stored = [ids.copy() for ids in asked]
        again = [ids.copy() for ids in asked]  # the tokens of the yardstick: ours are in the caches by then
        times, yardstick_us, results = [], [], []
        for ids, a, b in zip(asked, again, stored, strict=True):
            us, result = timed_us(partial(call, ids))
            times.append(us)
            results.append(result)
            us, _ = timed_us(partial(self._memcmp, a.ctypes.data, b.ctypes.data, a.nbytes))
            yardstick_us.append(us)
        self.note(f"{name}_us", times)
        self.note_over(f"{name}_over_compare", times, yardstick_us)
        return results

    def match(self, cache: GlobalCacheEngine) -> None:
        index = cache.index
        cases = (("hash_match_128k", LONG, np.int32), ("hash_match_8k", SHORT, np.int32))
        for name, tokens, dtype in (*cases, ("hash_match_128k_int64", LONG, np.int64)):
            asked = [self.in_turn(i)[:tokens].astype(dtype) for i in range(self.repeats)]
            if self.flip:
                asked[0][0] ^= 1
            found = self.note_comparing(name, asked, lambda ids: index.match_tokens(ids, NAMESPACE))
            for ids, (keys, tiers) in zip(asked, found, strict=True):
                wanted = _core.hash_tokens(ids, TOKENS_PER_BLOCK, NAMESPACE)
                self.report.check_bytes("bytes of keys", keys.view(np.uint8), wanted.view(np.uint8))
                self.report.check("matched prompts", len(tiers) == len(wanted) and bool((tiers == 1).all()))

    def get(self, cache: GlobalCacheEngine) -> None:
        def plan_get(ids: np.ndarray) -> Any:
            return cache.plan_get(SequenceMeta(ids, TOKENS_PER_BLOCK, NAMESPACE))

        asked = [self.in_turn(i) for i in range(self.repeats)]
        for plan in self.note_comparing("get_plan_128k", asked, plan_get):
            self.report.check("get plans", plan is not None and plan.num_blocks == self.per_long)
            cache.finish(plan, None)

    def put(self, cache: GlobalCacheEngine, name: str, seed: int, keep: bool) -> None:
        def plan_put(ids: np.ndarray) -> Any:
            sequence = SequenceMeta(ids, TOKENS_PER_BLOCK, NAMESPACE)
            return cache.plan_put(None, sequence.block_keys, ids)

        def check(plan: Any) -> None:
            self.report.check("put plans", plan is not None)
            if keep:
                cache.index.commit(plan.parts[0].txn) if plan.parts[0].txn else None
            else:
                cache.index.abort(plan.parts[0].txn)

        new = prompts(self.repeats, LONG, seed)
        calls = [partial(plan_put, ids) for ids in new]
        yardsticks = [partial(sha256, ids.copy()) for ids in new]
        self.note_storing(name, calls, check, "sha256", yardsticks)

    def insert(self) -> None:
        index = _core.PrefixIndex(
            [self.blocks + (self.repeats + 1) * self.per_long],
            [self.core_policy],
            TOKENS_PER_BLOCK,
        )
        rng = np.random.default_rng(2)

        def new_keys() -> np.ndarray:
            return rng.integers(0, 2**64, (self.per_long, 2), dtype=np.uint64)

        def insert(keys: np.ndarray) -> int:
            reserved = index.reserve(CPU, None, keys)
            assert reserved is not None
            return index.commit(reserved[0])

        for _ in range(len(self.held)):
            insert(new_keys())
        table = np.ones(self.blocks * BYTES_PER_BLOCK // 8, dtype=np.int64)
        self.note_storing(
            "insert_128k",
            [partial(insert, new_keys()) for _ in range(self.repeats)],
            lambda stored: self.report.check("inserted prompts", stored == self.per_long),
            "random_reads",
            [partial(table.take, rng.integers(0, len(table), self.per_long)) for _ in range(self.repeats)],
        )
        self.report.check("integrity of the index", index.check_integrity() == "")
        results = self.report.results
        results["insert_128k_over_hash_match"] = results["insert_128k_us"] / results["hash_match_128k_us"]

    def evict(self, leaves: int, name: str) -> None:
        """Every block is a prompt of its own, and they were used in random order: the worst there is."""
        rng = np.random.default_rng(3)
        times: list[float] = []
        yardstick: list[float] = []
        batch = min(EVICTED_AT_ONCE, leaves // 2)
        rounds = 1 if leaves > EVICTED_AT_ONCE * 10 else self.repeats
        batches = min(self.repeats, leaves // batch // 2) if rounds == 1 else 1
        for _ in range(rounds):
            index = _core.PrefixIndex([leaves], [self.core_policy], TOKENS_PER_BLOCK)
            keys = rng.integers(0, 2**64, (leaves, 1, 2), dtype=np.uint64)
            for key in keys:
                index.commit(index.reserve(CPU, None, key)[0])  # type: ignore[index]
            queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(leaves))
            for number in rng.permutation(leaves).tolist():
                index.release(index.acquire(keys[number], use=True)[0])
                queue.move_to_end(number)
            for _ in range(batches):
                us, count = timed_us(partial(index.evict, CPU, batch))
                times.append(us * 1000 / batch)
                yardstick.append(timed_us(partial(pop_oldest, queue, batch))[0] * 1000 / batch)
                self.report.check("evicted blocks", count == batch, batch)
        self.note(f"evict_ns_per_block_{name}", times, "ns")
        self.note_over(f"evict_{name}_over_ordered_dict", times, yardstick)

    def memory(self) -> None:
        per_prompt = 2048 // TOKENS_PER_BLOCK
        slots = self.blocks // per_prompt * per_prompt
        index = _core.PrefixIndex([slots, slots], [self.core_policy] * 2, TOKENS_PER_BLOCK)
        rng = np.random.default_rng(4)
        for _ in range(slots // per_prompt):
            keys = rng.integers(0, 2**64, (per_prompt, 2), dtype=np.uint64)
            for tier in (CPU, SSD):
                index.commit(index.reserve(tier, None, keys)[0])  # type: ignore[index]
        self.report.check(
            "blocks in both tiers", index.stats(CPU).ready == index.stats(SSD).ready == slots, slots
        )
        self.report.results["bytes_per_block"] = index.memory_bytes / slots


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    flip_a_byte: FlipOption = False,
    blocks: Annotated[int, typer.Option(help="Blocks in the index.")] = 1_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each kind.")] = 50,
    policy: Annotated[EvictionPolicy, typer.Option(help="Eviction policy.")] = EvictionPolicy.ADAPTIVE,
) -> None:
    if smoke:
        blocks, repeats = 20_000, 2
    report = Report(
        "index", smoke, Machine.here(), {"blocks": blocks, "repeats": repeats, "policy": policy.value}
    )
    bench = Bench(report, blocks, repeats, policy, flip_a_byte)
    gc.disable()  # whose pauses belong to whoever made the garbage
    cache = bench.engine(room=bench.per_long)
    bench.match(cache)
    bench.get(cache)
    bench.put(cache, "put_plan_128k", seed=5, keep=False)
    bench.put(cache, "put_plan_128k_full", seed=6, keep=True)
    report.check("integrity of the cache", cache.index.check_integrity() == "")
    del cache
    bench.insert()
    bench.evict(1_000, "1k")
    bench.evict(min(blocks, 1_000_000), "1m")
    bench.memory()
    report.goals.update(bytes_per_block="≤ 96", insert_128k_over_hash_match="≤ 4.2")
    print_table("single calls", report.rows, ["what", "median", "fastest", "slowest", "unit"])
    console.print(f"{blocks:,} blocks of {TOKENS_PER_BLOCK} tokens")
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
