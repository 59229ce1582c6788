"""Replays against a naive model, and the optimum against all that could have been done."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from replay_traces import TOKENS, random_prompts, trace_of

from sglang_flexkv.common.config import Admission, ConfigError, EvictionPolicy
from sglang_flexkv.common.transfer import TransferType
from sglang_flexkv.replay.comparison import compare
from sglang_flexkv.replay.optimum import optimum
from sglang_flexkv.replay.simulator import TierSetup, simulate
from sglang_flexkv.replay.trace import Trace

LRU = EvictionPolicy.LRU
A, B, C, D = ((content,) * 4 for content in range(1, 5))


def held_blocks(path: list[int], resident: object) -> int:
    held = 0
    while held < len(path) and path[held] in resident:  # type: ignore[operator]
        held += 1
    return held


def naive_lru(trace: Trace, capacity: int) -> list[int]:
    """Hit tokens of each request: the leading resident blocks; then the others are stored, and for them the
    least recently used leaves go that are not the request's own."""
    last_use: dict[int, int] = {}
    parents: dict[int, int | None] = {}
    hits = []
    for now, path in enumerate(path.tolist() for path in trace.paths()):
        held = held_blocks(path, last_use)
        hits.append(held * TOKENS)
        while len(last_use) + len(path) - held > capacity:
            leaves = last_use.keys() - {parents[block] for block in last_use} - set(path)
            del last_use[min(leaves, key=lambda block: last_use[block])]
        for block, parent in zip(path, [None, *path], strict=False):
            last_use[block] = now
            parents[block] = parent
    return hits


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("capacity", [6, 13, 40])
def test_one_tier_is_exactly_lru(seed: int, capacity: int) -> None:
    trace = trace_of(random_prompts(seed, requests=300, length_max=6))
    replay = simulate(trace, TierSetup(capacity, cpu_policy=LRU))
    assert replay.cpu_hit_tokens.tolist() == naive_lru(trace, capacity)
    assert not replay.ssd_hit_tokens.any()
    assert not replay.device_hit_tokens.any()
    assert replay.refused_puts == 0
    stored = replay.moved_blocks[TransferType.D2H]
    assert stored * TOKENS == (replay.input_tokens - replay.hit_tokens).sum()
    assert replay.moved_blocks[TransferType.H2D] * TOKENS == replay.hit_tokens.sum()


@pytest.mark.parametrize("policy", EvictionPolicy)
def test_with_room_for_all_every_repeated_block_is_hit(policy: EvictionPolicy) -> None:
    prompts = random_prompts(1, requests=200, length_max=6)
    trace = trace_of(prompts)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for prompt in prompts:
        prefixes = [prompt[: end + 1] for end in range(len(prompt))]
        expected.append(TOKENS * sum(prefix in seen for prefix in prefixes))
        seen.update(prefixes)
    setup = TierSetup(trace.num_blocks, cpu_policy=policy)
    assert simulate(trace, setup).hit_tokens.tolist() == expected
    assert optimum(trace, trace.num_blocks).tolist() == expected


def test_the_incomplete_block_at_the_end_counts_by_its_tokens() -> None:
    trace = trace_of([A, A], missing_tokens=5)
    for setup in (TierSetup(8), TierSetup(4, ssd_blocks=8), TierSetup(4, device_blocks=8)):
        replay = simulate(trace, setup)
        assert replay.hit_tokens.tolist() == [0, 4 * TOKENS - 5]
        assert replay.hit_rate() == 0.5
        assert replay.hit_rate(start=1) == 1.0


def test_ssd_serves_what_memory_lost() -> None:
    trace = trace_of([A, B, A, (*A, 9)], missing_tokens=5)
    alone = simulate(trace, TierSetup(5, cpu_policy=LRU))
    assert alone.hit_tokens.tolist() == [0, 0, TOKENS, 4 * TOKENS]
    replay = simulate(trace, TierSetup(5, ssd_blocks=64, cpu_policy=LRU))
    # A's first block was still in memory; the last one is incomplete.
    assert replay.cpu_hit_tokens.tolist() == [0, 0, TOKENS, 4 * TOKENS]
    assert replay.ssd_hit_tokens.tolist() == [0, 0, 3 * TOKENS - 5, 0]
    assert replay.moved_blocks[TransferType.LOWER2H] == 3
    assert replay.moved_blocks[TransferType.H2LOWER] == replay.ssd_admitted == 9


@pytest.mark.parametrize("seed", range(4))
def test_a_large_ssd_loses_nothing(seed: int) -> None:
    trace = trace_of(random_prompts(seed, requests=200, length_max=6))
    everything = simulate(trace, TierSetup(1000)).hit_tokens
    small = simulate(trace, TierSetup(12, ssd_blocks=1000, cpu_policy=LRU))
    np.testing.assert_array_equal(small.hit_tokens, everything)
    assert small.cpu_hit_tokens.tolist() == naive_lru(trace, 12), "SSD hits are stored like new blocks"
    assert small.ssd_hit_tokens.sum() > 0


def test_admission_on_reuse_writes_less() -> None:
    trace = trace_of([A, B, C, D, A, B, C, A])
    setup = TierSetup(8, ssd_blocks=64, cpu_policy=LRU)
    always = simulate(trace, setup)
    careful = simulate(trace, replace(setup, ssd_admission=Admission.REUSE))
    assert (always.ssd_offered, always.ssd_admitted) == (16, 16)
    assert always.ssd_hit_tokens.tolist() == [0] * 4 + [4 * TOKENS] * 4
    # Each at its second time, when it had to be computed once more; D has none.
    assert (careful.ssd_offered, careful.ssd_admitted) == (28, 12)
    assert careful.ssd_hit_tokens.tolist() == [0] * 7 + [4 * TOKENS]


def test_what_the_device_holds_the_tiers_do_not_see() -> None:
    trace = trace_of([A, A, B, A])
    replay = simulate(trace, TierSetup(8, device_blocks=4, cpu_policy=LRU))
    assert replay.device_hit_tokens.tolist() == [0, 4 * TOKENS, 0, 0]
    assert replay.cpu_hit_tokens.tolist() == [0, 0, 0, 4 * TOKENS]


def test_a_request_larger_than_the_tier() -> None:
    """However much of it a tier takes, it takes nothing it has no room for."""
    trace = trace_of([A, A, (5,), (5,)])
    replay = simulate(trace, TierSetup(2, cpu_policy=LRU))
    assert replay.cpu_hit_tokens[1] <= 2 * TOKENS
    assert replay.cpu_hit_tokens[3] == TOKENS
    assert replay.refused_puts <= 2


def test_sizes_that_make_no_cache() -> None:
    with pytest.raises(ConfigError, match="num_cpu_blocks"):
        simulate(trace_of([A]), TierSetup(0))


def test_progress_adds_up() -> None:
    trace = trace_of(random_prompts(1, requests=600, length_max=3))
    told: list[int] = []
    simulate(trace, TierSetup(10), told.append)
    assert sum(told) == 600
    assert len(told) == 3


# ---- the optimum ----


def best_of_all(trace: Trace, capacity: int) -> int:
    """Hit blocks of the best there is, by trying every content of the cache after every request."""
    paths = [path.tolist() for path in trace.paths()]
    parents = {block: parent for path in paths for block, parent in zip(path, [None, *path], strict=False)}

    def whole(blocks: tuple[int, ...]) -> bool:
        return all(parents[block] is None or parents[block] in blocks for block in blocks)

    @cache
    def best(number: int, resident: frozenset[int]) -> int:
        if number == len(paths):
            return 0
        path = paths[number]
        candidates = sorted(resident | set(path))
        following = (
            frozenset(kept)
            for size in range(min(capacity, len(candidates)) + 1)
            for kept in combinations(candidates, size)
            if whole(kept)
        )
        return held_blocks(path, resident) + max(best(number + 1, kept) for kept in following)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_nothing_is_better_than_the_optimum(seed: int, capacity: int) -> None:
    trace = trace_of(random_prompts(seed, requests=7, length_max=3, branches=2))
    assert optimum(trace, capacity).sum() == best_of_all(trace, capacity) * TOKENS


@pytest.mark.parametrize("seed", range(5))
def test_no_policy_beats_the_optimum(seed: int) -> None:
    trace = trace_of(random_prompts(seed, requests=400, length_max=7))
    results = compare(trace, TierSetup(1), [8, 20, 60], list(EvictionPolicy))
    for result in results:
        assert result.optimum_hit_rate is not None
        assert 0 <= result.hit_rate <= result.optimum_hit_rate
    with_ssd = compare(trace, TierSetup(1, ssd_blocks=30), [8, 20], [LRU])
    assert all(r.hit_rate <= (r.optimum_hit_rate or 0) for r in with_ssd)


def test_a_comparison_names_everything() -> None:
    trace = trace_of([A, B, A, A])
    (result,) = compare(trace, TierSetup(1, ssd_blocks=16), [4], [LRU], block_bytes=100)
    assert (result.cpu_blocks, result.ssd_blocks, result.policy, result.requests) == (4, 16, "lru", 4)
    assert result.input_tokens == 16 * TOKENS
    assert (result.cpu_hit_tokens, result.ssd_hit_tokens, result.hit_tokens) == (
        4 * TOKENS,
        4 * TOKENS,
        8 * TOKENS,
    )
    assert (result.cpu_hit_rate, result.ssd_hit_rate, result.hit_rate) == (0.25, 0.25, 0.5)
    assert result.warm_hit_rate == 1.0
    assert result.optimum_hit_rate == 0.5
    assert result.moved_bytes == {"H2D": 800, "D2H": 800, "DISK2H": 400, "H2DISK": 800}
    assert result.cpu_evicted == 8
    assert 0 < result.control_us_median <= result.control_us_p99
    (bare,) = compare(trace, TierSetup(1), [4], [LRU], with_optimum=False)
    assert bare.optimum_hit_rate is None
    assert bare.moved_bytes is None
