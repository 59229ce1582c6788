"""Requests whose load failed after they were admitted: they run again and compute what they could not load.

SGLang drops the output of such a request, gives its memory back and ends it with an error. We let it do all
of that but the last: the error is kept from the client, and when no batch holds the request any more it is
put back as if it had been retracted. Every rank does so in the same step, because the verdict on a load is
reduced over the ranks and what follows depends on the scheduler's state alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_flexkv.integration.compat.requests import report_sources

logger = logging.getLogger(__name__)

# Set on a request while its end is not the client's business.
_MARK = "_flexkv_runs_again"


def without_failed(reqs: Sequence[Any]) -> list[Any]:
    """The requests whose output may be sent."""
    return [req for req in reqs if not runs_again(req)]


def runs_again(req: Any) -> bool:
    """Whether a request that gives its memory back will want some again."""
    return hasattr(req, _MARK)


def keep_session(req: Any) -> None:
    """Called when SGLang takes a request's row back: if it runs again, its streaming session still waits for
    it, and takes no other request meanwhile."""
    if runs_again(req) and _is_streaming(req):
        req.session._inflight = True


def _is_streaming(req: Any) -> bool:
    return req.session is not None and req.session.streaming


def _can_run_again(req: Any) -> bool:
    # SGLang lets go of the images that a session's request has brought; and one that another server is to
    # decode has been given up there, too.
    has_peer = getattr(req, "disagg_kv_sender", None) is not None
    return not has_peer and (req.session is None or req.multimodal_inputs is None)


def end_with_its_beams(req: Any) -> None:
    """Called when SGLang has marked a request as failed: one that searches with beams ends as at a client's
    abort, which gives back what its other beams have. SGLang ends a failed one without that."""
    if req.beam_group is not None and req.inflight_middle_chunks <= 0:  # a chunk comes before all beams
        req.to_finish, req.discard_output_reason = req.discard_output_reason, None


@dataclass
class _Failed:
    req: Any
    skip_insert: bool
    retracted_before: bool
    multimodal_inputs: Any


class FailedLoads:
    """Those of one scheduler."""

    def __init__(self) -> None:
        self._failed: list[_Failed] = []

    def __len__(self) -> int:
        return len(self._failed)

    def take(self, req: Any, skip_insert: bool) -> bool:
        """A request that SGLang has marked as failed.

        Args:
            skip_insert: its ``skip_radix_cache_insert`` before that.

        Returns:
            False if it cannot run again and SGLang must end it.
        """
        if not _can_run_again(req):
            return False
        setattr(req, _MARK, True)
        self._failed.append(_Failed(req, skip_insert, req.retracted_stain, req.multimodal_inputs))
        req.multimodal_inputs = None  # SGLang clears those of a request that ends
        return True

    def run_again(self, scheduler: Any) -> None:
        """At the beginning of a step: puts back what no batch holds any more."""
        if not self._failed:
            return
        held = _requests_in_batches(scheduler)
        left = []
        for failed in self._failed:
            req = failed.req
            if req is scheduler.chunked_req:
                _end_chunked(scheduler, req)
            if id(req) in held or not req.finished() or req.inflight_middle_chunks > 0 or req.kv.holds_kv:
                left.append(failed)
                continue
            _reset(failed)
            if req.beam_group is not None:
                _search_anew(scheduler, req)
            scheduler.waiting_queue.insert(0, req)
            req.time_stats.set_wait_queue_entry_time()
            logger.warning("request %s runs again: its cached KV could not be loaded", req.rid)
        self._failed = left

    def abort(self, scheduler: Any, rid: str, *, all_requests: bool) -> None:
        """A client, or somebody for all, gives a request up: it ends with the error it has."""
        left = []
        for failed in self._failed:
            if not all_requests and not failed.req.rid.startswith(rid):
                left.append(failed)
                continue
            req = failed.req
            delattr(req, _MARK)
            req.multimodal_inputs = failed.multimodal_inputs
            req.release_mm_inputs_on_abort()
            if req.finished():  # its end has been kept back, nobody else sends it
                if _is_streaming(req):
                    req.session.abort_req()
                scheduler.output_streamer.stream_output([req], req.return_logprob)
        self._failed = left


def _requests_in_batches(scheduler: Any) -> set[int]:
    batches = [scheduler.running_batch, scheduler.last_batch]
    batches += [batch for batch, _ in getattr(scheduler, "result_queue", ())]
    return {id(req) for batch in batches if batch is not None for req in batch.reqs}


def _end_chunked(scheduler: Any, req: Any) -> None:
    """As SGLang does for a client's abort: no further chunk is started, and the result of the one that runs
    is dropped when it comes."""
    from sglang.srt.mem_cache.common import release_kv_cache

    req.finished_reason = req.discard_output_reason
    release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
    scheduler.chunked_req = None


def _reset(failed: _Failed) -> None:
    req = failed.req
    delattr(req, _MARK)
    req.finished_reason = req.to_finish = req.discard_output_reason = None
    req.skip_radix_cache_insert = failed.skip_insert
    req.multimodal_inputs = failed.multimodal_inputs
    req.reset_for_retract()
    req.retracted_stain = failed.retracted_before
    if not failed.retracted_before:
        # What it says about cached tokens is to be about the attempt that counts.
        req.cached_tokens = req.cached_tokens_device = req.cached_tokens_host = req.cached_tokens_storage = 0
        req._cache_breakdown_computed = False
    req.storage_hit_length = 0
    req.storage_hit_start = None
    report_sources(req, {})


def _search_anew(scheduler: Any, req: Any) -> None:
    """Gives a request new beams for those that it has given up, as SGLang does for one that has come."""
    from sglang.srt.beam_search.beam_group import BeamGroup

    coordinator, old = scheduler.beam_coordinator, req.beam_group
    coordinator.retire_group(req)
    req.beam_group = BeamGroup(
        beam_width=old.beam_width,
        length_penalty=old.length_penalty,
        stop_token_ids=old.stop_token_ids.tolist(),
        max_new_tokens=old.max_new_tokens,
        num_return=old.num_return,
        device=old.stop_token_ids.device,
    )
    req.beam_group.leader, req.beam_group.prompt_len = req, old.prompt_len
    coordinator._num_live_groups += 1
    req.output_ids = req.output_ids[:0]  # placeholders
