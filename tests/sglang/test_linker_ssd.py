"""What only SSD holds: read while a request waits in the queue, or under its forward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from kit import TIMEOUT_S, assert_same
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    forget_in_memory,
    invalidate_cpu_tier,
    prefetch,
    sequence,
    store_on_ssd_alone,
    wait_until_ready,
)

from sglang_flexkv.common.config import PrefetchPolicy
from sglang_flexkv.transfer.transfer_engine import TransferEngine

# ---- read while the request waits ----


def test_what_only_ssd_holds_comes_back_through_prefetch(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    assert (rig.stats("CPU")["ready"], rig.stats("SSD")["ready"]) == (0, PAGES)

    req = rig.request(tokens)
    prefetch(rig, req)
    assert rig.cache.has_pending_cache_operations()
    wait_until_ready(rig, req)
    assert rig.cache.pop_prefetch_loaded_tokens(req.cache_request_handle) == PAGES * PAGE
    # What has arrived is the request's until it is loaded.
    assert rig.stats("CPU")["pinned"] == PAGES
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_only_the_part_that_the_cpu_tier_lost_is_read_from_ssd(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, PAGES - 1)

    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    prefetch(rig, req)
    wait_until_ready(rig, req)
    assert rig.cache.pop_prefetch_loaded_span(req.cache_request_handle) == (PAGE, (PAGES - 1) * PAGE)
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize(
    ("queued", "chunked", "running", "reads_hide", "waits"),
    [
        (False, False, "none", False, False),  # alone: nobody stands still while it waits for the disk
        (False, False, "ended", False, False),
        (False, False, "some", False, True),
        (False, False, "prefilled", False, True),  # and will decode from now on
        (False, False, "elsewhere", False, True),  # on another rank, whose forward is ours too (DP attention)
        (False, False, "some", True, False),  # its own computing takes longer than the read
        (True, False, "none", True, True),  # it has to wait for others anyway
        (False, True, "none", True, True),
    ],
)
def test_who_waits_for_ssd_in_the_queue(
    make_rig: MakeRig,
    tmp_path: Path,
    queued: bool,
    chunked: bool,
    running: str,
    reads_hide: bool,
    waits: bool,
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    req = rig.request(tokens + sequence(7000))
    rig.cache.attach_scheduler(
        SimpleNamespace(
            waiting_queue=[req] if queued else [],
            chunked_req=req if chunked else None,
            running_batch=SimpleNamespace(is_empty=lambda: running != "some"),
            last_batch=None
            if running == "none"
            else SimpleNamespace(
                reqs=[SimpleNamespace(finished=lambda: running == "ended")] if running != "elsewhere" else [],
                forward_mode=SimpleNamespace(is_idle=lambda: running == "elsewhere"),
            ),
            enable_priority_preemption=False,
            is_mixed_chunk=False,
            enable_overlap=False,
            chunked_prefill_size=PAGE,
            _engine_paused=False,
        )
    )
    costs = rig.linker.load_or_recompute
    for i in range(1, 10):
        costs.prefill.observe([(0, 1000)], 10.0 if reads_hide else 1e-9)
        costs.from_tier[1].observe(i * 1e9, float(i))
    prefetch(rig, req)
    assert bool(rig.cache.prefetches.waits) is waits
    rig.abort(req)


def test_a_request_without_anything_on_ssd_does_not_wait(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    for tokens in (sequence(1), sequence(5000)):  # in the CPU tier, and nowhere
        req = rig.request(tokens)
        prefetch(rig, req)
        assert not rig.cache.prefetches.waits
        assert rig.cache.check_prefetch_progress(req.cache_request_handle)
        rig.abort(req)
    assert rig.stats("DISK2H")["ops_done"] == 0
    assert rig.engine.flush_spills(TIMEOUT_S)


@pytest.mark.parametrize("policy", [PrefetchPolicy.BEST_EFFORT, PrefetchPolicy.WAIT_COMPLETE])
def test_how_long_a_request_waits_for_ssd_is_the_policys_choice(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy
) -> None:
    rig = make_rig(ssd_dir=tmp_path, prefetch_policy=policy)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    # A prefetch that does not end by itself: the outcome is kept from the engine.
    with mock.patch.object(TransferEngine, "poll", return_value=[]):
        prefetch(rig, req)
        ready = rig.cache.check_prefetch_progress(req.cache_request_handle)
    assert ready is (policy is PrefetchPolicy.BEST_EFFORT)
    wait_until_ready(rig, req)
    rig.abort(req)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_an_abort_while_ssd_is_read_leaves_nothing(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    prefetch(rig, req)
    rig.abort(req)
    assert not rig.cache.prefetches.waits
    rig.settle()
    assert rig.stats("CPU")["pinned"] == 0


# ---- read under the forward ----


@pytest.mark.parametrize("in_memory", range(PAGES), ids=lambda n: f"{n}_pages_in_memory")
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_what_ssd_holds_is_read_under_the_forward(
    make_rig: MakeRig, tmp_path: Path, kind: str, in_memory: int
) -> None:
    rig = make_rig(kind, torch.bfloat16, 64, num_pages=12, ssd_dir=tmp_path)
    tokens = sequence(1, page_size=64)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, in_memory)

    req = rig.request(tokens)
    slots = rig.admit(req)
    assert len(slots) == len(tokens)
    # What the response will say about where its tokens came from.
    assert (req.storage_hit_start, req.storage_hit_length) == (in_memory * 64, (PAGES - in_memory) * 64)
    rig.start_batch()
    for layer in range(rig.pool.layer_num):
        rows = rig.read_layer(layer, slots)
        assert_same(rows, expected[layer * rig.buffers_per_layer : (layer + 1) * rig.buffers_per_layer])
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert rig.stats("DISK2H")["layers_per_read"] > 0
    assert rig.stats("CPU")["ready"] == PAGES  # in memory again
    assert rig.linker.metrics.total["loaded ssd"] == (PAGES - in_memory) * 64
    assert rig.linker.metrics.total["loaded cpu"] == in_memory * 64
    rig.finish(req, slots)
