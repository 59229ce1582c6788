"""A lower tier in memory: the least that keeps the contract. It fails, stands still and loses bits on
demand."""

from __future__ import annotations

import numpy as np
from sglang_flexkv_testing import MemoryTier as Core

from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import EvictionPolicy
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import HeldBlocks, LowerTier, TierSlots


class MemoryTier(LowerTier):
    """Keeps what it holds from ``close`` to ``open``, as long as the object lives."""

    def __init__(self, num_slots: int) -> None:
        super().__init__("MEMORY", "MEMORY", num_slots, eviction_policy=EvictionPolicy.LRU)
        self._core = Core(num_slots)
        self._held: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by slot: key and parent
        self._keep = True
        self.opens_fail = False

    def open(self) -> None:
        if self.opens_fail:
            raise ConfigError("there is no memory; add some")

    @property
    def core(self) -> Core:
        return self._core

    def take_held(self) -> HeldBlocks:
        if not self._held:
            return HeldBlocks()
        keys, parents = (np.stack(each) for each in zip(*self._held.values(), strict=True))
        return HeldBlocks(keys, parents, np.array(list(self._held), np.int64))

    def stored(self, keys: BlockKeys, parents: BlockKeys, slots: TierSlots) -> None:
        for key, parent, slot in zip(keys, parents, slots.tolist(), strict=True):
            self._held.pop(slot, None)  # what is stored last comes last
            self._held[slot] = key, parent

    def lost(self, slots: TierSlots) -> None:
        for slot in slots.tolist():
            self._held.pop(slot, None)

    def why_broken(self) -> str:
        return ""

    def clear(self, *, keep: bool, flush: bytes, late: bool = False) -> None:
        del flush, late
        self._held.clear()
        self._keep = keep

    def close(self) -> None:
        if not self._keep:
            self._held.clear()
