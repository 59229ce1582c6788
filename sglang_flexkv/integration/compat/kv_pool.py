"""SGLang's KV pools as the engine sees them: rows of bytes.

Bytes are copied as they are, so every dtype that a pool can hold works: fp32, bf16, fp16, and fp8. A pool is
taken only if everything it holds is copied: two pool classes, known recipes of quantisation, known layouts,
and no tensor beside K and V (or the latent). Whatever a pool had more, now or in an SGLang that was changed,
would come back as what another request left in those slots.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.common.storage import DeviceBuffers

# Attributes of the two pools that hold addresses and strides of the buffers, not KV.
_TABLES = frozenset({"k_data_ptrs", "v_data_ptrs", "data_ptrs", "data_strides"})
# How deep an attribute is searched for tensors: a scale in a dict of a list of a helper object is four.
_DEPTH_MAX = 6


def device_buffers(pool: Any) -> DeviceBuffers:
    """Describes a pool of MHA, GQA or MLA KV.

    Raises:
        IncompatibleError: the pool is of another class, or holds more than K and V (or a latent).
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    from sglang_flexkv.integration.compat.pool_infos import (
        KVBufferLayout,
        MLABufferInfo,
        device_pool_infos,
    )

    # Subclasses keep more state than their parent describes (index keys, scales, windows), so only the two
    # plain pools are taken.
    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool):
        raise _refused(pool, "of which it is not known what it holds beside K and V")
    if pool.layer_shard_enabled:
        raise _refused(pool, "that holds some of the layers only")
    _check_recipe(pool)
    (pool_info,) = device_pool_infos(pool)
    info = pool_info.buffer_info
    if isinstance(info, MLABufferInfo):
        if not isinstance(info.buffers, tuple):
            raise _refused(pool, "whose latent is in several buffers")
        layers = [[buffer] for buffer in info.buffers]
        tokens_per_row = 1
    else:
        layout = info.buffers.layout
        if layout not in (KVBufferLayout.NHD, KVBufferLayout.HND):
            raise _refused(pool, f"with the layout {layout.value}")
        layers = [[k, v] for k, v in zip(info.buffers.k, info.buffers.v, strict=True)]
        tokens_per_row = 1 if layout is KVBufferLayout.NHD else info.page_size
    _check_nothing_else(pool, [buffer for layer in layers for buffer in layer])
    return DeviceBuffers(layers, tokens_per_row=tokens_per_row)


def _check_recipe(pool: Any) -> None:
    """The recipe by which KV is quantised decides what else is needed to read it."""
    from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import (
        CPUFP8KVCacheMethod,
        UnquantizedKVCacheMethod,
    )

    recipe = getattr(pool, "quant_method", None)  # an MLA pool has none
    if recipe is not None and type(recipe) not in (UnquantizedKVCacheMethod, CPUFP8KVCacheMethod):
        raise _refused(
            pool,
            f"quantised by {recipe.name}, with scales beside the KV",
            remedy="use --kv-cache-dtype auto, bfloat16, fp8_e4m3 or fp8_e5m2",
        )


def _check_nothing_else(pool: Any, buffers: list[torch.Tensor]) -> None:
    """Every tensor that can be reached from the pool lies in ``buffers``, or is a table of them."""
    carried = [_span(buffer) for buffer in buffers]
    for name, value in vars(pool).items():
        if name in _TABLES:
            continue
        for tensor in _tensors_in(value, set(), _DEPTH_MAX):
            first, end = _span(tensor)
            if tensor.numel() and not any(start <= first and end <= stop for start, stop in carried):
                what = f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
                raise _refused(pool, f"with a tensor beside K and V that is not copied: {name}, {what}")


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
