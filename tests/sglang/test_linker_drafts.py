"""Speculative decoding: the draft models' KV goes where the target's goes, under keys of pairs of tokens.

An element of such a key is a token and the one behind it, so a page needs one token more than it has, and
depends on it. What a draft model lacks of a prefix it guesses badly from then on; so after a hit all of its
KV is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kit import CORES, TIMEOUT_S, Rig, assert_same, build_small_cache, cut, make_pool, radix_key
from linker_steps import PAGES, check_runs_again, invalidate_cpu_tier, prefetch, sequence
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import InsertParams

from sglang_flexkv.common.config import WritePolicy
from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration.compat.kv_pool import device_buffers, draft_pools

# Of MTP, a pool of one layer for each step; of EAGLE, one beside the target's, here of another kind.
DRAFTS = {"packed": ("mha", 1, 3), "sidecar": ("mla", 2, 1)}
MakeRig = Callable[..., Rig]


def make_drafts(kind: str, page_size: int, num_tokens: int) -> list[Any]:
    of, num_layers, num_pools = DRAFTS[kind]
    return [
        make_pool(of, torch.bfloat16, page_size, num_tokens=num_tokens, num_layers=num_layers)
        for _ in range(num_pools)
    ]


@pytest.fixture(params=CORES)
def make_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeRig]:
    rigs: list[Rig] = []

    def make(drafts: str = "packed", page_size: int = 16, **options: Any) -> Rig:
        num_tokens = 64 * page_size
        pool = make_pool("mha", torch.bfloat16, page_size, num_tokens=num_tokens)
        parts = build_small_cache(pool, page_size, request.param, is_eagle=True)
        options |= {"ssd_dir": tmp_path, "drafts": make_drafts(drafts, page_size, num_tokens)}
        rigs.append(Rig(parts, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        with rig:
            pass


def store(rig: Rig, tokens: list[int], seed: int) -> list[torch.Tensor]:
    """What a request leaves behind: its prompt's pages in the tree, and of the token behind them nothing."""
    slots = rig.allocator.alloc(len(tokens))
    assert slots is not None
    expected = rig.write(slots, seed)
    rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots))
    whole = (len(tokens) - 1) // rig.page_size * rig.page_size
    rig.allocator.free(slots[whole:])
    return cut(expected, 0, whole)


def ends(rig: Rig, req: Req, slots: torch.Tensor) -> None:
    """A request whose prefix is in the tree already."""
    assert req.kv.cache_protected_len == len(slots)
    rig.abort(req, slots)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK], ids=lambda p: p.value)
def test_the_drafts_kv_comes_back_with_the_targets(
    make_rig: MakeRig, drafts: str, page_size: int, policy: WritePolicy
) -> None:
    rig = make_rig(drafts, page_size, policy=policy)
    tokens = [*sequence(1, PAGES, page_size), 7777]
    expected = store(rig, tokens, seed=1)
    assert len(expected) == 2 * 3 + sum(len(layer) for layer in rig.linker.pools.popitem()[1].tensors) - 6
    rig.evict_all()
    for tier in ("CPU tier", "SSD"):
        if tier == "SSD":
            assert rig.engine.flush_spills(TIMEOUT_S)
            invalidate_cpu_tier(rig)
        req = rig.request(tokens)
        (slots,) = rig.restore(req)
        assert len(slots) == PAGES * page_size
        assert_same(rig.read(slots), expected)
        rig.abort(req, slots)
        rig.scribble()


def test_the_last_page_is_another_one_before_another_token(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = store(rig, [*tokens, 7777], seed=1)
    rig.evict_all()
    for behind, pages in (([7777], PAGES), ([8888], PAGES - 1), ([], PAGES - 1)):
        req = rig.request([*tokens, *behind])
        (slots,) = rig.restore(req)
        assert len(slots) == pages * rig.page_size
        assert_same(rig.read(slots), cut(expected, 0, len(slots)))
        rig.abort(req, slots)


@pytest.mark.parametrize("page_size", [1, 16])
def test_all_of_a_batch_share_one_load(make_rig: MakeRig, page_size: int) -> None:
    rig = make_rig(page_size=page_size)
    trunk = sequence(1, PAGES, page_size)
    expected = store(rig, [*trunk, 7777], seed=1)
    rig.evict_all()
    # The second one ends with the trunk's last token, so its last page is another one.
    reqs = [rig.request(tokens) for tokens in ([*trunk, 7777, 1], trunk, [*trunk, 7777, 2])]
    wanted = [PAGES, PAGES - 1, PAGES]
    for req in reqs:
        rig.admit(req)
    all_slots = [rig.cache.prefix_device_indices(req) for req in reqs]
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads(list(reqs)) == []
    assert rig.linker.metrics.total["loaded cpu"] == PAGES * page_size
    assert rig.linker.metrics.total["shared"] == (2 * PAGES - 1) * page_size
    for req, slots, pages in zip(reqs, all_slots, wanted, strict=True):
        assert slots.tolist() == all_slots[0][: pages * page_size].tolist()
        assert_same(rig.read(slots), cut(expected, 0, len(slots)))
        ends(rig, req, slots)


def test_a_shared_load_that_fails_leaves_nothing(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig()
    trunk = [*sequence(1), 7777]
    expected = store(rig, trunk, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    # The last draft's KV of the third page alone.
    page = expected[-1][2 * rig.page_size : 3 * rig.page_size].numpy().tobytes()
    (files,) = tmp_path.glob("*.slots")
    with files.open("r+b") as file:
        file.seek(files.read_bytes().index(page))
        file.write(bytes(8))
    reqs = [rig.request([*trunk, n]) for n in range(3)]
    for req in reqs:
        rig.admit(req)
    all_slots = [rig.cache.prefix_device_indices(req) for req in reqs]
    rig.start_batch()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads(list(reqs))  # none is ended
    check_runs_again(rig, *reqs)
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.abort(req, slots)
    again = rig.request(trunk)
    assert rig.match(again).device_prefix_len == 0
    rig.abort(again)


def test_what_waits_is_brought_from_ssd(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = [*sequence(1), 7777]
    expected = store(rig, tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(tokens)
    prefetch(rig, req)
    assert rig.engine.drain(TIMEOUT_S)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.abort(req, slots)


# ---- which drafts are taken ----


def params(**changes: Any) -> Any:
    pools = dict.fromkeys(
        ("mtp_draft_device_pools", "sidecar_draft_device_pools", "mtp_draft_mamba_pools"), ()
    )
    return SimpleNamespace(**pools | changes)


def test_drafts_are_those_that_sglang_names() -> None:
    packed, sidecar = make_drafts("packed", 16, 64), make_drafts("sidecar", 16, 64)
    assert draft_pools(params(), None) == draft_pools(params(), "NGRAM") == ()
    assert draft_pools(params(mtp_draft_device_pools=tuple(packed)), "EAGLE") == tuple(packed)
    assert draft_pools(params(sidecar_draft_device_pools=tuple(sidecar)), "EAGLE3") == tuple(sidecar)


def test_a_draft_whose_pool_is_not_known_is_refused() -> None:
    # As in SGLang 0.5.22, which does not hand over the pool beside the target's.
    with pytest.raises(IncompatibleError, match=r"does not say where .* EAGLE keeps its KV: drop"):
        draft_pools(params(), "EAGLE")
    with pytest.raises(IncompatibleError, match=r"Mamba state.* drop --speculative-algorithm"):
        draft_pools(params(mtp_draft_mamba_pools=("a pool",)), "EAGLE")


def test_a_draft_with_other_slots_is_refused() -> None:
    pool = make_pool("mha", torch.bfloat16, 16, num_tokens=64)
    with pytest.raises(IncompatibleError, match=r"with 32 slots, .*drop --speculative-algorithm"):
        device_buffers(pool, make_drafts("sidecar", 16, 32))
