"""Stores that fail, hang, and bring what was never stored, on demand or by a seed: between the remote tier
and any real store."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from sglang_flexkv import tierlife
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    value_bytes,
)

_HANGS_AT_MOST_S = 2.0


class Faults:
    """What goes wrong from now on. Probabilities are of each value, or of each call."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._may_go_on = threading.Event()
        self.num_held = threading.Semaphore(0)  # loads that have been held up
        self.num_bytes = self.num_bytes_max = 0  # of calls that move values
        self.heal()

    def heal(self) -> None:
        self.loads_fail = self.stores_fail = self.opens_fail = self.away = False
        self.flip = self.garbage = self.missing = self.wrong_size = self.error = self.lost = self.full = 0.0
        self.lies = 0.0  # says that something is there which is not
        self._may_go_on.set()

    def mix(self, draw: Callable[[], bool]) -> None:
        """Of each kind that values and calls have, by a draw, some or none."""
        self.heal()
        for kind in ("flip", "garbage", "missing", "wrong_size", "error", "lost", "full", "lies"):
            setattr(self, kind, 0.1 if draw() else 0.0)

    def stall(self) -> None:
        """Every load waits until this is healed."""
        self._may_go_on.clear()

    def draw(self, probability: float) -> bool:
        with self._lock:
            return self._random.random() < probability

    def below(self, limit: int) -> int:
        with self._lock:
            return self._random.randrange(limit)

    @contextmanager
    def counting(self, values: Sequence[Value]) -> Iterator[None]:
        num_bytes = sum(map(value_bytes, values))
        with self._lock:
            self.num_bytes += num_bytes
            self.num_bytes_max = max(self.num_bytes_max, self.num_bytes)
        try:
            yield
        finally:
            with self._lock:
                self.num_bytes -= num_bytes

    def wait(self) -> None:
        if not self._may_go_on.is_set():
            self.num_held.release()
        self._may_go_on.wait(_HANGS_AT_MOST_S)


def try_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed, or was not there, is left alone for no time that a test would notice."""
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.01)
    monkeypatch.setattr(tierlife, "_RETRY_MAX_S", 0.05)
    monkeypatch.setattr(remote_tier, "_ABSENT_S", 0.0)
    monkeypatch.setattr(remote_tier, "_SPOILT_S", 0.0)


def faulty_stores(faults: Faults) -> dict[str, Callable[[RemoteUrl, float], Store]]:
    """In place of the tier's STORES."""

    def behind(make: Callable[[RemoteUrl, float], Store]) -> Callable[[RemoteUrl, float], Store]:
        return lambda url, timeout_s: FaultyStore(make(url, timeout_s), faults)

    return {scheme: behind(make) for scheme, make in remote_tier.STORES.items()}


class FaultyStore(Store):
    def __init__(self, store: Store, faults: Faults) -> None:
        self._store, self._faults = store, faults
        self.name, self.any_size, self.replaces = store.name, store.any_size, store.replaces

    def open(self) -> None:
        if self._faults.opens_fail:
            raise ConfigError("there is no store; start one")
        if self._faults.away:
            raise AwayError("its server does not answer")
        self._store.open()

    def session(self) -> Session:
        return _FaultySession(self._store.session(), self._faults)

    def lend(self, memory: memoryview) -> None:
        self._store.lend(memory)

    def close(self) -> None:
        self._store.close()


class _FaultySession(Session):
    def __init__(self, session: Session, faults: Faults) -> None:
        self._session, self._faults = session, faults

    def exists(self, names: Sequence[str]) -> list[bool]:
        self._maybe_lose()
        return [there or self._faults.draw(self._faults.lies) for there in self._session.exists(names)]

    def count_leading(self, names: Sequence[str]) -> int:
        self._maybe_lose()
        if self._faults.draw(self._faults.lies):
            return len(names)
        return self._session.count_leading(names)

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        with self._faults.counting(values):
            return self._get(names, values, sizes)

    def _get(self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None) -> list[Outcome]:
        faults = self._faults
        faults.wait()
        self._maybe_lose()
        if faults.loads_fail and not names[0].endswith("generation"):
            raise StoreError("the store fails")
        outcomes = self._session.get(names, values, sizes)
        return [self._spoil(value, outcome) for value, outcome in zip(values, outcomes, strict=True)]

    def _spoil(self, value: Value, outcome: Outcome) -> Outcome:
        faults = self._faults
        if outcome != Outcome.GOOD:
            return outcome
        if faults.draw(faults.flip):
            piece = value[faults.below(len(value))]
            piece[faults.below(len(piece))] ^= 1 << faults.below(8)
        if faults.draw(faults.garbage):
            for piece in value:
                piece[:] = bytes([faults.below(256)]) * len(piece)
        for probability, instead in (
            (faults.missing, Outcome.MISSING),
            (faults.wrong_size, Outcome.CORRUPT),
            (faults.error, Outcome.FAILED),
        ):
            if faults.draw(probability):
                return instead
        return outcome

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        with self._faults.counting(values):
            return self._put(names, values)

    def _put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        faults = self._faults
        self._maybe_lose()
        if faults.stores_fail and not names[0].endswith("generation"):
            raise StoreError("the store fails")
        if faults.draw(faults.full):
            raise StoreFullError("the store is full")
        return self._session.put(names, values)

    def _maybe_lose(self) -> None:
        if self._faults.draw(self._faults.lost):
            raise StoreError("the connection is gone", temporary=self._faults.draw(0.5))

    def close(self) -> None:
        self._session.close()
