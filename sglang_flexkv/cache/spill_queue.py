"""What waits in the CPU tier for its turn to be stored in a tier below.

Blocks can come faster than a disk takes them. The oldest that wait are pinned, up to a share of the CPU tier:
they get there. What waits behind them is not pinned: new blocks may push it out of the CPU tier before its
turn, and then it is lost to that tier, and counted. So the CPU tier goes on taking in what is new, the disk
always has work, and what is lost is what the tier's policy thinks least of. Who must not lose anything does
not add more than may be pinned (see ``GlobalCacheEngine.may_put``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.lower_tier import CPU
from sglang_flexkv.common.transfer import Slots

# Leases of waiting requests may pin half of the CPU tier, the queues of all lower tiers a quarter; the rest
# is free to move.
_PINNED_SHARE = 0.25


@dataclass
class WaitingBlocks:
    """Blocks of one sequence, in order; some in between may be left to others."""

    parent: BlockKeys | None  # of the first
    keys: BlockKeys
    pin_all: bool = False  # whatever is pinned already
    lease: int = 0
    cpu_slots: Slots | None = None  # where they are, once they are pinned


class SpillQueue:
    """First come, first written.

    Args:
        tier: that they go to, by its number.
        num_tiers: that share the CPU tier's pins.
        num_cpu_blocks: of the CPU tier.
        blocks_max: that are written at once.
    """

    def __init__(
        self, index: _core.PrefixIndex, tier: int, num_tiers: int, num_cpu_blocks: int, blocks_max: int
    ) -> None:
        self._index = index
        self._tier = tier
        self._num_cpu_blocks = num_cpu_blocks
        self.pinned_max = max(1, int(_PINNED_SHARE / num_tiers * num_cpu_blocks))
        self._blocks_max = blocks_max
        self._pinned: deque[WaitingBlocks] = deque()  # pieces that are written at once
        self._unpinned: deque[WaitingBlocks] = deque()
        self._num_unpinned = 0
        self._num_pinned = 0  # also of those that were taken and have not ended
        self.num_waiting = 0  # blocks that nobody has taken yet
        self.num_dropped = 0  # blocks that were to go to the tier and did not get there

    @property
    def num_unfinished(self) -> int:
        """Blocks that wait or are being written."""
        return self._num_unpinned + self._num_pinned

    @property
    def num_leases(self) -> int:
        """Leases of those that wait. Who takes blocks takes their lease, too."""
        return len(self._pinned)

    def add(self, blocks: WaitingBlocks) -> None:
        self._unpinned.append(blocks)
        self._num_unpinned += len(blocks.keys)
        self.num_waiting += len(blocks.keys)
        self._pin()
        # More than the CPU tier holds cannot be waiting for real: the oldest has been evicted.
        while self.num_waiting > self._num_cpu_blocks and len(self._unpinned) > 1:
            dropped = self._unpinned.popleft()
            self._leave(len(dropped.keys))
            self.drop(dropped.keys)

    def take(self) -> WaitingBlocks | None:
        """The next to be written, with their lease; None if there is nothing now. ``end`` must follow."""
        self._pin()
        if not self._pinned:
            return None
        blocks = self._pinned.popleft()
        self.num_waiting -= len(blocks.keys)
        return blocks

    def end(self, num_blocks: int) -> None:
        """Blocks that were taken have been written, or will not be, and their lease was released."""
        self._num_pinned -= num_blocks

    def drop(self, keys: BlockKeys) -> None:
        """Counts blocks that did not get to the tier, unless they are there."""
        lease, held, _ = self._index.acquire(keys, self._tier)
        self._index.release(lease)
        self.num_dropped += len(keys) - len(held)

    def clear(self) -> None:
        """Nobody waits any more."""
        for blocks in self._pinned:
            self._index.release(blocks.lease)
            self._num_pinned -= len(blocks.keys)
        self._pinned.clear()
        self._unpinned.clear()
        self._num_unpinned = self.num_waiting = 0

    def _pin(self) -> None:
        while self._unpinned:
            blocks = self._unpinned[0]
            size = min(len(blocks.keys), self._blocks_max)
            if not blocks.pin_all:
                size = min(size, self.pinned_max)
            if not blocks.pin_all and self._num_pinned and self._num_pinned + size > self.pinned_max:
                return
            self._unpinned.popleft()
            lease, held, slots = self._index.acquire(blocks.keys[:size], CPU)
            found = len(held)
            self._num_unpinned -= size
            if found:
                piece = WaitingBlocks(blocks.parent, blocks.keys[:found], lease=lease, cpu_slots=slots)
                self._pinned.append(piece)
                self._num_pinned += found
            if found == size < len(blocks.keys):
                rest = WaitingBlocks(blocks.keys[size - 1], blocks.keys[size:], blocks.pin_all)
                self._unpinned.appendleft(rest)
            elif found < len(blocks.keys):  # evicted, and with them all that follow
                self._num_unpinned -= len(blocks.keys) - size
                self.num_waiting -= len(blocks.keys) - found
                self.drop(blocks.keys[found:])

    def _leave(self, num_unpinned: int) -> None:
        self._num_unpinned -= num_unpinned
        self.num_waiting -= num_unpinned
