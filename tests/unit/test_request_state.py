"""The records of requests and their leases."""

from __future__ import annotations

import pytest

from sglang_flexkv.integration import request_state
from sglang_flexkv.integration.request_state import RequestStates


class Rig:
    def __init__(self, pinned_blocks_max: float = 10) -> None:
        self.unpinned: list[int] = []
        self.states = RequestStates(self.unpinned.append, pinned_blocks_max)


def test_leases_together_pin_a_bounded_part_and_the_oldest_goes_first() -> None:
    rig = Rig()
    for number, rid in enumerate("abc", 1):
        rig.states.add_lease(rid, number, 4)
    assert rig.unpinned == [1]
    rig.states.add_lease("b", 4, 4)  # in place of its own: now it is the youngest
    assert rig.unpinned == [1, 2]
    rig.states.add_lease("d", 5, 4)
    assert rig.unpinned == [1, 2, 3]


def test_one_lease_may_pin_more_than_all_may_together() -> None:
    rig = Rig()
    rig.states.add_lease("a", 1, 100)
    assert rig.unpinned == []
    rig.states.add_lease("b", 2, 1)
    assert rig.unpinned == [1]


def test_a_lease_that_is_too_old_ends_and_what_is_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may wait for longer than that: what failed for it must not be tried again."""
    now_s = 0.0
    monkeypatch.setattr(request_state.time, "monotonic", lambda: now_s)
    rig = Rig()
    for number, rid in enumerate("ab", 1):
        rig.states.of(rid).gave_up = True
        rig.states.add_lease(rid, number, 1)
        now_s += 40.0
    rig.states.end_old_leases()
    assert rig.unpinned == [1]
    assert rig.states.known("a").gave_up
    rig.states.end_lease("a")  # which is gone
    assert rig.unpinned == [1]
    now_s += 40.0
    rig.states.end_old_leases()
    assert rig.unpinned == [1, 2]


def test_a_request_that_is_forgotten_leaves_nothing() -> None:
    rig = Rig()
    rig.states.of("a").num_waits = 3
    rig.states.add_lease("a", 1, 1)
    with pytest.raises(AssertionError, match="leases left"):
        rig.states.check_empty()
    assert rig.states.forget("a").num_waits == 3
    assert rig.unpinned == [1]
    rig.states.check_empty()
    assert rig.states.forget("a").num_waits == 0
    assert rig.states.known("b").num_waits == 0  # asking makes no record
    rig.states.check_empty()
