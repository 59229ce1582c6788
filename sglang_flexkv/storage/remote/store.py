"""A remote store, as small as it can be: names, pieces of memory, and what became of each value.

A store is one file beside this one. It knows nothing of blocks, transfers or SGLang: it is given names and
the memory that a value is to come from or go to. What it brings is compared with what was stored by
those who ask it, so it need not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from sglang_flexkv import _core

Outcome = _core.BlockOutcome

# A value is one range of bytes in the store; in memory it is these pieces, one after the other.
Value = Sequence[memoryview]


class StoreError(Exception):
    """A call failed. The message is for people, and holds no credentials.

    Attributes:
        temporary: the same call may well succeed at once, on another session.
    """

    def __init__(self, message: str, *, temporary: bool = False) -> None:
        super().__init__(message)
        self.temporary = temporary


class StoreFullError(StoreError):
    """There is no room for what was to be stored. What is there can be read."""


def value_bytes(value: Value) -> int:
    return sum(len(piece) for piece in value)


class Session(ABC):
    """What one thread talks to a store through. After an error it is closed and another one is made.

    Names are ``fkv1/<namespace>/<key>``, both in hex. Each call ends within the time that the store was
    made with, or raises; where the system cannot do that (a file system that hangs) it may take longer.
    """

    @abstractmethod
    def exists(self, names: Sequence[str]) -> list[bool]:
        """Of each value whether it is there. Raises StoreError."""

    def count_leading(self, names: Sequence[str]) -> int:
        """How many of the leading values are there. For stores that have to look for each on its own: more
        and more are asked for at once, so that a store that has none of them is asked for a few."""
        found, step = 0, 1
        while found < len(names):
            there = self.exists(names[found : found + step])
            if not all(there):
                return found + there.index(False)
            found += len(there)
            step *= 4
        return found

    @abstractmethod
    def get(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        """Fills values. GOOD: exactly so many bytes came; CORRUPT: it has another size; MISSING: it is not
        there. Raises StoreError if none can be had; what the pieces hold then is anybody's guess."""

    @abstractmethod
    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        """Stores values, each at once and as a whole: whoever reads sees all of it or what was before.
        Raises StoreError, or StoreFullError if there is no room."""

    @abstractmethod
    def close(self) -> None:
        """Never raises."""


class Store(ABC):
    """One store, by its URL.

    Attributes:
        name: for people, e.g. ``Redis at 10.0.0.1:6379``; no credentials.
    """

    name: str

    @abstractmethod
    def open(self) -> None:
        """Finds out whether the store can be used at all.

        Raises:
            ConfigError: somebody has to change something first.
            AwayError: it cannot be reached now, which may be otherwise later.
        """

    @abstractmethod
    def session(self) -> Session:
        """Raises StoreError."""

    def notes(self) -> list[str]:
        """What a user should know about how the store is set up, with what to do. Asks the store."""
        return []
