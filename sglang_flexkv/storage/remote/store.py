"""A remote store, as small as it can be: names, pieces of memory, and what became of each value.

A store is one file beside this one. It knows nothing of blocks, transfers or SGLang: it is given names and
the memory that a value is to come from or go to. What it brings is compared with what was stored by
those who ask it, so it need not.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from sglang_flexkv import _core
from sglang_flexkv.common.errors import ConfigError

Outcome = _core.BlockOutcome

# Values that are asked for at once when the last that is there is searched for.
_PROBES = 16
# Values that are asked for when windows are searched for, beside those of one window.
_WINDOW_PROBES_MAX = 64

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
    """What was to be stored is not taken: there is no room, or this one may only read. What is there can be
    read."""


def value_bytes(value: Value) -> int:
    return sum(len(piece) for piece in value)


def fits(size: int, value: Value, sizes: list[int] | None) -> bool:
    """Whether a value of this size is one that was asked for, see ``Session.get``."""
    room = value_bytes(value)
    return size == room or (sizes is not None and 0 < size < room and size % _core.IO_ALIGNMENT == 0)


def outcomes_of(got: Sequence[tuple[Outcome, int]], sizes: list[int] | None) -> list[Outcome]:
    """Takes apart what became of each value and how many bytes came, as ``Session.get`` gives them back."""
    if sizes is not None:
        sizes[:] = [size for _, size in got]
    return [outcome for outcome, _ in got]


def leading(value: Value, size: int) -> list[memoryview]:
    """The first bytes of its pieces, so many."""
    pieces = []
    for piece in value:
        pieces.append(piece[:size])
        size -= len(pieces[-1])
    return [piece for piece in pieces if len(piece)]


def import_client(module: str, store: str, extra: str) -> Any:
    """The client library of a store, which comes with an extra of this package, if it is not SGLang itself.

    Raises:
        ConfigError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        why = "" if missing else f" ({error})"
        remedy = f"pip install 'sglang-flexkv[{extra}]'" if extra else "install it"
        raise ConfigError(
            f"remote: {store} needs {module.partition('.')[0]}, which cannot be imported{why}; {remedy}"
        ) from None


def search_leading(num: int, are_there: Callable[[Sequence[int]], Sequence[bool]]) -> int:
    """How many leading values are there, where each has to be asked for on its own and that is dear.

    Not all are asked for, but some at a time, evenly spread over those that may be the last: what lies
    between two that are there is taken to be there, too. Where it is not, a load finds out.

    Args:
        are_there: of positions, in order.
    """
    low, high = 0, num  # before low all are there, at high is none
    probes: Sequence[int] = [0, num - 1][:num]  # mostly it is none, or all
    while low < high:
        for probe, there in zip(probes, are_there(probes), strict=True):
            if not there:
                high = probe
                break
            low = probe + 1
        step = max(1, -(-(high - low) // _PROBES))
        probes = range(low + step - 1, high, step)
    return low


def search_windows(num: int, window: int, are_there: Callable[[Sequence[int]], Sequence[bool]]) -> list[bool]:
    """The last place where so many values in a row are there, where each has to be asked for on its own and
    that is dear. What is not asked for counts as not there: an end that few prompts have in common, behind
    too many holes, is not found.

    Args:
        are_there: of positions.
    """
    known: dict[int, bool] = {}

    def ask(positions: Sequence[int]) -> None:
        unknown = [position for position in positions if position not in known]
        known.update(zip(unknown, are_there(unknown), strict=True) if unknown else ())

    def last_hole(run: range) -> int | None:
        return next((position for position in reversed(run) if known.get(position) is False), None)

    end, probes_max = num, min(num, window) + _WINDOW_PROBES_MAX
    while end > 0 and len(known) < probes_max:
        run = range(max(0, end - window), end)  # what has to be there for this to be the place
        hole = last_hole(run)
        if hole is None:
            if known and not known.get(
                run[0]
            ):  # mostly it is the end; else one in each such run is asked for
                probes = range(run[0], -1, -window)[:_PROBES]
                ask(probes)
                there = next((position for position in probes if known[position]), None)
                end = probes[-1] if there is None else there + len(run)
                continue
            ask(run)
            hole = last_hole(run)
            if hole is None:
                break
        end = hole
    return [known.get(position, False) for position in range(num)]


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

    def find_windows(self, names: Sequence[str], window: int) -> list[bool]:
        """Of each value whether it is there. Where looking for each is dear, those that are of no use for the
        last place where so many in a row are there may be told as missing. Raises StoreError."""
        del window
        return self.exists(names)

    @abstractmethod
    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        """Fills values. GOOD: exactly so many bytes came; CORRUPT: it has another size; MISSING: it is not
        there. Raises StoreError if none can be had; what the pieces hold then is anybody's guess.

        Args:
            sizes: one for each value. If they are given, a value may be smaller than its pieces (and whole
                pages of 4096 bytes), and they say how many bytes came of those that are GOOD.
        """

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
        any_size: its sessions can bring values that are smaller than the memory for them.
        replaces: what is stored under a name that is taken takes its place.
    """

    name: str
    any_size = True
    replaces = True

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

    def close(self) -> None:  # noqa: B027
        """Gives back what ``open`` took, after the last session was closed. Never raises."""

    def lend(self, memory: memoryview) -> None:  # noqa: B027
        """Blocks are in this memory from now on until ``close``; for clients that need to know memory
        beforehand. Called before each call, by the thread that makes it. Raises StoreError."""

    def notes(self) -> list[str]:
        """What a user should know about how the store is set up, with what to do. Asks the store."""
        return []
