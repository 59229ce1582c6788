"""Reads from SSD that several requests wait for."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from kit import TIMEOUT_S, assert_same
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    end_both,
    forget_failed_loads,
    forget_in_memory,
    invalidate_cpu_tier,
    may_run,
    nobody_else,
    page_hashes,
    prefetch,
    reads_do_not_end,
    sequence,
    store_on_ssd_alone,
    wait_until_ready,
)

from sglang_flexkv import _core
from sglang_flexkv.common.block import keys_from_page_hashes
from sglang_flexkv.common.config import LoadPolicy, PrefetchPolicy
from sglang_flexkv.integration.compat.requests import name_of
from sglang_flexkv.kvtask import Fetch


@pytest.mark.parametrize("in_memory", [0, 1], ids=lambda n: f"{n}_pages_in_memory")
def test_of_one_batch_only_the_first_reads_what_several_want(
    make_rig: MakeRig, tmp_path: Path, in_memory: int
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, in_memory)
    reads = rig.stats("DISK2H")["ops_done"]
    first, second = rig.request(tokens), rig.request(tokens + sequence(7000))
    for req in (first, second):
        assert rig.match(req).host_hit_length == len(tokens)
        assert may_run(rig, req)
    first_slots = rig.admit(first)
    assert not may_run(rig, second)  # it will read nothing: the other one's load does
    assert rig.cache.has_pending_cache_operations()
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    assert rig.linker.metrics.total["loaded ssd"] == (PAGES - in_memory) * PAGE
    (slots,) = rig.restore(second)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    assert rig.stats("DISK2H")["ops_done"] == reads + 1
    assert rig.linker.metrics.total["loaded cpu"] == in_memory * PAGE  # nor is it loaded again
    rig.abort(first, first_slots)
    rig.finish(second, slots)


def test_who_comes_while_a_load_reads_waits_even_if_nobody_else_does(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.cache.attach_scheduler(nobody_else())
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    prefetch(rig, first)
    assert may_run(rig, first)
    first_slots = rig.admit(first)
    with reads_do_not_end(rig):
        rig.start_batch()
        prefetch(rig, second)
        for _ in range(3):
            assert not may_run(rig, second)
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    assert rig.match(second).device_prefix_len == len(tokens)
    # It did not bring them, so it does not say so.
    assert rig.cache.pop_prefetch_loaded_tokens(second.cache_request_handle) == 0
    rig.abort(first, first_slots)
    rig.abort(second)


@pytest.mark.parametrize("owner_leaves", [False, True])
def test_a_prefetch_serves_all_who_want_it(make_rig: MakeRig, tmp_path: Path, owner_leaves: bool) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    # The first of all would have read under its forward, had the others not come before its turn.
    alone, owner, another = rig.request(tokens), rig.request(tokens), rig.request(tokens)
    rig.match(alone)
    with reads_do_not_end(rig):
        prefetch(rig, owner)
        prefetch(rig, another)
        assert not may_run(rig, alone)
        assert not may_run(rig, another)
        if owner_leaves:
            rig.abort(owner)
            assert not may_run(rig, another)  # the read goes on by itself
    waiting = [alone, another] if owner_leaves else [alone, owner, another]
    for req in waiting:
        wait_until_ready(rig, req)
    assert rig.stats("DISK2H")["ops_done"] == 1
    for req in waiting:
        (slots,) = rig.restore(req)
        assert_same(rig.read(slots), expected)
        rig.finish(req, slots)
        rig.evict_all()


def test_what_the_others_read_leaves_is_prefetched_next(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    shared, tail = sequence(1), sequence(5000)
    expected = rig.insert(shared + tail, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    first, second = rig.request(shared), rig.request(shared + tail)
    with reads_do_not_end(rig):
        prefetch(rig, first)
        assert not may_run(rig, first)
        prefetch(rig, second)
        assert not may_run(rig, second)
    wait_until_ready(rig, second)
    assert rig.stats("DISK2H")["ops_done"] == 2
    assert rig.cache.pop_prefetch_loaded_span(second.cache_request_handle) == (len(tail), len(shared))
    (slots,) = rig.restore(second)
    assert_same(rig.read(slots), expected)
    rig.finish(second, slots)
    wait_until_ready(rig, first)
    rig.abort(first)


def test_who_runs_alone_reads_what_is_left_under_its_forward(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.cache.attach_scheduler(nobody_else())
    shared, tail = sequence(1), sequence(5000)
    store_on_ssd_alone(rig, shared + tail)
    first, second = rig.request(shared), rig.request(shared + tail)
    rig.match(second)
    first_slots = rig.admit(first)
    assert not may_run(rig, second)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    match = rig.match(second)
    assert (match.device_prefix_len, match.host_hit_length) == (PAGES * PAGE, PAGES * PAGE)
    assert rig.stats("DISK2H")["ops_done"] == 1
    rig.abort(first, first_slots)
    rig.abort(second)


def test_who_waits_for_a_read_that_fails_computes(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(_core.SSD_SLOTS_OFFSET)
        file.write(bytes(rig.engine.slot_bytes))
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert not may_run(rig, second)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert len(rig.cache.failed_loads) == 1
    forget_failed_loads(rig)
    assert may_run(rig, second)
    assert rig.match(second).host_hit_length < len(tokens)
    assert rig.linker.states.of(name_of(first)).gave_up  # the one that failed loads nothing any more
    rig.abort(first, slots)
    rig.abort(second)


def test_who_waits_for_a_load_that_is_cancelled_reads_itself(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert not may_run(rig, second)
    rig.abort(first, slots)
    wait_until_ready(rig, second)
    assert rig.cache.pop_prefetch_loaded_tokens(second.cache_request_handle) == len(tokens)
    rig.abort(second)


@pytest.mark.parametrize(
    ("policy", "timeout_s", "waits"),
    [
        (PrefetchPolicy.BEST_EFFORT, 0.0, [True]),
        (PrefetchPolicy.TIMEOUT, 0.0, [False, True]),
        (PrefetchPolicy.TIMEOUT, TIMEOUT_S, [False, False, False]),
        (PrefetchPolicy.WAIT_COMPLETE, 0.0, [False, False, False]),
    ],
)
def test_how_long_a_request_waits_for_others_is_the_policys_choice(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy, timeout_s: float, waits: list[bool]
) -> None:
    rig = make_rig(ssd_dir=tmp_path, prefetch_policy=policy)
    rig.linker.config = rig.linker.config.model_copy(update={"prefetch_timeout_s": timeout_s})
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert [may_run(rig, second) for _ in waits] == waits
    end_both(rig, first, slots, second)


def test_nobody_waits_for_others_for_ever(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    req = rig.request(tokens)
    rig.match(req)
    # Whenever its turn comes somebody has just read it again, and it is gone again.
    ended = rig.engine.create_get(keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace))
    rig.engine.cancel(ended)
    rig.engine.forget(ended)
    rig.cache.ranks.reads_may_run = True
    with (
        mock.patch.object(rig.cache.prefetches, "_read_to_join", return_value=Fetch([ended])),
        mock.patch.object(rig.engine, "start_prefetch", return_value=None),
    ):
        turns = [may_run(rig, req) for _ in range(20)]
    assert turns[0] is False
    assert turns[-1] is True
    rig.abort(req)
    rig.linker.states.check_empty()


def test_nobody_waits_for_what_is_computed_faster(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path, load_policy=LoadPolicy.AUTO)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    costs = rig.linker.load_or_recompute
    for i in range(1, 10):
        costs.prefill.observe([(0, 1000)], 1e-6)
        costs.from_tier[1].observe(i * 1.0, float(i))
    assert may_run(rig, second)
    end_both(rig, first, slots, second)


def test_a_flush_leaves_nothing_to_wait_for(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    keys = keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace)
    req = rig.request(tokens)
    with reads_do_not_end(rig):
        prefetch(rig, req)
        assert rig.engine.find_read(keys) is not None
        rig.abort(req)
        assert rig.engine.find_read(keys) is not None
        rig.engine.clear()
        assert rig.engine.find_read(keys) is None
