"""The control plane: what is where, what may go, and which copies a request needs. Moves no byte.

A plan keeps a lease on what it reads, and the slots that were reserved for what it writes, until
``finish`` is called with the outcome of its graph, whatever that is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.cache.spill_queue import SpillQueue, WaitingBlocks
from sglang_flexkv.common.block import BlockKeys, SequenceMeta, TokenIds
from sglang_flexkv.common.config import CacheConfig, EvictionPolicy, SsdAdmission
from sglang_flexkv.common.transfer import Slots, TransferOp, TransferOpGraph, TransferType

logger = logging.getLogger(__name__)

CPU, SSD = _core.Tier.CPU, _core.Tier.SSD
_CPU_BIT, _SSD_BIT = 1 << int(CPU), 1 << int(SSD)

# Blocks that one plan copies to SSD, where nobody says how large they are.
_SPILL_BLOCKS_MAX = 256

_POLICIES = {policy: getattr(_core.EvictionPolicy, policy.name) for policy in EvictionPolicy}


class PlanKind(Enum):
    GET = "get"  # CPU or SSD -> device
    PUT = "put"  # device -> CPU
    PREFETCH = "prefetch"  # SSD -> CPU
    SPILL = "spill"  # CPU -> SSD


@dataclass
class TransferPlan:
    """A graph and what it holds in the index."""

    kind: PlanKind
    keys: BlockKeys  # the blocks it covers, from the first on
    graph: TransferOpGraph
    parent: BlockKeys | None = None
    leases: list[int] = field(default_factory=list)
    txn: int = 0
    txn_tier: _core.Tier | None = None
    txn_op: int = -1  # the op that fills the reserved slots
    num_ssd_blocks: int = 0  # blocks that come from SSD
    made_room: bool = False  # a put that waited until all of it can be pinned until it is on SSD
    discarded: bool = False  # what it writes must not be published: the cache was cleared meanwhile

    @property
    def num_blocks(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class MatchResult:
    """How much of a sequence is held, counted in leading blocks."""

    tiers: npt.NDArray[np.uint8]  # per block a mask of tiers: 1 CPU, 2 SSD

    @property
    def num_blocks(self) -> int:
        """Leading blocks that some tier holds."""
        return len(self.tiers)

    @property
    def num_cpu_blocks(self) -> int:
        """Leading blocks that the CPU tier holds."""
        missing = np.flatnonzero((self.tiers & _CPU_BIT) == 0)
        return int(missing[0]) if len(missing) else len(self.tiers)


class GlobalCacheEngine:
    """Decides for all tiers. Not thread-safe by itself: one owner calls it.

    Args:
        keep_tokens: for callers whose keys are SequenceMeta's: what is found is compared token by token.
        spill_blocks_max: blocks that one plan copies to SSD.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        keep_tokens: bool = False,
        spill_blocks_max: int = _SPILL_BLOCKS_MAX,
    ) -> None:
        self.config = config
        self.index = _core.PrefixIndex(
            config.num_cpu_blocks,
            config.num_ssd_blocks if config.enable_ssd else 0,
            _POLICIES[config.cpu_eviction_policy],
            _POLICIES[config.ssd_eviction_policy],
            config.tokens_per_block,
            keep_tokens,
        )
        # The SSD tier takes part only between ssd_online and ssd_offline.
        self.journal: _core.SsdStore | None = None
        # Failed SSD transfers in a row, by what they were: a disk that only reads is no disk to write to.
        self._ssd_failures = {kind: 0 for kind in PlanKind}
        self.ssd_error = ""  # of the last of them
        # Blocks that were seen; with ssd_admission=reuse only what is in it goes to SSD.
        self._seen = (
            _core.AdmissionFilter(2 * (config.num_cpu_blocks + config.num_ssd_blocks))
            if config.ssd_admission is SsdAdmission.REUSE
            else None
        )
        self.num_offered_to_ssd = 0  # blocks that came to the CPU tier while there was an SSD tier
        self.num_admitted_to_ssd = 0  # of them (or later, of those that were used again) meant for SSD
        self._to_spill = SpillQueue(self.index, config.num_cpu_blocks, spill_blocks_max)
        self.num_puts_without_room = 0

    def match(self, keys: BlockKeys) -> MatchResult:
        """Looks a sequence up in all tiers and marks what it finds as used."""
        return MatchResult(self.index.match(keys))

    # ---- plans ----

    def plan_get(
        self, blocks: BlockKeys | SequenceMeta, tokens: TokenIds | None = None
    ) -> TransferPlan | None:
        """Plan that brings the leading held blocks to the device, by way of the CPU tier where they are on
        SSD. Covers fewer blocks than are held if the CPU tier has no room. None: nothing to bring.

        Args:
            blocks: their keys, or a whole sequence, which is given its keys on the way.
            tokens: what the blocks must hold, int [blocks * tokens_per_block], if the index keeps tokens.
        """
        if isinstance(blocks, SequenceMeta):
            lease, blocks.block_keys, tiers, slots = self.index.acquire_tokens(
                blocks.token_ids, blocks.namespace, use=True
            )
            return self._plan_fetch(blocks.block_keys, (lease, tiers, slots), blocks.token_ids)
        return self._plan_fetch(blocks, self.index.acquire(blocks, use=True, tokens=tokens), tokens)

    def plan_prefetch(self, keys: BlockKeys) -> TransferPlan | None:
        """Plan that brings the leading held blocks into the CPU tier. None: nothing to bring."""
        return self._plan_fetch(keys, self.index.acquire(keys), None, to_device=False)

    def _plan_fetch(
        self,
        keys: BlockKeys,
        acquired: tuple[int, npt.NDArray[np.uint8], Slots],
        tokens: TokenIds | None,
        *,
        to_device: bool = True,
    ) -> TransferPlan | None:
        """Plan for what was acquired; for less of it where the CPU tier has no room."""
        while True:
            lease, tiers, slots = acquired
            held = len(tiers)
            on_ssd = np.flatnonzero(tiers == int(SSD))
            if held == 0 or (not to_device and len(on_ssd) == 0):
                self.index.release(lease)
                return None
            plan = TransferPlan(
                PlanKind.GET if to_device else PlanKind.PREFETCH,
                keys[:held],
                TransferOpGraph(),
                leases=[lease],
                num_ssd_blocks=len(on_ssd),
            )
            host_slots = slots.copy() if len(on_ssd) else slots
            if len(on_ssd):
                reserved = self.index.reserve(CPU, None, plan.keys, tokens, staging=True, required=True)
                if reserved is None:  # no room: take less
                    self.index.release(lease)
                    limit = int(on_ssd[0]) + (len(on_ssd) // 2 if len(on_ssd) > 1 else 0)
                    if limit == 0:
                        return None
                    acquired = self.index.acquire(keys[:limit], use=to_device, tokens=tokens)
                    continue
                plan.txn, positions, staged = reserved
                assert np.array_equal(positions, on_ssd), "a block on its way was acquired"
                plan.txn_tier = CPU
                host_slots[on_ssd] = staged
                plan.txn_op = plan.graph.add_transfer_op(
                    TransferOp(
                        TransferType.DISK2H,
                        on_ssd,
                        src_block_ids=slots[on_ssd],
                        dst_block_ids=host_slots[on_ssd],
                        keys=np.ascontiguousarray(plan.keys[on_ssd]),
                    )
                )
            if to_device:
                in_cpu = np.flatnonzero(tiers == int(CPU))
                for positions, read in ((in_cpu, -1), (on_ssd, plan.txn_op)):
                    if len(positions):
                        plan.graph.add_transfer_op(
                            TransferOp(
                                TransferType.H2D,
                                positions,
                                src_block_ids=host_slots[positions],
                                follows_layers_of=read,
                            )
                        )
            return plan

    def may_put(self, num_blocks: int, num_coming: int) -> bool:
        """Whether so many blocks can all be pinned until they are on SSD. What holds them up goes on by
        itself, and nothing does while the SSD tier is out.

        Args:
            num_coming: blocks of puts that run.
        """
        before = self._to_spill.num_unfinished + num_coming
        return self.journal is None or before == 0 or before + num_blocks <= self._to_spill.pinned_max

    def plan_put(
        self,
        parent: BlockKeys | None,
        keys: BlockKeys,
        tokens: TokenIds | None = None,
        *,
        importance: int = 0,
    ) -> TransferPlan | None:
        """Plan that copies blocks from the device to the CPU tier, those it holds already left out.

        Args:
            parent: key of the block before ``keys[0]``, shape [2]; None at the start of a sequence.
            tokens: what the blocks hold, int [blocks * tokens_per_block], if the index keeps tokens.
            importance: of the request, 0 to IMPORTANCE_MAX; less important blocks are evicted first.

        Returns:
            A plan (with an empty graph if every block is held), or None if pins leave no room.
        """
        # On its way to SSD a block passes through the CPU tier: what that tier does not want for itself, SSD
        # may well keep.
        reserved = self.index.reserve(
            CPU, parent, keys, tokens, importance, required=self.journal is not None
        )
        if reserved is None:
            self.num_puts_without_room += 1
            return None
        txn, positions, slots = reserved
        plan = TransferPlan(PlanKind.PUT, keys, TransferOpGraph(), parent, txn=txn, txn_tier=CPU)
        if txn:
            plan.txn_op = plan.graph.add_transfer_op(
                TransferOp(TransferType.D2H, positions, dst_block_ids=slots)
            )
        return plan

    def plan_spill(self) -> TransferPlan | None:
        """Plan that copies blocks that wait for it from the CPU tier to SSD. None: nothing waits, or so much
        is being copied that it has to wait on."""
        while self.journal is not None and (blocks := self._to_spill.take()) is not None:
            assert blocks.cpu_slots is not None
            reserved = self.index.reserve(SSD, blocks.parent, blocks.keys)
            if reserved is None or reserved[0] == 0:
                self.index.release(blocks.lease)
                self._to_spill.end(len(blocks.keys))
                if reserved is None:  # pins leave no room
                    self._to_spill.drop(blocks.keys)
                continue
            txn, positions, ssd_slots = reserved
            self.num_admitted_to_ssd += len(positions)
            plan = TransferPlan(
                PlanKind.SPILL,
                blocks.keys,
                TransferOpGraph(),
                blocks.parent,
                leases=[blocks.lease],
                txn=txn,
                txn_tier=SSD,
            )
            plan.txn_op = plan.graph.add_transfer_op(
                TransferOp(
                    TransferType.H2DISK,
                    positions,
                    src_block_ids=blocks.cpu_slots[positions],
                    dst_block_ids=ssd_slots,
                    keys=np.ascontiguousarray(blocks.keys[positions]),
                )
            )
            return plan
        return None

    # ---- outcomes ----

    def finish(self, plan: TransferPlan, result: _core.GraphResult | None) -> None:
        """Publishes what a plan wrote and gives back what it held.

        Args:
            result: what became of the plan's graph; None if it never ran.
        """
        if plan.txn:
            op = result.ops[plan.txn_op] if result is not None else None
            if (
                op is None
                or plan.discarded
                or op.status in (_core.OpStatus.CANCELLED, _core.OpStatus.PENDING)
            ):
                self.index.abort(plan.txn)
                if plan.kind is PlanKind.SPILL and self.journal is None:
                    self._to_spill.drop(plan.keys)  # the tier was taken out
            else:
                self._finish_writes(plan, op, result.error if result is not None else "")
        if plan.kind is PlanKind.GET and self._seen is not None and result is not None and result.done:
            self._queue_spill(None, plan.keys)  # used again: worth its place on SSD
        for lease in plan.leases:
            self.index.release(lease)
        if plan.kind is PlanKind.SPILL:
            self._to_spill.end(len(plan.keys))

    def _finish_writes(self, plan: TransferPlan, op: _core.OpResult, error: str) -> None:
        """Publishes those reserved blocks of a plan that were filled."""
        moved = plan.graph.ops[plan.txn_op]
        ok = op.ok if op.status == _core.OpStatus.FAILED else np.ones(len(moved.block_positions), np.uint8)
        if len(ok) == 0:
            self.index.abort(plan.txn)
            if plan.kind is PlanKind.SPILL:
                self._to_spill.drop(plan.keys)
            return
        # The journal first: once the index has it, the block can be evicted and its slot written anew.
        if plan.kind is PlanKind.SPILL:
            self._journal_blocks(plan, moved, ok)
        self.index.commit(plan.txn, ok)
        if plan.kind is PlanKind.PUT:
            self._offer_to_ssd(plan)
            return
        if plan.kind is PlanKind.SPILL:
            self._to_spill.num_dropped += int((ok == 0).sum())
        if plan.kind is not PlanKind.SPILL and not ok.all():
            # What cannot be read back, or is not what was written, is not there.
            assert moved.keys is not None
            assert moved.src_block_ids is not None
            self.index.invalidate(SSD, np.ascontiguousarray(moved.keys[ok == 0]))
            if self.journal is not None:
                self.journal.drop(np.ascontiguousarray(moved.src_block_ids[ok == 0]))
        # A corrupt block says nothing about the disk's health; a failed transfer does.
        if int((ok == 0).sum()) > op.corrupt:
            self._ssd_failures[plan.kind] += 1
            self.ssd_error = error
        else:
            self._ssd_failures[plan.kind] = 0
        # The first of many tells it all; what becomes of the tier is logged by who decides it.
        if error and self._ssd_failures[plan.kind] <= 1:
            logger.error("%s. The blocks concerned count as misses.", error)

    def _journal_blocks(self, plan: TransferPlan, moved: TransferOp, ok: npt.NDArray[np.uint8]) -> None:
        if self.journal is None or moved.dst_block_ids is None:
            return
        parents = np.zeros_like(plan.keys)
        parents[1:] = plan.keys[:-1]
        if plan.parent is not None:
            parents[0] = plan.parent
        written = moved.block_positions[ok != 0]
        self.journal.publish(
            np.ascontiguousarray(plan.keys[written]),
            np.ascontiguousarray(parents[written]),
            np.ascontiguousarray(moved.dst_block_ids[ok != 0]),
        )

    def _offer_to_ssd(self, plan: TransferPlan) -> None:
        if self.journal is None:
            return
        keys = plan.keys
        self.num_offered_to_ssd += len(keys)
        if self._seen is not None:
            unseen = np.flatnonzero(self._seen.seen(keys) == 0)
            keys = keys[: unseen[0]] if len(unseen) else keys
        if len(keys):
            self._queue_spill(plan.parent, keys, pin_all=plan.made_room)

    def _queue_spill(self, parent: BlockKeys | None, keys: BlockKeys, *, pin_all: bool = False) -> None:
        if self.journal is not None:
            self._to_spill.add(WaitingBlocks(parent, keys, pin_all))

    @property
    def num_waiting_spills(self) -> int:
        """Blocks that wait to be copied to SSD."""
        return self._to_spill.num_waiting

    @property
    def num_waiting_leases(self) -> int:
        """Leases of blocks that wait to be copied to SSD."""
        return self._to_spill.num_leases

    @property
    def num_spill_dropped_blocks(self) -> int:
        """Blocks that were to go to SSD and did not get there: pushed out of the CPU tier before their turn,
        not written because of a fault, or without room on SSD because of pins."""
        return self._to_spill.num_dropped

    # ---- the SSD tier comes and goes ----

    @property
    def ssd_failures(self) -> int:
        """Transfers from or to SSD that failed one after the other."""
        return max(self._ssd_failures.values())

    def ssd_online(self, store: _core.SsdStore) -> int:
        """Takes the SSD tier in, with the blocks that its files hold. It must be empty in the index. Returns
        how many blocks are served from it."""
        self.journal = store
        self._ssd_failures = {kind: 0 for kind in PlanKind}
        keys, parents, slots = store.take_recovered()
        return int(self.index.restore(SSD, keys, parents, slots.astype(np.int32)).sum())

    @property
    def ssd_is_empty(self) -> bool:
        """Whether no block of the SSD tier is left in the index. One that somebody holds goes when it is let
        go."""
        stats = self.index.stats(SSD)
        return stats.free == stats.slots

    def ssd_offline(self) -> int:
        """Leaves the SSD tier out: nothing is looked for or written there. Returns how many blocks are lost
        to this process until it is back."""
        self.journal = None
        self._to_spill.num_dropped += self._to_spill.num_waiting
        return self.clear([SSD])

    def close(self) -> None:
        """Lets go of the SSD tier's journal, which is written out when its last holder has."""
        self.journal = None

    def clear(self, tiers: Collection[_core.Tier]) -> int:
        """Forgets every block of these tiers. Blocks in use go when their users let go of them. Returns how
        many they were."""
        if SSD in tiers:
            self._to_spill.clear()
        return sum(self.index.invalidate_tier(tier) for tier in tiers)
