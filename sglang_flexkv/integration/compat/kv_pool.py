"""SGLang's KV pools as the engine sees them: rows of bytes.

Bytes are copied as they are, so every dtype that a pool can hold works: fp32, bf16, fp16, fp8, and what is
quantised in blocks with scales beside it. A pool is taken only if everything it holds is copied: known pool
classes, known recipes of quantisation, known layouts, and no tensor beside those that are carried. Whatever a
pool had more, now or in an SGLang that was changed, would come back as what another request left in those
slots.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.common.kv_group import KVGroup, window_share
from sglang_flexkv.common.storage import DeviceBuffers

# Attributes of the pools that hold addresses and strides of the buffers, not KV.
_TABLES = frozenset({"k_data_ptrs", "v_data_ptrs", "data_ptrs", "data_strides"})
# Attributes in which pools keep scales, a list with an entry per layer, or None.
_SCALES = (
    "k_scale_buffer",
    "v_scale_buffer",
    "native_k_scale_buffer",
    "native_v_scale_buffer",
    "kv_scale_buffer",
)
# Those that hold nothing from one forward to the next: what is dequantised for the layer that runs.
_WORKSPACES = ("dq_k_buffer", "dq_v_buffer")
# Where speculative decoding keeps states of tokens that are being checked.
_OF_VERIFIES = frozenset({"intermediate_ssm", "intermediate_conv_window"})
_NO_DRAFT = "drop --speculative-algorithm"
# How deep an attribute is searched for tensors: a scale in a dict of a list of a helper object is four.
_DEPTH_MAX = 6
# The group of sliding-window layers has the name of the tree's component.
SWA = "swa"
# So has the group of recurrent layers.
MAMBA = "mamba"
# A window is kept after each so many tokens of a long run, for prompts that leave it on the way.
_WINDOW_EVERY_TOKENS = 2048


@dataclass(frozen=True)
class KVPools:
    """What a pool of SGLang is made of.

    Attributes:
        full: what full attention keeps, which is there for all tokens.
        more: what other layers keep.
        num_layers: that a forward waits for, in all of them.
        layers: of the model, one for each layer of ``full``; None: those that keep nothing else.
        replicated: all attention TP ranks have the same bytes; if not, each has heads of its own.
    """

    full: DeviceBuffers
    more: tuple[KVGroup, ...]
    num_layers: int
    layers: tuple[int, ...] | None = None
    replicated: bool = False


def kv_pools(
    pool: Any, page_size: int, window_tokens: int, drafts: Sequence[Any] = (), requests: Any = None
) -> KVPools:
    """Describes a pool of SGLang, with what other layers than those of full attention keep: sliding windows
    or states.

    Args:
        window_tokens: that the tree keeps before each boundary in a sliding window; 0: there is none.
        drafts: pools of draft models.
        requests: SGLang's pool of requests, which has the states.

    Raises:
        IncompatibleError: see ``device_buffers``.
    """
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, HybridReqToTokenPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    has_states = isinstance(requests, HybridReqToTokenPool)
    drafts = [_full_part_of_draft(draft, requests) for draft in drafts]
    if type(pool) not in (SWAKVPool, HybridLinearKVPool):
        if has_states:
            raise _refused(pool, "with states of other layers beside it")
        full = device_buffers(pool, drafts)
        return KVPools(full, (), len(full.tensors), replicated=_are_replicated(pool, *drafts))
    if pool.start_layer != 0:
        raise _refused(pool, "that holds some of the layers only")
    _check_part(pool.full_kv_pool)
    full = device_buffers(pool.full_kv_pool, drafts)
    more: list[KVGroup] = []
    if type(pool) is SWAKVPool:
        layers = _layers_of(pool, in_window=False)
        more.append(_windows(pool, full, page_size, window_tokens))
    else:
        layers = tuple(pool.full_attention_layer_id_mapping)  # in the order of the pool
        _check_nothing_else(pool, [], (pool.full_kv_pool, pool.mamba_pool))
    if has_states:
        more.append(_states(requests, pool.size // page_size))
    if not layers or (type(pool) is HybridLinearKVPool and not (has_states and _same_states(pool, requests))):
        raise _refused(pool, "of which it is not known what other layers keep")
    return KVPools(
        full,
        tuple(more),
        1 + max(chain(layers, *(group.layers for group in more))),
        layers,
        # States are of the heads of a rank. Where a block has parts of both kinds none is shared.
        replicated=not has_states and _are_replicated(pool.full_kv_pool, pool.swa_kv_pool, *drafts),
    )


def _are_replicated(*pools: Any) -> bool:
    """Whether all of them keep a latent, which belongs to no head. SGLang's own stores have one copy of that
    for all attention TP ranks as well.

    Where a model has fewer heads than there are ranks, some have one in common. Which they are a pool does
    not say: that is up to the layers of each model.
    """
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return all(isinstance(pool, MLATokenToKVPool) for pool in pools)


def _full_part_of_draft(draft: Any, requests: Any) -> Any:
    """What a draft model keeps of full attention, which has to be all that it keeps: the target's states are
    in its pool as well, which it does not use."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if isinstance(draft, SWAKVPool):
        raise _refused(draft, "of a draft model with sliding windows of its own", remedy=_NO_DRAFT)
    if type(draft) is not HybridLinearKVPool:
        return draft
    if not _same_states(draft, requests):
        raise _refused(draft, "of a draft model with states of its own", remedy=_NO_DRAFT)
    _check_part(draft.full_kv_pool)
    _check_nothing_else(draft, [], (draft.full_kv_pool, draft.mamba_pool))
    return draft.full_kv_pool


def _check_part(part: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    # What keeps more may hand it out without asking whether the layer is there.
    if type(part) not in (MHATokenToKVPool, MLATokenToKVPool) or not asks_for_layers(part):
        raise _refused(part, "with what other layers keep beside it")


def _layers_of(pool: Any, *, in_window: bool) -> tuple[int, ...]:
    """Layers of the model whose KV one part of an SWAKVPool has, in the order of that part."""
    places = sorted((at, layer) for layer, (at, there) in pool.layers_mapping.items() if there == in_window)
    return tuple(layer for _, layer in places)


def _windows(pool: Any, full: DeviceBuffers, page_size: int, window_tokens: int) -> KVGroup:
    """Sliding windows, in a pool beside that of full attention."""
    if pool.swa_req_ring_size is not None or pool.request_window is not None or pool.swa_uses_full_indices:
        raise _refused(pool, "whose windows are not kept by page")
    _check_part(pool.swa_kv_pool)
    window = device_buffers(pool.swa_kv_pool)
    carried = [buffer for part in (full, window) for layer in part.tensors for buffer in layer]
    # A table says where the window of a token is.
    parts = (pool.full_kv_pool, pool.swa_kv_pool)
    _check_nothing_else(pool, carried, parts, _TABLES | {"full_to_swa_index_mapping"})
    blocks = -(-window_tokens // page_size)
    return KVGroup(
        SWA,
        window,
        _layers_of(pool, in_window=True),
        blocks,
        share=window_share(window_tokens, page_size),
        every_blocks=max(2 * (blocks + 1), _WINDOW_EVERY_TOKENS // page_size),
    )


def _same_states(pool: Any, requests: Any) -> bool:
    same: bool = pool.mamba_pool is getattr(requests, "mamba_pool", None)
    return same


def _states(requests: Any, num_blocks: int) -> KVGroup:
    """States of recurrent layers (Mamba, linear attention): a row for a slot, in one buffer or several.

    Args:
        num_blocks: that the device has of full attention.
    """
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, MambaPool

    pool = requests.mamba_pool
    if type(requests) is not HybridReqToTokenPool or type(pool) is not MambaPool or pool._slot_siblings:
        raise _refused(pool, "of which it is not known what it holds beside states")
    if requests.mamba_ckpt_pool is not None:
        raise _refused(pool, "with quantised copies", remedy="drop --enable-int8-mamba-checkpoint")
    held = {field.name: getattr(pool.mamba_cache, field.name) for field in fields(pool.mamba_cache)}
    conv, temporal = held.pop("conv"), held.pop("temporal")
    if others := [name for name, value in held.items() if value is not None and name not in _OF_VERIFIES]:
        raise _refused(
            pool,
            f"with what states still lack ({', '.join(others)})",
            remedy="drop --enable-linear-replayssm",
        )
    buffers = [buffer for buffer in (*conv, temporal) if buffer.numel()]
    work = [*(held.get("intermediate_conv_window") or ()), held.get("intermediate_ssm")]
    work += getattr(pool, "_intermediate_conv_window_phys", ())
    _check_nothing_else(pool, [*buffers, *(tensor for tensor in work if tensor is not None)])
    return KVGroup(
        MAMBA,
        DeviceBuffers([list(layer) for layer in zip(*buffers, strict=True)], tokens_per_row=1),
        tuple(pool.mamba_layer_ids),
        window_blocks=1,
        # A tier is divided as the device is, which its user has settled.
        share=min(1.0, pool.size / num_blocks),
        slots_per_block=1,
    )


def device_buffers(pool: Any, drafts: Sequence[Any] = ()) -> DeviceBuffers:
    """Describes a pool of MHA, GQA or MLA KV: of each layer K and V, or the latent, and what belongs to them.

    Args:
        drafts: pools of draft models, which have a token's KV in the same slot. A draft model runs when the
            target has: all layers of it are in the last layer of the target.

    Raises:
        IncompatibleError: a pool is of another class, or holds more than is known.
    """
    layers = _layers(pool)
    tokens_per_row = [[_tokens_per_row(pool, buffer) for buffer in layer] for layer in layers]
    for draft in drafts:
        if (draft.size, draft.page_size) != (pool.size, pool.page_size):
            raise _refused(draft, f"with {draft.size} slots, and the target's {pool.size}", remedy=_NO_DRAFT)
        for buffer in chain(*_layers(draft)):
            layers[-1].append(buffer)
            tokens_per_row[-1].append(_tokens_per_row(draft, buffer))
    return DeviceBuffers(layers, tokens_per_row)


def draft_pools(params: Any, algorithm: str | None) -> tuple[Any, ...]:
    """The pools of draft models, as SGLang hands them to who stores KV.

    Args:
        params: SGLang's CacheInitParams.
        algorithm: of speculative decoding, if any.

    Raises:
        IncompatibleError: there must be some, and none are handed over.
    """
    if params.mtp_draft_mamba_pools:
        raise IncompatibleError(f"the draft model keeps Mamba state, which is not stored yet: {_NO_DRAFT}")
    # SGLang 0.5.22 hands over those that have a layer for each step only.
    drafts = (*params.mtp_draft_device_pools, *getattr(params, "sidecar_draft_device_pools", ()))
    if algorithm not in (None, "NGRAM") and not drafts:
        raise IncompatibleError(
            "this version of SGLang does not say where the draft model of "
            f"--speculative-algorithm {algorithm} keeps its KV: {_NO_DRAFT}, or use SGLang 0.5.23"
        )
    return drafts


def _layers(pool: Any) -> list[list[torch.Tensor]]:
    """The buffers of each layer, which are all that the pool holds."""
    _check_class(pool)
    _check_recipe(pool)
    layers = _kv(pool)
    for name in _SCALES:
        _add(layers, getattr(pool, name, None))
    _add(layers, getattr(pool, "index_k_with_scale_buffer", None))
    _check_nothing_else(pool, [buffer for layer in layers for buffer in layer])
    return layers


def asks_for_layers(pool: Any) -> bool:
    """Whether every accessor of a pool by which attention gets at KV asks first whether the layer is there.

    The raw ones of NVFP4 do not (``get_raw_kv_buffer``, and the TRT-LLM backend reads the attributes).
    """
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod

    return not isinstance(getattr(pool, "quant_method", None), NVFP4KVCacheMethod)


def asks_for_states(model_config: Any) -> bool:
    """Whether a forward on a GPU asks for the state of each layer before it reads it.

    Layers that SGLang captures in graphs of prefills (KDA) ask when they are captured, and not when the graph
    runs. Of gated delta networks it is known that they run between the parts of such a graph.
    """
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config

    return hybrid_gdn_config(model_config) is not None


def _check_class(pool: Any) -> None:
    from sglang.srt.mem_cache import memory_pool as pools

    # Subclasses keep more state than their parent describes, so each one that is taken is named.
    known = (
        pools.MHATokenToKVPool,
        pools.MHATokenToKVPoolFP4,
        pools.MHATokenToKVPoolMXFP8,
        pools.MLATokenToKVPool,
        pools.MLATokenToKVPoolFP4,
        pools.DSATokenToKVPool,
    )
    if type(pool) not in known:
        raise _refused(pool, "of which it is not known what it holds beside K and V")
    if pool.layer_shard_enabled:
        raise _refused(pool, "that holds some of the layers only")


def _check_recipe(pool: Any) -> None:
    """The recipe by which KV is quantised decides what else is needed to read it."""
    from sglang.srt.layers.quantization import fp4_kv_cache_quant_method as recipes

    known = (
        recipes.UnquantizedKVCacheMethod,
        recipes.CPUFP8KVCacheMethod,
        recipes.NVFP4KVCacheMethod,
        recipes.FP4MXBlock16KVCacheMethod,
    )
    recipe = getattr(pool, "quant_method", None)  # an MLA pool has none
    if recipe is not None and type(recipe) not in known:
        raise _refused(
            pool,
            f"quantised by {recipe.name}, of which it is not known what it keeps beside the KV",
            remedy="use another --kv-cache-dtype",
        )


def _kv(pool: Any) -> list[list[torch.Tensor]]:
    """K and V of each layer, or the latent."""
    from sglang_flexkv.integration.compat.pool_infos import (
        KVBufferLayout,
        MLABufferInfo,
        device_pool_infos,
    )

    (pool_info,) = device_pool_infos(pool)
    info = pool_info.buffer_info
    if isinstance(info, MLABufferInfo):
        if not isinstance(info.buffers, tuple):
            raise _refused(pool, "whose latent is in several buffers")
        return [[buffer] for buffer in info.buffers]
    layout = info.buffers.layout
    if layout not in (KVBufferLayout.NHD, KVBufferLayout.HND):
        raise _refused(pool, f"with the layout {layout.value}")
    return [[k, v] for k, v in zip(info.buffers.k, info.buffers.v, strict=True)]


def _add(layers: list[list[torch.Tensor]], buffers: list[torch.Tensor] | None) -> None:
    """A further buffer of each layer. Of layers that have none SGLang keeps one without rows."""
    for layer, buffer in zip(layers, buffers or [None] * len(layers), strict=True):
        if buffer is not None and buffer.numel():
            layer.append(buffer)


def _tokens_per_row(pool: Any, buffer: torch.Tensor) -> int:
    """A token, or a page. A pool has a page more than tokens, and index keys may have a row more yet."""
    num_slots, page = pool.size + pool.page_size, pool.page_size
    if buffer.shape[0] == num_slots:
        return 1
    if buffer.shape[0] in (num_slots // page, num_slots // page + 1):
        return int(page)
    raise _refused(pool, f"with {buffer.shape[0]} rows for {num_slots} slots in pages of {page}")


def _check_nothing_else(
    pool: Any, buffers: list[torch.Tensor], parts: Collection[Any] = (), tables: Collection[str] = _TABLES
) -> None:
    """Every tensor that can be reached from the pool lies in ``buffers``, is a table of them, or no KV.

    Args:
        parts: pools that it is made of, and that have been looked through.
        tables: attributes that hold addresses, and no KV.
    """
    known = [_span(buffer) for buffer in (*buffers, *_no_kv(pool))]
    for name, value in vars(pool).items():
        if any(value is part for part in parts):
            continue
        if name in tables:
            continue
        for tensor in _tensors_in(value, {id(pool)}, _DEPTH_MAX):
            first, end = _span(tensor)
            if tensor.numel() and not any(start <= first and end <= stop for start, stop in known):
                what = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
                raise _refused(pool, f"with a tensor beside K and V that is not copied: {name}, {what}")


def _no_kv(pool: Any) -> list[torch.Tensor]:
    """What a pool holds that belongs to no token: work space, and what NVFP4 takes from the weights."""
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod

    found = [getattr(pool, name, None) for name in _WORKSPACES]
    recipe = getattr(pool, "quant_method", None)
    if isinstance(recipe, NVFP4KVCacheMethod):
        found += [recipe.k_scales_gpu, recipe.v_scales_gpu]
    return [tensor for tensor in found if tensor is not None]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses from the first to behind the last byte of a tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors_in(value: Any, seen: set[int], depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, (str, bytes, type, types.ModuleType)):
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    else:
        parts += getattr(value, "__dict__", {}).values()
        names = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()))
        parts += [getattr(value, name, None) for name in names if name not in ("__dict__", "__weakref__")]
    for part in parts:
        yield from _tensors_in(part, seen, depth - 1)


def _refused(pool: Any, what: str, *, remedy: str = "start without --enable-flexkv") -> IncompatibleError:
    return IncompatibleError(
        f"SGLang keeps the KV of this model in a {type(pool).__name__}, {what}; sglang-flexkv does not store "
        f"that: {remedy}"
    )
