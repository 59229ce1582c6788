"""Blocks with parts in two pools and a remote store: tests that a file of tests imports beside its ``Cache``
(``group_cache``), which has an SSD tier where it is given a directory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from dict_store import Values
from group_cache import PATIENCE_S, SEQUENCE
from remote_faults import Faults, FaultyStore, try_again_soon

from sglang_flexkv import kvtask
from sglang_flexkv.storage.remote import tier as remote_tier

MakeCache = Callable[[], Any]


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[MakeCache]:
    made: list[Any] = []

    def add() -> Any:
        made.append(request.module.Cache(None))
        return made[-1]

    yield add
    for each in made:
        each.close()


@pytest.fixture
def faults(values: Values, monkeypatch: pytest.MonkeyPatch) -> Faults:
    made = Faults(seed=1)
    monkeypatch.setattr(remote_tier, "STORES", {"file": lambda *_: FaultyStore(values, made)})
    try_again_soon(monkeypatch)
    return made


@pytest.fixture
def values() -> Values:
    return Values()


@pytest.mark.parametrize("at_once", [1, 1 << 30], ids=["in_pieces", "in_one"])
def test_what_one_process_stored_another_finds(
    make: MakeCache, values: Values, faults: Faults, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", at_once)
    first, second = make(), make()
    first.put(1, 5)
    first.put(1)
    for blocks, brought in ((SEQUENCE, SEQUENCE), (SEQUENCE - 1, 5), (4, 0)):
        second.engine.clear_tiers(0)
        second.bring(1, blocks)
        second.engine.stop_persisting()  # what comes now is in memory
        assert second.get(1, blocks) == brought
        second.close()
        second = make()
    # One that has it on the device stores nothing a second time.
    num_held = len(values.held)
    second.put(1)
    assert len(values.held) == num_held
    stats = second.engine.stats()
    for name in ("REMOTE", f"REMOTE {second.group.name}"):
        assert stats[name]["there_already"] == stats[name]["ready"] > 0


def test_what_is_missing_cuts_a_hit(make: MakeCache, values: Values, faults: Faults) -> None:
    """Whatever the store has let go of: what comes is what can be gone on from with the rest, as far as that
    is known beforehand; and else it is a miss."""
    rng = random.Random(7)
    writer, reader = make(), make()
    seen: set[int] = set()
    for number in range(12):
        for blocks in sorted(rng.sample(range(2, SEQUENCE + 1), 3)):
            writer.put(number, blocks)
        names = [name for group in range(2) for name in writer.names(values.held, number, group)]
        for name in rng.sample(names, rng.randrange(4)):
            values.held.pop(name, None)
        expected = writer.in_store(values.held, number)
        reader.bring(number)
        assert reader.engine.match(reader.sequence(number).block_keys).num_blocks == expected
        assert reader.get(number) == expected
        # Nor is there anything that was promised and did not come.
        assert reader.engine.stats()["REMOTE2H"]["missing_blocks"] == 0
        seen.add(expected)
    assert 0 in seen
    assert len(seen) > 3


def test_a_value_of_another_group_is_a_miss(make: MakeCache, values: Values, faults: Faults) -> None:
    first, second = make(), make()
    first.put(1)
    full, further = (first.names(values.held, 1, group) for group in range(2))
    assert not set(full) & set(further)
    assert set(full) & values.held.keys()
    assert set(further) & values.held.keys()
    swapped = dict(values.held)
    for a, b in zip(full, further, strict=True):
        if a in swapped and b in swapped:
            values.held[a], values.held[b] = swapped[b], swapped[a]
    second.bring(1)
    assert second.get(1) == 0
    assert second.engine.stats()["REMOTE2H"]["corrupt_blocks"] > 0


def test_a_flush_takes_all_parts_from_who_asks(
    make: MakeCache, values: Values, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    first.put(1)
    before = set(values.held)
    first.engine.clear()
    assert before <= values.held.keys()
    first.bring(1)
    assert first.get(1) == 0
    first.put(1)
    deadline_s = time.monotonic() + PATIENCE_S
    while sum(name.endswith("generation") for name in list(values.held)) < 2:
        assert time.monotonic() < deadline_s, "a flush is not told for each group"
        time.sleep(0.001)
    new = values.held.keys() - before
    assert all(new & set(first.names(values.held, 1, group)) for group in range(2))
    # Whoever opens the store afterwards finds these.
    second = make()
    second.bring(1)
    assert second.get(1) == SEQUENCE


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_does_what_it_likes_brings_nothing_that_is_wrong(
    make: MakeCache, values: Values, faults: Faults, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", 1)
    faults._random.seed(seed)
    first, second = make(), make()
    for number in range(6):
        for blocks in (4, 7, SEQUENCE):
            first.put(number, blocks)
    came: list[int] = []
    for _ in range(60):
        faults.mix(lambda: faults.draw(0.3))
        number = faults.below(6)
        if second.engine.can_ask:
            second.bring(number)
        came.append(second.get(number))  # which compares what came
        if faults.draw(0.5):
            second.engine.clear_tiers(0)
        if faults.draw(0.2):
            second.put(number, (4, 7, SEQUENCE)[faults.below(3)])
    assert set(came) <= {0, 4, 7, SEQUENCE} | set(range(4, SEQUENCE + 1))
    assert 0 in came
    assert SEQUENCE in came
    faults.heal()
    assert second.engine.flush_spills(PATIENCE_S)
