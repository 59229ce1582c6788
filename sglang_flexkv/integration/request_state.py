"""What is known of each request, from its first lookup until it ends: one record each."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.lower_tier import CPU, TierNumbers

# A lease nobody came back for, say of a request that found its prefix on the device after all.
_LEASE_AGE_MAX_S = 60.0


@dataclass(frozen=True)
class Lookup:
    """What the last lookup of a request was about, and what was decided."""

    keys: BlockKeys  # of everything it asked for
    held: TierNumbers  # of each leading block that is held the tier that it would come from
    num_to_load: int  # of these
    asked_tiers: frozenset[int] = frozenset()  # from which no forward loads: FlexKVLinker.read_before
    # How many of the leading blocks a forward can load as they are, growing; None: any number of those before
    # the first that is in one of the asked tiers.
    ready: npt.NDArray[np.int64] | None = None
    num_held: int = 0  # leading blocks that the first group holds, whatever the others do

    @property
    def num_cpu_blocks(self) -> int:
        """Leading blocks to load that the CPU tier holds."""
        lower = np.flatnonzero(self.to_load != CPU)
        return int(lower[0]) if len(lower) else self.num_to_load

    @property
    def num_lower_blocks(self) -> int:
        """Blocks to load that come from below the CPU tier."""
        return int(np.count_nonzero(self.to_load != CPU))

    @property
    def num_for_forward(self) -> int:
        """Leading blocks to load that a forward may load as they are."""
        if self.ready is not None:
            ready = self.ready[self.ready <= self.num_to_load]
            return int(ready[-1]) if len(ready) else 0
        return self.num_to_load if not self.asked_tiers else self._first_asked()

    @property
    def num_asked_blocks(self) -> int:
        """Blocks to load that have to come to the CPU tier first."""
        return int(np.isin(self.to_load, list(self.asked_tiers)).sum()) if self.asked_tiers else 0

    def _first_asked(self) -> int:
        asked = np.flatnonzero(np.isin(self.to_load, list(self.asked_tiers)))
        return int(asked[0]) if len(asked) else self.num_to_load

    @property
    def to_load(self) -> TierNumbers:
        """Of each block to load the tier that it would come from."""
        return self.held[: self.num_to_load]


NOTHING_FOUND = Lookup(np.empty((0, 2), np.uint64), np.empty(0, np.uint8), 0)


@dataclass
class Lease:
    """Blocks that stay pinned for a request until it has loaded them or lets go of them."""

    number: int  # by which the engine knows it
    num_cpu_blocks: int
    since_s: float


@dataclass
class RequestState:
    """One request's record."""

    device_tokens: int = 0  # of its prompt, at the last lookup
    total_tokens: int = 0
    found: Lookup = NOTHING_FOUND
    num_waits: int = 0  # times that it has waited for loads from lower tiers
    # Blocks that these have brought, by tier; how many of them SGLang has not been told of, and the token
    # where these start.
    brought: Counter[int] = field(default_factory=Counter)
    num_untold: int = 0
    brought_from: int = 0
    gave_up: bool = False  # a load of it failed: it loads nothing any more


class RequestStates:
    """The records of all requests that have not ended, by name, and the leases they have.

    Leases together pin a bounded part of the CPU tier. Beyond that the oldest one goes, and its request looks
    again when its turn comes.

    Args:
        unpin: gives a lease back, by its number.
        pinned_blocks_max: blocks of the CPU tier that leases may pin; one lease may always.
    """

    def __init__(self, unpin: Callable[[int], None], pinned_blocks_max: float) -> None:
        self._unpin = unpin
        self._pinned_blocks_max = pinned_blocks_max
        self._pinned_blocks = 0
        self._states: dict[str, RequestState] = {}
        self._leased: OrderedDict[str, Lease] = OrderedDict()  # oldest first

    def of(self, rid: str) -> RequestState:
        """A request's record; made when it is asked for first."""
        return self._states.setdefault(rid, RequestState())

    def known(self, rid: str) -> RequestState:
        """A request's record; an empty one that is not kept if nothing is known."""
        return self._states.get(rid) or RequestState()

    def add_lease(self, rid: str, number: int, num_cpu_blocks: int) -> None:
        """In place of the one that the request has."""
        self.end_lease(rid)
        self._leased[rid] = Lease(number, num_cpu_blocks, time.monotonic())
        self._pinned_blocks += num_cpu_blocks
        while self._pinned_blocks > self._pinned_blocks_max and len(self._leased) > 1:
            self.end_lease(next(iter(self._leased)))

    def end_lease(self, rid: str) -> None:
        """Nothing happens if there is none."""
        lease = self._leased.pop(rid, None)
        if lease is not None:
            self._pinned_blocks -= lease.num_cpu_blocks
            self._unpin(lease.number)

    def end_old_leases(self) -> None:
        while self._leased:
            rid, lease = next(iter(self._leased.items()))
            if time.monotonic() - lease.since_s <= _LEASE_AGE_MAX_S:
                break
            self.end_lease(rid)

    def end_leases(self) -> None:
        for rid in list(self._leased):
            self.end_lease(rid)

    def forget(self, rid: str) -> RequestState:
        """A request has ended. Returns what was known of it."""
        self.end_lease(rid)
        return self._states.pop(rid, RequestState())

    def clear(self) -> None:
        self.end_leases()
        self._states.clear()

    def check_empty(self) -> None:
        """Raises AssertionError if a request has ended and is not forgotten."""
        assert not self._leased, f"leases left: {list(self._leased)}"
        assert not self._states, f"records left of requests that have ended: {list(self._states)}"
