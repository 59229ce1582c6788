"""A CPU tier that is too small for everything: what is pinned stays, what goes is a miss."""

from __future__ import annotations

import pytest
from kit import assert_same, cut
from linker_steps import PAGE, PAGES, MakeRig, sequence


def test_a_lease_survives_pressure_on_the_cpu_tier(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    for number in range(1, 6):
        rig.insert(sequence(number * 10000), seed=number)
        rig.evict_all()
    assert rig.stats("CPU")["evicted"] > 0
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_what_the_cpu_tier_had_to_forget_is_a_miss(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    expected = {}
    for number in range(1, 6):
        expected[number] = rig.insert(sequence(number * 10000), seed=number)
        rig.evict_all()
    hits = {}
    for number, bytes_ in expected.items():
        req = rig.request(sequence(number * 10000))
        (slots,) = rig.restore(req)
        hits[number] = len(slots) // PAGE
        assert_same(rig.read(slots), cut(bytes_, 0, len(slots)))
        rig.finish(req, slots)
    assert hits == {1: 0, 2: 0, 3: 0, 4: PAGES, 5: PAGES}


def test_a_full_tier_refuses_and_the_tree_offers_the_node_again(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=PAGES)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    pinning = rig.request(sequence(1))
    rig.match(pinning)
    tokens = sequence(5000)
    expected = rig.insert(tokens, seed=2)
    rig.settle()
    assert rig.stats("CPU")["ready"] == PAGES  # still the first sequence: it is pinned
    rig.abort(pinning)
    rig.insert(tokens, seed=3)  # the next use
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_pressure_takes_the_end_of_a_conversation_before_its_start(make_rig: MakeRig) -> None:
    # The start is the older part, so plain LRU would take it and leave an end that nobody can reach.
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    start = sequence(1)
    rig.insert(start, seed=1)
    rig.insert(start + sequence(5000), seed=2)
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == 2 * PAGES
    rig.insert(sequence(9000, PAGES - 1), seed=3)
    rig.evict_all()
    req = rig.request(start + sequence(5000))
    assert rig.match(req).host_hit_length == (PAGES + 1) * PAGE
    rig.abort(req)


@pytest.mark.parametrize("honoured", [False, True])
def test_priorities_decide_what_goes_first_where_sglang_takes_them_so(
    make_rig: MakeRig, honoured: bool
) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES, by_priority=honoured)
    for number, priority in ((1, 5), (2, 0), (3, 5)):
        rig.insert(sequence(1000 * number), seed=number, priority=priority)
        rig.evict_all()
    kept = [number for number in (1, 2, 3) if rig.match(rig.request(sequence(1000 * number))).host_hit_length]
    assert (1 in kept) is honoured
    assert (2 in kept) is not honoured
    assert 3 in kept
    rig.linker.reset()
