"""Which of SGLang's KV pools are taken: those of which every byte is carried. The others are refused by name.

All of SGLang 0.5.23's pool classes are looked at, and those that a CPU can hold are built.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from pools import HEADS, LAYERS, PAGE, PLAIN, TOKENS, WITH_MORE, dsa, mha, mla
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateShape
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import NVFP4KVCacheMethod
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    HybridLinearKVPool,
    HybridReqToTokenPool,
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

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration.compat.kv_pool import (
    asks_for_layers,
    asks_for_states,
    device_buffers,
    kv_pools,
)
from sglang_flexkv.integration.compat.version import is_0_5_22

WINDOWS = pytest.mark.skipif(is_0_5_22(), reason="windows are refused with SGLang 0.5.22")


def without(names: tuple[str, ...], **arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


# ---- taken ----


def size_of(pool: Any) -> int:
    """Bytes of KV as the pool counts them, without what it needs while it computes."""
    size = pool.get_kv_size_bytes()
    workspaces = [getattr(pool, name, None) for name in ("dq_k_buffer", "dq_v_buffer")]
    return (sum(size) if isinstance(size, tuple) else size) - sum(
        w.nbytes for w in workspaces if w is not None
    )


@pytest.mark.parametrize("case", PLAIN)
def test_all_of_a_plain_pool_is_carried(case: str) -> None:
    pool = PLAIN[case]()
    buffers = device_buffers(pool)
    assert len(buffers.tensors) == LAYERS
    assert sum(t.nbytes for layer in buffers.tensors for t in layer) == size_of(pool)
    assert {n for layer in buffers.tokens_per_row for n in layer} == {1}
    assert asks_for_layers(pool)


@pytest.mark.parametrize("case", WITH_MORE)
def test_what_belongs_to_kv_is_carried_with_it(case: str) -> None:
    build, num_buffers, by_page = WITH_MORE[case]
    pool = build()
    buffers = device_buffers(pool)
    assert [len(layer) for layer in buffers.tensors] == num_buffers
    for layer in buffers.tokens_per_row:
        assert layer == [pool.page_size if at in by_page else 1 for at in range(len(layer))]


def test_what_nvfp4_reads_past_the_accessors() -> None:
    assert not asks_for_layers(WITH_MORE["nvfp4"][0]())


@pytest.mark.parametrize(("architecture", "asks"), [("gdn", True), ("kda", False)])
def test_which_models_ask_for_their_states_while_a_graph_runs(architecture: str, asks: bool) -> None:
    from sglang.srt.configs.kimi_linear import KimiLinearConfig
    from sglang.srt.configs.qwen3_next import Qwen3NextConfig

    config = Qwen3NextConfig() if architecture == "gdn" else KimiLinearConfig()
    assert asks_for_states(SimpleNamespace(hf_config=config)) == asks


@pytest.mark.parametrize("case", [*PLAIN, *WITH_MORE])
def test_a_latent_is_the_same_on_all_ranks_and_heads_are_not(case: str) -> None:
    make = PLAIN.get(case) or WITH_MORE[case][0]
    replicated = "mla" in case or "index keys" in case
    assert kv_pools(make(), PAGE, 0).replicated == replicated


@pytest.mark.parametrize("build", [mha, mla, dsa])
@pytest.mark.parametrize("draft", [mha, mla, dsa])
def test_a_draft_of_heads_makes_a_block_one_of_a_rank(
    build: Callable[..., Any], draft: Callable[..., Any]
) -> None:
    sizes = {"size": 15 * 64, "page_size": 64}
    pools = kv_pools(build(**sizes), 64, 0, [draft(**sizes)])
    assert pools.replicated == (mha not in (build, draft))


@WINDOWS
def test_where_a_block_has_parts_of_heads_beside_a_latent_it_is_one_of_a_rank() -> None:
    latent: dict[str, Any] = {"use_mla": True, "kv_lora_rank": 48, "qk_rope_head_dim": 16}
    pool, requests = with_states(pool=latent)
    assert type(pool.full_kv_pool) is MLATokenToKVPool
    assert not kv_pools(pool, PAGE, 0, (), requests).replicated
    assert not kv_pools(windows(), PAGE, 2 * PAGE + 1).replicated


def test_ranks_have_the_same_where_sglang_says_so() -> None:
    """Its own stores of blocks keep one copy for all ranks there."""
    from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import _build_dsa_device_pool_group

    pool = dsa()
    assert _build_dsa_device_pool_group(pool, 64).rank_replicated
    assert kv_pools(pool, 64, 0).replicated


def test_a_pool_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    buffers = device_buffers(mha())
    assert buffers.tokens_per_row == [[PAGE, PAGE]] * LAYERS
    assert buffers.tensors[0][0].shape[0] == TOKENS // PAGE + 1


# ---- windows in a pool of their own ----


def windows(**changes: Any) -> SWAKVPool:
    pool = SWAKVPool(
        **without(("layer_num",), **HEADS),
        size_swa=32,
        dtype=torch.bfloat16,
        **{"swa_attention_layer_ids": [0, 3], "full_attention_layer_ids": [1, 2, 4], **changes},
    )
    pool.register_mapping(torch.zeros(TOKENS + PAGE + 1, dtype=torch.int64))
    return pool


@WINDOWS
def test_all_of_a_pool_with_windows_is_carried() -> None:
    pool = windows()
    pools = kv_pools(pool, PAGE, 2 * PAGE + 1)
    (group,) = pools.more
    assert (group.name, group.layers, group.window_blocks) == ("swa", (0, 3), 3)
    assert pools.num_layers == 5
    for part, device in ((pool.full_kv_pool, pools.full), (pool.swa_kv_pool, group.device)):
        num_bytes = sum(t.numel() * t.element_size() for layer in device.tensors for t in layer)
        assert num_bytes == sum(part.get_kv_size_bytes())
    for layer, (at, in_window) in pool.layers_mapping.items():
        device = group.device if in_window else pools.full
        assert device.tensors[at][0].data_ptr() == pool.get_key_buffer(layer).data_ptr()
    # A plain pool has no further part.
    assert kv_pools(mha(), PAGE, 0).more == ()


@WINDOWS
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("swa_req_ring_size", 64, "not kept by page"),
        ("swa_uses_full_indices", True, "not kept by page"),
        ("start_layer", 2, "some of the layers"),
        ("extra", torch.zeros(3), "not copied: extra"),
    ],
)
def test_a_pool_with_windows_that_has_more_is_refused(name: str, value: Any, expected: str) -> None:
    pool = windows()
    setattr(pool, name, value)
    with pytest.raises(IncompatibleError, match=f"SWAKVPool, .*{expected}"):
        kv_pools(pool, PAGE, PAGE)


@WINDOWS
def test_windows_in_a_pool_that_keeps_more_are_refused() -> None:
    pool = windows(swa_kv_pool_class=MHATokenToKVPoolMXFP8)
    with pytest.raises(IncompatibleError, match=r"MHATokenToKVPoolMXFP8, .*start without"):
        kv_pools(pool, PAGE, PAGE)


# ---- states beside full attention ----


def with_states(
    pool: Mapping[str, Any] = MappingProxyType({}), **changes: Any
) -> tuple[HybridLinearKVPool, HybridReqToTokenPool]:
    """Layers 1 and 3 keep KV, 0, 1 and 4 a state (layer 1 both, as in Falcon-H1), 2 neither."""
    recurrent = [0, 1, 4]
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=64,
        n_groups=1,
        num_heads=2,
        head_dim=8,
        state_size=4,
        conv_kernel=4,
    )
    requests = HybridReqToTokenPool(
        **{
            "size": 4,
            "mamba_size": 6,
            "mamba_spec_state_size": 4,
            "max_context_len": TOKENS,
            "device": "cpu",
            "enable_memory_saver": False,
            "cache_params": Mamba2CacheParams(shape=shape, layers=recurrent),
            "mamba_layer_ids": recurrent,
            "enable_mamba_extra_buffer": True,
            **changes,
        }
    )
    sizes = {"size": TOKENS, "page_size": PAGE, "head_num": 2, "head_dim": 16}
    layers = {"full_attention_layer_ids": [1, 3], "mamba_pool": requests.mamba_pool}
    return HybridLinearKVPool(**sizes, **layers, dtype=torch.bfloat16, device="cpu", **pool), requests


@WINDOWS
@pytest.mark.parametrize("drafts", [None, 3])
def test_all_of_a_pool_with_states_is_carried(drafts: int | None) -> None:
    """Not what tokens that are guessed leave there while they are checked."""
    pool, requests = with_states(speculative_num_draft_tokens=drafts)
    pools = kv_pools(pool, PAGE, 0, requests=requests)
    (group,) = pools.more
    assert (group.name, group.layers, group.window_blocks, group.slots_per_block) == (
        "mamba",
        (0, 1, 4),
        1,
        1,
    )
    assert group.quota(TOKENS // PAGE) == 6  # as many as the device has
    assert (pools.num_layers, pools.layers) == (5, (1, 3))
    for at, layer in enumerate((1, 3)):
        assert pools.full.tensors[at][0].data_ptr() == pool.get_key_buffer(layer).data_ptr()
    for at, layer in enumerate(group.layers):
        state = requests.mamba2_layer_cache(layer)
        wanted = {buffer.data_ptr(): buffer.dtype for buffer in (state.temporal, *state.conv)}
        assert {buffer.data_ptr(): buffer.dtype for buffer in group.device.tensors[at]} == wanted


@WINDOWS
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"enable_linear_replayssm": True}, r"replayssm_.*: drop --enable-linear-replayssm"),
        ({"extra": torch.zeros(3)}, "not copied: extra"),
        ({"_slot_siblings": [object()]}, "beside states"),
    ],
)
def test_states_that_have_more_are_refused(changes: dict[str, Any], expected: str) -> None:
    arguments = {name: value for name, value in changes.items() if name.startswith("enable")}
    pool, requests = with_states(**arguments)
    for name, value in changes.items():
        if name not in arguments:
            setattr(requests.mamba_pool, name, value)
    with pytest.raises(IncompatibleError, match=f"MambaPool, .*{expected}"):
        kv_pools(pool, PAGE, 0, requests=requests)


@WINDOWS
def test_states_where_none_are_expected_are_refused() -> None:
    pool, requests = with_states()
    _, others = with_states()
    with pytest.raises(IncompatibleError, match=r"HybridLinearKVPool, .*what other layers keep"):
        kv_pools(pool, PAGE, 0, requests=others)
    with pytest.raises(IncompatibleError, match=r"HybridLinearKVPool, .*what other layers keep"):
        kv_pools(pool, PAGE, 0)
    with pytest.raises(IncompatibleError, match=r"MHATokenToKVPool, .*states of other layers beside it"):
        kv_pools(mha(), PAGE, 0, requests=requests)
    requests.mamba_ckpt_pool = object()
    with pytest.raises(IncompatibleError, match=r"quantised copies; .*drop --enable-int8-mamba-checkpoint"):
        kv_pools(pool, PAGE, 0, requests=requests)


# ---- draft models beside windows and states ----


@WINDOWS
def test_a_draft_is_carried_in_the_last_layer_of_full_attention() -> None:
    """MTP has a pool like the target's, whose states are the target's own."""
    pool, requests = with_states()
    sizes = {"size": TOKENS, "page_size": PAGE, "dtype": torch.bfloat16, "device": "cpu"}
    draft = HybridLinearKVPool(
        **sizes, head_num=1, head_dim=8, full_attention_layer_ids=[0], mamba_pool=requests.mamba_pool
    )
    pools = kv_pools(pool, PAGE, 0, [draft], requests)
    alone = kv_pools(pool, PAGE, 0, requests=requests)
    first, last = pools.full.tensors
    assert [len(first), len(last)] == [2, 4]
    assert {buffer.data_ptr() for buffer in last[2:]} == {
        buffer.data_ptr() for buffer in (draft.get_key_buffer(0), draft.get_value_buffer(0))
    }
    assert (pools.layers, pools.num_layers, len(pools.more)) == (alone.layers, alone.num_layers, 1)
    draft.extra = torch.zeros(3)
    with pytest.raises(IncompatibleError, match=r"HybridLinearKVPool, .*not copied: extra"):
        kv_pools(pool, PAGE, 0, [draft], requests)


@WINDOWS
def test_drafts_that_keep_more_are_refused() -> None:
    pool, requests = with_states()
    draft, _ = with_states()
    with pytest.raises(IncompatibleError, match=r"states of its own; .*drop --speculative-algorithm"):
        kv_pools(pool, PAGE, 0, [draft], requests)
    with pytest.raises(IncompatibleError, match=r"windows of its own; .*drop --speculative-algorithm"):
        kv_pools(windows(), PAGE, 64, [windows()])
    with pytest.raises(IncompatibleError, match=r"and the target's .*drop --speculative-algorithm"):
        kv_pools(windows(), PAGE, 64, [mha(size=2 * TOKENS)])


# ---- refused: more than K and V ----


class NewRecipe(NVFP4KVCacheMethod):
    name = "nvfp5"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a recipe that we do not know": (
        lambda: mha(quant_method=NewRecipe(LAYERS, "cpu", PAGE, native_scale_layout=False)),
        "quantised by nvfp5, .*use another --kv-cache-dtype",
    ),
    "index keys of several tokens, with tails": (
        lambda: dsa(
            page_size=128, size=1280, index_kpool=2, index_kpool_compress=True, max_running_requests=2
        ),
        "not copied: _compress_tail_k, .*start without",
    ),
    "no KV at all": (lambda: mha(NoOpMHATokenToKVPool), "NoOpMHATokenToKVPool, .*start without"),
    "windows": (lambda: windows(), "SWAKVPool, .*start without"),
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
    taken = {
        DSATokenToKVPool,
        MHATokenToKVPool,
        MHATokenToKVPoolFP4,
        MHATokenToKVPoolMXFP8,
        MLATokenToKVPool,
        MLATokenToKVPoolFP4,
    }
    assert taken <= found
    for kind in found - taken:
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
