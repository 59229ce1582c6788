"""Flushes, new weights, the end."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from closing_steps import StepFailedError, one_fails, steps_of
from kit import TIMEOUT_S, Rig, assert_same, build_small_cache, make_pool
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    invalidate_cpu_tier,
    nobody_else,
    prefetch,
    sequence,
    store_on_ssd_alone,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_flexkv.integration.compat.requests import name_of
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.kvtask import TaskStatus

# ---- flush ----


def test_a_flush_empties_every_tier_and_ends_everything_under_way(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    for number in range(3):
        rig.insert(sequence(10000 * number), seed=number)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    assert rig.stats("SSD")["ready"] == 3 * PAGES
    pinned, queued = rig.request(sequence(0)), rig.request(sequence(10000))
    rig.match(pinned)
    slots = rig.admit(queued)
    rig.insert(sequence(50000), seed=7)  # its copy is under way

    rig.cache.unlock(queued.lock)
    rig.cache.reset()
    rig.allocator.clear()

    assert len(slots) == PAGES * PAGE
    for tier in ("CPU", "SSD"):
        stats = rig.stats(tier)
        assert (stats["ready"], stats["writing"], stats["pinned"]) == (0, 0, 0), tier
        assert stats["free"] == stats["slots"], tier
    rig.check_nothing_is_left()
    for start in (0, 10000, 20000, 50000):
        req = rig.request(sequence(start))
        assert rig.match(req).host_hit_length == 0
        rig.abort(req)

    tokens = sequence(0)
    expected = rig.insert(tokens, seed=8)  # and it goes on, with other bytes for the same tokens
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_a_flush_while_a_request_waits_for_ssd_leaves_no_task(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    prefetch(rig, req)
    fetch = rig.cache.prefetches.waits[name_of(req)].reads[0]
    assert fetch is not None
    (task,) = fetch.tasks
    rig.cache.reset()
    rig.allocator.clear()
    # A flush does not wait for the disk; what the read brings is thrown away.
    assert rig.engine.wait([task], TIMEOUT_S)
    assert task.status in (TaskStatus.COMPLETED, TaskStatus.CANCELLED)
    assert rig.cache.check_prefetch_progress(req.cache_request_handle)
    assert (rig.stats("CPU")["ready"], rig.stats("SSD")["ready"]) == (0, 0)


def test_a_pause_does_not_hold_up_a_flush(make_rig: MakeRig, tmp_path: Path) -> None:
    """SGLang may pause at any time, plans no batches then, and flushes if nothing but its queue is left."""
    rig = make_rig(ssd_dir=tmp_path)
    scheduler = nobody_else()
    rig.cache.attach_scheduler(scheduler)
    store_on_ssd_alone(rig, sequence(1))
    waiting, failed = rig.request(sequence(1)), rig.request(sequence(5000))
    scheduler.waiting_queue.append(waiting)
    prefetch(rig, waiting)
    assert rig.cache.prefetches.waits
    rig.insert(sequence(9000), seed=1)
    failed.finished_reason = FINISH_ABORT("External KV cache load failed", 503)
    rig.cache.failed_loads.take(failed, skip_insert=False)
    assert rig.engine.drain(TIMEOUT_S)
    assert rig.cache.has_pending_cache_operations()
    scheduler._engine_paused = True
    assert not rig.cache.has_pending_cache_operations()
    assert scheduler.waiting_queue == [failed, waiting]
    rig.cache.reset()
    rig.allocator.clear()


def test_clearing_the_storage_keeps_what_the_device_holds(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.settle()
    assert rig.cache.clear_storage_backend()
    assert rig.stats("CPU")["ready"] == 0
    req = rig.request(tokens)
    assert rig.match(req).device_prefix_len == len(tokens)
    rig.abort(req)


def test_clearing_the_storage_while_a_node_is_copied_to_it_unlocks_the_node(make_rig: MakeRig) -> None:
    # The endpoint can be called at any time, not only when the server is idle as a flush is.
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    assert rig.cache.clear_storage_backend()
    rig.settle()
    assert rig.cache.full_protected_size() == 0
    tokens = sequence(5000)
    expected = rig.insert(tokens, seed=2)
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_clearing_the_storage_never_passes_off_an_unfinished_load_as_finished(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(dtype=torch.float32, num_pages=1600, num_layers=32, num_cpu_blocks=800, copy_threads=1)
    tokens = sequence(1, 700)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req, late = rig.request(tokens), rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    assert rig.match(late).host_hit_length == len(tokens)
    rig.cache.clear_storage_backend()
    assert rig.stats("CPU")["ready"] == 0
    rig.forward()
    if not rig.cache.finish_external_linker_loads([req]):
        assert_same(rig.read(slots), expected)
        rig.finish(req, slots)
    else:
        rig.abort(req, slots)
    # What was pinned for the other request is gone, so it must not be counted on.
    assert not rig.cache.linker.has_hit(name_of(late))
    rig.abort(late)


# ---- new weights ----


def test_new_weights_end_persistence_and_nothing_else(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.settle()
    with mock.patch.object(rig.engine, "stop_persisting", create=True) as stop:
        rig.cache.reset()
        assert not stop.called  # a plain flush is no reason
        rig.allocator.clear()
        rig.insert(tokens, seed=2)
        rig.settle()
        rig.cache.weights_changed()
        stop.assert_called_once_with()
    # Whether old KV may be used on is SGLang's to say: it flushes, or was told not to.
    assert rig.stats("CPU")["ready"] == PAGES
    req = rig.request(tokens)
    assert rig.match(req).device_prefix_len == len(tokens)
    rig.abort(req)


def test_new_weights_before_there_are_tiers(make_rig: MakeRig) -> None:
    rig = make_rig()
    with mock.patch.object(rig.cache, "linker", None):
        rig.cache.weights_changed()


# ---- the end ----


@pytest.mark.parametrize("failing", steps_of(FlexKVLinker.close))
def test_closing_goes_on_whatever_one_step_raises(tmp_path: Path, failing: str) -> None:
    pool = make_pool("mha", torch.bfloat16, PAGE, num_tokens=48 * PAGE, num_layers=3)
    rig = Rig(build_small_cache(pool, PAGE), ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.settle()
    steps = steps_of(FlexKVLinker.close)
    with one_fails(rig.linker, steps, failing, at_once=False) as called:
        with pytest.raises(StepFailedError, match=failing):
            rig.linker.close()
        rig.linker.close()
        assert called == dict.fromkeys(steps, 1)
