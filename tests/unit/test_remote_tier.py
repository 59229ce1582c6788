"""What the remote tier promises of every store: what it asks twice, for how long it leaves what alone, and
how much is on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dict_store import NAMESPACE, PATIENCE_S, Server, Values

from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.remote.store import Outcome, StoreError, StoreFullError, Value
from sglang_flexkv.storage.remote.tier import RemoteTier, WritePace

KEYS = np.arange(64, dtype=np.uint64).reshape(32, 2)
URL = parse_remote_url("file:///tmp")
FLUSH = bytes(range(16))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


class Watched(Values):
    """Counts calls, holds them up, and fails those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"exists": 0, "get": 0, "put": 0}
        self.errors: dict[str, list[StoreError]] = {}
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._lock = threading.Lock()
        self.num_running = self.num_running_max = self.num_values_max = 0
        self.lent: list[memoryview] = []
        self.not_lent = 0
        self.full = ""  # how it says so

    def lend(self, memory: memoryview) -> None:
        self.lent.append(memory)

    @contextmanager
    def _watch(self, name: str, num_values: int) -> Iterator[None]:
        with self._lock:
            self.calls[name] += 1
            self.num_running += 1
            self.num_running_max = max(self.num_running_max, self.num_running)
            self.num_values_max = max(self.num_values_max, num_values)
            error = self.errors[name].pop(0) if self.errors.get(name) else None
        try:
            self.goes_on.wait(PATIENCE_S)
            if error is not None:
                raise error
            yield
        finally:
            with self._lock:
                self.num_running -= 1

    def exists(self, names: Sequence[str]) -> list[bool]:
        with self._watch("exists", 0):
            return super().exists(names)

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        if names[0].endswith("generation"):
            return super().get(names, values, sizes)
        self.not_lent += sum(not self._is_lent(body) for _, body in values)
        with self._watch("get", len(names)):
            return super().get(names, values, sizes)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        if self.full == "raises":
            raise StoreFullError("it is full")
        if self.full:
            return [Outcome.MISSING] * len(names)
        if names[0].endswith("generation"):
            left_alone = not self.replaces and names[0] in self.held
            return [Outcome.GOOD] if left_alone else super().put(names, values)
        with self._watch("put", len(names)):
            return super().put(names, values)

    def _is_lent(self, piece: memoryview) -> bool:
        def range_of(memory: memoryview) -> tuple[int, int]:
            begin: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
            return begin, begin + len(memory)

        begin, end = range_of(piece)
        return any(first <= begin and end <= last for first, last in map(range_of, self.lent))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched()
    monkeypatch.setattr(remote_tier, "STORES", {"file": lambda url, timeout_s: made})
    return made


@pytest.fixture
def server(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Has a prompt of 32 blocks in the store, in calls of four."""
    monkeypatch.setattr(remote_tier, "_CALL_BYTES", 4 * 48 * 1024)
    made = Server(blocks=32)
    assert made.engine.slot_bytes == 48 * 1024
    yield made
    watched.goes_on.set()
    made.engine.close()


class Clock:
    """In place of the tier's ``time``."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remote_tier, "time", made)
    return made


def tier_of(watched: Watched, **settings: Any) -> RemoteTier:
    return RemoteTier(URL, 8, namespace=NAMESPACE, **settings)


@pytest.mark.parametrize("call", ["exists", "get"])
@pytest.mark.parametrize(
    ("error", "times"),
    [
        (StoreError("the connection is gone", temporary=True), 2),
        (StoreError("it has not answered", temporary=False), 1),
    ],
    ids=["temporary", "lasting"],
)
def test_only_what_is_temporary_is_tried_again(
    watched: Watched, server: Server, call: str, error: StoreError, times: int
) -> None:
    server.put()
    server.engine.clear_tiers(0, 1)  # it does not know of it any more
    server.put()
    before = watched.calls[call]
    watched.errors[call] = [error]
    if call == "get":
        assert server.get() == (times == 2)
        assert watched.calls["get"] - before == 8 - 1 + times
    else:
        server.engine.clear_tiers(0)
        question = server.engine.ask(server.keys)
        assert question is not None
        until(lambda: question.is_over, "a question is never over")
        assert watched.calls["exists"] > before
        assert bool(question.num_found) == (times == 2)
        assert server.engine.stats()["REMOTE"]["lookups_failed"] == 2 - times


def test_what_fails_twice_is_not_tried_for_ever(watched: Watched, server: Server) -> None:
    server.put()
    watched.errors["get"] = [StoreError("the connection is gone", temporary=True) for _ in range(100)]
    assert not server.get()
    assert watched.calls["get"] == 16  # of 8 calls each twice


def test_what_is_not_there_is_left_alone_for_a_while_and_what_is_spoilt_for_longer(
    watched: Watched, clock: Clock
) -> None:
    tier = tier_of(watched)
    absent, spoilt = KEYS[3].tobytes(), KEYS[5].tobytes()
    tier.note_absent(absent)
    tier.note_absent(spoilt, spoilt=True)
    for later_s, first in ((1.9, 3), (2.1, 5), (9.9, 5), (10.1, 32)):
        clock.now_s = 1000.0 + later_s
        assert tier.first_absent(KEYS) == first
    # Who has stored it knows better.
    tier.note_absent(absent, spoilt=True)
    tier.note_stored([absent])
    assert tier.first_absent(KEYS) == 32


def test_what_is_remembered_of_misses_is_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tier, "_REMEMBERED_MAX", 8)
    tier = tier_of(watched)
    for key in KEYS:
        tier.note_absent(key.tobytes(), spoilt=True)
    assert len(tier._not_there) == len(tier._spoilt) == 8
    assert tier.first_absent(KEYS) == 24  # the last ones


def test_a_full_store_is_left_alone_longer_and_longer(watched: Watched, clock: Clock) -> None:
    tier = tier_of(watched)
    pauses = []
    for _ in range(9):
        tier.note_full(StoreFullError("it is full"))
        began_s = clock.now_s
        while tier.is_full:
            clock.now_s += 0.5
        pauses.append(clock.now_s - began_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    tier.note_room()
    tier.note_full(StoreFullError("it is full"))
    clock.now_s += 1
    assert not tier.is_full


def test_nothing_is_sent_to_a_store_that_is_full(watched: Watched, server: Server) -> None:
    watched.errors["put"] = [StoreFullError("it is full")] * 100
    for _ in range(4):
        server.put()
        server.engine.clear_tiers(0, 1)
    assert 1 <= watched.calls["put"] <= 2  # by as many threads at once
    stats = server.engine.stats()["REMOTE"]
    assert stats["times_out"] == 0  # what it has is served
    assert stats["full"] == watched.calls["put"]


def test_a_limit_is_kept_for_what_is_sent_and_not_for_what_is_there(watched: Watched) -> None:
    now_s = [100.0]
    tier = tier_of(watched, pace=WritePace(2e6, lambda: now_s[0]))
    waits: list[float] = []
    mover = remote_tier._Mover(tier, store=True)
    mover.stop = SimpleNamespace(wait=waits.append)  # type: ignore[assignment]
    values = [[memoryview(bytes(4096)), memoryview(bytes(496_000 - 4096))] for _ in range(2)]
    names = ["fkv1/a/b", "fkv1/a/c"]
    for part in (slice(0, 1), slice(0, 2), slice(0, 2)):
        call = SimpleNamespace(values=lambda part=part: values[part])
        mover._put(call, KEYS[part], names[part])  # type: ignore[arg-type]
    # All that store share 2 MB/s: 496 kB take a quarter of a second, and the next ones another.
    assert waits == pytest.approx([0.248, 0.496, 0.0])
    now_s[0] += 100.0  # what nobody stored meanwhile is not made up for
    assert tier.pace.seconds_after(2_000_000) == pytest.approx(1.0)


def test_what_is_on_its_way_is_bounded_and_lies_in_memory_that_the_store_knows(
    watched: Watched, server: Server
) -> None:
    server.put()
    assert watched.num_values_max == 4
    assert watched.num_running_max <= remote_tier._STORE_THREADS
    server.engine.clear_tiers(0)
    watched.goes_on.clear()
    task = server.engine.create_get(server.keys)
    server.engine.launch(task, np.arange(server.num_tokens))
    until(lambda: watched.num_running == remote_tier._LOAD_THREADS, "loads do not begin")
    # Given up: they count as long as somebody may still write there, and no other is begun beside them.
    server.engine.cancel(task)
    assert not server.engine.wait([task], 0.05)
    watched.goes_on.set()
    assert server.engine.wait([task], PATIENCE_S)
    assert watched.num_running_max == remote_tier._LOAD_THREADS
    assert watched.num_values_max == 4
    assert watched.calls["get"] == remote_tier._LOAD_THREADS  # the rest was not begun
    assert watched.not_lent == 0


def test_a_question_is_over_in_time_and_a_store_that_answers_none_is_put_aside(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = tier_of(watched, timeout_s=0.02)
    tier.open()
    watched.goes_on.clear()
    question = tier.look_up(KEYS)
    until(lambda: question.is_over, "a question is never over")
    assert not question.answered
    assert question.num_found == 0
    assert not tier.why_broken()
    monkeypatch.setattr(remote_tier, "_LOOKUP_STALL_S", 0.0)
    until(lambda: "no answer to a look-up" in tier.why_broken(), "a store that hangs is asked for ever")
    monkeypatch.setattr(remote_tier, "_LOOKUP_STALL_S", PATIENCE_S)
    watched.goes_on.set()
    until(lambda: question.answered, "it is not answered at all")
    assert tier.stats()["lookups_failed"] == 1
    # Three in a row that fail, too.
    watched.errors["exists"] = [StoreError("it says no")] * 2
    for _ in range(2):
        failing = tier.look_up(KEYS[1:])
        until(lambda failing=failing: failing.answered, "it is never answered")  # type: ignore[misc]
    assert "3 look-ups failed in a row, the last one: it says no" in tier.why_broken()
    tier.close()


# ---- names ----


def test_servers_that_name_blocks_differently_find_each_others(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines do that have the same model at different places. What is shared has names of its own."""
    monkeypatch.setitem(remote_tier.STORES, "file", lambda url, timeout_s: watched)
    shared, other = (make_namespace({"of": name}) for name in ("all", "others"))
    here, there = (make_namespace({"on": name}) for name in ("one machine", "another one"))

    def found(namespace: bytes, shared: bytes | None) -> bool:
        reader = Server(namespace, shared=SharedBlocks(shared) if shared is not None else None)
        try:
            return reader.get()
        finally:
            reader.engine.close()

    writer = Server(here, shared=SharedBlocks(shared))
    writer.put()
    writer.engine.close()
    assert found(here, shared)
    assert found(there, shared)
    assert found(shared, None)
    assert not found(here, None)
    assert not found(here, other)


# ---- flushes ----


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tier, "_GENERATION_S", 0.0)
    monkeypatch.setattr(remote_tier, "_TELL_AGAIN_S", 0.001)
    monkeypatch.setattr(remote_tier, "_ABSENT_S", 0.0)


def told(watched: Watched) -> list[bytes]:
    return [value for name, value in watched.held.items() if name.endswith("generation")]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("how", ["raises", "stores nothing"])
def test_a_flush_that_a_full_store_takes_no_note_of_holds_here_and_is_told_when_there_is_room(
    watched: Watched, server: Server, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    server.put()
    watched.full = how
    server.engine.clear_tiers()
    # What is there is asked for, and is not what this server wants any more: no look-up fails.
    for _ in range(remote_tier._LOOKUPS_FAILED_MAX + 1):
        assert not server.get()
    stats = server.engine.stats()["REMOTE"]
    assert (stats["lookups_failed"], stats["times_out"]) == (0, 0)
    assert told(watched) == []
    assert caplog.text.count("cannot be told that the cache was flushed: it has no room") == 1
    # Nobody asks for anything now.
    watched.full = ""
    until(lambda: len(told(watched)) == 1, "a flush is not told again")
    server.put()
    assert server.get()


@pytest.mark.usefixtures("often")
def test_a_flush_of_a_store_that_is_full_is_kept_when_it_is_opened_again(
    watched: Watched, server: Server
) -> None:
    server.put()
    tier = tier_of(watched)
    tier.open()
    before = tier.values_namespace()
    watched.full = "raises"
    tier.clear(keep=True, flush=FLUSH)
    flushed = tier.values_namespace()
    assert flushed != before
    for _ in range(2):
        tier.close()
        tier.open()
        assert tier.values_namespace() == flushed
    watched.full = ""
    until(lambda: len(told(watched)) == 1, "a flush is not told again")
    # It is known here although the store has forgotten it.
    tier.close()
    watched.held.clear()
    tier.open()
    assert tier.values_namespace() == flushed
    assert len(told(watched)) == 1
    tier.close()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_flush_that_the_store_has_forgotten_is_told_again(
    watched: Watched, server: Server, how: str
) -> None:
    """Stores evict, and objects expire: what was flushed is not found again for that."""
    server.put()
    server.engine.clear_tiers()
    until(lambda: len(told(watched)) == 1, "a flush is not told")
    (record,) = told(watched)
    name = next(name for name in watched.held if name.endswith("generation"))
    watched.held[name] = bytes(40)
    if how == "gone":
        del watched.held[name]

    def is_told_again() -> bool:
        assert not server.get()
        return told(watched) == [record]

    until(is_told_again, "a flush is forgotten")
    assert server.engine.stats()["REMOTE"]["times_out"] == 0


@pytest.mark.usefixtures("often")
def test_a_second_flush_is_no_step_back_where_nothing_is_replaced(
    watched: Watched, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    watched.replaces = False
    server.put()
    for number in range(3):
        server.engine.clear_tiers()
        until(lambda: not server.get() and len(told(watched)) == 1, "a flush is not told")
        server.put()
        assert server.get(), number
    stats = server.engine.stats()["REMOTE"]
    assert (stats["lookups_failed"], stats["times_out"]) == (0, 0)
    assert caplog.text.count("cannot be told that the cache was flushed: it replaces nothing") == 1
