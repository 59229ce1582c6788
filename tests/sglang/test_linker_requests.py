"""Requests that do not go the whole way, and requests with the same id."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kit import TIMEOUT_S, assert_same
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    check_landed,
    check_runs_again,
    prefetch,
    sequence,
    store_on_ssd_alone,
    wait_until_ready,
)
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_flexkv.integration.compat.requests import name_of

# ---- requests that do not go the whole way ----


def test_matching_again_and_again_pins_once(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    for _ in range(3):
        assert rig.match(req).host_hit_length == PAGES * PAGE
        assert rig.stats("CPU")["pinned"] == PAGES
    rig.abort(req)


def test_an_abort_between_match_and_load_unpins(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    rig.match(req)
    assert rig.stats("CPU")["pinned"] == PAGES
    rig.abort(req)
    assert rig.stats("CPU")["pinned"] == 0
    assert rig.stats("CPU")["ready"] == PAGES


def test_a_match_that_the_device_answers_ends_the_lease(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    rig.insert(tokens, seed=2)  # somebody else computed it while this request waited
    match = rig.match(req)
    assert (match.device_prefix_len, match.host_hit_length) == (PAGES * PAGE, 0)
    assert rig.stats("CPU")["pinned"] == 0
    assert not rig.cache.linker.has_hit(name_of(req))
    rig.settle()
    rig.abort(req)


@pytest.mark.parametrize("end", ["released", "kept by a session"])
def test_a_request_that_has_ended_leaves_no_notes(
    make_rig: MakeRig, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found or not found: a server that runs for months sees many of them, and ids may come again."""
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    for req in (rig.request(tokens), rig.request(sequence(7000))):
        rig.match(req)
        assert rig.linker.states.known(name_of(req)).total_tokens
        with pytest.raises(AssertionError, match="left"):
            rig.linker.check_idle()
        if end == "released":
            rig.cache.on_release(req, checkpointed=True)
        else:
            monkeypatch.setattr(UnifiedRadixCache, "claim_kv_row", lambda cache, req: True)
            assert rig.cache.claim_kv_row(req)
        rig.linker.check_idle()


def test_a_cancelled_load_writes_nothing_and_gives_everything_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    slots = rig.admit(req)
    assert len(slots) == PAGES * PAGE
    untouched = rig.read(slots)
    rig.abort(req, slots)
    assert rig.start_batch() == -1
    assert rig.engine.drain(TIMEOUT_S)
    assert_same(rig.read(slots), untouched)
    assert rig.stats("CPU")["pinned"] == 0


def test_one_cancelled_load_does_not_stop_the_others_of_its_batch(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = sequence(1), sequence(5000)
    rig.insert(first, seed=1)
    expected = rig.insert(second, seed=2)
    rig.evict_all()
    aborted, kept = rig.request(first), rig.request(second)
    aborted_slots, kept_slots = rig.admit(aborted), rig.admit(kept)
    untouched = rig.read(aborted_slots)
    rig.abort(aborted, aborted_slots)
    rig.start_batch()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads([kept])
    assert_same(rig.read(kept_slots), expected)
    assert_same(rig.read(aborted_slots), untouched)
    rig.finish(kept, kept_slots)


# ---- two requests with the same id: each of several tokenizer workers knows its own only ----


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_requests_of_one_id_load_side_by_side(make_rig: MakeRig, failing: int | None) -> None:
    rig = make_rig()
    prompts = [sequence(1), sequence(5000, PAGES - 1)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    matches = [rig.match(req) for req in reqs]
    all_slots = [rig.admit(req, match) for req, match in zip(reqs, matches, strict=True)]
    assert [len(slots) for slots in all_slots] == [len(tokens) for tokens in prompts]
    assert [req.rid for req in reqs] == ["same", "same"]  # what the client knows them by
    rig.start_batch()
    rig.forward()

    def with_another_rank(verdicts: torch.Tensor, op: Any) -> None:
        assert verdicts.tolist() == [1, 1]
        if failing is not None:
            verdicts[failing] = 0

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", with_another_rank):
        assert rig.cache.finish_external_linker_loads(reqs) == []
    if failing is not None:
        check_runs_again(rig, reqs[failing])
    for number, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if number == failing:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[number])


@pytest.mark.parametrize("aborted", [0, 1])
@pytest.mark.parametrize("when", ["pinned", "queued"])
def test_the_end_of_one_request_is_not_that_of_another_with_its_id(
    make_rig: MakeRig, aborted: int, when: str
) -> None:
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    matches = [rig.match(req) for req in reqs]
    stays = 1 - aborted
    if when == "queued":
        all_slots = [rig.admit(req, match) for req, match in zip(reqs, matches, strict=True)]
        rig.abort(reqs[aborted], all_slots[aborted])
        slots = all_slots[stays]
    else:
        rig.cache.finish(reqs[aborted].cache_request_handle, CacheRequestOutcome.ABORT)
        slots = rig.admit(reqs[stays], matches[stays])
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([reqs[stays]]) == []
    check_landed(rig, reqs[stays], slots, expected[stays])


def test_an_id_may_look_like_the_name_of_another_request(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    match = rig.match(req)
    refused = rig.request(tokens, rid=name_of(req))  # before it was matched, by a limit of the queue
    rig.cache.finish(refused.cache_request_handle, CacheRequestOutcome.ABORT)
    slots = rig.admit(req, match)
    assert len(slots) == len(tokens)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == []
    check_landed(rig, req, slots, expected)


def test_requests_of_one_id_wait_for_ssd_each_for_itself(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    prompts = [sequence(1), sequence(5000)]
    for tokens in prompts:
        store_on_ssd_alone(rig, tokens)
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    for req in reqs:
        prefetch(rig, req)
    assert len(rig.cache.prefetches.waits) == 2
    rig.abort(reqs[0])
    assert len(rig.cache.prefetches.waits) == 1
    wait_until_ready(rig, reqs[1])
    (slots,) = rig.restore(reqs[1])
    assert len(slots) == len(prompts[1])
    rig.finish(reqs[1], slots)


def test_an_id_that_comes_again_starts_anew(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    for tokens, bytes_ in zip(prompts * 2, expected * 2, strict=True):
        req = rig.request(tokens, rid="same")
        (slots,) = rig.restore(req)
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)
        rig.evict_all()


# ---- what it costs the scheduler ----


def test_pages_are_hashed_once_however_often_a_request_is_matched(make_rig: MakeRig) -> None:
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1, pages=PAGES + 3))
    hashed = mock.Mock(wraps=get_storage_hash_str)
    with mock.patch("sglang_flexkv.integration.compat.tree.get_storage_hash_str", hashed):
        for _ in range(3):
            assert rig.match(req).host_hit_length == PAGES * PAGE
        slots = rig.admit(req)
    assert hashed.call_count == 1
    rig.start_batch()
    rig.forward()
    assert_same(rig.read(slots), expected)
    assert not rig.cache.finish_external_linker_loads([req])
    rig.finish(req, slots)
