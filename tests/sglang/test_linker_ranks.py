"""What the ranks agree on, and how often they ask each other. Other ranks are played by the reduction."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kit import TIMEOUT_S, Rig
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    admit_without_its_lease,
    check_landed,
    check_runs_again,
    collectives_of,
    may_run,
    sequence,
    store_on_ssd_alone,
)
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome

from sglang_flexkv.integration import build
from sglang_flexkv.integration.compat import server
from sglang_flexkv.integration.compat.kv_pool import kv_pools


@pytest.mark.parametrize("with_another", [False, True], ids=["alone", "beside_a_good_load"])
def test_a_rank_that_cannot_load_what_the_others_load_fails_that_load_and_blocks_nobody(
    make_rig: MakeRig, with_another: bool
) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    slots = admit_without_its_lease(rig, req)
    assert len(slots) == PAGES * PAGE  # the other ranks load, so this one goes along
    reqs = [req]
    if with_another:
        expected = rig.insert(sequence(5000), seed=2)
        rig.evict_all()
        other = rig.request(sequence(5000))
        other_slots = rig.admit(other)
        reqs.append(other)
    rig.start_batch()
    # Nobody opens the gate for it: a forward that waited for that would wait for every layer's time-out.
    forward = threading.Thread(target=rig.forward, daemon=True)
    forward.start()
    forward.join(TIMEOUT_S)
    assert not forward.is_alive()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, req)
    assert rig.match(req).host_hit_length == 0  # and computes everything
    rig.abort(req, slots)
    if with_another:
        check_landed(rig, other, other_slots, expected)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_load_that_fails_on_another_rank_fails_here_and_no_other_does(
    make_rig: MakeRig, failing: int
) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(10000 * n, n) for n in (1, 2, 3)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    rig.start_batch()
    rig.forward()

    def with_another_rank(verdicts: torch.Tensor, op: Any) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        assert verdicts.tolist() == [1, 1, 1]
        verdicts[failing] = 0

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", with_another_rank):
        assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, reqs[failing])
    for i, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if i == failing:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[i])


def test_ranks_wait_for_others_together(make_rig: MakeRig, tmp_path: Path) -> None:
    """A read that one rank has to wait for, and this one has not, or not any more."""
    rig = make_rig(ssd_dir=tmp_path, single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    rig.cache.ranks.reads_may_run = True
    req = rig.request(sequence(1))
    rig.match(req)

    def another_rank_reads(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        tensor.fill_(1)

    def another_rank_is_not_ready(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        tensor.fill_(0)

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", another_rank_reads):
        assert not may_run(rig, req)
    assert rig.stats("CPU")["pinned"] == PAGES  # what it found stays its own
    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", another_rank_is_not_ready):
        assert not may_run(rig, req)
    assert may_run(rig, req)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    rig.abort(req)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_ranks_ask_each_other_only_while_one_may_be_reading(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    store_on_ssd_alone(rig, sequence(1))
    first, second = rig.request(sequence(1)), rig.request(sequence(9000))
    rig.match(second)
    ask = partial(may_run, rig, second)
    assert collectives_of(rig, ask) == 0
    slots = rig.admit(first)
    assert collectives_of(rig, ask) == 1
    assert collectives_of(rig, ask) == 1
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert collectives_of(rig, ask) == 1  # which says that nobody reads any more
    assert collectives_of(rig, ask) == 0
    rig.abort(first, slots)
    rig.abort(second)


def test_a_step_without_anything_under_way_needs_no_collective(make_rig: MakeRig) -> None:
    rig = make_rig()
    assert collectives_of(rig, rig.cache.check_hicache_events) == 0
    rig.insert(sequence(1), seed=1)
    assert rig.cache.linker.pending_offloads
    assert collectives_of(rig, rig.cache.check_hicache_events) > 0  # whatever this rank knows by then
    rig.settle()
    assert collectives_of(rig, rig.cache.check_hicache_events) == 0


def test_ranks_agree_on_a_hit_with_one_number(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    sizes = []

    def other_rank_has_less(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        sizes.append(tensor.numel())
        tensor.clamp_(max=PAGES - 1)

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", other_rank_has_less):
        assert rig.match(req).host_hit_length == (PAGES - 1) * PAGE
    assert sizes == [1]
    rig.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)


# ---- ranks that share the computing of prefills, each of which has all KV ----


def test_ranks_that_share_prefills_are_among_those_that_agree(make_rig: MakeRig) -> None:
    rig = make_rig(single_rank=False)
    held = {"of prefills": 5, "of heads": 3}  # by group what another rank of it can load

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=held.pop(group))

    with (
        mock.patch.object(rig.cache, "attn_cp_group", "of prefills"),
        mock.patch.object(rig.cache, "attn_tp_group", "of heads"),
        mock.patch.object(torch.distributed, "get_world_size", return_value=2),
        mock.patch.object(torch.distributed, "all_reduce", all_reduce),
    ):
        assert rig.cache.ranks.shortest_hit(7) == 3
    assert not held


def fields(
    rig: Rig, place: server.Place, strategy: str | None = None, *, shared: bool = False
) -> dict[str, str]:
    """What the pool of a rank adds to the identity."""
    pools = kv_pools(rig.pool, PAGE, 0)
    context = SimpleNamespace(
        model_config=SimpleNamespace(model_path="model", revision=None),
        params=SimpleNamespace(page_size=PAGE),
    )
    with (
        mock.patch.object(server, "reader", return_value={"cp_strategy": strategy}.get),
        mock.patch.object(build, "model_identity", lambda *_, pool, **__: pool),
    ):
        return build._identity(context, rig.pool, pools, place, None, shared=shared)


def of_prefills(rank: int, size: int) -> server.Place:
    """A rank of some that share the computing of prefills."""
    return server.Place(rank, size, 0, 1, rank, size, 0, size, size)


def of_heads(tp_rank: int, tp_size: int, attn_tp_size: int) -> server.Place:
    """A rank of some that share heads; of fewer with DP attention."""
    return server.Place(tp_rank, tp_size, tp_rank % attn_tp_size, attn_tp_size, 0, 1, 0, tp_size, tp_size)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_ranks_that_share_prefills_are_told_apart(make_rig: MakeRig, kind: str, shared: bool) -> None:
    rig = make_rig(kind)
    assert "attention CP rank" not in fields(rig, of_prefills(0, 1), shared=shared)
    of_rank = fields(rig, of_prefills(1, 2), "zigzag", shared=shared)
    assert of_rank["attention CP rank"] == "1 of 2, zigzag"
    assert of_rank.get("TP rank") == (None if shared else "1 of 2")
    others = [(of_prefills(0, 2), "zigzag"), (of_prefills(1, 2), "zigzag"), (of_prefills(1, 2), "interleave")]
    assert len({str(fields(rig, *of, shared=shared)) for of in others}) == 3


@pytest.mark.parametrize(("kind", "shared", "apart"), [("mha", True, 2), ("mla", True, 1), ("mla", False, 4)])
def test_whose_blocks_ranks_have(make_rig: MakeRig, kind: str, shared: bool, apart: int) -> None:
    """Four ranks with DP attention: two replicas of two ranks, each with half of the heads, or with the
    latent, which has none. On a machine each rank has blocks of its own in any case."""
    rig = make_rig(kind)
    told = [str(fields(rig, of_heads(rank, 4, 2), shared=shared)) for rank in range(4)]
    assert len(set(told)) == apart
    assert str(fields(rig, of_heads(0, 4, 4), shared=shared)) not in told


@pytest.mark.parametrize(
    ("place", "ranks"),
    [(of_heads(1, 4, 4), 4), (of_heads(1, 4, 2), 2), (of_heads(1, 2, 1), 1), (of_prefills(1, 2), 2)],
)
def test_how_many_ranks_have_a_cache_in_common(place: server.Place, ranks: int) -> None:
    assert place.ranks_of_a_request == ranks
