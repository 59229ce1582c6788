"""What our cache and linker are built on: SGLang's classes, with names for what is private in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.session.streaming_session import is_virtual_node

from sglang_flexkv.integration.compat import version

if TYPE_CHECKING or not version.is_0_5_22():
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
else:
    from sglang_flexkv.integration.compat.sglang_0_5_22 import Linker as UnifiedCacheLinker
    from sglang_flexkv.integration.compat.sglang_0_5_22 import RadixCache as UnifiedRadixCache

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

    # ---- what a request loads becomes a part of the tree before the request has run ----

    def match_on_device(self, key: Any, req: Any) -> Any:
        """SGLang's match without what is held below."""
        params = MatchPrefixParams(key=key, req=req)
        result = self.tree_core.match_prefix(params)
        self._apply_cache_actions(result.cache_actions)
        for component in self._components_tuple:
            result = component.finalize_match_result_in_cache(params, result)
        return result

    def take_prefix(self, req: Any, tokens: Any, first: int, slots: torch.Tensor) -> tuple[Any, Any]:
        """Puts what a request loads into the tree, which holds exactly the tokens before it. The request has
        it from then on as if it had found it there. Nothing is stored on that account: the request inserts
        its prompt when it has run.

        Args:
            tokens: of its prompt.
            first: the first one of these that is loaded.
            slots: of it and of those behind it, whole pages.

        Returns:
            The key of the prompt up to the last of these, and a lock on it.
        """
        end = first + len(slots)
        key = RadixKey(tokens[:end], req.extra_key, cache_salt=req.cache_salt)
        params = InsertParams(
            key=key,
            value=torch.cat([self.path_device_indices(req.last_node), slots]),
            prev_prefix_len=first,
            inserted_len=end,
            priority=req.priority or 0,
            session_id=req.session_id,
        )
        node = self.insert(params).last_device_node
        self.unlock(req.lock)
        req.last_node, req.lock = node, self.lock(node)
        req.kv.cache_protected_len = end
        return key, self.lock(node)

    def common_tokens(self, one: Any, other: Any) -> int:
        """Tokens at their start, in whole pages, that two keys have in common."""
        if (one.extra_key, one.cache_salt) != (other.extra_key, other.cache_salt):
            return 0
        common: int = one.match(other, page_size=self.page_size)
        return common

    def let_go_of_prefix(self, req: Any) -> None:
        """A request, which will give back its memory, does not want its prefix kept until then."""
        holder = self.session.borrowed_slot(req) or req
        self.unlock(holder.lock)
        holder.lock = None
        req.last_node = self.root_node_handle(req.extra_key)

    def drop_prefix(self, key: Any, first: int) -> None:
        """Takes the tokens of a key from ``first`` on out of the tree, and stores nothing. Nobody has a lock
        on them, and nothing else is below them."""
        while True:
            found = self.tree_core.match_prefix(MatchPrefixParams(key=key))
            self._apply_cache_actions(found.cache_actions)
            if found.device_prefix_len <= first:
                return
            super()._evict_device_leaf(found.last_device_node, Counter())

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        self.node_leaves(node_id)
        return super()._evict_device_leaf(node_id, tracker)
