"""SGLang's KV pools, as small as they can be built on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import (
    CPUFP8KVCacheMethod,
    FP4MXBlock16KVCacheMethod,
    NVFP4KVCacheMethod,
)
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MHATokenToKVPoolMXFP8,
    MLATokenToKVPool,
    MLATokenToKVPoolFP4,
)
from sglang.srt.runtime_context import get_parallel

TOKENS, PAGE, LAYERS = 60, 4, 2
SIZE: dict[str, Any] = {
    "size": TOKENS,
    "page_size": PAGE,
    "layer_num": LAYERS,
    "device": "cpu",
    "enable_memory_saver": False,
}
HEADS: dict[str, Any] = {**SIZE, "head_num": 2, "head_dim": 64}
LATENT: dict[str, Any] = {**SIZE, "kv_lora_rank": 48, "qk_rope_head_dim": 16}


def mha(kind: type = MHATokenToKVPool, **changes: Any) -> Any:
    return kind(**HEADS | {"dtype": torch.bfloat16} | changes)


def mla(kind: type = MLATokenToKVPool, **changes: Any) -> Any:
    return kind(**LATENT | {"dtype": torch.bfloat16} | changes)


def dsa(**changes: Any) -> Any:
    with get_parallel().override(attn_dcp_size=1):
        sizes = {"size": 15 * 64, "page_size": 64, "index_head_dim": 128, "kv_cache_dim": 64}
        return mla(DSATokenToKVPool, **sizes | changes)


def nvfp4(*, native: bool, **changes: Any) -> Any:
    recipe = NVFP4KVCacheMethod(LAYERS, "cpu", PAGE, native_scale_layout=native)
    return mha(quant_method=recipe, **changes)


# All of one kind: a layer is K and V, or a latent.
PLAIN: dict[str, Callable[[], Any]] = {
    "fp32": lambda: mha(dtype=torch.float32),
    "bf16": mha,
    "fp16": lambda: mha(dtype=torch.float16),
    "fp8 e5m2": lambda: mha(dtype=torch.float8_e5m2),
    "fp8 e4m3": lambda: mha(dtype=torch.float8_e4m3fn),
    "fp8 on a CPU": lambda: mha(dtype=torch.float8_e4m3fn, quant_method=CPUFP8KVCacheMethod()),
    "heads of two sizes": lambda: mha(v_head_dim=32),
    "mla": mla,
    "mla in fp8": lambda: mla(dtype=torch.float8_e4m3fn),
}
# With more buffers: how many each layer has, and which of them have a page in a row.
WITH_MORE: dict[str, tuple[Callable[[], Any], list[int], set[int]]] = {
    "nvfp4": (lambda: nvfp4(native=False), [4, 4], set()),
    # Its prefill reads scales by token, its decode scales by page.
    "nvfp4 as the kernel wants it": (lambda: nvfp4(native=True), [6, 6], {4, 5}),
    "fp4": (lambda: mha(quant_method=FP4MXBlock16KVCacheMethod()), [4, 4], set()),
    "fp4 pool": (lambda: mha(MHATokenToKVPoolFP4), [4, 4], set()),
    "mxfp8": (lambda: mha(MHATokenToKVPoolMXFP8, dtype=torch.float8_e4m3fn), [4, 4], set()),
    "mxfp8 interleaved": (
        lambda: mha(MHATokenToKVPoolMXFP8, dtype=torch.float8_e4m3fn, page_size=128, size=15 * 128),
        [4, 4],
        {2, 3},
    ),
    "mla in fp4": (lambda: mla(MLATokenToKVPoolFP4), [2, 2], set()),
    "index keys": (dsa, [2, 2], {1}),
    "index keys beside fp8": (
        lambda: dsa(dtype=torch.float8_e4m3fn, kv_cache_dim=656, kv_lora_rank=512, qk_rope_head_dim=64),
        [2, 2],
        {1},
    ),
    "index keys that a layer borrows": (lambda: dsa(skip_topk_layers=[False, True]), [2, 1], {1}),
}
