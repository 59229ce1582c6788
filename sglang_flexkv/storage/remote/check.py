"""Tries a store as a server would use it: reach it, store, look up, load, compare, and how fast that is."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sglang_flexkv import _core
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import Outcome, Session, StoreError, StoreFullError, Value
from sglang_flexkv.storage.remote.tier import STORES

_VALUE_BYTES = 2 << 20
_NUM_VALUES, _AT_ONCE = 8, 4  # the server's calls move as much
_NUM_LOOKED_UP = 2048
_ROUNDS = 3


@dataclass
class Check:
    """What was found out. ``problem`` is empty if a server can use the store."""

    store: str
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    put_mb_s: float = 0.0
    get_mb_s: float = 0.0
    round_trip_s: float = 0.0  # asking for one value
    look_up_s: float = 0.0  # of 2,048 blocks of which the store has none


def check(url: RemoteUrl, timeout_s: float | None = None) -> Check:
    """Stores 16 MiB under names of its own, which nobody asks for again. Raises nothing that a store does."""
    store = STORES[url.scheme](url, timeout_s or CacheConfig.model_fields["remote_timeout_s"].default)
    found = Check(store.name)
    try:
        store.open()
        found.notes = store.notes()
        session = store.session()
        try:
            _try(session, found)
        finally:
            session.close()
    except ConfigError as error:
        found.problem = str(error).removeprefix("remote: ")
    except StoreFullError as error:
        found.problem = f"{error}; make room, or let it evict"
    except StoreError as error:
        found.problem = f"{error}; if it is only slow, raise remote_timeout_s"
    finally:
        store.close()
    return found


def _try(session: Session, found: Check) -> None:
    prefix = f"fkv1/{secrets.token_hex(16)}/"
    names = [prefix + secrets.token_hex(16) for _ in range(_NUM_VALUES)]
    sent, received = _Memory(), _Memory()
    sent.fill()
    found.put_mb_s = _mb_s(lambda: _in_calls(session.put, names, sent, "stored"))
    if not all(session.exists(names)):
        raise StoreError(f"{found.store} does not find what was just stored; has it room for 16 MiB?")
    found.get_mb_s = _mb_s(lambda: _in_calls(session.get, names, received, "loaded"))
    if received.content() != sent.content():
        raise StoreError(f"{found.store} brings other bytes than were stored; use another one")
    found.round_trip_s = min(_seconds(lambda: session.exists(names[:1])) for _ in range(10))
    nobody = [prefix + secrets.token_hex(16) for _ in range(_NUM_LOOKED_UP)]
    found.look_up_s = min(_seconds(lambda: session.count_leading(nobody)) for _ in range(_ROUNDS))


class _Memory:
    """Values as the tier has them: a header and a block, on whole pages."""

    def __init__(self) -> None:
        header, size = _core.VALUE_HEADER_BYTES, _core.VALUE_HEADER_BYTES + _VALUE_BYTES
        self._view = memoryview(mmap.mmap(-1, _NUM_VALUES * size))
        slots = [self._view[i * size : (i + 1) * size] for i in range(_NUM_VALUES)]
        self.values = [[slot[:header], slot[header:]] for slot in slots]

    def fill(self) -> None:
        self._view[:] = os.urandom(len(self._view))

    def content(self) -> bytes:
        return bytes(self._view)


def _in_calls(
    call: Callable[[Sequence[str], Sequence[Value]], list[Outcome]],
    names: Sequence[str],
    memory: _Memory,
    done: str,
) -> None:
    for first in range(0, len(names), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        outcomes = call(names[part], memory.values[part])
        if any(outcome != Outcome.GOOD for outcome in outcomes):
            raise StoreError(f"a value could not be {done} ({', '.join(str(o) for o in outcomes)})")


def _mb_s(call: Callable[[], object]) -> float:
    best_s = min(_seconds(call) for _ in range(_ROUNDS))
    return _NUM_VALUES * (_VALUE_BYTES + _core.VALUE_HEADER_BYTES) / best_s / 1e6


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
