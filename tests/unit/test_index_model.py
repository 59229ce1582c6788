"""The index against a naive model: every call, both tiers, all eviction policies (see index_model.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from index_model import CPU, LOWER, TIERS, IndexModel, Lookup, Policy, Setup, run_episodes

ROOT = Path(__file__).resolve().parents[2]
POLICIES = list(Policy.__members__.values())
BLOCKS = 2 * Setup.blocks_per_namespace

leaves = st.integers(1, BLOCKS)
tiers = st.sampled_from(TIERS)
lookups = st.sampled_from(Lookup)
records = st.lists(
    st.tuples(leaves, st.booleans(), st.integers(-1, Setup.slots[LOWER])), max_size=Setup.slots[LOWER] + 2
)


class IndexMachine(RuleBasedStateMachine):
    @initialize(
        policies=st.tuples(*[st.sampled_from(POLICIES)] * len(TIERS)),
        tokens_kept=st.sampled_from([0, 1, 9]),
        records=records,
    )
    def start(
        self,
        policies: tuple[Policy, ...],
        tokens_kept: int,
        records: list[tuple[int, bool, int]],
    ) -> None:
        self.model = IndexModel(Setup(policies=policies, tokens_kept=tokens_kept))
        self.model.restore(LOWER, records)

    def part(self, leaf: int, skip: int) -> tuple[int, list[int]]:
        """The block before the part, and the part."""
        path = [0, *self.model.blocks.path(leaf)]
        skip = min(skip, len(path) - 2)
        return path[skip], path[skip + 1 :]

    @rule(leaf=leaves, skip=st.integers(0, 2), lookup=lookups)
    def match(self, leaf: int, skip: int, lookup: Lookup) -> None:
        self.model.match(self.part(leaf, skip)[1], lookup)

    @rule(leaf=leaves, skip=st.integers(0, 2), tier=st.none() | tiers, use=st.booleans(), lookup=lookups)
    def acquire(self, leaf: int, skip: int, tier: object, use: bool, lookup: Lookup) -> None:
        self.model.acquire(self.part(leaf, skip)[1], tier, use, lookup)

    @precondition(lambda self: self.model.blocks.per_block)
    @rule(leaf=leaves, wide=st.booleans(), rest=st.integers(0, 2))
    def match_tokens(self, leaf: int, wide: bool, rest: int) -> None:
        self.model.match_tokens(leaf, wide, rest)

    @precondition(lambda self: self.model.blocks.per_block)
    @rule(leaf=leaves, use=st.booleans(), wide=st.booleans(), rest=st.integers(0, 2))
    def acquire_tokens(self, leaf: int, use: bool, wide: bool, rest: int) -> None:
        self.model.acquire_tokens(leaf, use, wide, rest)

    @precondition(lambda self: self.model.leases)
    @rule(position=st.integers(0, 7))
    def release(self, position: int) -> None:
        self.model.release(position)

    @rule(
        tier=tiers,
        leaf=leaves,
        skip=st.integers(0, 2),
        says_parent=st.booleans(),
        lookup=st.sampled_from([Lookup.KEYS, Lookup.NARROW, Lookup.WIDE]),
        importance=st.sampled_from([0, 0, 1, 127]),
        staging=st.booleans(),
        required=st.booleans(),
    )
    def reserve(
        self,
        tier: object,
        leaf: int,
        skip: int,
        says_parent: bool,
        lookup: Lookup,
        importance: int,
        staging: bool,
        required: bool,
    ) -> None:
        parent, part = self.part(leaf, skip)
        before = parent if says_parent else 0
        self.model.reserve(tier, part, before, lookup, importance, staging, required)

    @rule(tier=tiers, leaf=leaves)
    def writer(self, tier: object, leaf: int) -> None:
        self.model.writer(tier, leaf)

    @rule(leaf=leaves, skip=st.integers(0, 2))
    def watch(self, leaf: int, skip: int) -> None:
        self.model.watch(self.part(leaf, skip)[1])

    @precondition(lambda self: self.model.transactions)
    @rule(position=st.integers(0, 7), failed=st.sets(st.integers(0, 3), max_size=2))
    def commit(self, position: int, failed: set[int]) -> None:
        good = (lambda count: [i not in failed for i in range(count)]) if failed else None
        self.model.commit(position, good)

    @precondition(lambda self: self.model.transactions)
    @rule(position=st.integers(0, 7))
    def abort(self, position: int) -> None:
        self.model.abort(position)

    @rule(tier=tiers, leaf=leaves, skip=st.integers(0, 3))
    def invalidate(self, tier: object, leaf: int, skip: int) -> None:
        self.model.invalidate(tier, self.part(leaf, skip)[1])

    @rule(tier=tiers)
    def invalidate_tier(self, tier: object) -> None:
        self.model.invalidate_tier(tier)

    @rule(tier=tiers, count=st.integers(0, 3))
    def evict(self, tier: object, count: int) -> None:
        self.model.evict(tier, count)

    @rule(tier=tiers, records=records)
    def restore(self, tier: object, records: list[tuple[int, bool, int]]) -> None:
        self.model.restore(tier, records)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "model"):
            self.model.check()
            self.model.check_blocks()


TestIndexAgainstModel = IndexMachine.TestCase
TestIndexAgainstModel.settings = settings(
    max_examples=100, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_random_operations(policy: Policy) -> None:
    run_episodes(policy, seed=1, operations=3000)


def test_the_model_notices_what_is_not_so() -> None:
    """A divergence is found where there is one: here the index is asked behind the model's back."""
    model = IndexModel(Setup())
    model.reserve(CPU, [1, 3])
    model.commit(0)
    model.check()
    for behind_its_back, after in (
        (lambda: model.index.acquire(model.blocks.keys([1])), model.check),
        (lambda: model.index.evict(CPU, 1), model.check_blocks),
    ):
        behind_its_back()
        with pytest.raises(AssertionError, match="the index says"):
            after()


def test_the_script_runs_and_says_what_it_did() -> None:
    script = str(ROOT / "scripts" / "model_check.py")
    done = subprocess.run(
        [sys.executable, script, "--operations", "700", "--seed", "5"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(POLICIES)
