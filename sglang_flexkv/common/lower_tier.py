"""A tier below the CPU tier: the one contract that the SSD tier keeps, and every other one.

A tier has two halves. This one knows what the tier holds and whether it works; ``core`` moves blocks between
its slots and the host pool (``csrc/tier/lower_tier.hpp`` has the contract of that). Who is above knows tiers
by their number alone: 0 is the CPU tier, the others follow, nearest first.

What those above guarantee:

- All calls come one at a time, under one lock, except ``open`` and ``close``: these may take as long as the
  medium does, and are made in a thread of their own while no other call is made.
- ``open`` comes first, then ``take_held``. Nothing is called between ``close`` and the next ``open``.
- A slot is given to one block at a time. ``stored`` comes after the bytes are where they belong, and before
  anybody can look the block up; only then may the slot be given to another block.
- ``close`` comes when ``core`` moves nothing any more.

What a tier owes:

- A fault of its medium is an outcome per block (``core``), a reason in ``why_broken``, or a ConfigError from
  ``open``: never another exception.
- What ``core`` loads is what was stored under that key, compared before anybody sees it.
- Only ``open``, ``close`` and ``sync`` may wait for the medium.

A tier that others write to as well does not know all that it holds. It is *asked*: what it answers to
``look_up`` the index remembers as it does what was stored, until a load finds that it is not there any more.
Its slots are places in that memory and no more.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.common.block import KEY_BYTES, BlockKeys, Namespace
from sglang_flexkv.common.config import Admission, EvictionPolicy
from sglang_flexkv.common.errors import ConfigError

# The number of the CPU tier.
CPU = 0

TierNumbers = npt.NDArray[np.uint8]  # [blocks]: of each block the tier it is in
TierSlots = npt.NDArray[np.int64]  # [blocks]


@dataclass(frozen=True)
class HeldBlocks:
    """What a tier holds when it is opened, least recently stored first."""

    keys: BlockKeys = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    parents: BlockKeys = field(default_factory=lambda: np.zeros((0, 2), np.uint64))  # zeros: none
    slots: TierSlots = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class SharedBlocks:
    """Whose blocks these are in a tier that others write to as well, and which of them this process is to
    store.

    Attributes:
        namespace: of the keys there.
        rank: which of the ``ranks`` this one is.
        ranks: of one server, that compute the same blocks at the same time. One of them stores each block.
        seed: random, and the same on these ranks: what they draw from it is the same as well.
    """

    namespace: Namespace
    rank: int = 0
    ranks: int = 1
    seed: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))


class AwayError(ConfigError):
    """What a tier is kept in cannot be reached now, and may be later: nobody has to change a setting."""


class Question:
    """What an asked tier was asked, and its answer when it comes.

    Args:
        keys: of blocks that follow each other.
        deadline_s: of the monotonic clock; nothing was found by then.
        window: 0: which of the leading blocks it has. Else: where it has this many in a row, the later the
            better; it may leave out what is of no use for the last such place.
    """

    def __init__(self, keys: BlockKeys, deadline_s: float, window: int = 0) -> None:
        self.keys, self.window, self._deadline_s = keys, window, deadline_s
        self._found: tuple[int, ...] | None = None

    def answer(self, positions: Iterable[int]) -> None:
        """By the tier, once, from any thread.

        Args:
            positions: of the blocks that it has, growing.
        """
        self._found = tuple(positions)

    @property
    def answered(self) -> bool:
        return self._found is not None

    @property
    def is_over(self) -> bool:
        return self.answered or time.monotonic() >= self._deadline_s

    @property
    def num_found(self) -> int:
        return len(self._found or ())

    @property
    def positions(self) -> list[int]:
        """Of what was found, growing."""
        return list(self._found or ())

    @property
    def runs(self) -> list[tuple[int, int]]:
        """What was found, as ranges with a gap between any two."""
        runs: list[tuple[int, int]] = []
        for position in self._found or ():
            first = runs.pop()[0] if runs and runs[-1][1] == position else position
            runs.append((first, position + 1))
        return runs


class LowerTier(ABC):
    """See the module.

    Args:
        name: as users know it, e.g. ``SSD``.
        medium: in the names of transfers, e.g. ``DISK`` for DISK2H and H2DISK.
        num_slots: blocks it can hold.
        eviction_policy: which of them goes first.
        admission: which blocks are worth a place in it.

    Attributes:
        is_asked: it has ``look_up``. Its blocks come to the CPU tier while a request waits, and no forward
            waits for them: how long they take depends on others.
    """

    is_asked = False

    def __init__(
        self,
        name: str,
        medium: str,
        num_slots: int,
        *,
        eviction_policy: EvictionPolicy,
        admission: Admission = Admission.ALL,
    ) -> None:
        self.name, self.medium, self.num_slots = name, medium, num_slots
        self.eviction_policy, self.admission = eviction_policy, admission

    @property
    def kind(self) -> str:
        """As clients know it, who are told where their tokens came from: no address, no path."""
        return self.name

    @abstractmethod
    def open(self) -> None:
        """Makes the medium ready; also the way back after a fault.

        Raises:
            ConfigError: it cannot be, with what to do about it. An AwayError does not keep a server from
                starting without the tier.
        """

    def look_up(self, keys: BlockKeys, window: int = 0) -> Question:
        """Asks what it has of these, see Question; only of a tier that ``is_asked``. Returns at once."""
        raise NotImplementedError

    @property
    @abstractmethod
    def core(self) -> _core.LowerTier:
        """What moves its blocks; one object from ``open`` to ``close``."""

    def to_store(self, keys: BlockKeys) -> BlockKeys:
        """Those of these blocks that it is for this process to store; another one stores the others. A tier
        that leaves some out can make nothing of the parents in ``stored``."""
        return keys

    @abstractmethod
    def take_held(self) -> HeldBlocks:
        """What it holds since before ``open``. Asked once after each."""

    @abstractmethod
    def stored(self, keys: BlockKeys, parents: BlockKeys, slots: TierSlots) -> None:
        """These blocks are in these slots from now on.

        Args:
            parents: of each the block before it, shape [blocks, 2]; zeros: none.
        """

    @abstractmethod
    def lost(self, slots: TierSlots) -> None:
        """What is in these slots could not be loaded, or is not what was stored."""

    @abstractmethod
    def why_broken(self) -> str:
        """Why it is of no use any more, as far as it knows itself; empty while all is well. Cheap."""

    @abstractmethod
    def clear(self, *, keep: bool, flush: bytes, late: bool = False) -> None:
        """Forgets what it holds.

        Args:
            keep: what is stored from now on may be found by another server; if not, no other one ever finds
                it.
            flush: KEY_BYTES that stand for this flush and no other one, the same on all ranks of
                SharedBlocks.
            late: the tier was away when the flush came, and has just been opened again.
        """

    def sync(self, timeout_s: float) -> bool:
        """Waits until what was stored so far would survive a power failure. False if it does not come to it;
        a tier that keeps nothing for another process has nothing to wait for."""
        del timeout_s
        return True

    def stats(self) -> Mapping[str, float]:
        """Figures of its own, by name."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Gives everything back. What it holds stays there for the next ``open`` if it can."""
