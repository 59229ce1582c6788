"""What every remote store owes, in tests that a file of tests imports beside a fixture ``store``: one that is
open."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator

import pytest

from sglang_flexkv.storage.remote.store import Outcome, Session, Store

SIZE = 8192


def some_names(count: int = 40) -> list[str]:
    """Of a namespace that nobody has used before."""
    namespace = secrets.token_hex(16)
    return [f"fkv1/{namespace}/{i:032x}" for i in range(count)]


def value(number: int, size: int = SIZE) -> list[memoryview]:
    content = bytearray(bytes([number % 256]) * size)
    return [memoryview(content)[:4096], memoryview(content)[4096:]]


def empty(size: int = SIZE) -> list[memoryview]:
    return value(0xEE, size)


def content(pieces: list[memoryview]) -> bytes:
    return b"".join(map(bytes, pieces))


@pytest.fixture
def session(store: Store) -> Iterator[Session]:
    made = store.session()
    yield made
    made.close()


def test_what_is_stored_is_there(session: Session) -> None:
    names = some_names()
    assert session.exists(names) == [False] * 40
    assert session.count_leading(names) == 0
    assert session.put(names[:30], [value(i) for i in range(30)]) == [Outcome.GOOD] * 30
    assert session.exists(names) == [True] * 30 + [False] * 10
    for asked in (40, 31, 30, 29, 1):
        assert session.count_leading(names[:asked]) == min(30, asked)
    assert session.count_leading(names[30:]) == 0
    for window in (1, 3, 16):
        # What it may leave out is of no use for the last place where so many are in a row.
        assert session.find_windows(names[:30], window)[-window:] == [True] * window
        assert session.find_windows(names, window)[30 - window :] == [True] * window + [False] * 10
    assert session.find_windows(names[30:], 3) == [False] * 10
    into = [empty() for _ in range(31)]
    assert session.get(names[:31], into) == [Outcome.GOOD] * 30 + [Outcome.MISSING]
    for i in range(30):
        assert content(into[i]) == content(value(i))


def test_another_size_is_no_hit_and_spoils_nothing_else(session: Session) -> None:
    names = some_names()
    session.put(names[:4], [value(0), value(1, SIZE - 4096), value(2, SIZE + 4096), value(3)])
    into = [empty() for _ in range(4)]
    outcomes = session.get(names[:4], into)
    assert outcomes == [Outcome.GOOD, Outcome.CORRUPT, Outcome.CORRUPT, Outcome.GOOD]
    assert content(into[3]) == content(value(3))
    session.put(names[:2], [value(5), value(6)])  # in place of what was there
    assert session.get(names[:2], into[:2]) == [Outcome.GOOD] * 2
    assert content(into[1]) == content(value(6))


def test_a_value_may_be_smaller_than_the_memory_for_it(store: Store, session: Session) -> None:
    if not store.any_size:
        pytest.skip("it brings values of one size only")
    names, room = some_names(), SIZE + 8192
    stored = [value(i, size) for i, size in enumerate((room, room - 4096, room + 4096, room - 1))]
    assert session.put(names[:4], stored) == [Outcome.GOOD] * 4
    for _ in range(2):  # what was learned from the first time holds at the second
        into, sizes = [empty(room) for _ in range(5)], [0] * 5
        outcomes = session.get(names[:5], into, sizes)
        assert outcomes == [Outcome.GOOD] * 2 + [Outcome.CORRUPT] * 2 + [Outcome.MISSING]
        assert sizes[:2] == [room, room - 4096]
        assert content(into[0]) == content(stored[0])
        assert content(into[1])[: room - 4096] == content(stored[1])
    sizes = [0]
    assert session.get(names[:1], [empty(room)], sizes) == [Outcome.GOOD]
    assert sizes == [room]
    assert session.get(names[1:2], [empty(room)]) == [Outcome.CORRUPT]  # who gives no sizes wants this one


def test_many_threads_store_and_load_at_the_same_time(store: Store) -> None:
    names = some_names(24)
    size = 1 << 19
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            store_and_load(number)
        except Exception as error:
            wrong.append(error)

    def store_and_load(number: int) -> None:
        session = store.session()
        mine = names[number::4]
        for turn in range(3):
            values = [value(10 * number + turn, size) for _ in mine]
            if session.put(mine, values) != [Outcome.GOOD] * len(mine):
                wrong.append("put")
            into = [empty(size) for _ in mine]
            outcomes = session.get(mine, into)
            if outcomes != [Outcome.GOOD] * len(mine) or list(map(content, into)) != list(
                map(content, values)
            ):
                wrong.append((number, turn, outcomes))
        session.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_it_is_used_again_after_it_was_closed(store: Store) -> None:
    names = some_names(1)
    session = store.session()
    session.put(names, [value(1)])
    session.close()
    store.close()
    store.open()
    session = store.session()
    into = empty()
    assert session.get(names, [into]) == [Outcome.GOOD]
    assert content(into) == content(value(1))
    session.close()
