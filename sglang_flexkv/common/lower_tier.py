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
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import Admission, EvictionPolicy

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


class LowerTier(ABC):
    """See the module.

    Args:
        name: as users know it, e.g. ``SSD``.
        medium: in the names of transfers, e.g. ``DISK`` for DISK2H and H2DISK.
        num_slots: blocks it can hold.
        eviction_policy: which of them goes first.
        admission: which blocks are worth a place in it.
    """

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

    @abstractmethod
    def open(self) -> None:
        """Makes the medium ready; also the way back after a fault.

        Raises:
            ConfigError: it cannot be, with what to do about it.
        """

    @property
    @abstractmethod
    def core(self) -> _core.LowerTier:
        """What moves its blocks; one object from ``open`` to ``close``."""

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
    def clear(self, *, keep: bool) -> None:
        """Forgets what it holds.

        Args:
            keep: what is stored from now on may be found by another process; if not, no process ever finds
                it.
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
