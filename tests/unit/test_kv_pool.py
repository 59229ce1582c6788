"""Which of SGLang's KV pools are taken: those of which every byte is carried. The others are refused by name.

All of SGLang 0.5.23's pool classes are looked at, and those that a CPU can hold are built.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import (
    CPUFP8KVCacheMethod,
    FP4MXBlock16KVCacheMethod,
    NVFP4KVCacheMethod,
)
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    KVCache,
    MHATokenToKOnlyPool,
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MHATokenToKVPoolMXFP8,
    MiniMaxSparseKVPool,
    MLATokenToKVPool,
    MLATokenToKVPoolFP4,
    NoOpMHATokenToKVPool,
)
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_parallel

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration.compat.kv_pool import device_buffers

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


def dsa() -> Any:
    with get_parallel().override(attn_dcp_size=1):
        return mla(DSATokenToKVPool, size=128, page_size=64, index_head_dim=128, kv_cache_dim=64)


def without(names: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


# ---- taken ----

TAKEN: dict[str, Callable[[], Any]] = {
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


@pytest.mark.parametrize("case", TAKEN)
def test_all_of_a_plain_pool_is_carried(case: str) -> None:
    pool = TAKEN[case]()
    buffers = device_buffers(pool)
    assert len(buffers.tensors) == LAYERS
    num_bytes = sum(t.numel() * t.element_size() for layer in buffers.tensors for t in layer)
    size = pool.get_kv_size_bytes()
    assert num_bytes == (sum(size) if isinstance(size, tuple) else size)
    assert buffers.tokens_per_row == 1


def test_a_pool_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    buffers = device_buffers(mha())
    assert buffers.tokens_per_row == PAGE
    assert buffers.tensors[0][0].shape[0] == TOKENS // PAGE + 1


# ---- refused: more than K and V ----

SCALES = "with scales beside the KV; .*use --kv-cache-dtype auto, bfloat16, fp8_e4m3 or fp8_e5m2"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # The scales of these two are in attributes of different names.
    "nvfp4": (
        lambda: mha(quant_method=NVFP4KVCacheMethod(LAYERS, "cpu", PAGE, native_scale_layout=False)),
        f"MHATokenToKVPool, quantised by nvfp4, {SCALES}",
    ),
    "nvfp4 as the kernel wants it": (
        lambda: mha(quant_method=NVFP4KVCacheMethod(LAYERS, "cpu", PAGE, native_scale_layout=True)),
        f"MHATokenToKVPool, quantised by nvfp4, {SCALES}",
    ),
    "fp4": (
        lambda: mha(quant_method=FP4MXBlock16KVCacheMethod()),
        f"MHATokenToKVPool, quantised by fp4_mx_block16, {SCALES}",
    ),
    "fp4 pool": (lambda: mha(MHATokenToKVPoolFP4), "MHATokenToKVPoolFP4, .*start without --enable-flexkv"),
    "mxfp8": (
        lambda: mha(MHATokenToKVPoolMXFP8, dtype=torch.float8_e4m3fn),
        "MHATokenToKVPoolMXFP8, .*start without",
    ),
    "mla in fp4": (lambda: mla(MLATokenToKVPoolFP4), "MLATokenToKVPoolFP4, .*start without"),
    "no KV at all": (lambda: mha(NoOpMHATokenToKVPool), "NoOpMHATokenToKVPool, .*start without"),
    "index keys": (dsa, "DSATokenToKVPool, .*start without"),
    "windows": (
        lambda: SWAKVPool(
            **without(("layer_num",), **HEADS),
            size_swa=32,
            dtype=torch.bfloat16,
            swa_attention_layer_ids=[0],
            full_attention_layer_ids=[1],
        ),
        "SWAKVPool, .*start without",
    ),
    "keys only": (
        lambda: mha(MHATokenToKOnlyPool),
        "MHATokenToKOnlyPool, .*start without",
    ),
    "sparse attention": (
        lambda: MiniMaxSparseKVPool(
            **without(("layer_num",), **HEADS),
            dtype=torch.bfloat16,
            idx_head_dim=64,
            dense_layer_ids=[0],
            sparse_layer_ids=[1],
            start_layer=0,
            end_layer=2,
        ),
        "MiniMaxSparseKVPool, .*start without",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pool_with_more_is_refused(case: str) -> None:
    build, expected = REFUSED[case]
    with pytest.raises(IncompatibleError, match=expected):
        device_buffers(build())


def subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_pool_class_of_sglang_is_taken_or_refused_by_its_name() -> None:
    import sglang.srt.mem_cache as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except Exception:  # for hardware and services that are not here
            continue
    found = {kind for kind in subclasses(KVCache) if kind.__module__.startswith("sglang.")}
    found = {kind for kind in found if not inspect.isabstract(kind)}
    assert len(found) > 20
    for kind in found - {MHATokenToKVPool, MLATokenToKVPool}:
        with pytest.raises(IncompatibleError, match=f"in a {kind.__name__}, .*start without"):
            device_buffers(kind.__new__(kind))


# ---- a known pool that has become something else ----


def more() -> torch.Tensor:
    return torch.zeros(TOKENS, 2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "tensor": lambda _: more(),
    "per layer": lambda _: [None, more()],
    "by name": lambda _: {"scales": {0: (more(),)}},
    "in an object": lambda _: SimpleNamespace(buffers=[more()]),
    "beside the rows of K": lambda pool: pool.k_buffer[0]._base,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [mha, mla])
def test_a_tensor_that_we_do_not_know(build: Callable[[], Any], change: str) -> None:
    pool = build()
    if change == "beside the rows of K" and build is mla:
        pool.kv_buffer = [whole[:-1] for whole in pool.kv_buffer]
        pool.k_buffer = pool.kv_buffer
    pool.new_in_this_release = CHANGES[change](pool)
    if pool.new_in_this_release is None:
        pytest.skip("nothing is beside the rows of K in this SGLang")
    with pytest.raises(IncompatibleError, match=r"not copied: new_in_this_release, \("):
        device_buffers(pool)


@pytest.mark.parametrize("build", [mha, mla])
def test_views_of_what_is_carried_are_no_surprise(build: Callable[[], Any]) -> None:
    pool = build()
    buffers = device_buffers(pool).tensors
    pool.cached_views = [layer[0].view(torch.uint8)[:10] for layer in buffers]
    pool.nothing_yet = [torch.empty(0), None]
    device_buffers(pool)


def test_layers_that_are_elsewhere() -> None:
    pool = mla()
    pool.layer_shard_enabled = True
    with pytest.raises(IncompatibleError, match="holds some of the layers only"):
        device_buffers(pool)


def test_a_layout_that_we_do_not_know() -> None:
    pool = mha()
    pool.kv_cache_layout = "vectorized_5d"
    with pytest.raises(IncompatibleError, match="with the layout vectorized_5d"):
        device_buffers(pool)
