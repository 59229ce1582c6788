"""What becomes of a request whose load failed, between its two attempts."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.beam_search.beam_group import BeamGroup
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req, ReqKvInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.session.session_controller import Session

from sglang_flexkv.integration.compat.failed_loads import (
    FailedLoads,
    end_with_its_beams,
    keep_session,
    without_failed,
)


def make_request(rid: str = "a") -> Req:
    req = Req(rid, "", array("q", range(40)), SamplingParams(max_new_tokens=4))
    req.kv = ReqKvInfo(kv_allocated_len=0)
    # As SGLang leaves it when its load has failed.
    req.skip_radix_cache_insert = True
    req.discard_output_reason = FINISH_ABORT("External KV cache load failed", 503)
    req.cached_tokens = req.cached_tokens_host = 32
    req._cache_breakdown_computed = True
    req.storage_hit_length, req.storage_hit_start = 16, 16
    return req


def end(req: Req) -> None:
    """What SGLang does with the result of its forward."""
    req.to_finish = req.discard_output_reason
    req.update_finish_state(0)


class Scheduler:
    """As much of SGLang's as is looked at."""

    def __init__(self) -> None:
        self.waiting_queue: list[Any] = [make_request("queued")]
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch: Any = None
        self.result_queue: list[Any] = []
        self.chunked_req: Any = None
        self.streamed: list[Any] = []
        self.retired: list[Any] = []
        self.beam_coordinator = SimpleNamespace(_num_live_groups=0, retire_group=self.retired.append)
        self.output_streamer = SimpleNamespace(stream_output=self._stream)

    def _stream(self, reqs: list[Any], return_logprob: bool) -> None:
        self.streamed += without_failed(reqs)


@pytest.fixture
def failed() -> FailedLoads:
    return FailedLoads()


def test_a_request_goes_back_when_no_batch_holds_it(failed: FailedLoads) -> None:
    scheduler, req = Scheduler(), make_request()
    assert failed.take(req, skip_insert=False)
    assert without_failed([req, scheduler.waiting_queue[0]]) == scheduler.waiting_queue
    batch = SimpleNamespace(reqs=[req])
    # Its result has not been looked at; then one batch after the other still has it.
    failed.run_again(scheduler)
    assert req not in scheduler.waiting_queue
    end(req)
    for place in ("running_batch", "last_batch", "result_queue"):
        before = getattr(scheduler, place)
        setattr(scheduler, place, [(batch, None)] if place == "result_queue" else batch)
        failed.run_again(scheduler)
        assert req not in scheduler.waiting_queue
        assert len(failed) == 1
        setattr(scheduler, place, before)
    failed.run_again(scheduler)
    assert scheduler.waiting_queue[0] is req
    assert len(failed) == 0
    # As new, and its output is the client's again.
    assert not req.finished()
    assert req.discard_output_reason is None
    assert not req.skip_radix_cache_insert
    assert (req.cached_tokens, req.cached_tokens_host, req._cache_breakdown_computed) == (0, 0, False)
    assert (req.storage_hit_length, req.storage_hit_start) == (0, None)
    assert without_failed([req]) == [req]


def test_a_request_that_never_was_to_be_inserted_stays_so(failed: FailedLoads) -> None:
    scheduler, req = Scheduler(), make_request()
    failed.take(req, skip_insert=True)
    end(req)
    failed.run_again(scheduler)
    assert req.skip_radix_cache_insert


def test_one_that_was_retracted_before_keeps_what_it_reported(failed: FailedLoads) -> None:
    scheduler, req = Scheduler(), make_request()
    req.retracted_stain = True
    failed.take(req, skip_insert=False)
    end(req)
    failed.run_again(scheduler)
    assert req.retracted_stain
    assert req.cached_tokens == 32


def test_a_chunked_one_starts_no_further_chunk(failed: FailedLoads, monkeypatch: pytest.MonkeyPatch) -> None:
    released = []
    monkeypatch.setattr(
        "sglang.srt.mem_cache.common.release_kv_cache",
        lambda req, cache, checkpoint: released.append((req, cache, checkpoint)),
    )
    scheduler, req = Scheduler(), make_request()
    scheduler.tree_cache = "tree"
    scheduler.chunked_req = req
    req.inflight_middle_chunks = 1
    failed.take(req, skip_insert=False)
    failed.run_again(scheduler)
    assert scheduler.chunked_req is None
    assert req.finished()
    assert released == [(req, "tree", False)]
    assert req not in scheduler.waiting_queue  # the chunk that runs has not come back
    req.inflight_middle_chunks = 0
    failed.run_again(scheduler)
    assert scheduler.waiting_queue[0] is req


def test_images_are_kept_for_the_second_attempt(failed: FailedLoads) -> None:
    scheduler, req = Scheduler(), make_request()
    req.multimodal_inputs = images = SimpleNamespace()
    failed.take(req, skip_insert=False)
    assert req.multimodal_inputs is None
    end(req)
    failed.run_again(scheduler)
    assert req.multimodal_inputs is images


@pytest.mark.parametrize("rid", ["a", "", "another"])
@pytest.mark.parametrize("ended", [False, True])
def test_an_abort_between_the_attempts(failed: FailedLoads, rid: str, ended: bool) -> None:
    scheduler, req = Scheduler(), make_request()
    failed.take(req, skip_insert=False)
    if ended:
        end(req)
    failed.abort(scheduler, rid or "nobody", all_requests=not rid)
    if rid == "another":
        assert len(failed) == 1
        assert not scheduler.streamed
        return
    assert len(failed) == 0
    # One that has not ended yet is ended, and told, by SGLang.
    assert scheduler.streamed == ([req] if ended else [])
    assert without_failed([req]) == [req]
    failed.run_again(scheduler)
    assert req not in scheduler.waiting_queue


def test_what_sglang_has_let_go_of_stays_sglangs(failed: FailedLoads) -> None:
    req = make_request()
    req.session, req.multimodal_inputs = Session(100, "s"), SimpleNamespace()
    assert not failed.take(req, skip_insert=False)
    assert without_failed([req]) == [req]
    assert len(failed) == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_beams_end_as_at_an_abort_and_are_searched_anew(failed: FailedLoads, chunked: bool) -> None:
    scheduler, req = Scheduler(), make_request()
    old = req.beam_group = BeamGroup(beam_width=3, stop_token_ids=[7], max_new_tokens=9, num_return=2)
    old.leader, old.prompt_len = req, 40
    req.inflight_middle_chunks = int(chunked)
    reason = req.discard_output_reason
    end_with_its_beams(req)
    # A chunk has no beams yet, and SGLang ends it by its mark.
    assert (req.to_finish, req.discard_output_reason) == ((None, reason) if chunked else (reason, None))
    assert failed.take(req, skip_insert=True)
    req.output_ids.append(0)  # what SGLang counts steps with
    req.inflight_middle_chunks = 0
    req.finished_reason, req.to_finish = reason, None  # what the group does at its end
    failed.run_again(scheduler)
    assert scheduler.waiting_queue[0] is req
    new = req.beam_group
    assert new is not old
    assert (new.beam_width, new.max_new_tokens, new.num_return, new.prompt_len) == (3, 9, 2, 40)
    assert (new.leader, new.stop_token_ids.tolist()) == (req, [7])
    assert not req.output_ids
    assert scheduler.retired == [req]
    assert scheduler.beam_coordinator._num_live_groups == 1


@pytest.mark.parametrize("aborted", [None, "before its end", "after its end"])
def test_a_streaming_session_waits_for_its_request(failed: FailedLoads, aborted: str | None) -> None:
    scheduler, req = Scheduler(), make_request()
    req.session = Session(100, "s", streaming=True)
    req.session._inflight = True
    assert failed.take(req, skip_insert=False)
    if aborted == "before its end":
        failed.abort(scheduler, req.rid, all_requests=False)
    end(req)
    req.session.abort_req()  # SGLang's part of taking the row back
    keep_session(req)
    if aborted == "after its end":
        failed.abort(scheduler, req.rid, all_requests=False)
    # Only one that runs again has the session for itself.
    assert req.session._inflight == (aborted is None)
    failed.run_again(scheduler)
    assert (req in scheduler.waiting_queue) == (aborted is None)
