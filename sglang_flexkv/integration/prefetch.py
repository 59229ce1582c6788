"""Requests that wait in SGLang's queue while blocks come from lower tiers to the CPU tier.

Such a request waits for a read of its own, or joins one that somebody else has begun, or both. Who waits, and
for how long, is decided here, by all ranks together (``ranks``). What a request reads under its own forward
is in ``linker``: nobody waits for that in the queue.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import PrefetchPolicy
from sglang_flexkv.integration.compat.scheduler import SchedulerView
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.ranks import Ranks
from sglang_flexkv.integration.request_state import RequestState
from sglang_flexkv.kvtask import KVTask, TaskStatus

# Times that one request waits for reads from lower tiers. Two or three bring all of a prompt, each what the
# one before left; it takes more if blocks are evicted again meanwhile, which must not go on for ever.
_WAITS_MAX = 8


@dataclass
class Wait:
    """One request's wait for reads from lower tiers."""

    own: KVTask | None  # its own read; None: this rank has nothing to bring
    joined: KVTask | None  # somebody else's, which brings what comes next
    keys: BlockKeys  # of all that the request asked for
    deadline_s: float | None = None  # set when the request's turn comes

    @property
    def is_done(self) -> bool:
        return all(read is None or read.ended for read in (self.own, self.joined))

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s


class Prefetches:
    """The waits of one rank. Requests go by their names (``compat.requests``)."""

    def __init__(self, linker: FlexKVLinker, ranks: Ranks, scheduler: SchedulerView) -> None:
        self._linker = linker
        self._engine = linker.engine
        self._costs = linker.load_or_recompute
        self._ranks = ranks
        self._scheduler = scheduler
        self._page = linker.engine.config.tokens_per_block
        self.waits: dict[str, Wait] = {}  # by the requests that wait

    def enter(self, rid: str) -> None:
        """A request enters the queue, right after its prefix was looked up."""
        if not self._engine.has_lower_tiers:
            return
        scheduler = self._scheduler
        if scheduler.next_is_free and not scheduler.runs_something:
            return  # its turn comes at once, and its load reads under the forward
        state = self._linker.states.known(rid)
        num_lower_blocks = state.found.num_lower_blocks
        if scheduler.next_is_free and self._hides_its_reads(state):
            num_lower_blocks = 0
        # Whether to wait is decided by all ranks together; which blocks to bring, by each for itself.
        if self._ranks.any_would_wait(num_lower_blocks):
            self._start(rid)

    def may_run(self, rid: str) -> bool:
        """Whether a request whose turn has come may be scheduled. Same answer on every rank."""
        waited = self.waits.get(rid)
        if waited is not None:
            if not self._ranks.all_may_go_on(self._is_over(waited)):
                return False
            self._end(rid, waited)
        elif not self._ranks.reads_may_run:
            return True
        # One that has pushed others off the device must not let them pass: they would be pushed off again.
        return self._scheduler.preempts or not self._waits_again(rid, waited)

    def take_brought(self, rid: str) -> tuple[int, int]:
        """What the waits of a request have brought since this was asked last: the first token of its prompt
        that came from a lower tier, and how many tokens did."""
        state = self._linker.states.known(rid)
        num_blocks, state.num_brought = state.num_brought, 0
        return state.brought_from, num_blocks * self._page

    def leave(self, rid: str) -> None:
        """A request leaves the queue and will not run. Its own read goes on by itself: whoever comes next
        joins it, or hits."""
        waited = self.waits.get(rid)
        if waited is not None:
            self._end(rid, waited)

    def clear(self) -> None:
        self.waits.clear()

    # ---- one wait ----

    def _start(self, rid: str, joined: KVTask | None = None, before: Wait | None = None) -> None:
        """Starts to bring what the last lookup decided to load from lower tiers.

        Args:
            joined: a read of somebody else that the request waits for as well.
            before: the wait that this one continues: both together may take as long as one.
        """
        state = self._linker.states.of(rid)
        found = state.found
        own = self._engine.start_prefetch(found.keys[: found.num_to_load])
        if own is not None:
            self._linker.states.end_lease(rid)  # the plan has leases of its own
        state.num_waits += 1
        if not state.num_brought:
            state.brought_from = state.device_tokens + found.num_cpu_blocks * self._page
        self.waits[rid] = Wait(own, joined, found.keys, before.deadline_s if before is not None else None)

    def _is_over(self, wait: Wait) -> bool:
        """Whether a request stops waiting: all is there, or it has let others pass for long enough."""
        self._engine.poll()
        if wait.deadline_s is None:
            wait.deadline_s = (
                time.monotonic()
                + {
                    PrefetchPolicy.BEST_EFFORT: 0.0,
                    PrefetchPolicy.TIMEOUT: self._linker.config.prefetch_timeout_s,
                    PrefetchPolicy.WAIT_COMPLETE: math.inf,
                }[self._linker.config.prefetch_policy]
            )
        return wait.is_done or wait.is_late

    def _end(self, rid: str, wait: Wait) -> None:
        """Keeps what has arrived pinned for the request."""
        del self.waits[rid]
        if wait.own is not None:
            if wait.own.status is TaskStatus.COMPLETED and wait.own.plan is not None:
                self._linker.states.of(rid).num_brought += wait.own.plan.num_lower_blocks
            self._engine.forget(wait.own)
        self._linker.find_and_pin(rid, wait.keys)

    # ---- whether to wait ----

    def _waits_again(self, rid: str, before: Wait | None) -> bool:
        """Whether a request whose turn has come waits (again) for a read: for one that somebody else
        has begun, since it could only compute what that brings; and after such a one for its own of what is
        left. If so the wait has begun."""
        state = self._linker.states.known(rid)
        joined, left = None, False
        if self._may_wait(state, before):
            joined = self._read_to_join(state)
            after_another = before is not None and before.joined is not None
            left = after_another and self._would_hold_up_others(state)
        waits = self._ranks.any_waits_again(joined is not None or left, self._engine.num_reads)
        if waits:
            self._start(rid, joined, before)
        return waits

    def _may_wait(self, state: RequestState, before: Wait | None) -> bool:
        return (
            self._linker.config.prefetch_policy is not PrefetchPolicy.BEST_EFFORT
            and not state.gave_up
            and state.num_waits < _WAITS_MAX
            and not (before is not None and before.is_late)
        )

    def _read_to_join(self, state: RequestState) -> KVTask | None:
        """Somebody else's read that brings what the request should load next, if waiting for it beats
        computing. Until it has ended no lookup finds these blocks."""
        found = state.found
        if not self._engine.num_reads:
            return None
        # What it found below (the read may have begun later), and where it ended.
        for first in sorted({found.num_cpu_blocks, len(found.held)} - {len(found.keys)}):
            read = self._engine.find_read(found.keys[first])
            if read is not None:
                return read if self._is_worth_waiting(state, first, read) else None
        return None

    def _is_worth_waiting(self, state: RequestState, first: int, read: KVTask) -> bool:
        """Whether to wait for a read that brings the block ``first`` of a prompt, and more behind it."""
        reached = self._engine.match(state.found.keys).num_blocks  # with what is being read
        num_bytes = self._engine.queued_read_bytes()
        if read.status is TaskStatus.READY and read.plan is not None:
            num_bytes += self._engine.bytes_by_tier(read.plan.tiers)
        return self._costs.is_worth_waiting(
            num_bytes,
            state.device_tokens + first * self._page,
            state.device_tokens + reached * self._page,
            state.total_tokens,
        )

    def _would_hold_up_others(self, state: RequestState) -> bool:
        """Whether a request would read in its forward while others have to wait for that."""
        return (
            state.found.num_lower_blocks > 0
            and self._scheduler.runs_something
            and not self._hides_its_reads(state)
        )

    def _hides_its_reads(self, state: RequestState) -> bool:
        """Whether what the last lookup decided to load from lower tiers is read while the request's first
        chunk is computed. If not, a forward would wait for a disk, and with it all that run beside the
        request."""
        costs, found = self._costs, state.found
        num_bytes = self._engine.queued_read_bytes() + self._engine.bytes_by_tier(found.to_load)
        reads_s = costs.seconds_of_loads(num_bytes)
        if reads_s is None or not costs.prefill.known:
            return False
        total, chunk = state.total_tokens, self._scheduler.chunk_tokens
        start = min(total, state.device_tokens + found.num_to_load * self._page)
        end = min(total, start + chunk) if chunk else total
        return reads_s <= costs.prefill.seconds(start, end)
