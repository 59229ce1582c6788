"""Requests that wait in SGLang's queue while blocks come from lower tiers to the CPU tier.

Such a request waits for a read of its own, or joins one that somebody else has begun, or both. Who waits, and
for how long, is decided here, by all ranks together (``ranks``). What a request reads under its own forward
is in ``linker``: nobody waits for that in the queue.

Of a tier that is asked (a store that other servers write as well) it is not known what it has: what is
missing at the end of a prompt is asked for when the request comes, and what is found is brought as soon as
the answer is there. The wait is for both.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from sglang_flexkv.cache.load_or_recompute import Prompt
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import PrefetchPolicy
from sglang_flexkv.common.lower_tier import TierNumbers
from sglang_flexkv.integration.compat.scheduler import SchedulerView
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.ranks import Ranks
from sglang_flexkv.integration.request_state import RequestState
from sglang_flexkv.kvtask import Fetch, Inquiry, TaskStatus

# Times that one request waits for reads from lower tiers. Two or three bring all of a prompt, each what the
# one before left; it takes more if blocks are evicted again meanwhile, which must not go on for ever.
_WAITS_MAX = 8
# Reads of its own in one wait, where a prompt can only be taken up at some places: what was to bring the last
# one may have failed, and a place before it may do.
_READS_MAX = 4


@dataclass
class Wait:
    """One request's wait for reads from lower tiers."""

    reads: list[Fetch]  # its own; none: this rank has nothing to bring
    joined: Fetch | None  # somebody else's, which brings what comes next
    keys: BlockKeys  # of all that the request asked for
    deadline_s: float | None = None  # set when the request's turn comes
    inquiry: Inquiry | None = None  # to the tier that is asked, about what follows
    before_asked: TierNumbers = field(
        default_factory=lambda: np.zeros(0, np.uint8)
    )  # where what is before is
    num_ended: int = 0  # tasks of `reads`, as far as somebody has looked

    @property
    def is_done(self) -> bool:
        return self.inquiry is None and self.reads_nothing

    @property
    def reads_nothing(self) -> bool:
        return all(read is None or read.ended for read in (self.joined, *self.reads))

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
        self._asks = bool(self._engine.asked_tiers)
        self.waits: dict[str, Wait] = {}  # by the requests that wait

    def enter(self, rid: str) -> None:
        """A request enters the queue, right after its prefix was looked up."""
        if not self._linker.has_lower_tiers:
            return
        scheduler = self._scheduler
        its_turn = scheduler.next_is_free and not scheduler.runs_something
        if its_turn and not self._linker.read_before:
            return  # its load reads under the forward
        state = self._linker.states.known(rid)
        num_blocks = state.found.num_lower_blocks
        if its_turn or (scheduler.next_is_free and self._hides_its_reads(state)):
            num_blocks = state.found.num_asked_blocks
        num_blocks += self._num_to_ask(state)
        # Whether to wait is decided by all ranks together; which blocks to bring, by each for itself.
        if self._ranks.any_would_wait(num_blocks):
            self._start(rid)

    def tick(self) -> None:
        """Called at each step of the scheduler: answers are taken in, and what has come is kept, whoever's
        turn it is."""
        if not self._engine.reads_in_pieces:
            return
        for rid, wait in self.waits.items():
            self._go_on(rid, wait)

    def may_run(self, rid: str) -> bool:
        """Whether a request whose turn has come may be scheduled. Same answer on every rank."""
        waited = self.waits.get(rid)
        if waited is not None:
            if not self._ranks.all_may_go_on(self._is_over(rid, waited)):
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
        num_blocks, state.num_untold = state.num_untold, 0
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

    def _start(self, rid: str, joined: Fetch | None = None, before: Wait | None = None) -> None:
        """Starts to bring what the last lookup decided to load from lower tiers, and asks for what follows.

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
        if not state.num_untold:
            state.brought_from = state.device_tokens + found.num_cpu_blocks * self._page
        deadline_s = before.deadline_s if before is not None else None
        wait = Wait([own] if own is not None else [], joined, found.keys, deadline_s)
        if self._num_to_ask(state):
            wait.before_asked = found.held
            wait.inquiry = self._engine.ask(found.keys, len(found.held))
        self.waits[rid] = wait
        self._go_on(rid, wait)

    def _go_on(self, rid: str, wait: Wait) -> None:
        """Takes in what has come of a wait."""
        inquiry = wait.inquiry
        # With windows or states it depends on what has come which place is the last one to go on from.
        if inquiry is not None and inquiry.is_over and (wait.reads_nothing or not self._linker.has_parts):
            wait.inquiry = None
            if inquiry.found_something:
                self._bring_answer(rid, wait, inquiry)
        num_ended = sum(read.num_ended for read in wait.reads) if self._engine.reads_in_pieces else 0
        if num_ended > wait.num_ended:  # what has come is kept, whatever becomes of the rest
            wait.num_ended = num_ended
            self._linker.find_and_pin(rid, wait.keys)
            if self._linker.has_parts and wait.is_done and not wait.is_late:
                self._bring_known(rid, wait)

    def _bring_known(self, rid: str, wait: Wait) -> None:
        """Starts to bring what the last lookup decided to load from a tier that is asked."""
        found = self._linker.states.of(rid).found
        if len(wait.reads) < _READS_MAX and found.num_asked_blocks:
            read = self._engine.start_prefetch(found.keys[: found.num_to_load])
            if read is not None:
                self._linker.states.end_lease(rid)  # the plans have leases of their own
                wait.reads.append(read)

    def _bring_answer(self, rid: str, wait: Wait, inquiry: Inquiry) -> None:
        """Starts to bring what the tier that was asked has, as far as that is worth it."""
        state, first = self._linker.states.of(rid), len(wait.before_asked)
        num_found = self._engine.learn(inquiry)
        if self._linker.has_parts:
            self._linker.find_and_pin(rid, wait.keys)
            return self._bring_known(rid, wait)
        (tier,) = self._engine.asked_tiers
        tiers = np.concatenate([wait.before_asked, np.full(num_found, tier, np.uint8)])
        queued_bytes = self._engine.queued_read_bytes()
        num_to_load = self._costs.blocks_to_load(
            Prompt(tiers, state.device_tokens, state.total_tokens, queued_bytes)
        )
        read = self._engine.start_prefetch(wait.keys[first:num_to_load])
        if read is not None:
            wait.reads.append(read)

    def _is_over(self, rid: str, wait: Wait) -> bool:
        """Whether a request stops waiting: all is there, or it has let others pass for long enough."""
        self._engine.poll()
        self._go_on(rid, wait)
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
        for read in wait.reads:
            state, brought = self._linker.states.of(rid), read.brought
            state.brought += brought
            state.num_untold += brought.total()
            self._engine.forget_fetch(read)
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
            left = after_another and (self._would_hold_up_others(state) or self._num_to_ask(state) > 0)
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

    def _read_to_join(self, state: RequestState) -> Fetch | None:
        """Somebody else's read that brings what the request should load next, if waiting for it beats
        computing. Until it has ended no lookup finds these blocks."""
        found = state.found
        if not self._engine.num_reads:
            return None
        # What it found below (the read may have begun later), and where it ended; and where the first group
        # did, of which more may be held than can be gone on from.
        for first in sorted({found.num_cpu_blocks, len(found.held), found.num_held} - {len(found.keys)}):
            read = self._engine.find_read(found.keys[first:])
            if read is not None:
                return read if self._is_worth_waiting(state, first, read) else None
        return None

    def _is_worth_waiting(self, state: RequestState, first: int, read: Fetch) -> bool:
        """Whether to wait for a read that brings the block ``first`` of a prompt, and more behind it."""
        reached = len(self._engine.match(state.found.keys).tiers)  # with what is being read
        num_bytes = self._engine.queued_read_bytes()
        for task in read.tasks:
            if task.status is TaskStatus.READY and task.plan is not None:
                num_bytes += self._costs.bytes_by_tier(task.plan.tiers)
        return self._costs.is_worth_waiting(
            num_bytes,
            state.device_tokens + first * self._page,
            state.device_tokens + reached * self._page,
            state.total_tokens,
        )

    def _num_to_ask(self, state: RequestState) -> int:
        """Blocks behind those that are held that are worth asking for: to have them brought would take less
        time than to compute them, as far as is known."""
        found = state.found
        missing = len(found.keys) - len(found.held)
        if not self._asks or state.gave_up or not missing or found.num_to_load < len(found.held):
            return 0
        if not self._engine.can_ask:
            return 0
        first = len(found.held)
        if self._engine.find_read(found.keys[first:]) is not None:  # somebody brings it
            return 0
        (tier,) = self._engine.asked_tiers
        num_bytes = self._engine.queued_read_bytes()
        num_bytes += self._costs.bytes_by_tier(np.full(missing, tier, np.uint8))
        start = state.device_tokens + first * self._page
        worth = self._costs.is_worth_waiting(
            num_bytes, start, start + missing * self._page, state.total_tokens
        )
        return missing if worth else 0

    def _would_hold_up_others(self, state: RequestState) -> bool:
        """Whether a request should not read in its forward, as others would have to wait for that."""
        if state.found.num_asked_blocks:
            return True  # in no forward at all
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
        num_bytes = self._engine.queued_read_bytes() + self._costs.bytes_by_tier(found.to_load)
        reads_s = costs.seconds_of_loads(num_bytes)
        if reads_s is None or not costs.prefill.known:
            return False
        total, chunk = state.total_tokens, self._scheduler.chunk_tokens
        start = min(total, state.device_tokens + found.num_to_load * self._page)
        end = min(total, start + chunk) if chunk else total
        return reads_s <= costs.prefill.seconds(start, end)
