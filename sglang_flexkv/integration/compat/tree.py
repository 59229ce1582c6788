"""What our cache and linker are built on: SGLang's classes, with names for what is private in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    UnifiedCacheLinker,
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.session.streaming_session import is_virtual_node

__all__ = (
    "LinkerWrapper",
    "PoolName",
    "PoolTransfer",
    "TreeCache",
    "UnifiedCacheLinker",
    "hash_pages",
    "is_virtual_node",
)


def hash_pages(key: Any, first: int, end: int, before: str | None, page_size: int) -> list[str]:
    """SGLang's names of the pages [first, end) of a key; ``before`` is that of the page before them."""
    part = key[first * page_size : end * page_size]
    hashes: list[str] = get_storage_hash_str(part, before, page_size=page_size)
    return hashes


class LinkerWrapper(UnifiedCacheLinkerWrapper):
    """SGLang's driver of a linker, whose steps are to be filled in by a subclass."""

    def tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        """Hashes of the pages behind what a match found on the device."""
        raise NotImplementedError

    def agree_on_hit(self, num_pages: int) -> int:
        """The longest hit that all ranks have in common, given what this one has."""
        raise NotImplementedError

    def remember_offload(self, node_id: int, lock_params: Any) -> None:
        """An offload of a node has begun; the node is unlocked when all ranks have ended theirs."""
        self.cache.tree_core.mark_external_linker_offload_pending(node_id)
        self.pending_offloads.append(_PendingOffload(node_id, lock_params, [node_id]))

    def _tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        return self.tail_hashes(key, result, device_hit_len)

    def _sync_restorable_prefix(
        self, restorable: Sequence[int], *, num_pages: int, device_hit_pages: int
    ) -> int:
        # Of a prefix that we hold, every shorter one can be restored.
        return self.agree_on_hit(len(restorable))


class TreeCache(UnifiedRadixCache):
    """SGLang's radix cache, which says when a node leaves the device."""

    def node_leaves(self, node_id: int) -> None:
        """Called before a node's slots are given back."""
        raise NotImplementedError

    def reduce_over_ranks(self, tensor: torch.Tensor, op: Any) -> None:
        """In place, over all ranks that run this request's attention."""
        self._all_reduce_attn_groups(tensor, op)

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        self.node_leaves(node_id)
        return super()._evict_device_leaf(node_id, tracker)
