"""SGLang's radix cache with our tiers under it.

A thin subclass: the tree, its locks and its eviction stay SGLang's. What is added are the calls that SGLang
makes while a request waits (prefetch from SSD), the spill of a leaving node under ``write_back``, and the
parent of each stored node, which keeps eviction in our tiers leaf first.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    UnifiedCacheLinkerWrapper,
    _PendingOffload,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_context, get_memory, get_observability, get_parallel
from sglang.srt.session.streaming_session import is_virtual_node

from sglang_flexkv import __version__, _core
from sglang_flexkv.common.config import GIB, FlexKVConfig, WritePolicy
from sglang_flexkv.integration import checks
from sglang_flexkv.integration.failed_loads import FailedLoads, keep_session, runs_again
from sglang_flexkv.integration.kv_pool import device_buffers
from sglang_flexkv.integration.linker import FlexKVLinker, Prefetch
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.integration.model_identity import Settings, describe, model_identity, notes
from sglang_flexkv.integration.prefill_times import PrefillTimes
from sglang_flexkv.integration.request_names import NamedHandle, by_name, name_of
from sglang_flexkv.integration.sglang_hashes import native_works
from sglang_flexkv.kvtask import KVTaskEngine
from sglang_flexkv.storage.storage_engine import slot_bytes_for

logger = logging.getLogger(__name__)

# Uses of a node before it is stored. A node that leaves is stored whatever its use under write_back, and
# never before: the threshold is one that no node reaches.
_STORE_AT_USE = {
    WritePolicy.WRITE_THROUGH: 1,
    WritePolicy.WRITE_THROUGH_SELECTIVE: 2,
    WritePolicy.WRITE_BACK: 2**31 - 1,
}


@dataclass
class _WaitingRequest:
    prefetch: Prefetch
    first_token: int  # where the part that comes from SSD starts in the prompt
    arrived: int = 0  # pages of it that have come


class FlexKVLinkerWrapper(UnifiedCacheLinkerWrapper):
    """SGLang's driver of a linker. It additionally tells it the parent and the importance of what is stored,
    hashes the pages of a waiting prompt once, and reduces one number over the ranks instead of a mask.

    Wherever it takes or returns a request's id, that is the request's name (``request_names``)."""

    cache: FlexKVRadixCache
    cache_linker: FlexKVLinker
    inflight_load_rids: list[str]
    inflight_load_index: int
    _matching_rid = ""

    def match(self, key: Any, req: Any, result: Any) -> Any:
        self._matching_rid = req.rid
        # What an earlier attempt found must not survive an attempt that finds nothing.
        self.hit_markers.pop(req.rid, None)
        self.cache_linker.forget_lookup(req.rid)
        matched = super().match(key, req, result)
        if req.rid not in self.hit_markers:
            self.cache_linker.release_hold(req.rid)
        return matched

    def _tail_hashes(self, key: Any, result: Any, device_hit_len: int) -> list[str]:
        anchor = None
        if device_hit_len > 0:
            anchor = self.cache.get_last_hash_value(result.last_device_node)
            if anchor is None:
                return []  # without it the tail would hash as if it were a prompt's start
        page = self.cache.page_size
        self.cache_linker.begin_lookup(self._matching_rid, device_hit_len, len(key))

        def hash_pages(first: int, end: int, before: str | None) -> list[str]:
            hashes: list[str] = get_storage_hash_str(key[first * page : end * page], before, page_size=page)
            return hashes

        return self.cache_linker.page_hashes.tail(
            self._matching_rid,
            key.raw_token_ids(),
            len(key),
            (key.extra_key, key.cache_salt),
            device_hit_len // page,
            anchor,
            hash_pages,
        )

    def _sync_restorable_prefix(
        self, restorable: Sequence[int], *, num_pages: int, device_hit_pages: int
    ) -> int:
        # Of a prefix that we hold, every shorter one can be restored: the ranks have the shortest in common.
        held = torch.tensor([len(restorable)], dtype=torch.int64)
        self.cache._all_reduce_attn_groups(held, torch.distributed.ReduceOp.MIN)
        return int(held.item())

    def load_back(self, req: Any) -> Any:
        hit = self.hit_markers.get(req.rid)
        loaded = super().load_back(req)
        if loaded[0] and self.cache_linker.engine.config.enable_ssd:
            self.cache.reads_may_run = True
        first, count = self.cache_linker.ssd_span(req.rid)
        if hit is not None and count:
            # Where the tokens came from, for what the request reports: this part was not prefetched.
            page = self.cache.page_size
            start = hit.device_hit_len + first * page
            if req.storage_hit_length and req.storage_hit_start is not None:
                start = min(start, req.storage_hit_start)
            req.storage_hit_length += count * page
            req.storage_hit_start = start
            req.host_hit_is_storage = False
        return loaded

    def finish_loads(self) -> list[str]:
        """Requests whose KV did not land, the same on every rank. No other request has read what they were to
        load: it is in slots of their own, and not in the tree before this has been answered."""
        rids, self.inflight_load_rids = self.inflight_load_rids, []
        if not rids:
            return []
        index, self.inflight_load_index = self.inflight_load_index, -1
        here = self.cache_linker.finish_layer_wise_loading(index)
        landed = torch.tensor([rid in here for rid in rids], dtype=torch.int64)
        self.cache._all_reduce_attn_groups(landed, torch.distributed.ReduceOp.MIN)
        for rid in rids:
            del self.private_load_indices[rid]
        failed = [rid for rid, ok in zip(rids, landed.tolist(), strict=True) if not ok]
        for rid in failed:
            self.cache_linker.give_up(rid)
        return failed

    def offload_nodes(self, node_ids: Sequence[int]) -> None:
        for node_id in node_ids:
            transfers = self.cache.tree_core.build_external_linker_offload_transfers(node_id)
            if transfers:
                self._offload(node_id, transfers)

    def _offload(self, node_id: int, transfers: list[Any]) -> None:
        cache = self.cache
        lock_params = cache.inc_lock_ref(node_id).to_dec_params()
        try:
            self.cache_linker.offload(
                transfers,
                parent_hash=self._parent_hash(node_id, transfers),
                importance=cache.insert_importance,
            )
        except BaseException:
            cache.dec_lock_ref(node_id, lock_params)
            raise
        cache.tree_core.mark_external_linker_offload_pending(node_id)
        self.pending_offloads.append(_PendingOffload(node_id, lock_params, [node_id]))

    def spill_node(self, node_id: int) -> None:
        """Stores a node that is about to be evicted, unless it is stored or on its way already."""
        transfers = self.cache.tree_core.build_external_linker_offload_transfers(node_id)
        if transfers:
            self.cache_linker.spill(transfers, self._parent_hash(node_id, transfers))

    def _parent_hash(self, node_id: int, transfers: list[Any]) -> str | None:
        """Hash of the page before the node's first; None at the start of a sequence."""
        # Of the two calls that know it, this one copies neither the node's tokens nor its hashes.
        (transfer,) = transfers
        node = self.cache.tree_core.validate_buffer_backup(node_id, len(transfer.device_indices))
        return None if node is None else node.parent_last_hash

    def release_request(self, rid: str) -> None:
        super().release_request(rid)
        self.cache_linker.forget_request(rid)


class FlexKVRadixCache(UnifiedRadixCache):
    """UnifiedRadixCache over CPU and SSD tiers."""

    linker: FlexKVLinkerWrapper | None

    def __init__(self, params: Any) -> None:
        # The parent's constructor calls reset().
        self._waiting: dict[Any, _WaitingRequest] = {}
        self._scheduler: Any = None
        # Whether any rank may be reading from SSD. Follows from what all ranks know, so while it is not set
        # they need not ask each other.
        self.reads_may_run = False
        super().__init__(params)
        checks.check_components(self.tree_components)
        self._spill_on_evict = False
        self.failed_loads = FailedLoads()
        self._prefill_times: PrefillTimes | None = None
        # Whether a request's priority is about the cache, too: SGLang takes it so only if it is told to.
        self._by_priority = False
        self.insert_importance = 0  # of the request that is inserted right now

    def attach(self, linker: FlexKVLinker, policy: WritePolicy) -> None:
        """Puts the tiers under the tree."""
        self.linker = FlexKVLinkerWrapper(self, linker)
        self._by_priority = get_memory().radix_eviction_policy == "priority"
        self.write_through_threshold = _STORE_AT_USE[policy]
        self._spill_on_evict = policy is WritePolicy.WRITE_BACK

    def attach_scheduler(self, scheduler: Any) -> None:
        """Called when the scheduler is complete."""
        self._scheduler = scheduler
        if self.linker is None:
            return
        linker = self.linker.cache_linker
        linker.attach_scheduler(scheduler)
        if not scheduler.is_mixed_chunk:  # no forwards of prefills alone there
            self._prefill_times = PrefillTimes(
                linker.load_or_recompute.prefill, linker.on_gpu, linker.forward_stream
            )

    def insert(self, params: Any) -> Any:
        if self._by_priority:
            self.insert_importance = min(max(int(params.priority or 0), 0), _core.IMPORTANCE_MAX)
        try:
            return super().insert(params)
        finally:
            self.insert_importance = 0

    # ---- a request looks for what is cached, and is admitted: SGLang goes by its id, we by its name ----

    def match_prefix(self, params: Any) -> Any:
        with by_name(*([params.req] if params.req is not None else [])):
            return super().match_prefix(params)

    def init_load_back(self, params: Any) -> Any:
        with by_name(params.req):
            return super().init_load_back(params)

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

    # ---- while a request waits: SSD -> CPU ----

    def prefetch_from_storage(self, request: Any, *_args: Any, **_kwargs: Any) -> None:
        """Called when a request enters the queue, right after its prefix was matched."""
        if self.linker is None or not self.linker.cache_linker.engine.config.enable_ssd:
            return
        if self._is_alone():
            return  # its turn comes at once, and its load reads from SSD under the forward
        linker = self.linker.cache_linker
        first_token, on_ssd = linker.ssd_part(request.rid)
        if self._is_next() and linker.hides_its_reads(request.rid, self._scheduler.chunked_prefill_size):
            on_ssd = 0
        # Whether to wait is decided by all ranks together; which blocks to bring, by each for itself.
        anything = torch.tensor([on_ssd], dtype=torch.int64)
        self._all_reduce_attn_groups(anything, torch.distributed.ReduceOp.MAX)
        if int(anything.item()) == 0:
            return
        self._waiting[request] = _WaitingRequest(linker.start_prefetch(request.rid), first_token)
        self.reads_may_run = True

    def _is_next(self) -> bool:
        """Whether a request that enters the queue now is the next to be scheduled. Same answer on every
        rank."""
        scheduler = self._scheduler
        return scheduler is not None and not scheduler.waiting_queue and scheduler.chunked_req is None

    def _is_alone(self) -> bool:
        """Whether, besides, nobody would stand still while its forward waits for the disk."""
        return self._is_next() and not self._others_run()

    def _others_run(self) -> bool:
        """Whether a forward of others is in progress or follows. Same answer on every rank."""
        scheduler = self._scheduler
        if scheduler is None or scheduler.chunked_req is not None or not scheduler.running_batch.is_empty():
            return True
        # Requests that have just been prefilled join the running batch after the next one has been chosen.
        last = scheduler.last_batch
        return last is not None and any(not req.finished() for req in last.reqs)

    def check_prefetch_progress(self, request: Any) -> bool:
        """Whether a request may be scheduled. Same answer on every rank."""
        if self.linker is None:
            return True
        linker = self.linker.cache_linker
        waited = self._waiting.get(request)
        if waited is not None:
            ready = torch.tensor([int(linker.prefetch_ready(waited.prefetch))], dtype=torch.int64)
            self._all_reduce_attn_groups(ready, torch.distributed.ReduceOp.MIN)
            if not int(ready.item()):
                return False
            del self._waiting[request]
            waited.arrived += linker.end_prefetch(request.rid, waited.prefetch)
        # One that has pushed others off the device must not let them pass: they would be pushed off again.
        preempts = self._scheduler is not None and self._scheduler.enable_priority_preemption
        if (
            (waited is not None or self.reads_may_run)
            and not preempts
            and self._waits_for_a_read(request, waited)
        ):
            return False
        if waited is not None:
            self.prefetch_loaded_tokens_by_reqid[request] = waited.arrived * self.page_size
            self.prefetch_loaded_storage_start_by_reqid[request] = waited.first_token
        return True

    def _waits_for_a_read(self, request: Any, waited: _WaitingRequest | None) -> bool:
        """Whether a request whose turn has come waits (again) for a read from SSD: for one that somebody else
        has begun, since it could only compute what that brings; and after such a one for its own of what is
        left. Same answer on every rank."""
        assert self.linker is not None
        linker = self.linker.cache_linker
        before = waited.prefetch if waited is not None else None
        joined, left = None, False
        if linker.may_wait(request.rid, before):
            joined = linker.read_to_join(request.rid)
            after_another = before is not None and before.joined is not None
            left = after_another and self._would_hold_up_others(request.rid)
        wanted = torch.tensor(
            [int(joined is not None or left), linker.engine.num_ssd_reads], dtype=torch.int64
        )
        self._all_reduce_attn_groups(wanted, torch.distributed.ReduceOp.MAX)
        waits, reads = wanted.tolist()
        self.reads_may_run = bool(waits or reads)
        if not waits:
            return False
        first_token, _ = linker.ssd_part(request.rid)
        if waited is not None and waited.arrived:
            first_token = waited.first_token
        self._waiting[request] = _WaitingRequest(
            linker.start_prefetch(request.rid, joined, before),
            first_token,
            waited.arrived if waited is not None else 0,
        )
        return True

    def _would_hold_up_others(self, rid: str) -> bool:
        """Whether a request would read from SSD in its forward while others have to wait for that."""
        assert self.linker is not None
        linker, scheduler = self.linker.cache_linker, self._scheduler
        if linker.ssd_part(rid)[1] == 0 or not self._others_run():
            return False
        return scheduler is None or not linker.hides_its_reads(rid, scheduler.chunked_prefill_size)

    def has_pending_cache_operations(self) -> bool:
        """Whether the tree is locked by copies, or requests wait for some: SGLang is not idle then."""
        paused = self._scheduler is not None and self._scheduler._engine_paused
        if paused:
            # SGLang plans no batches, before which it looks after these; it asks this in each round instead,
            # on every rank. It may flush while requests wait in its queue.
            self.failed_loads.run_again(self._scheduler)
            self.check_hicache_events()
        return (
            (bool(self._waiting) and not paused)
            or bool(self.failed_loads)
            or (self.linker is not None and bool(self.linker.pending_offloads))
        )

    def settle(self, scheduler: Any) -> None:
        """Ends what the next steps of the scheduler would find ended. Called on every rank alike when SGLang
        is about to do what wants it idle."""
        self.failed_loads.run_again(scheduler)
        # A session's turn borrows the session's record when it enters the queue, and again when it is
        # scheduled. SGLang flushes while it waits in a pause, but not while it holds memory.
        for req in scheduler.waiting_queue:
            if self.session.borrowed_slot(req) is not None:
                req.detach_kv()
        if self.linker is not None and self.linker.pending_offloads:
            self.linker.cache_linker.wait_for_offloads()
            self.check_hicache_events()

    def release_aborted_request(self, request: Any) -> None:
        if not isinstance(request, NamedHandle):
            return  # it has never looked for anything here
        waiting = self._waiting.pop(request, None)
        if waiting is not None and self.linker is not None:
            self.linker.cache_linker.end_prefetch(request.rid, waiting.prefetch)
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

    def _evict_device_leaf(self, node_id: int, tracker: Any) -> Any:
        if self._spill_on_evict and self.linker is not None:
            self.linker.spill_node(node_id)
        return super()._evict_device_leaf(node_id, tracker)

    # ---- lifecycle ----

    def reset(self) -> None:
        self._waiting.clear()
        super().reset()

    def weights_changed(self) -> None:
        """The weights are about to differ from the files that this process has loaded. May come at any time,
        with requests running."""
        if self.linker is not None:
            self.linker.cache_linker.weights_changed()

    def clear_storage_backend(self) -> bool:
        """SGLang's endpoint for clearing the storage behind the cache: empties the CPU and the SSD tier. What
        the device holds stays."""
        if self.linker is None:
            return False
        self.linker.hit_markers.clear()
        self.linker.cache_linker.clear_storage()
        return True

    def sanity_check(self) -> None:
        super().sanity_check()
        if self.linker is not None and not self._waiting and not self.linker.pending_offloads:
            self.linker.cache_linker.engine.check_integrity()


def build_radix_cache(create: Callable[..., Any], ctx: Any, at_start: Settings | None) -> FlexKVRadixCache:
    """Builds the cache and everything under it.

    Args:
        create: SGLang's ``create_unified_radix_cache``.
        ctx: its TreeCacheBuildContext.
        at_start: the settings of this process before it loaded the model.

    Raises:
        ConfigError, IncompatibleError: with the setting and the remedy.
    """
    # The flag opened the scheduler's gates; left on here it would build SGLang's own linker.
    with get_memory().override(enable_unified_cache_external_linker=False):
        cache = create(ctx, cache_class=FlexKVRadixCache)
    config = FlexKVConfig.load(get_memory().flexkv_config_file)
    params = ctx.params
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    device = device_buffers(pool)
    page_size = params.page_size
    parallel = get_parallel()
    layout = device.block_layout(page_size)

    replicas = 1 if parallel.enable_dp_attention else parallel.dp_size
    num_ranks = max(1, parallel.tp_size * replicas // parallel.nnodes)
    cache_config = config.cache_config(
        block_bytes=slot_bytes_for(layout.block_bytes), tokens_per_block=page_size, num_ranks=num_ranks
    )
    identity = model_identity(
        get_context().config_leaf,
        ctx.model_config.model_path,
        ctx.model_config.revision,
        at_start=at_start,
        pool={
            "dtype of the KV": str(pool.dtype),
            "layout of the KV": str([(t.dtype, tuple(t.shape[1:])) for t in chain(*device.tensors)]),
            "tokens per row": str(device.tokens_per_row),
            "tokens per block": str(page_size),
            "TP rank": f"{parallel.tp_rank} of {parallel.tp_size}",
            "attention TP rank": f"{parallel.attn_tp_rank} of {parallel.attn_tp_size}",
            "format": "2",
        },
    )
    if cache_config.enable_ssd:
        for note in notes(identity):
            logger.warning("sglang-flexkv: %s", note)
    native_works()  # what SGLang has to compile is compiled before the first request comes
    engine = KVTaskEngine(
        cache_config,
        device,
        namespace=identity.namespace,
        label=describe(
            ctx.model_config.model_path, pool.dtype, page_size, parallel.tp_rank, parallel.tp_size
        ),
        identity=identity,
        rank_tag=f"dp{parallel.dp_rank or 0}-tp{parallel.tp_rank}",
    )
    linker = FlexKVLinker(
        engine,
        config,
        identity.namespace,
        num_layers=layout.num_layers,
        single_rank=parallel.tp_size == 1,
        metrics=Metrics(
            {"dp_rank": str(parallel.dp_rank or 0), "tp_rank": str(parallel.tp_rank)}
            if get_observability().enable_metrics
            else None
        ),
    )
    atexit.register(linker.close)
    cache.attach(linker, config.write_policy)
    pool.register_layer_transfer_counter(linker.layer_done_counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(linker.layer_done_counter)
    slot_bytes = engine.slot_bytes
    logger.info(
        "sglang-flexkv %s: %s, block %d tokens (%.1f KiB); CPU tier %.2f GiB (%d blocks); SSD tier %s",
        __version__,
        config.write_policy.value,
        page_size,
        slot_bytes / 1024,
        cache_config.num_cpu_blocks * slot_bytes / GIB,
        cache_config.num_cpu_blocks,
        f"{cache_config.num_ssd_blocks * slot_bytes / GIB:.2f} GiB through {engine.io_engine}"
        if cache_config.enable_ssd
        else "off",
    )
    if engine.cuda_note:
        logger.info("sglang-flexkv copies: %s", engine.cuda_note)
    return cache
