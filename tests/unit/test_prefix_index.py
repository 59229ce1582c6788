"""The promises the users of the index rely on, one by one. test_index_model.py has the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang_flexkv import _core

CPU, SSD = 0, 1


def keys(*ids: int) -> np.ndarray:
    return np.array([[i, i * 7919 + 1] for i in ids], dtype=np.uint64).reshape(-1, 2)


def store(index: _core.PrefixIndex, tier: int, *ids: int, parent: int | None = None) -> None:
    reserved = index.reserve(tier, None if parent is None else keys(parent)[0], keys(*ids))
    assert reserved is not None
    if reserved[0]:
        index.commit(reserved[0])


def held(index: _core.PrefixIndex, *ids: int) -> list[int]:
    return index.match(keys(*ids)).tolist()


def restore(index: _core.PrefixIndex, tier: int, *records: tuple[int, int, int]) -> list[int]:
    """Each record is (block, its parent or 0, slot), the least recently written first."""
    blocks, parents, slots = zip(*records, strict=True) if records else ((), (), ())
    parent_keys = keys(*parents)
    parent_keys[parent_keys[:, 0] == 0] = 0
    return index.restore(tier, keys(*blocks), parent_keys, np.array(slots, dtype=np.int32)).tolist()


def test_reserved_blocks_are_invisible_until_commit() -> None:
    index = _core.PrefixIndex([4, 0])
    txn, positions, slots = index.reserve(CPU, None, keys(1, 2))
    assert positions.tolist() == [0, 1]
    assert len(set(slots.tolist())) == 2
    assert held(index, 1, 2) == []
    assert index.commit(txn) == 2
    assert held(index, 1, 2) == [1, 1]


def test_abort_gives_the_slots_back() -> None:
    index = _core.PrefixIndex([2, 0])
    txn, _, _ = index.reserve(CPU, None, keys(1, 2))
    assert index.reserve(CPU, None, keys(3)) is None
    assert index.abort(txn)
    assert not index.abort(txn)
    assert index.stats(CPU).free == 2
    store(index, CPU, 3, 4)
    assert index.check_integrity() == ""


def test_commit_publishes_only_what_was_written() -> None:
    index = _core.PrefixIndex([4, 0])
    txn, _, _ = index.reserve(CPU, None, keys(1, 2, 3))
    assert index.commit(txn, np.array([1, 0, 1], dtype=np.uint8)) == 2
    assert held(index, 1, 2, 3) == [1]  # block 3 is there, but not behind a hole
    assert held(index, 3) == [1]
    assert index.check_integrity() == ""


def test_blocks_that_are_held_or_being_written_are_not_reserved_twice() -> None:
    index = _core.PrefixIndex([8, 0])
    store(index, CPU, 1, 2)
    first, positions, _ = index.reserve(CPU, None, keys(1, 2, 3, 4))
    assert positions.tolist() == [2, 3]
    again, positions, _ = index.reserve(CPU, None, keys(1, 2, 3, 4))
    assert again == 0
    assert positions.tolist() == []
    index.commit(first)
    assert index.check_integrity() == ""


def test_who_writes_a_block_is_known_until_it_is_there() -> None:
    index = _core.PrefixIndex([8, 8])
    store(index, CPU, 1)
    first, _, _ = index.reserve(CPU, None, keys(1, 2))
    later, _, _ = index.reserve(CPU, keys(2)[0], keys(3, 4))
    to_ssd, _, _ = index.reserve(SSD, None, keys(1))

    def writers(tier: int) -> list[int]:
        return [index.writer(tier, key) for key in keys(1, 2, 3, 4, 5)]

    assert writers(CPU) == [0, first, later, later, 0]
    assert writers(SSD) == [to_ssd, 0, 0, 0, 0]
    index.commit(first)
    index.abort(later)
    assert writers(CPU) == [0, 0, 0, 0, 0]


def test_what_is_forgotten_in_memory_and_still_read_is_brought_by_nobody() -> None:
    """Its slot is not given back yet, and a block has one at a time."""
    index = _core.PrefixIndex([8, 8])
    for tier in (CPU, SSD):
        store(index, tier, 1, 2)
    reader, _, _ = index.acquire(keys(1))
    index.invalidate_tier(CPU)
    assert index.acquire(keys(1, 2))[0] == 0
    assert index.held(keys(1, 2)).tolist() == [0, 2]
    assert len(index.acquire(keys(2))[1]) == 1
    index.release(reader)
    assert index.acquire(keys(1, 2))[1].tolist() == [SSD, SSD]
    txn, positions, _ = index.reserve(CPU, None, keys(1, 2))
    assert positions.tolist() == [0, 1]
    index.abort(txn)


def test_duplicate_keys_in_one_request_take_one_slot() -> None:
    index = _core.PrefixIndex([4, 0])
    txn, positions, slots = index.reserve(CPU, None, keys(1, 1))
    assert positions.tolist() == [0]
    assert len(slots) == 1
    index.commit(txn)
    assert index.check_integrity() == ""


def test_eviction_takes_leaves_first_so_that_a_prefix_has_no_hole() -> None:
    index = _core.PrefixIndex([4, 0])
    store(index, CPU, 1, 2, 3, 4)
    store(index, CPU, 9)
    store(index, CPU, 10)
    assert held(index, 1, 2, 3, 4) == [1, 1]
    assert index.stats(CPU).evicted == 2


def test_a_parent_that_arrives_after_its_child_still_goes_after_it() -> None:
    index = _core.PrefixIndex([4, 0])
    store(index, CPU, 3, 4, parent=2)  # write_back spills the leaf first
    store(index, CPU, 1, 2)
    held(index, 3, 4)  # the child was used last; its parent must still not go before it
    store(index, CPU, 9)
    assert held(index, 1, 2, 3, 4) == [1, 1, 1]
    assert index.check_integrity() == ""


def test_the_least_recently_used_leaf_goes() -> None:
    index = _core.PrefixIndex([3, 0])
    for i in (1, 2, 3):
        store(index, CPU, i)
    held(index, 1)
    store(index, CPU, 4)
    assert held(index, 2) == []
    assert held(index, 1) == [1]
    assert held(index, 3) == [1]


def test_a_lease_keeps_its_blocks_from_eviction_until_released() -> None:
    index = _core.PrefixIndex([2, 0])
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
    index = _core.PrefixIndex([4, 0])
    store(index, CPU, 1)
    store(index, CPU, 2)
    lease, _, _ = index.acquire(keys(1))
    assert index.reserve(CPU, None, keys(10, 11, 12, 13)) is None
    assert held(index, 2) == [1]
    index.release(lease)


def test_a_block_is_read_from_its_nearest_tier() -> None:
    index = _core.PrefixIndex([4, 4])
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
    index = _core.PrefixIndex([0, 2])
    store(index, SSD, 1, 2)
    lease, _, _ = index.acquire(keys(1, 2))
    assert index.invalidate(SSD, keys(2)) == 1
    assert held(index, 1, 2) == [2]
    assert index.stats(SSD).free == 0
    index.release(lease)
    assert index.stats(SSD).free == 1
    assert index.check_integrity() == ""


def test_invalidating_a_tier_leaves_the_others() -> None:
    index = _core.PrefixIndex([4, 4])
    store(index, CPU, 1)
    store(index, SSD, 1, 2)
    assert index.invalidate_tier(SSD) == 2
    assert held(index, 1, 2) == [1]
    assert index.stats(SSD).free == 4


def test_keys_of_the_wrong_shape_are_refused() -> None:
    index = _core.PrefixIndex([4, 0])
    with pytest.raises(ValueError, match="shape"):
        index.match(np.zeros(4, dtype=np.uint64))
    with pytest.raises(ValueError, match="unknown transaction"):
        index.commit(77)


def test_restored_blocks_are_read_from_the_slots_they_had() -> None:
    index = _core.PrefixIndex([4, 8])
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
    index = _core.PrefixIndex([0, 6])
    restore(index, SSD, (1, 0, 1), (2, 1, 3))
    _, _, slots = index.reserve(SSD, keys(2)[0], keys(3, 4, 5, 6))
    assert slots.tolist() == [0, 2, 4, 5]
    assert index.check_integrity() == ""


@pytest.mark.parametrize(
    ("new", "left"),
    enumerate([[1, 2, 3, 8, 9], [1, 2, 8, 9], [1, 8, 9], [8, 9], [9], []]),
)
def test_restored_blocks_go_leaf_first_and_then_oldest_first(new: int, left: list[int]) -> None:
    index = _core.PrefixIndex([0, 5])
    # The chain 1-2-3 was written before 8 and 9, and its root before its leaf.
    restore(index, SSD, (1, 0, 2), (2, 1, 3), (3, 2, 4), (8, 0, 1), (9, 0, 0))
    index.reserve(SSD, None, keys(*range(100, 100 + new)))
    assert [block for block in (1, 2, 3, 8, 9) if held(index, block)] == left
    assert index.check_integrity() == ""


def test_a_parent_that_did_not_survive_keeps_its_place() -> None:
    index = _core.PrefixIndex([0, 3])
    restore(index, SSD, (3, 2, 0), (4, 2, 1))
    assert index.check_integrity() == ""
    store(index, SSD, 2)  # comes back later, and must not go before its children
    held(index, 3, 4)
    store(index, SSD, 9)
    assert held(index, 2) == [2]
    index.invalidate_tier(SSD)
    assert index.check_integrity() == ""


def test_of_records_that_contradict_each_other_the_later_is_restored() -> None:
    index = _core.PrefixIndex([0, 4])
    same_key = restore(index, SSD, (1, 0, 0), (2, 1, 1), (1, 0, 2))
    assert same_key == [0, 1, 1]
    assert index.acquire(keys(1, 2))[2].tolist() == [2, 1]
    assert index.check_integrity() == ""

    index = _core.PrefixIndex([0, 4])
    assert restore(index, SSD, (1, 0, 3), (2, 0, 3)) == [0, 1]
    assert held(index, 1) == []
    assert held(index, 2) == [2]
    assert index.check_integrity() == ""

    index = _core.PrefixIndex([0, 4])  # an ignored record hides nothing before it
    assert restore(index, SSD, (1, 0, 0), (1, 0, 4), (1, 0, 2), (2, 0, 2)) == [1, 0, 0, 1]
    assert held(index, 1) == [2]
    assert index.check_integrity() == ""


def test_a_slot_that_does_not_exist_is_not_restored() -> None:
    index = _core.PrefixIndex([0, 4])
    assert restore(index, SSD, (1, 0, -1), (2, 1, 4), (3, 2, 2**31 - 1), (4, 9, 3)) == [0, 0, 0, 1]
    assert index.stats(SSD).ready == 1
    assert index.check_integrity() == ""


def test_odd_parents_leave_nothing_behind() -> None:
    index = _core.PrefixIndex([2, 4])
    store(index, CPU, 2, parent=1)
    assert restore(index, SSD, (2, 77, 0), (5, 5, 1)) == [1, 1]
    assert index.check_integrity() == ""


def test_only_an_empty_tier_is_restored() -> None:
    index = _core.PrefixIndex([4, 4])
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


WIDE_TOKEN = np.array([0, 1, 2, 2**40, 4, 5], dtype=np.int64)
NAMESPACE = b"name of 16 bytes"


@pytest.mark.parametrize("call", ["acquire", "acquire_tokens", "reserve"])
def test_a_token_of_more_than_32_bits_is_refused_and_changes_nothing(call: str) -> None:
    index = _core.PrefixIndex([8, 0], tokens_per_block=2, keep_tokens=True)
    names = _core.hash_tokens(np.arange(6, dtype=np.int64), 2, NAMESPACE)
    # Of the first block the tokens are known, of the others not (as after a restart).
    index.commit(index.reserve(CPU, None, names[:1], WIDE_TOKEN)[0])
    if call != "reserve":
        index.commit(index.reserve(CPU, names[0], names[1:])[0])
    free = index.stats(CPU).free
    calls = {
        "acquire": lambda: index.acquire(names, tokens=WIDE_TOKEN),
        "acquire_tokens": lambda: index.acquire_tokens(WIDE_TOKEN, NAMESPACE),
        "reserve": lambda: index.reserve(CPU, None, names, WIDE_TOKEN),
    }
    with pytest.raises(ValueError, match="32 bits"):
        calls[call]()
    assert index.check_integrity() == ""
    assert index.stats(CPU).free == free
    assert index.stats(CPU).pinned == 0


def test_what_was_held_for_long_goes_in_the_order_of_its_use() -> None:
    index = _core.PrefixIndex([4, 0])
    for i in (1, 2, 3):
        store(index, CPU, i)
    leases = [index.acquire(keys(i))[0] for i in (1, 2)]
    for _ in range(3000):
        held(index, 3)
    for lease in leases:
        index.release(lease)
    index.evict(CPU, 1)
    assert [i for i in (1, 2, 3) if held(index, i)] == [2, 3]


def test_another_parent_than_the_block_has_leaves_nothing_behind() -> None:
    index = _core.PrefixIndex([4, 0])
    store(index, CPU, 2, parent=1)
    store(index, CPU, 2, parent=9)
    assert index.check_integrity() == ""


def test_records_whose_parents_go_in_a_circle_are_evicted_all_the_same() -> None:
    index = _core.PrefixIndex([0, 4])
    restore(index, SSD, (1, 2, 0), (2, 1, 1))
    assert index.evict(SSD, 2) == 2
    assert index.num_entries == 0


# ---- Long runs of new blocks ----

LONG = 600  # blocks


def store_all(index: _core.PrefixIndex, run: np.ndarray, parent: np.ndarray | None = None) -> None:
    reserved = index.reserve(CPU, parent, run)
    assert reserved is not None
    assert reserved[1].tolist() == list(range(len(run)))
    assert index.commit(reserved[0]) == len(run)


@pytest.mark.parametrize("commit_first", [True, False])
def test_a_long_run_is_found_from_its_middle(commit_first: bool) -> None:
    index = _core.PrefixIndex([2 * LONG, 0])
    run = keys(*range(1, LONG + 1))
    txn, _, slots = index.reserve(CPU, None, run)
    if commit_first:
        index.commit(txn)
    else:
        assert held(index, 300) == []  # reserved, and nobody's to see
        index.commit(txn)
    lease, tiers, found = index.acquire(run[300:400])
    assert len(tiers) == 100
    assert found.tolist() == slots[300:400].tolist()
    assert index.check_integrity() == ""
    assert index.release(lease)


def test_a_long_run_can_be_evicted_aborted_and_invalidated() -> None:
    index = _core.PrefixIndex([LONG, 0])
    run = keys(*range(1, LONG + 1))
    store_all(index, run)
    assert index.evict(CPU, 100) == 100
    assert len(index.match(run)) == LONG - 100  # from its end
    assert index.evict(CPU, LONG) == LONG - 100
    assert index.num_entries == 0
    txn, _, _ = index.reserve(CPU, None, run)
    assert index.check_integrity() == ""
    assert index.abort(txn)
    assert index.stats(CPU).free == LONG
    store_all(index, run)
    assert index.invalidate(CPU, run[-10:]) == 10
    store_all(index, run[-10:], run[-11])
    txn, _, _ = index.reserve(CPU, None, keys(*range(5001, 5001 + LONG)))
    assert index.commit(txn, np.arange(LONG, dtype=np.uint8) % 2) == LONG // 2
    assert index.check_integrity() == ""


def test_long_runs_may_follow_each_other() -> None:
    index = _core.PrefixIndex([10 * LONG, 0])
    first, second, other = keys(*range(1, 301)), keys(*range(301, 601)), keys(*range(2001, 2301))
    store_all(index, first)
    store_all(index, other)
    store_all(index, second, first[-1])
    assert index.num_entries == 900
    assert index.check_integrity() == ""
    assert len(index.match(np.concatenate([first, second]))) == 600
    assert len(index.match(other)) == 300
    # Blocks go from the end of the prompt, so the second part is linked to the first.
    assert index.evict(CPU, 300) == 300
    assert index.evict(CPU, 310) == 310
    assert index.check_integrity() == ""
    assert len(index.match(first)) in (0, 290)


def test_long_runs_are_as_old_as_the_calls_that_stored_them() -> None:
    index = _core.PrefixIndex([10 * LONG, 0])
    older, newer = keys(*range(1, 301)), keys(*range(2001, 2301))
    first, _, _ = index.reserve(CPU, None, older)
    second, _, _ = index.reserve(CPU, None, newer)
    index.commit(second)
    index.commit(first)
    assert index.evict(CPU, 300) == 300
    assert len(index.match(newer)) == 300


@pytest.mark.parametrize("again", [slice(0, 600), slice(0, 300), slice(250, 600), slice(590, 900)])
def test_blocks_of_a_long_run_are_not_new_again(again: slice) -> None:
    """Whether they are its beginning, its middle, or what a new run goes into."""
    index = _core.PrefixIndex([10 * LONG, 0])
    numbers = list(range(1, 1001))
    store_all(index, keys(*numbers[:600]))
    txn, positions, _ = index.reserve(CPU, None, keys(*numbers[again]))
    assert len(positions) == max(0, again.stop - 600)
    assert index.num_entries == max(600, again.stop)
    if txn:
        index.commit(txn)
    assert index.check_integrity() == ""


def test_a_long_run_meets_blocks_that_came_before_their_parents() -> None:
    """New blocks in front of a fragment that nobody named a parent for, as write_back leaves it."""
    index = _core.PrefixIndex([10 * LONG, 0])
    store(index, CPU, *range(500, 510))
    txn, positions, _ = index.reserve(CPU, None, keys(*range(1, LONG + 1)))
    assert positions.tolist() == [i for i in range(LONG) if not 499 <= i < 509]
    index.commit(txn)
    assert len(held(index, *range(1, LONG + 1))) == LONG
    assert index.check_integrity() == ""


def test_a_long_run_takes_what_was_given_back_in_pieces() -> None:
    index = _core.PrefixIndex([LONG, 0])
    for i in range(60):
        store(index, CPU, *range(1000 * i + 1, 1000 * i + 11))
    for i in range(0, 60, 2):
        index.invalidate(CPU, keys(*range(1000 * i + 1, 1000 * i + 11)))
    memory = index.memory_bytes
    store_all(index, keys(*range(100_001, 100_301)))
    assert index.check_integrity() == ""
    assert len(held(index, *range(100_001, 100_301))) == 300
    assert held(index, *range(1001, 1011)) == [1] * 10
    assert index.memory_bytes == memory
    assert index.check_integrity() == ""


def test_keys_that_come_twice_in_a_long_run_do_no_harm() -> None:
    """Keys are chained, so none does; a block that comes again is the one that is there."""
    index = _core.PrefixIndex([2 * LONG, 0])
    run = keys(*range(1, LONG + 1))
    run[400] = run[200]
    txn, positions, _ = index.reserve(CPU, None, run)
    assert positions.tolist() == [i for i in range(LONG) if i != 400]
    index.commit(txn)
    assert index.check_integrity() == ""
    assert len(index.match(run)) == LONG
    assert index.evict(CPU, LONG) == LONG - 1
    assert index.num_entries == 0
    assert index.check_integrity() == ""


def test_tokens_of_a_long_run_are_compared() -> None:
    index = _core.PrefixIndex([2 * LONG, 0], tokens_per_block=4, keep_tokens=True)
    run = keys(*range(1, LONG + 1))
    tokens = np.arange(4 * LONG, dtype=np.int32)
    index.commit(index.reserve(CPU, None, run, tokens)[0])
    assert len(index.match(run, tokens)) == LONG
    tokens[4 * 300 + 3] += 1
    assert len(index.match(run, tokens)) == 300


def huge_pages_kib() -> int:
    """Of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))


def test_huge_pages_stay_huge_when_the_index_grows() -> None:
    """Lookups are scattered over its arrays: with small pages each of them misses the TLB as well."""
    slots, before = 400_000, huge_pages_kib()
    index = _core.PrefixIndex([slots])
    made = huge_pages_kib() - before
    if made < 2048:
        pytest.skip("the kernel gives no huge pages here")
    ids = np.arange(1, slots + 1, dtype=np.uint64)
    # Has room for a parent as well, so it grows.
    reserved = index.reserve(CPU, None, np.stack([ids, ids * 7919], axis=1))
    assert reserved is not None
    assert len(reserved[1]) == slots
    assert huge_pages_kib() - before >= made
