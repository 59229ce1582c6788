"""The prefill side of a disaggregated deployment: a failed load ends its request, so none reads a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kit import TIMEOUT_S, assert_same, cut
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    admit_without_its_lease,
    check_runs_again,
    invalidate_cpu_tier,
    prefetch,
    sequence,
    wait_in_queue,
    wait_until_ready,
)
from sglang_flexkv_testing import FaultyDisk

from sglang_flexkv import kvtask
from sglang_flexkv.common.config import PrefetchPolicy
from sglang_flexkv.integration.compat.failed_loads import runs_again


@pytest.fixture
def make(make_rig: MakeRig, tmp_path: Path) -> Any:
    return lambda **options: make_rig(ssd_dir=tmp_path, reads_under_forwards=False, **options)


def test_what_only_ssd_holds_is_waited_for_in_the_queue(make: Any) -> None:
    rig = make()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == 0, "a forward would read from a disk"
    prefetch(rig, req)  # its turn, and nothing runs beside it: elsewhere it would not wait
    assert rig.cache.has_pending_cache_operations()
    wait_until_ready(rig, req)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_what_has_come_when_the_time_is_up_is_loaded(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", 1)  # a task for each block
    disk = FaultyDisk(1)
    rig = make(disk=disk, prefetch_policy=PrefetchPolicy.TIMEOUT, prefetch_timeout_s=0.2)
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    disk.set_fault("read", 1.0, delay_s=TIMEOUT_S, after=PAGES - 1)  # the last one hangs
    req = rig.request(sequence(1))
    wait_in_queue(rig, req)
    assert rig.match(req).host_hit_length == (PAGES - 1) * PAGE
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), cut(expected, 0, (PAGES - 1) * PAGE))
    disk.clear_faults()
    rig.finish(req, slots)


@pytest.mark.parametrize("single_rank", [True, False])
def test_what_leaves_the_cpu_tier_before_it_is_loaded(make: Any, single_rank: bool) -> None:
    rig = make(single_rank=single_rank)
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    req = rig.request(tokens)
    slots = admit_without_its_lease(rig, req)
    # Alone it computes. Ranks cannot answer each for itself, but wait for no disk either.
    assert len(slots) == (0 if single_rank else len(tokens))
    rig.start_batch()
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert rig.stats("DISK2H")["ops_done"] == 0
    if not single_rank:
        check_runs_again(rig, req)
    rig.abort(req, slots)


def test_a_load_that_fails_all_the_same_is_told_to_the_client(make: Any) -> None:
    """Its decode server has been told, too: it must not run again in silence."""
    rig = make(single_rank=False)
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    req.disagg_kv_sender = object()
    slots = admit_without_its_lease(rig, req)
    rig.start_batch()
    assert rig.cache.finish_external_linker_loads([req]) == [req]
    assert not runs_again(req)
    assert not rig.cache.failed_loads
    assert req.discard_output_reason is not None
    rig.abort(req, slots)
