"""What the eviction policies promise beyond what every one of them must keep (test_index_model.py)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from sglang_flexkv import _core
from sglang_flexkv.common.config import EvictionPolicy
from sglang_flexkv.replay.simulator import TierSetup, simulate
from sglang_flexkv.replay.synthetic import TraceKind, generate, write_trace
from sglang_flexkv.replay.trace import Trace, load_trace

CPU, SSD = 0, 1
Policy = _core.EvictionPolicy
ALL = tuple(Policy.__members__.values())


def keys(*ids: int) -> np.ndarray:
    # Spread over all bits, as hashes are: tables take sets from some of them and compare others.
    numbers = np.array(ids, dtype=np.uint64) + np.uint64(1)
    factors = np.array([0x9E3779B97F4A7C15, 0xD1B54A32D192ED03], dtype=np.uint64)
    return numbers[:, None] * factors


def index_of(slots: int, policy: _core.EvictionPolicy, tokens_per_block: int = 16) -> _core.PrefixIndex:
    return _core.PrefixIndex([slots], [policy], tokens_per_block)


def store(
    index: _core.PrefixIndex,
    *ids: int,
    parent: int | None = None,
    importance: int = 0,
    required: bool = False,
) -> int:
    """Stores a prompt, or what follows ``parent`` in it; returns how many of its blocks were new and got a
    slot."""
    above = None if parent is None else keys(parent)[0]
    reserved = index.reserve(CPU, above, keys(*ids), importance=importance, required=required)
    assert reserved is not None
    if reserved[0]:
        index.commit(reserved[0])
    return len(reserved[1])


def use(index: _core.PrefixIndex, *ids: int) -> int:
    lease, tiers, _ = index.acquire(keys(*ids), use=True)
    if lease:
        index.release(lease)
    return len(tiers)


def held(index: _core.PrefixIndex, *ids: int) -> bool:
    return len(index.match(keys(*ids))) == len(ids)


# ---- importance ----


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p.name)
def test_the_less_important_go_first_whatever_the_policy(policy: _core.EvictionPolicy) -> None:
    index = index_of(4, policy)
    for block, importance in ((1, 3), (2, 1), (3, 2), (4, 1)):
        store(index, block, importance=importance)
    for _ in range(3):
        use(index, 2)
        use(index, 4)
    for new in (11, 12):
        assert store(index, new, importance=9, required=True) == 1
    assert [b for b in (1, 2, 3, 4) if held(index, b)] == [1, 3]
    assert index.check_integrity() == ""


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p.name)
def test_a_block_is_as_important_as_the_most_important_that_stored_it(policy: _core.EvictionPolicy) -> None:
    index = index_of(3, policy)
    for block in (1, 2, 3):
        store(index, block, importance=1)
    store(index, 1, importance=5)  # is there, and queued as a victim
    assert index.check_integrity() == ""
    for new in (11, 12):
        store(index, new, importance=5, required=True)
    assert held(index, 1)
    assert index.check_integrity() == ""


def test_an_importance_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="importance"):
        index_of(1, Policy.LRU).reserve(CPU, None, keys(1), importance=_core.IMPORTANCE_MAX + 1)


# ---- single policies ----


def test_looking_is_not_using() -> None:
    index = index_of(2, Policy.LFU)
    store(index, 1)
    store(index, 2)
    use(index, 1)
    for _ in range(5):
        held(index, 2)
    store(index, 3)
    assert held(index, 1)
    assert not held(index, 2)


def test_slru_keeps_what_was_used_over_what_is_new() -> None:
    index = index_of(5, Policy.SLRU)
    for block in range(5):
        store(index, block)
    use(index, 0)
    for new in range(10, 20):
        store(index, new)
    assert held(index, 0)


def test_s3fifo_lets_new_blocks_prove_themselves_in_a_tenth_of_the_tier() -> None:
    index = index_of(40, Policy.S3FIFO)
    for block in range(40):
        store(index, block)
        use(index, block)
    for one_shot in range(1000, 1200):
        store(index, one_shot)
    assert sum(held(index, block) for block in range(40)) >= 35


def test_cost_keeps_what_is_expensive_to_compute_again() -> None:
    index = index_of(6, Policy.COST, tokens_per_block=8192)
    store(index, 1, 2, 3, 4, 5)  # block 5 follows 32 k tokens
    store(index, 9)
    for new in range(10, 13):
        store(index, new)
    assert held(index, 1, 2, 3, 4, 5)
    assert not held(index, 9)


def test_cost_does_not_let_old_merits_count_for_ever() -> None:
    index = index_of(4, Policy.COST)
    store(index, 1)
    for _ in range(10):
        use(index, 1)
    for new in range(100, 200):
        store(index, new)
    assert not held(index, 1)


# ---- adaptive ----


@cache
def trace(kind: TraceKind, requests: int = 3000, seed: int = 7) -> Trace:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.jsonl"
        write_trace(path, generate(kind, requests, seed))
        return load_trace(path)


def hit_rate(kind: TraceKind, cpu_blocks: int, policy: EvictionPolicy, ssd_blocks: int = 0) -> float:
    setup = TierSetup(cpu_blocks, ssd_blocks, cpu_policy=policy, ssd_policy=policy)
    return simulate(trace(kind), setup).hit_rate()


def test_adaptive_keeps_one_shot_prompts_from_sweeping_the_tier() -> None:
    lru, adaptive = (
        hit_rate(TraceKind.SCAN, 1024, policy) for policy in (EvictionPolicy.LRU, EvictionPolicy.ADAPTIVE)
    )
    assert adaptive > 1.2 * lru


@pytest.mark.parametrize("kind", list(TraceKind), ids=lambda kind: kind.value)
@pytest.mark.parametrize("blocks", [512, 2048])
def test_adaptive_is_never_much_worse_than_lru(kind: TraceKind, blocks: int) -> None:
    lru = hit_rate(kind, blocks, EvictionPolicy.LRU)
    assert hit_rate(kind, blocks, EvictionPolicy.ADAPTIVE) >= 0.99 * lru


@pytest.mark.parametrize("seed", [2, 4, 6])
def test_under_a_load_made_for_lru_adaptive_is_as_good_in_a_tier_of_a_dozen_prompts(seed: int) -> None:
    """There the worths that are learned differ by chance alone, and nothing is to be won by them."""
    made_for_lru = trace(TraceKind.STACK, 4000, seed)
    lru, adaptive = (
        simulate(made_for_lru, TierSetup(100, cpu_policy=policy)).hit_rate()
        for policy in (EvictionPolicy.LRU, EvictionPolicy.ADAPTIVE)
    )
    assert adaptive >= 0.99 * lru


@pytest.mark.parametrize("kind", [TraceKind.CHAT, TraceKind.SCAN], ids=lambda kind: kind.value)
def test_with_an_ssd_tier_adaptive_hits_no_less_either(kind: TraceKind) -> None:
    lru = hit_rate(kind, 256, EvictionPolicy.LRU, ssd_blocks=2048)
    assert hit_rate(kind, 256, EvictionPolicy.ADAPTIVE, ssd_blocks=2048) >= 0.99 * lru


def test_without_evidence_adaptive_is_lru() -> None:
    index = index_of(3, Policy.ADAPTIVE)
    for block in (1, 2, 3):
        store(index, block)
    use(index, 1)
    assert store(index, 4) == 1
    assert [b for b in (1, 2, 3, 4) if held(index, b)] == [1, 3, 4]


def taught() -> _core.PrefixIndex:
    """A tier of 200 blocks: fifty prompts of three that come back, and many that come once."""
    index = index_of(200, Policy.ADAPTIVE, tokens_per_block=512)
    for turn in range(60):
        for prompt in range(50):
            ids = [prompt * 3 + i for i in range(3)]
            if use(index, *ids) < 3:
                store(index, *ids)
        store(index, *range(10_000 + 50 * turn, 10_050 + 50 * turn))
    return index


def test_adaptive_refuses_what_is_worth_less_than_its_victim_and_what_follows_it() -> None:
    index = taught()
    evicted = index.stats(CPU).evicted
    new = range(50_000, 50_190)
    stored = store(index, *new)
    assert stored < len(new)
    assert held(index, *new[:stored])  # a leading part, or nothing
    rest = index.reserve(CPU, keys(new[-1])[0], keys(60_000, 60_001))
    assert rest is not None
    assert len(rest[1]) == 0, "nobody would find what follows a part that is not there"
    assert index.stats(CPU).evicted - evicted <= stored
    assert index.check_integrity() == ""


def test_what_is_required_is_not_refused() -> None:
    index = taught()
    assert store(index, *range(50_000, 50_190), required=True) == 190
    assert index.check_integrity() == ""


def test_of_many_that_return_in_turn_adaptive_keeps_some_where_lru_keeps_none() -> None:
    """Sessions at once that do not all fit: each newcomer is as good as what would go for it, and later. That
    takes evidence: a newcomer is never refused for little."""
    turns = 8000
    hits = {}
    for policy in (Policy.LRU, Policy.ADAPTIVE):
        index = index_of(300, policy)
        hits[policy] = 0
        for turn in range(turns):
            ids = range(turn % 60 * 10, turn % 60 * 10 + 10)
            found = use(index, *ids)
            hits[policy] += found * (turn >= turns / 2)
            if found < 10:
                store(index, *ids[found:], parent=ids[found - 1] if found else None)
        assert index.check_integrity() == ""
    assert hits[Policy.LRU] == 0
    assert hits[Policy.ADAPTIVE] > 0.9 * turns / 2 * 10 / 2, "half of them fit"


def test_what_was_left_outside_is_let_in_when_it_turns_out_to_come_back() -> None:
    index = taught()
    new = range(50_000, 50_190)
    assert store(index, *new) < len(new)
    for _ in range(12):
        if use(index, *new) < len(new):
            store(index, *new)
    assert held(index, *new)


@pytest.mark.parametrize("policy", ALL, ids=lambda p: p.name)
def test_only_a_policy_that_may_refuse_stores_the_head_of_what_is_larger_than_the_tier(
    policy: _core.EvictionPolicy,
) -> None:
    index = index_of(20, policy)
    store(index, 1, 2, 3)
    reserved = index.reserve(CPU, None, keys(*range(100, 130)))
    if policy != Policy.ADAPTIVE:
        assert reserved is None
        assert held(index, 1, 2, 3)
    else:
        assert reserved is not None
        index.commit(reserved[0])
        assert reserved[1].tolist() == list(range(20))
        assert held(index, *range(100, 120))
    assert index.reserve(CPU, None, keys(*range(200, 230)), required=True) is None, "all of it or nothing"
    assert index.check_integrity() == ""


def test_adaptive_under_agents_hits_far_more_in_a_small_tier() -> None:
    lru, adaptive = (
        hit_rate(TraceKind.AGENTS, 200, policy) for policy in (EvictionPolicy.LRU, EvictionPolicy.ADAPTIVE)
    )
    assert adaptive > 1.3 * lru


def test_a_replay_gives_the_same_hits_each_time() -> None:
    setup = TierSetup(700, cpu_policy=EvictionPolicy.ADAPTIVE)
    first, second = (simulate(trace(TraceKind.CHAT), setup) for _ in range(2))
    np.testing.assert_array_equal(first.hit_tokens, second.hit_tokens)
