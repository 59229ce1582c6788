"""What our cache asks of SGLang's scheduler."""

from __future__ import annotations

from typing import Any


class SchedulerView:
    """The state of SGLang's scheduler. It is the same on every rank, and so is every answer here."""

    def __init__(self) -> None:
        self._scheduler: Any = None

    def attach(self, scheduler: Any) -> None:
        """The scheduler is complete. No request comes before that."""
        self._scheduler = scheduler

    @property
    def next_is_free(self) -> bool:
        """Whether a request that enters the queue now is the next to be scheduled."""
        scheduler = self._scheduler
        return scheduler is not None and not scheduler.waiting_queue and scheduler.chunked_req is None

    @property
    def runs_something(self) -> bool:
        """Whether a forward is in progress or follows that is not the next request's."""
        scheduler = self._scheduler
        if scheduler is None or scheduler.chunked_req is not None or not scheduler.running_batch.is_empty():
            return True
        last = scheduler.last_batch
        if last is None:
            return False
        # A rank without requests of its own runs an idle batch when others compute (DP attention). Requests
        # that have just been prefilled join the running batch after the next one has been chosen.
        return last.forward_mode.is_idle() or any(not req.finished() for req in last.reqs)

    @property
    def is_paused(self) -> bool:
        """Whether no batches are planned. SGLang may flush then while requests wait in its queue."""
        return self._scheduler is not None and self._scheduler._engine_paused

    @property
    def preempts(self) -> bool:
        """Whether urgent requests push others off the device."""
        return self._scheduler is not None and self._scheduler.enable_priority_preemption

    @property
    def mixes_prefills_and_decodes(self) -> bool:
        return self._scheduler is not None and self._scheduler.is_mixed_chunk

    @property
    def chunk_tokens(self) -> int | None:
        """The most tokens of a prompt that one forward computes; None: all of it."""
        return None if self._scheduler is None else self._scheduler.chunked_prefill_size

    @property
    def forward_stream(self) -> Any | None:
        """Where forwards run. With overlap (``event_loop_overlap``) they have a stream of their own. Without,
        None: they run on the stream on which batches are scheduled, which is the current one at any call of
        our cache."""
        scheduler = self._scheduler
        return scheduler.forward_stream if scheduler is not None and scheduler.enable_overlap else None

    def run_again(self, failed_loads: Any) -> None:
        """Puts requests back whose load failed, see ``FailedLoads.run_again``."""
        if self._scheduler is not None:
            failed_loads.run_again(self._scheduler)
