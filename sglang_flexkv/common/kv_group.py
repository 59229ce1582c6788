"""Groups of KV: the parts that a block has in several pools.

A model whose layers do not all keep the same has a pool for each kind: full attention here, a window of
tokens there, or the state of a recurrent layer. A block has one key and a part in each group, with a layout,
slots and quotas of its own. vLLM calls these KV cache groups, SGLang components.

The first group keeps all blocks. A further one keeps what it takes to go on: the blocks of a window before
the boundary at which a prompt is taken up again. A recurrent state is a window of one block, whose part is
the state at its end: one slot, however many tokens the block has. A prefix of n blocks is a hit where every
group holds what its rule asks for, so hits are a set of boundaries, and not every prefix of a hit is one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # replay needs none, and no torch
    from sglang_flexkv.common.storage import DeviceBuffers

# So many tokens of stored prompts have a window of their own, by which the windows get their share of a tier.
_TOKENS_PER_WINDOW = 512


def window_share(window_tokens: int, tokens_per_block: int) -> float:
    """The share (see KVGroup) that sliding windows of so many tokens get of a tier."""
    blocks = math.ceil(window_tokens / tokens_per_block) + 1  # with the block that is kept before it
    return min(1.0, blocks * tokens_per_block / _TOKENS_PER_WINDOW)


@dataclass(frozen=True)
class KVGroup:
    """A further group, beside the first.

    Attributes:
        name: in files and messages.
        device: its pool.
        layers: of the model, one for each layer of the pool: what a forward waits for.
        window_blocks: blocks before a boundary that it takes to go on from there, at least 1.
        share: of the blocks that each tier can hold of the first group, so many it can hold of this one.
        every_blocks: of a long run of blocks a window is kept after each so many, beside the last one.
        slots_per_block: of its pool, that a block takes; None: one for each token.

    Raises:
        ValueError: one of these makes no group.
    """

    name: str
    device: DeviceBuffers
    layers: tuple[int, ...]
    window_blocks: int
    share: float = 1.0
    every_blocks: int = 256
    slots_per_block: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise ValueError(f"name of a KV group: letters a to z, digits and dashes, not {self.name!r}")
        in_pool = len(self.device.tensors)
        if len(self.layers) != in_pool:
            raise ValueError(f"KV group {self.name}: {len(self.layers)} layers, and {in_pool} in its pool")
        if self.window_blocks < 1:
            raise ValueError(f"KV group {self.name}: a window of {self.window_blocks} blocks holds nothing")
        if not 0 < self.share <= 1:
            raise ValueError(f"KV group {self.name}: share is above 0 and at most 1, not {self.share}")
        if self.every_blocks < 1:
            raise ValueError(f"KV group {self.name}: a window every {self.every_blocks} blocks is none")
        if self.slots_per_block is not None and self.slots_per_block < 1:
            raise ValueError(f"KV group {self.name}: {self.slots_per_block} slots for a block")

    def quota(self, num_blocks: int) -> int:
        """Blocks that a tier holds of it which holds ``num_blocks`` of the first group."""
        return math.ceil(num_blocks * self.share)

    def slots_of(self, tokens_per_block: int) -> int:
        """Slots of its pool that a block of so many tokens takes."""
        return tokens_per_block if self.slots_per_block is None else self.slots_per_block

    def kept(self, num_blocks: int) -> list[tuple[int, int]]:
        """What is kept of a run of blocks: which ranges, growing, with a gap between any two.

        A window at the end and one block more, as the same prompt again is taken up one block before its end
        at the latest (its last token is always computed). And one such window every ``every_blocks``, for
        prompts that leave the run on the way.
        """
        ranges: list[tuple[int, int]] = []
        for end in [*range(self.every_blocks, num_blocks, self.every_blocks), num_blocks]:
            first = max(0, end - self.window_blocks - 1)
            if ranges and ranges[-1][1] >= first:
                first = ranges.pop()[0]
            if end > first:
                ranges.append((first, end))
        return ranges


def boundaries(held: npt.NDArray[np.bool_], window_blocks: int) -> npt.NDArray[np.bool_]:
    """Which prefixes can be taken up again where a window of blocks is needed.

    Args:
        held: of each block whether it is held, [blocks].

    Returns:
        For 0 to all blocks whether the window before that boundary is held, [blocks + 1].
    """
    # The first block of the run of held blocks that ends at each boundary.
    starts = np.maximum.accumulate(np.where(held, 0, np.arange(1, len(held) + 1)))
    ends = np.arange(1, len(held) + 1)
    return np.concatenate(([True], starts <= np.maximum(ends - window_blocks, 0)))
