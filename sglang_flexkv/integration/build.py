"""Builds the cache of one rank and everything under it."""

from __future__ import annotations

import atexit
import logging
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

from sglang_flexkv import __version__
from sglang_flexkv.common.config import GIB, FlexKVConfig, WritePolicy
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.integration import one_copy
from sglang_flexkv.integration.compat import server
from sglang_flexkv.integration.compat.arguments import RECURRENT_ARGUMENTS
from sglang_flexkv.integration.compat.kv_pool import (
    MAMBA,
    KVPools,
    asks_for_layers,
    asks_for_states,
    draft_pools,
    kv_pools,
)
from sglang_flexkv.integration.compat.sglang_hashes import native_works
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.integration.model_identity import Settings, describe, model_identity, notes
from sglang_flexkv.integration.radix_cache import FlexKVRadixCache
from sglang_flexkv.kvtask import KVTaskEngine
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.storage_engine import slot_bytes_for

logger = logging.getLogger(__name__)


def build_radix_cache(create: Callable[..., Any], ctx: Any, at_start: Settings | None) -> FlexKVRadixCache:
    """Builds the cache and everything under it.

    Args:
        create: SGLang's ``create_unified_radix_cache``.
        ctx: its TreeCacheBuildContext.
        at_start: the settings of this process before it loaded the model.

    Raises:
        ConfigError, IncompatibleError: with the setting and the remedy.
    """
    with server.external_linker_off():
        cache: FlexKVRadixCache = create(ctx, cache_class=FlexKVRadixCache)
    config = FlexKVConfig.load(server.config_file())
    place = server.place()
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    page_size = ctx.params.page_size
    drafts = draft_pools(ctx.params, server.reader()("speculative_algorithm"))
    pools = kv_pools(pool, page_size, cache.window_tokens, drafts, ctx.params.req_to_token_pool)
    # Together, before anything that may fail on one of them.
    common = one_copy.join(cache.ranks, place) if _is_one_for_all(pools, place) and not pools.more else None
    cache_config = config.cache_config(
        block_bytes=_bytes_per_block(pools, page_size),
        tokens_per_block=ctx.params.page_size,
        num_ranks=place.num_ranks,
        ranks_per_copy=common.num_ranks if common is not None else 1,
    )
    num_lower_tiers = cache_config.enable_ssd + (cache_config.remote is not None)
    memory = common.memory(cache_config.num_cpu_blocks) if common is not None else None
    identity = _identity(ctx, pool, pools, place, at_start)
    shared = _identity(ctx, pool, pools, place, at_start, shared=True) if cache_config.remote else None
    if cache_config.enable_ssd:
        _warn(identity, "to SSD")
    # All ranks meet, also one that has no store.
    seed, all_alike = cache.ranks.meet(shared.namespace if shared is not None else b"")
    shared_blocks = None
    if shared is not None:
        ranks = place.attn_tp_size if all_alike and _is_one_for_all(pools, place) else 1
        storing = ranks if common is None else min(ranks, common.num_copies)
        rank = place.attn_tp_rank if common is None else common.copy
        shared_blocks = SharedBlocks(shared.namespace, rank % storing, storing, seed)
        _warn(shared, "to the store")
        of_ranks = f", one copy for {ranks} ranks" if ranks > 1 else ""
        logger.info("sglang-flexkv: remote blocks are shared as %s%s", shared.namespace.hex()[:12], of_ranks)
        logger.debug("sglang-flexkv: %s", shared)
    keeps = common is None or common.keeps
    if not keeps:  # an index of nothing, and no tier but the keeper's memory
        nothing = {"num_cpu_blocks": 1, "enable_ssd": False, "num_ssd_blocks": 0, "remote": None}
        cache_config = cache_config.model_copy(update=nothing)
    # Of what one rank reads the others do not know which layers have come.
    reads_under_forwards = common is None and not server.sends_to_decode_servers()
    native_works()  # what SGLang has to compile is compiled before the first request comes
    engine = KVTaskEngine(
        cache_config,
        pools.full,
        more_groups=pools.more,
        layers=pools.layers,
        namespace=identity.namespace,
        shared=shared_blocks,
        label=describe(
            ctx.model_config.model_path, pool.dtype, ctx.params.page_size, place.tp_rank, place.tp_size
        ),
        identity=identity,
        rank_tag=f"dp{place.dp_rank}-tp{place.tp_rank}",
        watched=cache.tells_routers and keeps,
        reads_in_pieces=not reads_under_forwards,
        memory=memory,
    )
    if common is not None:
        common.close()
    labels = {"dp_rank": str(place.dp_rank), "tp_rank": str(place.tp_rank)}
    on_gpu = pools.full.device.type != "cpu"
    waits_for_states = cache.keeps_states and on_gpu and not asks_for_states(ctx.model_config)
    linker = FlexKVLinker(
        engine,
        config,
        identity.namespace,
        num_layers=pools.num_layers,
        single_rank=place.ranks_of_a_request == 1,
        has_draft=bool(drafts),
        by_layer=all(map(asks_for_layers, (pool, *drafts))) and not waits_for_states,
        reads_under_forwards=reads_under_forwards,
        one_copy=common,
        num_lower_tiers=num_lower_tiers,
        metrics=Metrics(
            labels if server.exports_metrics() else None, engine.tier_names, remote=bool(engine.asked_tiers)
        ),
    )
    atexit.register(linker.close)
    cache.attach(
        linker,
        config.write_policy,
        by_priority=server.evicts_by_priority(),
        shares_forwards=place.tp_size > place.ranks_of_a_request,
    )
    pool.register_layer_transfer_counter(linker.layer_done_counter)
    if cache.keeps_states:
        ctx.params.req_to_token_pool.register_layer_transfer_counter(linker.layer_done_counter)
    ctx.tp_worker.register_hicache_layer_transfer_counter(linker.layer_done_counter)
    if common is not None:
        logger.info(
            "sglang-flexkv: one copy for %d ranks of this machine, kept by TP rank %d",
            common.num_ranks,
            place.tp_rank - place.attn_tp_rank % common.num_ranks,
        )
    if keeps:
        _log(engine, config.write_policy)
    return cache


def _warn(identity: Identity, where: str) -> None:
    """Says whom what is written there is lost to."""
    for note in notes(identity, where):
        logger.warning("sglang-flexkv: %s", note)


def _bytes_per_block(pools: KVPools, page_size: int) -> int:
    """Bytes that a block takes in a tier, with what further groups have for each."""

    def slot_bytes(device: DeviceBuffers, slots: int) -> int:
        return slot_bytes_for(device.block_layout(slots).block_bytes)

    return slot_bytes(pools.full, page_size) + sum(
        math.ceil(group.share * slot_bytes(group.device, group.slots_of(page_size))) for group in pools.more
    )


def _is_one_for_all(pools: KVPools, place: server.Place) -> bool:
    """Whether the ranks of a server share one copy of what they store.

    With prefill CP each rank has all KV of a prompt, too. But no server has run that here, and a rank that
    gets back what it stored itself is right in any case.
    """
    return pools.replicated and place.attn_cp_size == 1


def _identity(
    ctx: Any,
    pool: Any,
    pools: KVPools,
    place: server.Place,
    at_start: Settings | None,
    *,
    shared: bool = False,
) -> Identity:
    """Whose KV this is, with what the device pool adds."""
    device, read = pools.full, server.reader()
    groups = {
        f"KV group {group.name}": f"layers {group.layers}, {_layout(group.device)}, windows of "
        f"{group.window_blocks} blocks"
        for group in pools.more
    }
    # With DP attention several TP ranks have the same heads: what others share is told by the heads alone.
    ranks = {} if shared else {"TP rank": f"{place.tp_rank} of {place.tp_size}"}
    heads_of = "any" if shared and _is_one_for_all(pools, place) else place.attn_tp_rank
    ranks["attention TP rank"] = f"{heads_of} of {place.attn_tp_size}"
    if place.attn_cp_size > 1:
        rank = f"{place.attn_cp_rank} of {place.attn_cp_size}"
        ranks["attention CP rank"] = f"{rank}, {read('cp_strategy')}"
    if any(group.name == MAMBA for group in pools.more):
        groups["kernels of recurrent layers"] = ", ".join(
            f"{name} {read(name)}" for name in RECURRENT_ARGUMENTS
        )
    return model_identity(
        read,
        ctx.model_config.model_path,
        ctx.model_config.revision,
        shared=shared,
        at_start=at_start,
        pool={
            "dtype of the KV": str(pool.dtype),
            "layout of the KV": _layout(device),
            **groups,
            "tokens per row": _tokens_per_row(device),
            "tokens per block": str(ctx.params.page_size),
            **ranks,
            "format": "2",
        },
    )


def _tokens_per_row(device: DeviceBuffers) -> str:
    """One number if it is that of all buffers."""
    numbers = list(chain(*device.tokens_per_row))
    return str(numbers[0] if len(set(numbers)) == 1 else device.tokens_per_row)


def _layout(device: DeviceBuffers) -> str:
    return str([(t.dtype, tuple(t.shape[1:])) for t in chain(*device.tensors)])


def _log(engine: KVTaskEngine, policy: WritePolicy) -> None:
    config, slot_bytes = engine.config, engine.slot_bytes
    lower = [
        f"{name} tier {f'{num_slots * slot_bytes / GIB:.2f} GiB through ' if num_slots else ''}{moved_by}"
        for name, (num_slots, moved_by) in engine.describe_lower_tiers().items()
    ]
    stats = engine.stats()
    more = [
        f", {stats[f'CPU {name}']['slots']:.0f} with their part of {name} ({num_bytes / 1024:.1f} KiB)"
        for name, (_, num_bytes) in zip(engine.group_names, engine.windows, strict=True)
    ]
    logger.info(
        "sglang-flexkv %s: %s, block %d tokens (%.1f KiB); CPU tier %.2f GiB (%d blocks%s); %s",
        __version__,
        policy.value,
        config.tokens_per_block,
        slot_bytes / 1024,
        config.num_cpu_blocks * slot_bytes / GIB,
        config.num_cpu_blocks,
        "".join(more),
        "; ".join(lower) or "no tier below it",
    )
    if engine.cuda_note:
        logger.info("sglang-flexkv copies: %s", engine.cuda_note)
