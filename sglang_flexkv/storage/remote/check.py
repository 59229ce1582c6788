"""Tries a store as a server would use it: reach it, store, look up, load, compare, and how fast that is."""

from __future__ import annotations

import mmap
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_flexkv import _core
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.compression import Costs
from sglang_flexkv.storage.remote.store import Outcome, Session, Store, StoreError, StoreFullError, Value
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
    compression: str = ""  # what remote_compression would bring


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
        found.compression = _compression(store, found)
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


def _compression(store: Store, found: Check) -> str:
    if not store.any_size:
        return "it brings values of one size: remote_compression cannot be used"
    # Numbers of 16 bits, as KV is, as likely as a normal distribution has them.
    numbers = np.random.default_rng(0).standard_normal(_VALUE_BYTES // 2, np.float32)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    seen = [_core.try_compression(block, 2) for _ in range(_ROUNDS)]
    costs = Costs(
        seen[0].stored_bytes / _VALUE_BYTES,
        min(trial.compress_s for trial in seen) / _VALUE_BYTES,
        min(trial.expand_s for trial in seen) / _VALUE_BYTES,
    )
    pays = costs.pays(1e-6 / found.put_mb_s, 1e-6 / found.get_mb_s)
    return (
        f"remote_compression {'pays' if pays else 'does not pay'} at these speeds: a core shrinks 16-bit KV "
        f"to about {100 * costs.stored:.0f} % at {1e-6 / costs.compress_s:.0f} MB/s and expands it at "
        f"{1e-6 / costs.expand_s:.0f} MB/s"
    )


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
