"""SGLang's radix cache with our tiers under it.

A thin subclass: the tree, its locks and its eviction stay SGLang's. What is added are the calls that SGLang
makes while a request waits (``prefetch``), the write-back of a leaving node, the parent of each stored node,
which keeps eviction in our tiers leaf first, and what becomes of loads that fail (``compat.failed_loads``).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from sglang_flexkv import _core
from sglang_flexkv.common.config import WritePolicy
from sglang_flexkv.integration.compat import refused
from sglang_flexkv.integration.compat.failed_loads import (
    FailedLoads,
    end_with_its_beams,
    keep_session,
    runs_again,
)
from sglang_flexkv.integration.compat.kv_events import NodeTokens
from sglang_flexkv.integration.compat.requests import (
    NamedHandle,
    by_name,
    name_of,
    release_borrowed_rows,
    report_sources,
    report_storage_part,
)
from sglang_flexkv.integration.compat.scheduler import SchedulerView
from sglang_flexkv.integration.compat.tree import LinkerWrapper, TreeCache, hash_pages, is_virtual_node
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.prefetch import Prefetches
from sglang_flexkv.integration.prefill_times import PrefillTimes
from sglang_flexkv.integration.ranks import Ranks
from sglang_flexkv.integration.shared_loads import SharedLoads

logger = logging.getLogger(__name__)

# Uses of a node before it is stored. A node that leaves is stored whatever its use under write_back, and
# never before: the threshold is one that no node reaches.
_STORE_AT_USE = {
    WritePolicy.WRITE_THROUGH: 1,
    WritePolicy.WRITE_THROUGH_SELECTIVE: 2,
    WritePolicy.WRITE_BACK: 2**31 - 1,
}


# Nodes of which it is remembered that their windows, or states, were offered.
_PARTS_REMEMBERED = 1 << 16


class FlexKVLinkerWrapper(LinkerWrapper):
    """SGLang's driver of a linker. It additionally tells it the parent and the importance of what is stored,
    hashes the pages of a waiting prompt once, reduces one number over the ranks instead of a mask, and lets
    requests share what one of them loads.

    Wherever it takes or returns a request's id, that is the request's name (``compat.requests``)."""

    cache: FlexKVRadixCache
    cache_linker: FlexKVLinker
    inflight_load_rids: list[str]
    inflight_load_index: int
    _matching_rid = ""

    def __init__(self, cache: FlexKVRadixCache, linker: FlexKVLinker) -> None:
        super().__init__(cache, linker)
        self.loads = SharedLoads(cache)
        # Of nodes whose windows or states were offered, which: by their last page.
        self._parts_offered: OrderedDict[str, frozenset[str]] = OrderedDict()

    def match(self, key: Any, req: Any, result: Any) -> Any:
        self._matching_rid = req.rid
        key = self.key_of_tree(key)
        # What an earlier attempt found must not survive an attempt that finds nothing.
        self.hit_markers.pop(req.rid, None)
        self.cache_linker.forget_lookup(req.rid)
        if self.loads:
            result = self._match_loads(key, req, result)
        matched = super().match(key, req, result)
        if req.rid not in self.hit_markers:
            self.cache_linker.states.end_lease(req.rid)
        return matched

    def _match_loads(self, key: Any, req: Any, result: Any) -> Any:
        """A match that also finds what others load."""
        gave_up = self.cache_linker.states.known(req.rid).gave_up
        while not gave_up and len(hashes := self.tail_hashes(key, result, result.device_prefix_len)):
            load = self.loads.find(hashes[0])
            if load is None:
                break
            self.loads.share(load)
            self.private_load_indices.pop(load.name, None)
            result = self.cache.match_on_device(key, req)
        self.loads.note_match(req.rid, key, result.device_prefix_len)
        return result

    def tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        anchor = None
        if device_hit_len > 0:
            anchor = self.cache.get_last_hash_value(result.last_device_node)
            if anchor is None:
                return []  # without it the tail would hash as if it were a prompt's start
        page = self.cache.page_size
        self.cache_linker.begin_lookup(self._matching_rid, device_hit_len, len(key))
        return self.cache_linker.page_hashes.tail(
            self._matching_rid,
            key.raw_token_ids(),
            len(key),
            (key.extra_key, key.cache_salt),
            device_hit_len // page,
            anchor,
            lambda first, end, before: hash_pages(key, first, end, before, page),
        )

    def agree_on_hit(self, restorable: Sequence[int], num_pages: int) -> int:
        if self.cache_linker.has_parts:
            return self.cache.ranks.common_hit(restorable, num_pages)
        return self.cache.ranks.shortest_hit(len(restorable))

    def load_back(self, req: Any) -> Any:
        if self.cache.keeps_states and self.has_hit(req.rid) and not self.cache.has_state_for_load():
            del self.hit_markers[req.rid]
            return 0, req.last_node
        hit = self.hit_markers.get(req.rid)
        loaded = super().load_back(req)
        if loaded[0] and self.cache_linker.has_lower_tiers:
            self.cache.ranks.loads_begin()
        if hit is None or not loaded[0]:
            return loaded
        slots = self.private_load_indices[req.rid]
        self.loads.add(req, hit.tail_hashes[0], hit.device_hit_len, slots)
        first, count = self.cache_linker.storage_span(req.rid)
        if count:
            page = self.cache.page_size
            report_storage_part(req, hit.device_hit_len + first * page, count * page)
        report_sources(req, self.cache_linker.sources(req.rid))
        return loaded

    def start_layer_wise_loading(self) -> int:
        self.loads.begin_batch()
        return super().start_layer_wise_loading()

    def finish_loads(self) -> list[str]:
        """Requests whose KV did not land, the same on every rank: what they were to load themselves, or what
        another one of their batch was to load for them."""
        rids, self.inflight_load_rids = self.inflight_load_rids, []
        if not rids:
            return []
        index, self.inflight_load_index = self.inflight_load_index, -1
        here = self.cache_linker.finish_layer_wise_loading(index)
        landed = self.cache.ranks.landed_everywhere([rid in here for rid in rids])
        self.cache_linker.loads_have_ended_everywhere()
        for rid in rids:
            self.private_load_indices.pop(rid, None)
        return list(self.loads.end(rids, [rid for rid, ok in zip(rids, landed, strict=True) if not ok]))

    def offload_nodes(self, node_ids: Sequence[int]) -> None:
        for node_id in node_ids:
            transfers = self.cache.tree_core.build_external_linker_offload_transfers(node_id)
            if transfers:
                self._offload(node_id, transfers)

    def _offload(self, node_id: int, transfers: list[Any]) -> None:
        if len(transfers) > 1:
            self._note_parts(transfers)
        lock_params = self._start_offload(node_id, transfers)
        self.remember_offload(node_id, lock_params)

    def _start_offload(self, node_id: int, transfers: list[Any]) -> Any:
        """Starts to store a node, which is locked meanwhile. Returns what unlocks it."""
        cache = self.cache
        lock_params = cache.inc_lock_ref(node_id).to_dec_params()
        try:
            self.cache_linker.offload(
                transfers,
                parent_hash=self._parent_hash(node_id, transfers),
                importance=cache.insert_importance,
                tokens=self._tokens_for_routers(node_id),
            )
        except BaseException:
            cache.dec_lock_ref(node_id, lock_params)
            raise
        return lock_params

    def _tokens_for_routers(self, node_id: int) -> NodeTokens | None:
        return None if self.cache_linker.tier_events is None else self.cache.tokens_for_routers(node_id)

    def _note_parts(self, transfers: list[Any]) -> None:
        last_hash = transfers[0].keys[-1]
        before = self._parts_offered.get(last_hash, frozenset())
        self._parts_offered[last_hash] = before.union(transfer.name for transfer in transfers[1:])
        self._parts_offered.move_to_end(last_hash)
        if len(self._parts_offered) > _PARTS_REMEMBERED:
            self._parts_offered.popitem(last=False)

    def offer_parts(self, node_id: int) -> None:
        """Stores the window or the state of a node that has got it on the device after it was stored without:
        SGLang offers a node once.

        Goes by what has been offered, which is the same on every rank, and not by what is held."""
        cache = self.cache
        num_parts = len(self.cache_linker.pools) - 1
        if not num_parts or cache.is_root(node_id):
            return
        last_hash = cache.get_last_hash_value(node_id)
        if last_hash is None:
            return
        offered = self._parts_offered.get(last_hash, frozenset())
        if len(offered) == num_parts:
            return
        transfers = cache.offer_again(node_id)
        if any(transfer.name not in offered for transfer in transfers[1:]):
            self._note_parts(transfers)
            self.remember_lock(node_id, self._start_offload(node_id, transfers))

    def write_back(self, node_id: int) -> None:
        """Stores a node that is about to be evicted, unless it is stored or on its way already."""
        transfers = self.cache.tree_core.build_external_linker_offload_transfers(node_id)
        if transfers:
            parent_hash = self._parent_hash(node_id, transfers)
            self.cache_linker.write_back(transfers, parent_hash, self._tokens_for_routers(node_id))

    def _parent_hash(self, node_id: int, transfers: list[Any]) -> str | None:
        """Hash of the page before the node's first; None at the start of a sequence."""
        # Of the two calls that know it, this one copies neither the node's tokens nor its hashes.
        transfer = transfers[0]
        node = self.cache.tree_core.validate_buffer_backup(node_id, len(transfer.device_indices))
        return None if node is None else node.parent_last_hash

    def release_request(self, rid: str) -> None:
        self.loads.forget(rid)
        if self.loads.is_shared(rid):
            self.hit_markers.pop(rid, None)  # its load goes on: others want it
        else:
            super().release_request(rid)
        self.cache_linker.forget_request(rid)

    def reset(self) -> None:
        super().reset()
        self.loads.clear()
        self._parts_offered.clear()


class FlexKVRadixCache(TreeCache):
    """UnifiedRadixCache over a CPU tier and those below it."""

    linker: FlexKVLinkerWrapper | None

    def __init__(self, params: Any) -> None:
        self.prefetches: Prefetches | None = None  # the parent's constructor calls reset()
        super().__init__(params)
        refused.check_components(self.tree_components)
        refused.check_boundaries(self.has_windows_at_boundaries)
        self.ranks = Ranks(self.reduce_over_ranks)
        self._scheduler = SchedulerView()
        self._writes_back = False
        self.failed_loads = FailedLoads()
        self._prefill_times: PrefillTimes | None = None
        self._by_priority = self._shares_forwards = False
        self.insert_importance = 0  # of the request that is inserted right now

    def attach(
        self,
        linker: FlexKVLinker,
        policy: WritePolicy,
        *,
        by_priority: bool = False,
        shares_forwards: bool = False,
    ) -> None:
        """Puts the tiers under the tree.

        Args:
            by_priority: a request's priority is about the cache, too.
            shares_forwards: a forward is also that of ranks with other requests (DP attention).
        """
        self._by_priority = by_priority
        self._shares_forwards = shares_forwards
        self.linker = FlexKVLinkerWrapper(self, linker)
        self.prefetches = Prefetches(linker, self.ranks, self._scheduler)
        self.write_through_threshold = _STORE_AT_USE[policy]
        self._writes_back = policy is WritePolicy.WRITE_BACK

    def attach_scheduler(self, scheduler: Any) -> None:
        """Called when the scheduler is complete."""
        self._scheduler.attach(scheduler)
        if self.linker is None:
            return
        linker = self.linker.cache_linker
        linker.attach_scheduler(self._scheduler)
        # What a forward takes is to tell what its own prefills take, not decodes beside them, nor what other
        # ranks compute and wait for.
        if not self._scheduler.mixes_prefills_and_decodes and not self._shares_forwards:
            self._prefill_times = PrefillTimes(
                linker.load_or_recompute.prefill, linker.on_gpu, linker.forward_stream
            )

    def insert(self, params: Any) -> Any:
        if self._by_priority:
            self.insert_importance = min(max(int(params.priority or 0), 0), _core.IMPORTANCE_MAX)
        try:
            result = super().insert(params)
            if self.linker is not None and result.last_device_node is not None:
                self.linker.offer_parts(result.last_device_node)
            return result
        finally:
            self.insert_importance = 0

    # ---- a request looks for what is cached, and is admitted: SGLang goes by its id, we by its name ----

    def match_prefix(self, params: Any) -> Any:
        with by_name(*([params.req] if params.req is not None else [])):
            return super().match_prefix(params)

    def init_load_back(self, params: Any) -> Any:
        with by_name(params.req):
            return super().init_load_back(params)

    def checkpoint(self, req: Any, **kwargs: Any) -> None:
        super().checkpoint(req, **kwargs)
        if self.linker is not None:
            self.linker.loads.forget(name_of(req))

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        with by_name(req):
            indices: torch.Tensor = super().prefix_device_indices(req)
        return indices

    # ---- nodes: what a streaming session keeps is not in the tree, and its node is none of the tree's ----

    def is_backuped(self, node_id: Any) -> bool:
        # SGLang asks this to know whether the store below can continue the device's prefix. Keys are chained,
        # so ours can, from any node of the tree.
        return not is_virtual_node(node_id)

    def is_root(self, node_id: Any) -> bool:
        return not is_virtual_node(node_id) and super().is_root(node_id)

    def get_last_hash_value(self, node_id: Any) -> str | None:
        return None if is_virtual_node(node_id) else super().get_last_hash_value(node_id)

    def dfs_weight_order(self, node_handles: Sequence[Any]) -> list[int]:
        # By which SGLang may sort its queue. A session's turn has no place in the tree. It goes first: the
        # memory that its session holds is held until it has run.
        in_tree = [i for i, node in enumerate(node_handles) if not is_virtual_node(node)]
        order = super().dfs_weight_order([node_handles[i] for i in in_tree])
        turns = set(range(len(node_handles))) - set(in_tree)
        return [*sorted(turns), *(in_tree[i] for i in order)]

    # ---- a request waits: lower tiers -> CPU tier ----

    def prefetch_from_storage(self, request: Any, *_args: Any, **_kwargs: Any) -> None:
        """Called when a request enters the queue, right after its prefix was matched."""
        if self.prefetches is not None:
            self.prefetches.enter(request.rid)

    def check_prefetch_progress(self, request: Any) -> bool:
        """Whether a request may be scheduled. Same answer on every rank."""
        if self.prefetches is None:
            return True
        if not self.prefetches.may_run(request.rid):
            return False
        first_token, num_tokens = self.prefetches.take_brought(request.rid)
        if num_tokens:
            self.prefetch_loaded_tokens_by_reqid[request] = num_tokens
            self.prefetch_loaded_storage_start_by_reqid[request] = first_token
        return True

    # ---- what is under way ----

    def has_pending_cache_operations(self) -> bool:
        """Whether the tree is locked by copies, or requests wait for some: SGLang is not idle then."""
        waiting = self.prefetches is not None and bool(self.prefetches.waits)
        if self._scheduler.is_paused:
            # SGLang plans no batches, before which it looks after these; it asks this in each round instead,
            # on every rank. It may flush while requests wait in its queue.
            self._scheduler.run_again(self.failed_loads)
            self.check_hicache_events()
            waiting = False
        offloading = self.linker is not None and bool(self.linker.pending_offloads)
        return waiting or offloading or bool(self.failed_loads)

    def let_go_of_states(self) -> bool:
        if self.linker is None or not self.linker.pending_offloads:
            return False
        self.linker.cache_linker.wait_for_offloads()
        super().check_hicache_events()
        return True

    def settle(self, scheduler: Any) -> None:
        """Ends what the next steps of the scheduler would find ended. Called on every rank alike when SGLang
        is about to do what wants it idle."""
        self.failed_loads.run_again(scheduler)
        release_borrowed_rows(scheduler.waiting_queue, self.session)
        if self.linker is not None and self.linker.pending_offloads:
            self.linker.cache_linker.wait_for_offloads()
            self.check_hicache_events()

    def release_aborted_request(self, request: Any) -> None:
        if not isinstance(request, NamedHandle):
            return  # it has never looked for anything here
        if self.prefetches is not None:
            self.prefetches.leave(request.rid)
        super().release_aborted_request(request)

    def finish(self, handle: Any, outcome: Any) -> None:
        # A request that is aborted before it runs. The others end in on_release.
        super().finish(handle, outcome)
        if self.linker is not None and isinstance(handle, NamedHandle):
            self.linker.release_request(handle.rid)

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        # A request has ended, or is retracted and will look again.
        super().on_release(req, checkpointed=checkpointed)
        self._forget(req)

    def claim_kv_row(self, req: Any) -> bool:
        # A streaming session keeps the memory, and SGLang does not call on_release.
        claimed: bool = super().claim_kv_row(req)
        if claimed:
            self._forget(req)
        else:
            keep_session(req)
        return claimed

    def _forget(self, req: Any) -> None:
        # What failed to load must not be tried again when its request runs again.
        if self.linker is not None and not runs_again(req):
            self.linker.release_request(name_of(req))

    def check_hicache_events(self) -> None:
        # The ranks agree on what has been offloaded, each time that SGLang's loop comes round. What is on its
        # way is the same on every rank (nodes are offered in the same order and always accepted), so where
        # nothing is, every rank knows that the others have nothing to say either.
        if self.linker is None or self.linker.pending_offloads:
            super().check_hicache_events()
        if self.linker is not None:
            self.linker.cache_linker.tick()
        if self.prefetches is not None:
            self.prefetches.tick()

    # ---- a batch runs ----

    def ready_to_load_host_cache(self) -> int:
        index: int = super().ready_to_load_host_cache()
        if self._prefill_times is not None:
            self._prefill_times.start()
            if index >= 0:
                self._prefill_times.cancel()  # it waits for what is loaded
        return index

    def finish_external_linker_loads(self, reqs: list[Any]) -> list[Any]:
        if self.linker is None:
            return []
        if self._prefill_times is not None and self._prefill_times.started:
            self._prefill_times.end([(req.prefix_len, req.extend_end or 0) for req in reqs])
        if not self.linker.inflight_load_rids:
            return []
        before = [req.skip_radix_cache_insert for req in reqs]
        # SGLang marks what failed to be ended with an error, and gives a chunked one up at once. Neither
        # becomes of what can run again.
        with by_name(*reqs):
            failed = super().finish_external_linker_loads(reqs)
        for req in failed:
            self.linker.cache_linker.give_up(name_of(req))
            end_with_its_beams(req)
        self.linker.cache_linker.metrics.shared(self.linker.loads.end_batch(reqs, failed))
        ended = [
            req
            for req, skip_insert in zip(reqs, before, strict=True)
            if req in failed and not self.failed_loads.take(req, skip_insert)
        ]
        if failed:
            self.linker.cache_linker.metrics.failed_loads(len(failed))
            logger.error(
                "the KV of %d request(s) could not be loaded; %d run again and compute it",
                len(failed),
                len(failed) - len(ended),
            )
        return ended

    # ---- eviction ----

    def node_leaves(self, node_id: int) -> None:
        if self._writes_back and self.linker is not None:
            self.linker.write_back(node_id)

    # ---- events for routers ----

    def take_events(self) -> list[Any]:
        events: list[Any] = super().take_events()
        if self.linker is not None and (of_tiers := self.linker.cache_linker.tier_events) is not None:
            events += of_tiers.take()
        return events

    # ---- lifecycle ----

    def reset(self) -> None:
        if self.prefetches is not None:
            self.prefetches.clear()
        super().reset()

    def weights_changed(self) -> None:
        """The weights are about to differ from the files that this process has loaded. May come at any time,
        with requests running."""
        if self.linker is not None:
            self.linker.cache_linker.weights_changed()

    def clear_storage_backend(self) -> bool:
        """SGLang's endpoint for clearing the storage behind the cache: empties every tier. What
        the device holds stays."""
        if self.linker is None:
            return False
        self.linker.hit_markers.clear()
        self.linker.cache_linker.clear_storage()
        return True

    def sanity_check(self) -> None:
        super().sanity_check()
        if self.prefetches is None or self.prefetches.waits or self.linker is None:
            return
        if not self.linker.pending_offloads:
            self.linker.cache_linker.engine.check_integrity()
