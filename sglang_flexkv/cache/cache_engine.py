"""The control plane: what is where, what may go, and which copies a request needs. Moves no byte.

A plan keeps leases on what it reads, and the slots that were reserved for what it writes, until ``finish`` is
called with the outcome of its graph, whatever that is.

Tiers below the CPU tier are a list: each is named by its number and known by its contract alone. Everything
goes through the CPU tier, in both directions. ``CacheEngine`` decides for one KV group, ``GlobalCacheEngine``
for what a request needs of all of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.cache.spill_queue import SpillQueue, WaitingBlocks
from sglang_flexkv.common.block import BlockKeys, SequenceMeta, TokenIds
from sglang_flexkv.common.config import Admission, CacheConfig, EvictionPolicy
from sglang_flexkv.common.kv_group import KVGroup, boundaries
from sglang_flexkv.common.lower_tier import CPU, LowerTier, TierNumbers
from sglang_flexkv.common.seldom import Seldom
from sglang_flexkv.common.transfer import Slots, TransferOp, TransferOpGraph, TransferType

logger = logging.getLogger(__name__)

# Blocks that one plan stores in a lower tier, where nobody says how large they are.
_SPILL_BLOCKS_MAX = 256

_POLICIES = {policy: getattr(_core.EvictionPolicy, policy.name) for policy in EvictionPolicy}

# What an index says of blocks that it pins: the lease, and of each block its tier and its slot there.
Acquired = tuple[int, TierNumbers, Slots]


class PlanKind(Enum):
    GET = "get"  # any tier -> device
    PUT = "put"  # device -> CPU tier
    PREFETCH = "prefetch"  # lower tiers -> CPU tier
    SPILL = "spill"  # CPU tier -> a lower tier


@dataclass
class PlanPart:
    """What a plan does, and holds in the index, of a run of blocks of one group."""

    group: int
    first: int  # block of the plan: it covers those from there on
    keys: BlockKeys  # of these
    parent: BlockKeys | None = None  # the key before them
    # GET, PREFETCH: of each block the tier that it comes from.
    tiers: TierNumbers = field(default_factory=lambda: np.zeros(0, np.uint8))
    lease: int = 0
    txn: int = 0
    fills: list[int] = field(default_factory=list)  # ops that fill the reserved slots

    @property
    def num_lower_blocks(self) -> int:
        """Blocks that come from below the CPU tier."""
        return int(np.count_nonzero(self.tiers))


@dataclass
class TransferPlan:
    """A graph and what it holds in the indexes."""

    kind: PlanKind
    keys: BlockKeys  # the blocks it covers, from the first on
    graph: TransferOpGraph
    parts: list[PlanPart] = field(default_factory=list)  # the first one is the first group's
    tier: int = CPU  # that it writes to
    made_room: bool = False  # a put that waited until all of it can be pinned until lower tiers have it
    discarded: bool = False  # what it writes must not be published: the cache was cleared meanwhile

    @property
    def num_blocks(self) -> int:
        return len(self.keys)

    @property
    def tiers(self) -> TierNumbers:
        """GET, PREFETCH: of each block the tier that it comes from; where its parts are in several, the
        lowest."""
        if len(self.parts) == 1:
            return self.parts[0].tiers
        tiers = self.parts[0].tiers.copy()
        for part in self.parts[1:]:
            np.maximum(tiers[part.first :], part.tiers, out=tiers[part.first :])
        return tiers

    @property
    def num_lower_blocks(self) -> int:
        """Blocks that come from below the CPU tier, with any of their parts."""
        return int(np.count_nonzero(self.tiers))

    def num_blocks_from(self, tier: int) -> int:
        return int(np.count_nonzero(self.tiers == tier))

    @property
    def lower_blocks(self) -> Counter[int]:
        """Blocks that come from below the CPU tier, by tier."""
        return Counter(self.tiers[self.tiers != CPU].tolist())

    @property
    def cpu_slots(self) -> Slots:
        """GET of one group: of each block the slot in the CPU tier that it comes from, or passes through."""
        slots = np.empty(self.num_blocks, np.int64)
        for op in self.graph.ops:
            if op.transfer_type is TransferType.H2D and op.src_block_ids is not None:
                slots[op.block_positions] = op.src_block_ids
        return slots

    @property
    def reads(self) -> list[tuple[int, int]]:
        """Group and transaction of what comes from below the CPU tier."""
        return [(part.group, part.txn) for part in self.parts if part.num_lower_blocks]


@dataclass(frozen=True)
class MatchResult:
    """How much of a sequence is held, counted in leading blocks."""

    tiers: npt.NDArray[np.uint8]  # per block a mask of tiers: 1 CPU, 2 the first below it, and so on
    boundaries: npt.NDArray[np.int64]  # prefixes, in blocks, that all groups hold; growing, without 0

    @property
    def num_blocks(self) -> int:
        """Leading blocks that can be brought."""
        return int(self.boundaries[-1]) if len(self.boundaries) else 0

    @property
    def num_cpu_blocks(self) -> int:
        """Leading blocks that the CPU tier holds."""
        missing = np.flatnonzero((self.tiers & (1 << CPU)) == 0)
        return int(missing[0]) if len(missing) else len(self.tiers)


@dataclass(frozen=True)
class Pinned:
    """What was pinned of a prompt, and what of it can be brought, in leading blocks.

    Attributes:
        leases: each with its group.
        tiers: of each block the tier that it is in; where its parts are in several, the lowest.
        ends: how many can be brought, growing, without 0; None: any number.
        ready: those that can be without a tier that is asked; None: any number, as far as ``tiers`` says.
        num_held: of the first group, whatever the others hold.
    """

    leases: list[tuple[int, int]]
    tiers: TierNumbers
    ends: npt.NDArray[np.int64] | None
    ready: npt.NDArray[np.int64] | None
    num_held: int


class _Below:
    """What is to be decided about one lower tier."""

    def __init__(
        self, number: int, tier: LowerTier, queue: SpillQueue, seen: _core.AdmissionFilter | None
    ) -> None:
        self.number, self.tier, self.queue = number, tier, queue
        self.is_in = False  # takes part, between take_in and take_out
        self.seen = seen  # blocks that were; if there is one, only what is in it goes to the tier
        # Blocks for this process to store that came to the CPU tier while this one took part.
        self.num_offered = 0
        self.num_admitted = 0  # of them (or later, of those that were used again) meant for this one
        # Failed transfers in a row, by their direction: a disk that only reads is no disk to write to.
        self.failures = {TransferType.LOWER2H: 0, TransferType.H2LOWER: 0}
        self.error = ""  # of the last of them
        self.said = Seldom()


class CacheEngine:
    """Decides for one KV group, in all tiers.

    Args:
        group: its number.
        num_cpu_blocks: that the CPU tier holds of it.
        lower: the tiers below, nearest first. None of them takes part before ``take_in``.
    """

    def __init__(
        self,
        group: int,
        config: CacheConfig,
        num_cpu_blocks: int,
        lower: Sequence[LowerTier],
        *,
        keep_tokens: bool,
        watched: bool,
        spill_blocks_max: int,
    ) -> None:
        self.group = group
        self.index = _core.PrefixIndex(
            [num_cpu_blocks, *(tier.num_slots for tier in lower)],
            [_POLICIES[config.cpu_eviction_policy], *(_POLICIES[tier.eviction_policy] for tier in lower)],
            config.tokens_per_block,
            keep_tokens,
            watched,
        )
        self._below = [
            _Below(
                number,
                tier,
                SpillQueue(self.index, number, len(lower), num_cpu_blocks, spill_blocks_max),
                _core.AdmissionFilter(2 * (num_cpu_blocks + tier.num_slots))
                if tier.admission is Admission.REUSE
                else None,
            )
            for number, tier in enumerate(lower, start=1)
        ]
        self.num_puts_without_room = 0

    @property
    def stores_below(self) -> bool:
        """Whether some lower tier takes part."""
        return any(self._taking_part)

    @property
    def _taking_part(self) -> Iterator[_Below]:
        return (below for below in self._below if below.is_in)

    # ---- parts of plans ----

    def add_fetch(
        self, plan: TransferPlan, first: int, acquired: Acquired, tokens: TokenIds | None
    ) -> int | None:
        """Adds to a get or a prefetch what it takes to bring acquired blocks of this group.

        Args:
            first: which block of the plan they begin with.
            tokens: what they must hold, if the index keeps tokens.

        Returns:
            None; or, if the CPU tier has no room for what comes from below, how many blocks of the plan it
            may have room for. Nothing is held then.
        """
        lease, tiers, slots = acquired
        part = PlanPart(self.group, first, plan.keys[first:], tiers=tiers, lease=lease)
        lower = np.flatnonzero(tiers)
        host_slots = slots
        if len(lower):
            # A prefetch has no reader yet: its use is still to come, and is counted then.
            staging = plan.kind is PlanKind.PREFETCH
            reserved = self.index.reserve(CPU, None, part.keys, tokens, staging=staging, required=True)
            if reserved is None:
                self.index.release(lease)
                return first + int(lower[0]) + (len(lower) // 2 if len(lower) > 1 else 0)
            part.txn, positions, staged = reserved
            assert np.array_equal(positions, lower), "a block on its way was acquired"
            host_slots = slots.copy()
            host_slots[lower] = staged
        plan.parts.append(part)
        for tier in np.unique(tiers).tolist():
            positions = np.flatnonzero(tiers == tier)
            load = -1
            if tier != CPU:
                load = plan.graph.add_transfer_op(
                    TransferOp(
                        TransferType.LOWER2H,
                        positions,
                        src_block_ids=slots[positions],
                        dst_block_ids=host_slots[positions],
                        keys=np.ascontiguousarray(part.keys[positions]),
                        tier=tier,
                        group=self.group,
                        first=first,
                    )
                )
                part.fills.append(load)
            if plan.kind is PlanKind.GET:
                plan.graph.add_transfer_op(
                    TransferOp(
                        TransferType.H2D,
                        positions,
                        src_block_ids=host_slots[positions],
                        follows_layers_of=load,
                        group=self.group,
                        first=first,
                    )
                )
        return None

    def add_put(
        self,
        plan: TransferPlan,
        first: int,
        parent: BlockKeys | None,
        tokens: TokenIds | None,
        importance: int,
        end: int | None = None,
    ) -> bool:
        """Adds to a put what it takes to store the blocks from ``first`` to before ``end`` of this group
        that the CPU tier does not hold. False if pins leave no room; nothing is held then."""
        keys = plan.keys[first:end]
        # On its way down a block passes through the CPU tier: what that tier does not want for itself, a
        # lower one may well keep.
        # And a window is of use as a whole.
        required = self.stores_below or self.group > 0
        reserved = self.index.reserve(CPU, parent, keys, tokens, importance, required=required)
        if reserved is None:
            self.num_puts_without_room += 1
            return False
        txn, positions, slots = reserved
        part = PlanPart(self.group, first, keys, parent, txn=txn)
        if txn:
            part.fills.append(
                plan.graph.add_transfer_op(
                    TransferOp(
                        TransferType.D2H, positions, dst_block_ids=slots, group=self.group, first=first
                    )
                )
            )
        plan.parts.append(part)
        return True

    def may_put(self, num_blocks: int, num_coming: int) -> bool:
        """Whether so many blocks can all be pinned until every lower tier has them. What holds them up goes
        on by itself, and nothing does for a tier that is out.

        Args:
            num_coming: blocks of puts that run.
        """
        for below in self._taking_part:
            before = below.queue.num_unfinished + num_coming
            if before and before + num_blocks > below.queue.pinned_max:
                return False
        return True

    def plan_spill(self, tier: int) -> TransferPlan | None:
        """Plan that copies blocks that wait for it from the CPU tier to a lower one. None: nothing waits, or
        so much is being copied that it has to wait on."""
        below = self._below[tier - 1]
        while below.is_in and (blocks := below.queue.take()) is not None:
            assert blocks.cpu_slots is not None
            # A window is of use as a whole.
            reserved = self.index.reserve(tier, blocks.parent, blocks.keys, required=self.group > 0)
            if reserved is None or reserved[0] == 0:
                self.index.release(blocks.lease)
                below.queue.end(len(blocks.keys))
                if reserved is None:  # pins leave no room
                    below.queue.drop(blocks.keys)
                continue
            txn, positions, slots = reserved
            below.num_admitted += len(positions)
            plan = TransferPlan(PlanKind.SPILL, blocks.keys, TransferOpGraph(), tier=tier)
            op = plan.graph.add_transfer_op(
                TransferOp(
                    TransferType.H2LOWER,
                    positions,
                    src_block_ids=blocks.cpu_slots[positions],
                    dst_block_ids=slots,
                    keys=np.ascontiguousarray(blocks.keys[positions]),
                    tier=tier,
                    group=self.group,
                )
            )
            plan.parts.append(
                PlanPart(self.group, 0, blocks.keys, blocks.parent, lease=blocks.lease, txn=txn, fills=[op])
            )
            return plan
        return None

    # ---- outcomes ----

    def finish(self, plan: TransferPlan, part: PlanPart, result: _core.GraphResult | None) -> None:
        """Publishes what a part wrote and gives back what it held. See GlobalCacheEngine.finish."""
        if part.txn:
            statuses = [result.ops[op].status for op in part.fills] if result is not None else []
            over = (_core.OpStatus.DONE, _core.OpStatus.FAILED)
            if result is None or plan.discarded or not any(status in over for status in statuses):
                self.index.abort(part.txn)
                if plan.kind is PlanKind.SPILL and not self._below[plan.tier - 1].is_in:
                    self._below[plan.tier - 1].queue.drop(part.keys)  # the tier was taken out
            else:
                self._finish_writes(plan, part, result)
        if plan.kind is PlanKind.GET and result is not None and result.done:
            for below in self._taking_part:
                if below.seen is not None:  # used again: worth its place there
                    self._add_waiting(below, None, below.tier.to_store(part.keys))
        if part.lease:
            self.index.release(part.lease)
        if plan.kind is PlanKind.SPILL:
            self._below[plan.tier - 1].queue.end(len(part.keys))

    def _finish_writes(self, plan: TransferPlan, part: PlanPart, result: _core.GraphResult) -> None:
        """Publishes those reserved blocks that were filled."""
        filled = np.zeros(len(part.keys), np.uint8)
        outcomes = []
        for number in part.fills:
            moved, outcome = plan.graph.ops[number], result.ops[number]
            ok = outcome.ok
            if outcome.status == _core.OpStatus.DONE:
                ok = np.ones(len(moved.block_positions), np.uint8)
            if len(ok) == len(moved.block_positions) and outcome.status != _core.OpStatus.CANCELLED:
                filled[moved.block_positions] = ok
                outcomes.append((moved, ok, outcome.corrupt + outcome.missing))
        positions = [plan.graph.ops[op].block_positions for op in part.fills]
        reserved = positions[0] if len(positions) == 1 else np.sort(np.concatenate(positions))
        # The tier first: once the index has it, the block can be evicted and its slot written anew.
        if plan.kind is PlanKind.SPILL:
            self._tell_stored(plan, part, filled)
        self.index.commit(part.txn, filled[reserved])
        if plan.kind is PlanKind.PUT:
            if filled[reserved].any():
                self._offer_below(part, pin_all=plan.made_room)
            return
        if plan.kind is PlanKind.PREFETCH:
            self._offer_fetched(part, filled)
        if plan.kind is PlanKind.SPILL:
            queue = self._below[plan.tier - 1].queue
            if not outcomes:
                queue.drop(part.keys)
            else:
                queue.num_dropped += int((filled[reserved] == 0).sum())
        for moved, ok, harmless in outcomes:
            self._note_outcome(moved, ok, harmless, result.error)

    def _note_outcome(self, moved: TransferOp, ok: npt.NDArray[np.uint8], harmless: int, error: str) -> None:
        """Takes in how an op of a lower tier ended.

        Args:
            harmless: blocks that did not get where they should, and say nothing about the medium's health:
                what came is not what was stored, or is not there any more, or there is no room for it.
        """
        below = self._below[moved.tier - 1]
        if moved.transfer_type is TransferType.LOWER2H and not ok.all():
            # What cannot be read back, or is not what was written, is not there.
            assert moved.keys is not None
            assert moved.src_block_ids is not None
            self.index.invalidate(moved.tier, np.ascontiguousarray(moved.keys[ok == 0]))
            if below.is_in:
                below.tier.lost(np.ascontiguousarray(moved.src_block_ids[ok == 0]))
        if int((ok == 0).sum()) > harmless:
            below.failures[moved.transfer_type] += 1
            below.error = error
        else:
            below.failures[moved.transfer_type] = 0
        # What becomes of the tier is logged by who decides it.
        if error and below.said.is_new(error):
            logger.error("%s. The blocks concerned count as misses.", error)

    def _tell_stored(self, plan: TransferPlan, part: PlanPart, filled: npt.NDArray[np.uint8]) -> None:
        below = self._below[plan.tier - 1]
        moved = plan.graph.ops[part.fills[0]]
        ok = filled[moved.block_positions] != 0
        written = moved.block_positions[ok]
        if not below.is_in or len(written) == 0 or moved.dst_block_ids is None:
            return
        parents = np.zeros_like(part.keys)
        parents[1:] = part.keys[:-1]
        if part.parent is not None:
            parents[0] = part.parent
        below.tier.stored(
            np.ascontiguousarray(part.keys[written]),
            np.ascontiguousarray(parents[written]),
            np.ascontiguousarray(moved.dst_block_ids[ok]),
        )

    def _offer_below(self, part: PlanPart, *, pin_all: bool) -> None:
        for below in self._taking_part:
            keys = below.tier.to_store(part.keys)
            # Where there are gaps each block knows its parent from the CPU tier.
            parent = part.parent if len(keys) == len(part.keys) else None
            below.num_offered += len(keys)
            if below.seen is not None:
                unseen = np.flatnonzero(below.seen.seen(keys) == 0)
                keys = keys[: unseen[0]] if len(unseen) else keys
            self._add_waiting(below, parent, keys, pin_all)

    @staticmethod
    def _add_waiting(below: _Below, parent: BlockKeys | None, keys: BlockKeys, pin_all: bool = False) -> None:
        if len(keys):
            below.queue.add(WaitingBlocks(parent, keys, pin_all))

    def _offer_fetched(self, part: PlanPart, filled: npt.NDArray[np.uint8]) -> None:
        """What came from a tier that others share goes to those between it and the CPU tier as well: the next
        time it is near."""
        for below in self._below:
            if not below.tier.is_asked:
                continue
            came = np.flatnonzero((part.tiers == below.number) & (filled != 0))
            for nearer in self._taking_part:
                if nearer.number < below.number and len(came) and nearer.seen is None:
                    keys = part.keys[came[0] : came[-1] + 1]
                    nearer.queue.add(WaitingBlocks(part.parent, keys))

    # ---- what waits, and what came of it ----

    @property
    def num_waiting_spills(self) -> int:
        """Blocks that wait to be copied to lower tiers."""
        return sum(below.queue.num_waiting for below in self._below)

    @property
    def num_waiting_leases(self) -> int:
        """Leases of blocks that wait to be copied to lower tiers."""
        return sum(below.queue.num_leases for below in self._below)

    @property
    def num_spill_dropped_blocks(self) -> int:
        """Blocks that were to go to a lower tier and did not get there: pushed out of the CPU tier before
        their turn, not written because of a fault, or without room there because of pins."""
        return sum(below.queue.num_dropped for below in self._below)

    def failures(self, tier: int) -> tuple[int, str]:
        """Transfers from or to a lower tier that failed one after the other, and the error of the last."""
        below = self._below[tier - 1]
        return max(below.failures.values()), below.error

    def stats(self, tier: int) -> dict[str, float]:
        """Of one tier: slots, free, ready, writing, pinned, evicted, and of the CPU tier puts_without_room,
        of a lower one offered, admitted, and dropped (see ``num_spill_dropped_blocks``)."""
        of_index = self.index.stats(tier)
        out: dict[str, float] = {
            name: getattr(of_index, name)
            for name in ("slots", "free", "ready", "writing", "pinned", "evicted")
        }
        if tier == CPU:
            out["puts_without_room"] = self.num_puts_without_room
        else:
            below = self._below[tier - 1]
            out |= {
                "offered": below.num_offered,
                "admitted": below.num_admitted,
                "dropped": below.queue.num_dropped,
            }
        return out

    # ---- what a lower tier is asked for ----

    def learn(self, tier: int, parent: BlockKeys | None, keys: BlockKeys) -> int:
        """An asked tier has these blocks. Returns how many of the leading ones the index knows it has."""
        if not self._below[tier - 1].is_in or len(keys) == 0:
            return 0
        reserved = self.index.reserve(tier, parent, keys)
        if reserved is None:
            return 0
        txn, positions, _ = reserved
        if txn:  # else all of them were known
            self.index.commit(txn, np.ones(len(positions), np.uint8))
        lease, known, _ = self.index.acquire(keys, tier)
        self.index.release(lease)
        return len(known)

    # ---- lower tiers come and go ----

    def take_in(self, tier: int) -> int:
        """A lower tier takes part from now on, with the blocks that it holds. It must be empty in the index.
        Returns how many blocks are served from it."""
        below = self._below[tier - 1]
        below.is_in = True
        below.failures = dict.fromkeys(below.failures, 0)
        held = below.tier.take_held()
        return int(self.index.restore(tier, held.keys, held.parents, held.slots.astype(np.int32)).sum())

    def tier_is_empty(self, tier: int) -> bool:
        """Whether no block of a tier is left in the index. One that somebody holds goes when it is let go."""
        stats = self.index.stats(tier)
        return stats.free == stats.slots

    def take_out(self, tier: int) -> int:
        """A lower tier takes part no more: nothing is looked for or written there. Returns how many blocks
        are lost to this process until it is back."""
        below = self._below[tier - 1]
        below.is_in = False
        below.queue.num_dropped += below.queue.num_waiting
        return self.clear([tier])

    def clear(self, tiers: Collection[int]) -> int:
        """Forgets every block of these tiers. Blocks in use go when their users let go of them. Returns how
        many they were."""
        for below in self._below:
            if below.number in tiers:
                below.queue.clear()
        return sum(self.index.invalidate_tier(tier) for tier in tiers)


class GlobalCacheEngine:
    """Decides for all groups and tiers. Not thread-safe by itself: one owner calls it.

    Args:
        lower: the tiers below the CPU tier, nearest first, of the first group.
        more_groups: the further groups, and the lower tiers of each.
        keep_tokens: for callers whose keys are SequenceMeta's: what is found is compared token by token.
        watched: whether blocks of the first group can be watched.
        spill_blocks_max: blocks that one plan stores in a lower tier.
    """

    def __init__(
        self,
        config: CacheConfig,
        lower: Sequence[LowerTier] = (),
        more_groups: Sequence[tuple[KVGroup, Sequence[LowerTier]]] = (),
        *,
        keep_tokens: bool = False,
        watched: bool = False,
        spill_blocks_max: int = _SPILL_BLOCKS_MAX,
    ) -> None:
        self.config = config
        sizes = [config.num_cpu_blocks, *(group.quota(config.num_cpu_blocks) for group, _ in more_groups)]
        tiers = [lower, *(of_group for _, of_group in more_groups)]
        self.groups = [
            CacheEngine(
                number,
                config,
                num_cpu_blocks,
                of_group,
                keep_tokens=keep_tokens and number == 0,
                watched=watched and number == 0,
                spill_blocks_max=spill_blocks_max,
            )
            for number, (num_cpu_blocks, of_group) in enumerate(zip(sizes, tiers, strict=True))
        ]
        self._full = self.groups[0]
        # The others with the blocks that each takes to go on.
        windows = (group.window_blocks for group, _ in more_groups)
        self._windowed = list(zip(self.groups[1:], windows, strict=True))
        self._kept = [group.kept for group, _ in more_groups]
        self._asked = frozenset(number for number, tier in enumerate(lower, start=1) if tier.is_asked)

    @property
    def index(self) -> _core.PrefixIndex:
        """Of the first group."""
        return self._full.index

    # ---- asking ----

    def match(self, keys: BlockKeys) -> MatchResult:
        """Looks a sequence up in all tiers and marks what it finds as used."""
        tiers = self.index.match(keys)
        if not self._windowed:
            return MatchResult(tiers, np.arange(1, len(tiers) + 1))
        return MatchResult(tiers, np.flatnonzero(self._resumable(keys[: len(tiers)]))[1:])

    def pin(self, keys: BlockKeys) -> Pinned:
        """Pins what it takes to bring as many of the leading blocks as can be brought, and as many as can be
        without a tier that is asked."""
        lease, tiers, _ = self.index.acquire(keys, None)
        num_held = len(tiers)
        if not self._windowed:
            return Pinned([(0, lease)] if lease else [], tiers, None, None, num_held)
        ends = ready = np.flatnonzero(self._resumable(keys[:num_held]))
        if self._asked:
            at_hand = np.flatnonzero((tiers != CPU) & np.isin(tiers, list(self._asked)))
            num_at_hand = int(at_hand[0]) if len(at_hand) else num_held
            ready = np.flatnonzero(self._resumable(keys[:num_at_hand], without=self._asked))
        limit = int(ends[-1])
        if limit < num_held:
            if lease:
                self.index.release(lease)
            lease, tiers, _ = self.index.acquire(keys[:limit], None)
        leases = [(0, lease)] if lease else []
        for end in {limit, int(ready[-1])}:
            for group, window in self._windowed:
                first = max(0, end - window)
                lease, theirs, _ = group.index.acquire(keys[first:end], None)
                if lease:
                    leases.append((group.group, lease))
                if end == limit:
                    np.maximum(tiers[first:], theirs, out=tiers[first:])
        return Pinned(leases, tiers, ends[1:], ready[1:], num_held)

    def unpin(self, leases: Sequence[tuple[int, int]]) -> None:
        for group, lease in leases:
            self.groups[group].index.release(lease)

    def _resumable(self, keys: BlockKeys, without: Collection[int] = ()) -> npt.NDArray[np.bool_]:
        """For 0 to all of the leading blocks, which the first group holds, whether the others have what it
        takes to go on behind them, bool [blocks + 1].

        Args:
            without: tiers that do not count.
        """
        good = np.ones(len(keys) + 1, bool)
        counting = ~np.uint8(sum(1 << tier for tier in without))
        for group, window in self._windowed:
            good &= boundaries(group.index.held(keys) & counting != 0, window)
        return good

    def _longest(self, keys: BlockKeys) -> int:
        """How many of the leading blocks, which the first group holds, can be brought."""
        return int(np.flatnonzero(self._resumable(keys))[-1]) if self._windowed else len(keys)

    def num_held(self, keys: BlockKeys) -> int:
        """How many of the leading blocks the first group holds, in any tier."""
        missing = np.flatnonzero(self.index.held(keys) == 0)
        return int(missing[0]) if len(missing) else len(keys)

    def num_to_go_on(self, keys: BlockKeys) -> int:
        """How many of the leading blocks can be brought."""
        return self._longest(keys[: self.num_held(keys)])

    def num_to_go_on_with(self, keys: BlockKeys, found: Mapping[int, Sequence[int]]) -> int:
        """How many of the leading blocks, all of which the first group is to have, can be brought as far as
        these further groups are concerned.

        Args:
            found: positions of blocks that a group is to have beside those that it holds.
        """
        good = np.ones(len(keys) + 1, bool)
        for group, window in self._windowed:
            if group.group in found:
                held = group.index.held(keys) != 0
                held[list(found[group.group])] = True
                good &= boundaries(held, window)
        return int(np.flatnonzero(good)[-1])

    def learn(self, tier: int, parent: BlockKeys | None, keys: BlockKeys, group: int = 0) -> int:
        """See CacheEngine.learn."""
        return self.groups[group].learn(tier, parent, keys)

    # ---- plans ----

    def plan_get(
        self, blocks: BlockKeys | SequenceMeta, tokens: TokenIds | None = None
    ) -> TransferPlan | None:
        """Plan that brings the leading held blocks to the device, by way of the CPU tier where they are in a
        lower one. Covers fewer blocks than are held if the CPU tier has no room. None: nothing to bring.

        Args:
            blocks: their keys, or a whole sequence, which is given its keys on the way.
            tokens: what the blocks must hold, int [blocks * tokens_per_block], if the index keeps tokens.
        """
        if isinstance(blocks, SequenceMeta):
            lease, blocks.block_keys, tiers, slots = self.index.acquire_tokens(
                blocks.token_ids, blocks.namespace, use=True
            )
            acquired = lease, tiers, slots
            return self._plan_fetch(PlanKind.GET, blocks.block_keys, acquired, blocks.token_ids)
        acquired = self.index.acquire(blocks, use=True, tokens=tokens)
        return self._plan_fetch(PlanKind.GET, blocks, acquired, tokens)

    def plan_load(self, keys: BlockKeys, cpu_slots: Slots) -> TransferPlan:
        """Plan that brings what is in these slots of the CPU tier to the device. It holds nothing here: that
        they stay as they are is somebody else's part."""
        plan = TransferPlan(PlanKind.GET, keys, TransferOpGraph())
        plan.parts.append(PlanPart(0, 0, keys, tiers=np.full(len(keys), CPU, np.uint8)))
        op = TransferOp(TransferType.H2D, np.arange(len(keys)), src_block_ids=cpu_slots)
        plan.graph.add_transfer_op(op)
        return plan

    def plan_prefetch(self, keys: BlockKeys, *, all_groups: bool = True) -> TransferPlan | None:
        """Plan that brings the leading held blocks into the CPU tier. None: nothing to bring.

        Args:
            all_groups: if not, what the first group keeps of them, whatever the others hold.
        """
        acquired = self.index.acquire(keys)
        return self._plan_fetch(PlanKind.PREFETCH, keys, acquired, None, all_groups=all_groups)

    def plan_prefetches(self, keys: BlockKeys, at_once: int) -> list[TransferPlan]:
        """Plans that together bring as many of the leading held blocks into the CPU tier as can be brought
        and there is room for, each so many of them. What further groups need is in one of them, which has all
        blocks of their windows, for these are of use as a whole. Empty if nothing is to be brought."""
        while limit := self.num_to_go_on(keys):
            plans, reached = self._plan_pieces(keys[:limit], at_once)
            if reached == limit:
                return plans
            for plan in plans:
                self.finish(plan, None)
            keys = keys[:reached]
        return []

    def _plan_pieces(self, keys: BlockKeys, at_once: int) -> tuple[list[TransferPlan], int]:
        """See plan_prefetches. Also how many of the blocks are covered, or in the CPU tier."""
        begin = max(0, len(keys) - max(at_once, *(window for _, window in self._windowed)))
        # The last one first: without it the others are of no use.
        pieces = [(begin, len(keys)), *((at, min(begin, at + at_once)) for at in range(0, begin, at_once))]
        plans = []
        for first, end in pieces:
            piece, is_last = keys[first:end], end == len(keys)
            plan = self.plan_prefetch(piece, all_groups=is_last)
            if plan is not None:
                plans.append(plan)
            covered = plan.num_blocks if plan is not None else self._num_in_memory(piece, is_last)
            if covered < len(piece):
                return plans, first + covered
        return plans, len(keys)

    def _num_in_memory(self, keys: BlockKeys, all_groups: bool) -> int:
        """How many of the leading blocks are in the CPU tier; none if a window at their end is not."""
        lease, tiers, _ = self.index.acquire(keys, CPU)
        self.index.release(lease)
        windows = self._windowed if all_groups else []
        in_memory = (group.index.held(keys[-window:]) & (1 << CPU) for group, window in windows)
        return len(tiers) if all(map(np.all, in_memory)) else 0

    def _plan_fetch(
        self,
        kind: PlanKind,
        keys: BlockKeys,
        acquired: Acquired,
        tokens: TokenIds | None,
        *,
        all_groups: bool = True,
    ) -> TransferPlan | None:
        """Plan for what was acquired; for less of it where a group does not hold as much, or has no room."""
        use = kind is PlanKind.GET
        while True:
            lease, tiers, _ = acquired
            held = len(tiers)
            limit = self._longest(keys[:held]) if all_groups else held
            if limit == held > 0:
                plan = TransferPlan(kind, keys[:held], TransferOpGraph())
                too_much = self._add_fetches(plan, acquired, tokens, self._windowed if all_groups else ())
                if too_much is None:
                    if use or any(part.num_lower_blocks for part in plan.parts):
                        return plan
                    self.finish(plan, None)  # all of it is in the CPU tier
                    return None
                limit = too_much
            else:
                self.index.release(lease)
            if limit == 0:
                return None
            acquired = self.index.acquire(keys[:limit], use=use, tokens=tokens)

    def _add_fetches(
        self,
        plan: TransferPlan,
        acquired: Acquired,
        tokens: TokenIds | None,
        windowed: Sequence[tuple[CacheEngine, int]],
    ) -> int | None:
        """Adds what each group brings. See CacheEngine.add_fetch: nothing is held if there is no room."""
        limit = self._full.add_fetch(plan, 0, acquired, tokens)
        for group, window in windowed:
            if limit is not None:
                break
            first = max(0, plan.num_blocks - window)
            acquired = group.index.acquire(plan.keys[first:], use=plan.kind is PlanKind.GET)
            assert len(acquired[1]) == plan.num_blocks - first, "a window that was held is not there"
            limit = group.add_fetch(plan, first, acquired, None)
        if limit is not None:
            self.finish(plan, None)
        return limit

    def may_put(
        self, num_blocks: int, num_coming: Mapping[int, int], on_device: Mapping[int, int] | None = None
    ) -> bool:
        """Whether so many blocks can all be pinned until every lower tier has them.

        Args:
            num_coming: blocks of puts that run, by group.
            on_device: see plan_put.
        """
        return self._full.may_put(num_blocks, num_coming.get(0, 0)) and all(
            group.may_put(
                sum(end - first for first, end in self._ranges(group, num_blocks, on_device)),
                num_coming.get(group.group, 0),
            )
            for group, _ in self._windowed
        )

    def _ranges(
        self, group: CacheEngine, num_blocks: int, on_device: Mapping[int, int] | None
    ) -> list[tuple[int, int]]:
        """Which blocks of a put are kept of a further group."""
        there = num_blocks if on_device is None else on_device.get(group.group, 0)
        before = num_blocks - there
        return [(before + first, before + end) for first, end in self._kept[group.group - 1](there)]

    def plan_put(
        self,
        parent: BlockKeys | None,
        keys: BlockKeys,
        tokens: TokenIds | None = None,
        *,
        importance: int = 0,
        on_device: Mapping[int, int] | None = None,
    ) -> TransferPlan | None:
        """Plan that copies blocks from the device to the CPU tier, those it holds already left out: all of
        them of the first group, of the others what these keep (``KVGroup.kept``).

        Args:
            parent: key of the block before ``keys[0]``, shape [2]; None at the start of a sequence.
            tokens: what the blocks hold, int [blocks * tokens_per_block], if the index keeps tokens.
            importance: of the request, 0 to IMPORTANCE_MAX; less important blocks are evicted first.
            on_device: of each further group how many of the blocks, the last ones, the device has; those that
                are not named have none. None: all of them have all.

        Returns:
            A plan (with an empty graph if every block is held), or None if pins leave no room.
        """
        plan = TransferPlan(PlanKind.PUT, keys, TransferOpGraph())
        if not self._full.add_put(plan, 0, parent, tokens, importance):
            return None
        for group, _ in self._windowed:
            for first, end in self._ranges(group, len(keys), on_device):
                # Without a parent: what goes first is a matter of each window.
                if not group.add_put(plan, first, None, None, importance, end):
                    self.finish(plan, None)
                    return None
        return plan

    def plan_spill(self, tier: int, group: int = 0) -> TransferPlan | None:
        """See CacheEngine.plan_spill."""
        return self.groups[group].plan_spill(tier)

    def finish(self, plan: TransferPlan, result: _core.GraphResult | None) -> None:
        """Publishes what a plan wrote and gives back what it held.

        Args:
            result: what became of the plan's graph; None if it never ran.
        """
        for part in plan.parts:
            self.groups[part.group].finish(plan, part, result)

    # ---- of all groups ----

    @property
    def stores_below(self) -> bool:
        """Whether some lower tier takes part."""
        return any(group.stores_below for group in self.groups)

    @property
    def num_waiting_spills(self) -> int:
        """Blocks that wait to be copied to lower tiers."""
        return sum(group.num_waiting_spills for group in self.groups)

    @property
    def num_spill_dropped_blocks(self) -> int:
        """See CacheEngine.num_spill_dropped_blocks."""
        return sum(group.num_spill_dropped_blocks for group in self.groups)

    def clear(self, tiers: Collection[int]) -> None:
        """Forgets every block of these tiers. Blocks in use go when their users let go of them."""
        for group in self.groups:
            group.clear(tiers)
