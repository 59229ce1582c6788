"""What our cache and linker are built on: SGLang's classes, with names for what is private in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.session.streaming_session import is_virtual_node

from sglang_flexkv.integration.compat import version
from sglang_flexkv.integration.compat.kv_events import NodeTokens
from sglang_flexkv.integration.compat.linker_interface import PoolName, PoolTransfer

if TYPE_CHECKING or not version.is_0_5_22():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
else:
    from sglang_flexkv.integration.compat.sglang_0_5_22 import RadixCache as UnifiedRadixCache

__all__ = (
    "LinkerWrapper",
    "TreeCache",
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

    def key_of_tree(self, key: Any) -> Any:
        """The key as the tree has it: with speculative decoding of pairs of tokens."""
        key, _ = key.maybe_to_bigram_view(self.cache.tree_core.is_eagle)
        return key

    def tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        """Hashes of the pages behind what a match found on the device."""
        raise NotImplementedError

    def agree_on_hit(self, restorable: Sequence[int], num_pages: int) -> int:
        """The longest hit that all ranks have in common, given the ones that this one has, growing.

        Args:
            num_pages: that were looked up.
        """
        raise NotImplementedError

    def remember_offload(self, node_id: int, lock_params: Any) -> None:
        """An offload of a node has begun; the node is unlocked when all ranks have ended theirs."""
        self.cache.tree_core.mark_external_linker_offload_pending(node_id)
        self.pending_offloads.append(_PendingOffload(node_id, lock_params, [node_id]))

    def remember_lock(self, node_id: int, lock_params: Any) -> None:
        """As ``remember_offload``, for a node that the tree counts as stored."""
        self.pending_offloads.append(_PendingOffload(node_id, lock_params, []))

    def _tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        return self.tail_hashes(key, result, device_hit_len)

    def _sync_restorable_prefix(
        self, restorable: Sequence[int], *, num_pages: int, device_hit_pages: int
    ) -> int:
        return self.agree_on_hit(restorable, num_pages)


class TreeCache(UnifiedRadixCache):
    """SGLang's radix cache, which says when a node leaves the device."""

    @property
    def window_tokens(self) -> int:
        """Tokens before a boundary that a sliding window needs to go on from there; 0: there is none."""
        window = self.components.get(ComponentType.SWA)
        return window.sliding_window_size if window is not None else 0

    @property
    def keeps_states(self) -> bool:
        """Whether a prompt can only be taken up again where its recurrent state was kept."""
        return ComponentType.MAMBA in self.components

    @property
    def has_windows_at_boundaries(self) -> bool:
        """Whether every prefix that a match finds on the device has its window there, too."""
        window = self.components.get(ComponentType.SWA)
        return window is None or bool(window.gates_prefix_match)

    def offer_again(self, node_id: int) -> list[PoolTransfer]:
        """What it takes to store the window and the state of a node that is stored; nothing if it has
        neither, or if it is not stored and so offered by itself."""
        tree = self.tree_core
        more = []
        for component, name in ((ComponentType.SWA, PoolName.SWA), (ComponentType.MAMBA, PoolName.MAMBA)):
            if component in self.components:
                slots = tree.get_component_device_value(node_id, component)
                if slots is not None and len(slots):
                    more.append(PoolTransfer(name=name, device_indices=slots.to(torch.int64)))
        if not more or tree.build_external_linker_offload_transfers(node_id):
            return []
        keys = list(tree.get_hash_values(node_id))
        for transfer in more:  # a node has its state at its end
            transfer.keys = keys[-1:] if transfer.name is PoolName.MAMBA else keys
        full = tree.get_component_device_value(node_id, ComponentType.FULL)
        return [PoolTransfer(name=PoolName.KV, device_indices=full.to(torch.int64), keys=keys), *more]

    # ---- events for routers ----

    @property
    def tells_routers(self) -> bool:
        """Whether this rank's events are published (``--kv-events-config``)."""
        tells: bool = self.tree_core.kv_events.enabled
        return tells

    def tokens_for_routers(self, node_id: int) -> NodeTokens | None:
        """Those of a node. None where its pages are not called by their tokens alone: with a salt or an
        adapter events have names for them that the node does not tell."""
        node = self.tree_core.snapshot_buffer_backup(node_id, False)
        if node is None or node.key.extra_key is not None or node.key.cache_salt is not None:
            return None
        return NodeTokens(node.key.raw_token_ids(), node.key.is_bigram)

    # ---- slots of recurrent states ----

    def num_free_states(self) -> int:
        """Slots of states that nobody has."""
        count: int = self.req_to_token_pool.mamba_allocator.available_size()
        return count

    def has_state_for_load(self) -> bool:
        """Whether a request can get a slot for a state that it loads. SGLang takes that for granted, and ends
        the scheduler where it is not so. It is tried, so that the tree gives up a state for it if it can."""
        allocator = self.req_to_token_pool.mamba_allocator
        slot = allocator.alloc(1)
        if slot is None:
            self.evict_for_alloc(EvictParams(num_tokens=0, mamba_num=1))
            slot = allocator.alloc(1)
        if slot is None:
            return False
        allocator.free(slot)
        return True

    def evict_for_alloc(self, params: Any, **kwargs: Any) -> Any:
        wanted = self.num_free_states() + params.mamba_num if params.mamba_num > 0 else 0
        result = super().evict_for_alloc(params, **kwargs)
        if wanted and self.num_free_states() < wanted and self.let_go_of_states():
            more = EvictParams(num_tokens=0, mamba_num=wanted - self.num_free_states())
            result.mamba_num_evicted += super().evict_for_alloc(more).mamba_num_evicted
        return result

    def let_go_of_states(self) -> bool:
        """Called where there is no state left that could be given up: lets go of those that are locked for
        our sake. Called on all ranks alike. False: there were none."""
        raise NotImplementedError

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
        key = self._key_of(req, tokens, end)
        params = InsertParams(
            key=key,
            value=torch.cat([self.path_device_indices(req.last_node), slots]),
            prev_prefix_len=first,
            inserted_len=end,
            priority=req.priority or 0,
            session_id=req.session_id,
        )
        if self.window_tokens:  # what is before the window that comes has none on the device
            params.set_evicted_seqlen(ComponentType.SWA, req.kv.get_evicted_seqlen(ComponentType.SWA))
        node = self.insert(params).last_device_node
        self.unlock(req.lock)
        req.last_node, req.lock = node, self.lock(node)
        req.kv.cache_protected_len = end
        return key, self.lock(node)

    def would_take_all(self, req: Any, tokens: Any, first: int, count: int) -> bool:
        """Whether ``take_prefix`` keeps all slots of so many tokens from ``first`` on: whether the tree has
        none of them. Without windows what is not found is not there. With recurrent states nothing is
        shared that has not come: who shares copies the state, which would be before the load brings it."""
        if self.keeps_states:
            return False
        if not self.window_tokens:
            return True
        key = self._key_of(req, tokens, first + count)
        reached: int = self.tree_core.match_full_device_prefix(key)[0]
        return reached <= first

    def _key_of(self, req: Any, tokens: Any, count: int) -> RadixKey:
        """The tree's key of the first tokens of a prompt."""
        bigrams = self.tree_core.is_eagle  # an element of a key is a token and the one behind it
        return RadixKey(
            tokens[: count + bigrams], req.extra_key, is_bigram=bigrams, cache_salt=req.cache_salt
        )

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
            # Whatever windows there are: the tokens themselves have to go.
            reached, node = self._match_tokens(key)
            if reached <= first:
                return
            super()._evict_device_leaf(node, Counter())

    def _match_tokens(self, key: Any) -> tuple[int, Any]:
        """How many tokens of a key are on the device, and the node of the last of them. Splits nodes where
        the key ends."""
        found = self.tree_core.match_prefix(MatchPrefixParams(key=key))
        self._apply_cache_actions(found.cache_actions)
        if not self.window_tokens:
            return found.device_prefix_len, found.last_device_node
        reached, node, *_ = self.tree_core.match_full_device_prefix(key)
        return reached, node

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        self.node_leaves(node_id)
        return super()._evict_device_leaf(node_id, tracker)
