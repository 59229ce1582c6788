"""The index against a naive model, and the promises its users rely on, one by one."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_flexkv import _core

CPU, SSD = _core.Tier.CPU, _core.Tier.SSD


def keys(*ids: int) -> np.ndarray:
    return np.array([[i, i * 7919 + 1] for i in ids], dtype=np.uint64).reshape(-1, 2)


def store(index: _core.PrefixIndex, tier: _core.Tier, *ids: int, parent: int | None = None) -> None:
    reserved = index.reserve(tier, None if parent is None else keys(parent)[0], keys(*ids))
    assert reserved is not None
    if reserved[0]:
        index.commit(reserved[0])


def held(index: _core.PrefixIndex, *ids: int) -> list[int]:
    return index.match(keys(*ids)).tolist()


def restore(index: _core.PrefixIndex, tier: _core.Tier, *records: tuple[int, int, int]) -> list[int]:
    """Each record is (block, its parent or 0, slot), the least recently written first."""
    blocks, parents, slots = zip(*records, strict=True) if records else ((), (), ())
    parent_keys = keys(*parents)
    parent_keys[parent_keys[:, 0] == 0] = 0
    return index.restore(tier, keys(*blocks), parent_keys, np.array(slots, dtype=np.int32)).tolist()


def test_reserved_blocks_are_invisible_until_commit() -> None:
    index = _core.PrefixIndex(4, 0)
    txn, positions, slots = index.reserve(CPU, None, keys(1, 2))
    assert positions.tolist() == [0, 1]
    assert len(set(slots.tolist())) == 2
    assert held(index, 1, 2) == []
    assert index.commit(txn) == 2
    assert held(index, 1, 2) == [1, 1]


def test_abort_gives_the_slots_back() -> None:
    index = _core.PrefixIndex(2, 0)
    txn, _, _ = index.reserve(CPU, None, keys(1, 2))
    assert index.reserve(CPU, None, keys(3)) is None
    assert index.abort(txn)
    assert not index.abort(txn)
    assert index.stats(CPU).free == 2
    store(index, CPU, 3, 4)
    assert index.check_integrity() == ""


def test_commit_publishes_only_what_was_written() -> None:
    index = _core.PrefixIndex(4, 0)
    txn, _, _ = index.reserve(CPU, None, keys(1, 2, 3))
    assert index.commit(txn, np.array([1, 0, 1], dtype=np.uint8)) == 2
    assert held(index, 1, 2, 3) == [1]  # block 3 is there, but not behind a hole
    assert held(index, 3) == [1]
    assert index.check_integrity() == ""


def test_blocks_that_are_held_or_being_written_are_not_reserved_twice() -> None:
    index = _core.PrefixIndex(8, 0)
    store(index, CPU, 1, 2)
    first, positions, _ = index.reserve(CPU, None, keys(1, 2, 3, 4))
    assert positions.tolist() == [2, 3]
    again, positions, _ = index.reserve(CPU, None, keys(1, 2, 3, 4))
    assert again == 0
    assert positions.tolist() == []
    index.commit(first)
    assert index.check_integrity() == ""


def test_duplicate_keys_in_one_request_take_one_slot() -> None:
    index = _core.PrefixIndex(4, 0)
    txn, positions, slots = index.reserve(CPU, None, keys(1, 1))
    assert positions.tolist() == [0]
    assert len(slots) == 1
    index.commit(txn)
    assert index.check_integrity() == ""


def test_eviction_takes_leaves_first_so_that_a_prefix_has_no_hole() -> None:
    index = _core.PrefixIndex(4, 0)
    store(index, CPU, 1, 2, 3, 4)
    store(index, CPU, 9)
    store(index, CPU, 10)
    assert held(index, 1, 2, 3, 4) == [1, 1]
    assert index.stats(CPU).evicted == 2


def test_a_parent_that_arrives_after_its_child_still_goes_after_it() -> None:
    index = _core.PrefixIndex(4, 0)
    store(index, CPU, 3, 4, parent=2)  # write_back spills the leaf first
    store(index, CPU, 1, 2)
    held(index, 3, 4)  # the child was used last; its parent must still not go before it
    store(index, CPU, 9)
    assert held(index, 1, 2, 3, 4) == [1, 1, 1]
    assert index.check_integrity() == ""


def test_the_least_recently_used_leaf_goes() -> None:
    index = _core.PrefixIndex(3, 0)
    for i in (1, 2, 3):
        store(index, CPU, i)
    held(index, 1)
    store(index, CPU, 4)
    assert held(index, 2) == []
    assert held(index, 1) == [1]
    assert held(index, 3) == [1]


def test_a_lease_keeps_its_blocks_from_eviction_until_released() -> None:
    index = _core.PrefixIndex(2, 0)
    store(index, CPU, 1, 2)
    lease, tiers, slots = index.acquire(keys(1, 2))
    assert tiers.tolist() == [0, 0]
    assert sorted(slots.tolist()) == [0, 1]
    assert index.reserve(CPU, None, keys(5)) is None
    assert held(index, 1, 2) == [1, 1]
    assert index.release(lease)
    assert not index.release(lease)
    store(index, CPU, 5)
    assert held(index, 1, 2) == [1]


def test_a_request_that_cannot_fit_evicts_nothing() -> None:
    index = _core.PrefixIndex(4, 0)
    store(index, CPU, 1)
    store(index, CPU, 2)
    lease, _, _ = index.acquire(keys(1))
    assert index.reserve(CPU, None, keys(10, 11, 12, 13)) is None
    assert held(index, 2) == [1]
    index.release(lease)


def test_a_block_is_read_from_its_nearest_tier() -> None:
    index = _core.PrefixIndex(4, 4)
    store(index, CPU, 1, 2)
    store(index, SSD, 1, 2, 3)
    assert held(index, 1, 2, 3) == [3, 3, 2]
    lease, tiers, _ = index.acquire(keys(1, 2, 3))
    assert tiers.tolist() == [0, 0, 1]
    only_cpu, tiers, _ = index.acquire(keys(1, 2, 3), CPU)
    assert tiers.tolist() == [0, 0]
    index.release(lease)
    index.release(only_cpu)
    assert index.check_integrity() == ""


def test_an_invalid_block_is_a_miss_at_once_and_keeps_its_slot_while_it_is_read() -> None:
    index = _core.PrefixIndex(0, 2)
    store(index, SSD, 1, 2)
    lease, _, _ = index.acquire(keys(1, 2))
    assert index.invalidate(SSD, keys(2)) == 1
    assert held(index, 1, 2) == [2]
    assert index.stats(SSD).free == 0
    index.release(lease)
    assert index.stats(SSD).free == 1
    assert index.check_integrity() == ""


def test_invalidating_a_tier_leaves_the_others() -> None:
    index = _core.PrefixIndex(4, 4)
    store(index, CPU, 1)
    store(index, SSD, 1, 2)
    assert index.invalidate_tier(SSD) == 2
    assert held(index, 1, 2) == [1]
    assert index.stats(SSD).free == 4


def test_keys_of_the_wrong_shape_are_refused() -> None:
    index = _core.PrefixIndex(4, 0)
    with pytest.raises(ValueError, match="shape"):
        index.match(np.zeros(4, dtype=np.uint64))
    with pytest.raises(ValueError, match="unknown transaction"):
        index.commit(77)


def test_restored_blocks_are_read_from_the_slots_they_had() -> None:
    index = _core.PrefixIndex(4, 8)
    store(index, CPU, 1)
    assert restore(index, SSD, (1, 0, 5), (2, 1, 0), (3, 2, 7)) == [1, 1, 1]
    assert held(index, 1, 2, 3) == [3, 2, 2]
    lease, tiers, slots = index.acquire(keys(1, 2, 3), SSD)
    assert tiers.tolist() == [1, 1, 1]
    assert slots.tolist() == [5, 0, 7]
    index.release(lease)
    assert index.stats(SSD).ready == 3
    assert index.stats(SSD).free == 5
    assert index.check_integrity() == ""


def test_what_was_free_on_the_disk_is_handed_out_low_slots_first() -> None:
    index = _core.PrefixIndex(0, 6)
    restore(index, SSD, (1, 0, 1), (2, 1, 3))
    _, _, slots = index.reserve(SSD, keys(2)[0], keys(3, 4, 5, 6))
    assert slots.tolist() == [0, 2, 4, 5]
    assert index.check_integrity() == ""


@pytest.mark.parametrize(
    ("new", "left"),
    enumerate([[1, 2, 3, 8, 9], [1, 2, 8, 9], [1, 8, 9], [8, 9], [9], []]),
)
def test_restored_blocks_go_leaf_first_and_then_oldest_first(new: int, left: list[int]) -> None:
    index = _core.PrefixIndex(0, 5)
    # The chain 1-2-3 was written before 8 and 9, and its root before its leaf.
    restore(index, SSD, (1, 0, 2), (2, 1, 3), (3, 2, 4), (8, 0, 1), (9, 0, 0))
    index.reserve(SSD, None, keys(*range(100, 100 + new)))
    assert [block for block in (1, 2, 3, 8, 9) if held(index, block)] == left
    assert index.check_integrity() == ""


def test_a_parent_that_did_not_survive_keeps_its_place() -> None:
    index = _core.PrefixIndex(0, 3)
    restore(index, SSD, (3, 2, 0), (4, 2, 1))
    assert index.check_integrity() == ""
    store(index, SSD, 2)  # comes back later, and must not go before its children
    held(index, 3, 4)
    store(index, SSD, 9)
    assert held(index, 2) == [2]
    index.invalidate_tier(SSD)
    assert index.check_integrity() == ""


def test_of_records_that_contradict_each_other_the_later_is_restored() -> None:
    index = _core.PrefixIndex(0, 4)
    same_key = restore(index, SSD, (1, 0, 0), (2, 1, 1), (1, 0, 2))
    assert same_key == [0, 1, 1]
    assert index.acquire(keys(1, 2))[2].tolist() == [2, 1]
    assert index.check_integrity() == ""

    index = _core.PrefixIndex(0, 4)
    assert restore(index, SSD, (1, 0, 3), (2, 0, 3)) == [0, 1]
    assert held(index, 1) == []
    assert held(index, 2) == [2]
    assert index.check_integrity() == ""

    index = _core.PrefixIndex(0, 4)  # an ignored record hides nothing before it
    assert restore(index, SSD, (1, 0, 0), (1, 0, 4), (1, 0, 2), (2, 0, 2)) == [1, 0, 0, 1]
    assert held(index, 1) == [2]
    assert index.check_integrity() == ""


def test_a_slot_that_does_not_exist_is_not_restored() -> None:
    index = _core.PrefixIndex(0, 4)
    assert restore(index, SSD, (1, 0, -1), (2, 1, 4), (3, 2, 2**31 - 1), (4, 9, 3)) == [0, 0, 0, 1]
    assert index.stats(SSD).ready == 1
    assert index.check_integrity() == ""


def test_odd_parents_leave_nothing_behind() -> None:
    index = _core.PrefixIndex(2, 4)
    store(index, CPU, 2, parent=1)
    assert restore(index, SSD, (2, 77, 0), (5, 5, 1)) == [1, 1]
    assert index.check_integrity() == ""


def test_only_an_empty_tier_is_restored() -> None:
    index = _core.PrefixIndex(4, 4)
    assert restore(index, SSD) == []
    txn, _, _ = index.reserve(SSD, None, keys(1))
    with pytest.raises(ValueError, match="not empty"):
        restore(index, SSD, (2, 0, 0))
    index.commit(txn)
    with pytest.raises(ValueError, match="not empty"):
        restore(index, SSD, (2, 0, 0))
    lease, _, _ = index.acquire(keys(1))
    index.invalidate_tier(SSD)
    with pytest.raises(ValueError, match="not empty"):  # dying: its reader still has the slot
        restore(index, SSD, (2, 0, 0))
    index.release(lease)
    assert restore(index, SSD, (2, 0, 0)) == [1]
    assert index.check_integrity() == ""
    with pytest.raises(ValueError, match="one parent and one slot"):
        index.restore(SSD, keys(1, 2), keys(1), np.zeros(2, dtype=np.int32))


class IndexMachine(RuleBasedStateMachine):
    """Random operations on a small index and on a dict of what must be readable.

    Blocks form a tree: block n has parent n // 3, so that prefixes share and branch.
    """

    CAPACITY: ClassVar = {CPU: 7, SSD: 11}

    @initialize(
        records=st.lists(st.tuples(st.integers(1, 60), st.integers(-1, 11)), max_size=12),
    )
    def setup(self, records: list[tuple[int, int]]) -> None:
        self.index = _core.PrefixIndex(self.CAPACITY[CPU], self.CAPACITY[SSD])
        self.slot_of: dict[tuple[_core.Tier, int], int] = {}
        self.txns: list[tuple[int, _core.Tier, list[int], list[int]]] = []
        self.leases: list[tuple[int, list[tuple[_core.Tier, int]]]] = []
        taken = restore(self.index, SSD, *((block, block // 3, slot) for block, slot in records))
        for i in reversed(range(len(records))):
            block, slot = records[i]
            usable = 0 <= slot < self.CAPACITY[SSD] and slot not in self.slot_of.values()
            assert taken[i] == (usable and (SSD, block) not in self.slot_of)
            if taken[i]:
                self.slot_of[SSD, block] = slot

    @staticmethod
    def path(leaf: int) -> list[int]:
        out = []
        while leaf > 0:
            out.append(leaf)
            leaf //= 3
        return out[::-1]

    def forget_evicted(self) -> None:
        """Eviction is the index's choice: what it no longer shows is gone, but never what is pinned."""
        pinned = {pin for _, pins in self.leases for pin in pins}
        for tier, block in list(self.slot_of):
            mask = self.index.match(keys(block))
            here = len(mask) and mask[0] & (1 << int(tier))
            if not here:
                assert (tier, block) not in pinned, "a pinned block was evicted"
                del self.slot_of[tier, block]

    @rule(leaf=st.integers(1, 60), skip=st.integers(0, 2), tier=st.sampled_from([CPU, SSD]))
    def reserve(self, leaf: int, skip: int, tier: _core.Tier) -> None:
        path = self.path(leaf)
        skip = min(skip, len(path) - 1)
        parent = keys(path[skip - 1])[0] if skip else None
        wanted = path[skip:]
        result = self.index.reserve(tier, parent, keys(*wanted))
        self.forget_evicted()
        if result is None:
            return
        txn, positions, slots = result
        busy = {b for _, t, blocks, _ in self.txns if t == tier for b in blocks}
        missing = [b for b in wanted if (tier, b) not in self.slot_of and b not in busy]
        assert [wanted[p] for p in positions] == missing
        in_use = {s for (t, _), s in self.slot_of.items() if t == tier}
        in_use |= {s for _, t, _, ss in self.txns if t == tier for s in ss}
        assert not in_use & set(slots.tolist()), "a slot in use was handed out"
        if txn:
            self.txns.append((txn, tier, missing, slots.tolist()))

    @precondition(lambda self: self.txns)
    @rule(data=st.data())
    def end_transaction(self, data: st.DataObject) -> None:
        txn, tier, blocks, slots = self.txns.pop(data.draw(st.integers(0, len(self.txns) - 1)))
        if data.draw(st.booleans()):
            ok = data.draw(st.lists(st.booleans(), min_size=len(blocks), max_size=len(blocks)))
            assert self.index.commit(txn, np.array(ok, dtype=np.uint8)) == sum(ok)
            for block, slot, good in zip(blocks, slots, ok, strict=True):
                if good:
                    self.slot_of[tier, block] = slot
        else:
            self.index.abort(txn)

    @rule(leaf=st.integers(1, 60), tier=st.sampled_from([None, CPU, SSD]))
    def acquire(self, leaf: int, tier: _core.Tier | None) -> None:
        path = self.path(leaf)
        lease, tiers, slots = self.index.acquire(keys(*path), tier)
        expected = []
        for block in path:
            for candidate in (CPU, SSD) if tier is None else (tier,):
                if (candidate, block) in self.slot_of:
                    expected.append((candidate, block))
                    break
            else:
                break
        assert [(int(t), s) for t, s in zip(tiers, slots, strict=True)] == [
            (int(t), self.slot_of[t, b]) for t, b in expected
        ]
        assert bool(lease) == bool(expected)
        if lease:
            self.leases.append((lease, expected))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        assert self.index.release(lease)

    @rule(block=st.integers(1, 60), tier=st.sampled_from([CPU, SSD]))
    def invalidate(self, block: int, tier: _core.Tier) -> None:
        dropped = self.index.invalidate(tier, keys(block))
        assert dropped == ((tier, block) in self.slot_of)
        self.slot_of.pop((tier, block), None)
        self.leases = [(lease, [pin for pin in pins if pin != (tier, block)]) for lease, pins in self.leases]

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.check_integrity() == ""
        assert self.index.num_leases == len(self.leases)
        assert self.index.num_transactions == len(self.txns)
        for tier in (CPU, SSD):
            assert self.index.stats(tier).ready == sum(t == tier for t, _ in self.slot_of)


TestIndexAgainstModel = IndexMachine.TestCase
TestIndexAgainstModel.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
