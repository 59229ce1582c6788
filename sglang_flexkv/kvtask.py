"""Tasks: the life of one get, put, prefetch or spill, from plan to outcome.

::

    CREATED ──plan──▶ READY ──launch──▶ RUNNING ──▶ COMPLETED
       │                │                  ├──────▶ FAILED
       └────────────────┴──────cancel──────┴──────▶ CANCELLED

Whatever way a task ends, what its plan held is given back exactly once. A READY task that nobody launches is
cancelled after ``lease_timeout_s``: what its creator forgot must not stay pinned. A put is CREATED until
there is room for it, if its creator asked for that. Outcomes are taken in by ``poll``, which every call of
this class makes first: there is no hidden thread that changes the cache.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from sglang_flexkv import _core
from sglang_flexkv.cache.cache_engine import GlobalCacheEngine, MatchResult, Pinned, PlanKind, TransferPlan
from sglang_flexkv.common.block import BlockKeys, Namespace, SequenceMeta, TokenIds, make_namespace
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.common.config import Admission, CacheConfig
from sglang_flexkv.common.kv_group import KVGroup
from sglang_flexkv.common.lower_tier import CPU, LowerTier, Question, SharedBlocks
from sglang_flexkv.common.patience import Patience
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.common.transfer import Slots, SlotsOnTheirWay, TransferType
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.storage_engine import SharedMemory, StorageEngine, TierRequest
from sglang_flexkv.tierlife import TierLife, TierState
from sglang_flexkv.transfer.trace import TransferTrace
from sglang_flexkv.transfer.transfer_engine import TransferEngine

logger = logging.getLogger(__name__)

# Spills in flight to one tier. Enough to keep a disk busy, few enough that a stop does not wait for long.
_SPILLS_MAX = 4
_SPILL_BYTES_MAX = 64 << 20
# Where reads are in pieces, so much is brought by one task: see Fetch.
_FETCH_BYTES = 32 << 20

# Who waits for a task looks after the lower tiers so often meanwhile.
_WAIT_STEP_S = 0.1

# A stop or a flush waits this long for copies that have started, then says so and goes on waiting.
_QUIESCE_WARN_S = 30.0
# An orderly stop gives blocks that wait for a lower tier so long to get there.
_CLOSE_FLUSH_S = 5.0
# Then what is on its way from or to a lower tier, and closing the tier, may each take so long. A medium that
# takes longer hangs, and nobody waits for it.
_CLOSE_WAIT_S = 10.0


class TaskStatus(Enum):
    CREATED = "created"
    READY = "ready"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


_NEXT: dict[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.CREATED: frozenset({TaskStatus.READY, TaskStatus.CANCELLED}),
    TaskStatus.READY: frozenset({TaskStatus.RUNNING, TaskStatus.COMPLETED, TaskStatus.CANCELLED}),
    TaskStatus.RUNNING: frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED}),
    TaskStatus.COMPLETED: frozenset(),
    TaskStatus.FAILED: frozenset(),
    TaskStatus.CANCELLED: frozenset(),
}


@dataclass
class KVTask:
    task_id: int
    plan: TransferPlan | None  # None: there was nothing to do
    status: TaskStatus = TaskStatus.CREATED
    error: str = ""
    core_graph: int = 0
    created_s: float = field(default_factory=time.monotonic)
    held_events: list[object] = field(default_factory=list)  # kept alive while the core may wait on them

    def become(self, status: TaskStatus) -> None:
        if status not in _NEXT[self.status]:
            raise RuntimeError(f"task {self.task_id} cannot go from {self.status.value} to {status.value}")
        self.status = status

    @property
    def num_loads(self) -> int:
        """Times that this task passes each layer of a gate."""
        return self._num_ops(TransferType.H2D)

    @property
    def num_stores(self) -> int:
        """The same of a put, whose gate has one layer."""
        return self._num_ops(TransferType.D2H)

    def _num_ops(self, transfer_type: TransferType) -> int:
        ops = self.plan.graph.ops if self.plan is not None else []
        return sum(op.transfer_type is transfer_type for op in ops)

    @property
    def ended(self) -> bool:
        return not _NEXT[self.status]


@dataclass
class Fetch:
    """Tasks that together bring blocks of a prompt to the CPU tier. Each ends, and publishes what it brought,
    by itself: what is slow, or never comes, takes nothing along."""

    tasks: list[KVTask]

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to wait for: of what was given up somebody still holds the memory,
        but it brings nothing any more."""
        return all(task.ended or (task.plan is not None and task.plan.discarded) for task in self.tasks)

    @property
    def num_ended(self) -> int:
        return sum(task.ended for task in self.tasks)

    @property
    def brought(self) -> Counter[int]:
        """Blocks that came from below the CPU tier, in tasks that brought all of theirs, by tier."""
        plans = [t.plan for t in self.tasks if t.status is TaskStatus.COMPLETED and t.plan is not None]
        return sum((plan.lower_blocks for plan in plans), Counter())


@dataclass
class Inquiry:
    """What an asked tier was asked about a prompt: which of the blocks behind those that are held it has, and
    then, where blocks have parts in further groups, at which places up to there these are whole.

    Attributes:
        keys: of the prompt.
        first: block from which on it was asked for the leading ones.
        leading: None: all of them are held.
        to_ask: further groups that are still to be asked for.
        parts: of those that were its question, and the block that this begins with.
    """

    keys: BlockKeys
    first: int
    leading: Question | None
    to_ask: list[int] = field(default_factory=list)
    parts: dict[int, tuple[int, Question]] = field(default_factory=dict)

    @property
    def num_found(self) -> int:
        """How many of the leading blocks the tier has."""
        return self.leading.num_found if self.leading is not None else 0

    @property
    def waits(self) -> bool:
        """For an answer to what was asked so far."""
        of_parts = [question for _, question in self.parts.values()]
        return not all(question is None or question.is_over for question in (self.leading, *of_parts))

    @property
    def is_over(self) -> bool:
        return not self.to_ask and not self.waits

    @property
    def found_something(self) -> bool:
        return self.num_found > 0 or any(question.num_found for _, question in self.parts.values())


@dataclass
class _WaitingPut:
    task: KVTask
    parent: BlockKeys | None
    keys: BlockKeys
    tokens: TokenIds | None
    slots: Slots | SlotsOnTheirWay
    places_for: Callable[[TransferPlan | None], Slots | None]


class KVTaskEngine:
    """Runs tasks over the tiers of one rank. Thread-safe: calls are serialised by one lock.

    The only door to what is under it: index, transfers, memory and files are private, so that nobody changes
    one of them without the others, or without the lock.

    Args:
        device: the pool of the first group, which keeps all blocks.
        more_groups: parts that blocks have in other pools.
        namespace: of the keys; what is found in a tier under another one is not ours.
        shared: whose blocks they are for other processes, where these find them as well; None: those of
            ``namespace``.
        layers: of the model, one for each layer of the first group; None: those that no other group has.
        watched: whether blocks can be watched.
        reads_in_pieces: what a fetch brings comes in many tasks, and is of use as far as it has come. With a
            tier that is asked it does in any case.
        memory: of the CPU tier, if other processes have it as well; with one group only. Where another one
            decides what is in it, nothing is stored here, and ``create_load`` loads from it.

    Raises:
        ConfigError, OSError: a tier cannot be set up (see StorageEngine).
    """

    def __init__(
        self,
        config: CacheConfig,
        device: DeviceBuffers,
        *,
        namespace: Namespace,
        shared: SharedBlocks | None = None,
        label: str = "",
        identity: Identity | None = None,
        rank_tag: str = "rank0",
        keep_tokens: bool = False,
        disk: _core.Disk | None = None,
        more_groups: Sequence[KVGroup] = (),
        layers: Sequence[int] | None = None,
        watched: bool = False,
        reads_in_pieces: bool = False,
        memory: SharedMemory | None = None,
    ) -> None:
        self.config = config
        self._trace = TransferTrace() if config.trace_file is not None else None
        self._rank_tag = rank_tag
        shared = shared or SharedBlocks(namespace)
        self._flush_seed, self._num_flushes = shared.seed, 0
        self._watched = watched
        request = TierRequest(config, namespace, shared, label, identity, rank_tag, disk, memory=memory)
        self._storage = StorageEngine(device, request, more_groups, layers)
        self._tier_names = ["CPU", *(tier.name for tier in self._storage.first.lower)]
        self._lock = threading.RLock()
        self._tasks: dict[int, KVTask] = {}
        self._unlaunched: OrderedDict[int, KVTask] = OrderedDict()  # READY tasks, the oldest first
        self._by_graph: dict[int, KVTask] = {}
        # Tasks that load from a lower tier, READY or RUNNING, by group and the transaction that brings it to
        # the CPU tier.
        self._reads: dict[tuple[int, int], KVTask] = {}
        self._fetches: dict[int, Fetch] = {}  # by the ids of their tasks that read
        # Asked tiers, by number: that of each group.
        self._asked = {
            number: [storage.lower[number - 1] for storage in self._storage.groups]
            for number, tier in enumerate(self._storage.first.lower, start=1)
            if tier.is_asked
        }
        self._reads_in_pieces = reads_in_pieces or bool(self._asked)
        # Further groups in the order in which they are asked for: states are at the fewest places.
        self._fewest_places_first = sorted(
            range(1, len(more_groups) + 1),
            key=lambda number: (
                more_groups[number - 1].slots_per_block is None,
                more_groups[number - 1].window_blocks,
            ),
        )
        self._inquiries: list[Inquiry] = []  # with further groups that are still to be asked for
        self._ids = itertools.count(1)
        self._leases: dict[int, list[tuple[int, int]]] = {}  # of each group that has one
        self._spills_running: Counter[tuple[int, int]] = Counter()  # by group and tier
        self._waiting_puts: OrderedDict[int, _WaitingPut] = OrderedDict()  # CREATED tasks, the oldest first
        self._closed = False
        self._hangs = False  # something below does not end
        try:
            self._cache = GlobalCacheEngine(
                config,
                self._storage.first.lower,
                [(g, s.lower) for g, s in zip(more_groups, self._storage.groups[1:], strict=True)],
                keep_tokens=keep_tokens,
                watched=watched,
                spill_blocks_max=max(1, _SPILL_BYTES_MAX // self.slot_bytes),
            )
            self._transfer = TransferEngine(config, self._storage)
            self._lives = {
                (cache.group, number): TierLife(
                    number,
                    tier,
                    cache,
                    self._transfer,
                    partial(self._cancel_tasks_of, number, cache.group),
                    partial(self._num_tasks_of, number, cache.group),
                    storage.away.get(tier, ""),
                )
                for cache, storage in zip(self._cache.groups, self._storage.groups, strict=True)
                for number, tier in enumerate(storage.lower, start=1)
            }
        except BaseException:
            self._storage.close_lower()
            raise

    # ---- what it stands on ----

    @property
    def device(self) -> DeviceBuffers:
        """The pool that is cached."""
        return self._storage.device

    @property
    def host_pool(self) -> _core.HostPool:
        """The memory of the CPU tier, for benchmarks that compare with it."""
        return self._storage.first.host

    @property
    def slot_bytes(self) -> int:
        """Bytes that a block takes in a tier, its part in the first group."""
        return self._storage.first.slot_bytes

    @property
    def group_names(self) -> list[str]:
        """Of the further groups."""
        return [group.name for group in self._storage.more_groups]

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Of each further group the blocks of its window, and the bytes that one of them takes in a tier."""
        return [
            (group.window_blocks, storage.slot_bytes)
            for group, storage in zip(self._storage.more_groups, self._storage.groups[1:], strict=True)
        ]

    @property
    def blocks_per_window(self) -> int:
        """Blocks of the first group for which the CPU tier has a window of a further one; where it has least.
        0: there is no further group."""
        groups, num_blocks = self._storage.more_groups, self.config.num_cpu_blocks
        return max((num_blocks * g.window_blocks // g.quota(num_blocks) for g in groups), default=0)

    @property
    def tier_names(self) -> Sequence[str]:
        """As users know them, by number: ``CPU`` and those below it."""
        return self._tier_names

    @property
    def tier_kinds(self) -> Sequence[str]:
        """As clients know them, by number."""
        return ["CPU", *(tier.kind for tier in self._storage.first.lower)]

    @property
    def has_lower_tiers(self) -> bool:
        return bool(self._lives)

    def describe_lower_tiers(self) -> dict[str, tuple[int, str]]:
        """By name: how many blocks each can hold (0: that is not for us to say), and what moves them, with
        the reason if it is a fall-back."""

        def engine(tier: LowerTier) -> str:
            note = tier.core.engine_note
            return f"{tier.core.engine_name} ({note})" if note else tier.core.engine_name

        return {
            tier.name: (0 if tier.is_asked else tier.num_slots, engine(tier))
            for tier in self._storage.first.lower
        }

    @property
    def cuda_note(self) -> str:
        """What the GPU or its driver cannot do and is done in a slower way; empty if nothing."""
        return self._transfer.cuda_note

    def make_gate(self, num_layers: int) -> _core.LayerGate:
        """A gate for tasks of this engine, see ``launch``. On a GPU streams can be told to wait for it."""
        return self._transfer.make_gate(num_layers)

    # ---- asking ----

    def match(self, keys: BlockKeys) -> MatchResult:
        with self._lock:
            self.poll()
            return self._cache.match(keys)

    def pin(self, keys: BlockKeys) -> tuple[int, Pinned]:
        """Pins the leading held blocks for a reader that comes later. Returns the lease, to be given back
        with ``unpin`` (0 if there is nothing), and what was pinned."""
        with self._lock:
            self.poll()
            pinned = self._cache.pin(keys)
            if not pinned.leases:
                return 0, pinned
            lease = next(self._ids)
            self._leases[lease] = pinned.leases
            return lease, pinned

    def queued_read_bytes(self) -> Counter[int]:
        """Bytes that wait to be loaded from each lower tier or are being loaded, by its number."""
        queued = [int(of_tier["queued_bytes"]) for of_tier in self.load_stats()]
        return Counter({n: num_bytes for n, num_bytes in enumerate(queued) if n != CPU})

    @property
    def num_spill_dropped_blocks(self) -> int:
        """Blocks that were to go from the CPU tier to a lower one and did not get there."""
        return self._cache.num_spill_dropped_blocks

    @property
    def reads_in_pieces(self) -> bool:
        """Whether what a fetch has brought is of use before it has ended."""
        return self._reads_in_pieces

    @property
    def num_reads(self) -> int:
        """Tasks that bring blocks from lower tiers to the CPU tier, or are about to."""
        return len(self._reads)

    def find_read(self, keys: BlockKeys) -> Fetch | None:
        """What brings the first of these blocks from a lower tier to the CPU tier, or a window behind it;
        None if nobody does. It ends by itself, whoever forgets it meanwhile."""
        if not self._reads:
            return None
        with self._lock:
            self.poll()
            task = self._reads.get((0, self._cache.index.writer(CPU, keys[0])))
            if task is None and len(self._cache.groups) > 1:
                task = self._find_read_of_window(keys)
            if task is None or task.plan is None or task.plan.discarded:
                return None
            return self._fetches.get(task.task_id) or Fetch([task])

    def _find_read_of_window(self, keys: BlockKeys) -> KVTask | None:
        # By what comes, which is little, and not by the keys: with pages of one token they are many.
        for (group, _), task in self._reads.items():
            for part in task.plan.parts if group and task.plan is not None else ():
                coming = part.keys[part.tiers != CPU]
                if part.group == group and any((keys == key).all(1).any() for key in coming):
                    return task
        return None

    # ---- who watches blocks ----

    @property
    def watched(self) -> bool:
        """Whether blocks can be watched."""
        return self._watched

    def watch(self, keys: BlockKeys, first: int) -> int:
        """From now on ``take_sightings`` tells when one of these blocks comes to a tier or goes from one, its
        part in the first group. They are numbered from ``first`` on, which is not 0. Returns how many are
        watched that were not; a block that no tier holds or is about to hold cannot be."""
        return self._cache.index.watch(keys, first)

    def take_sightings(
        self,
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """What has become of watched blocks since the last call, in order, each of shape [sightings]: their
        numbers, tiers, and whether they came, went, or are in no tier any more and so watched no more
        (``_core.CAME``, ``WENT``, ``FORGOTTEN``)."""
        return self._cache.index.take_sightings()

    # ---- tiers that are asked ----

    @property
    def asked_tiers(self) -> frozenset[int]:
        """Numbers of the tiers that know of more than they were given here."""
        return frozenset(self._asked)

    @property
    def can_ask(self) -> bool:
        """Whether one of them takes part now."""
        return any(map(self._takes_part, self._asked))

    def _takes_part(self, number: int) -> bool:
        """Whether a lower tier does, with what it keeps of each group."""
        groups = range(len(self._cache.groups))
        return all(self._lives[group, number].state is TierState.ONLINE for group in groups)

    def ask(self, keys: BlockKeys, first: int = 0) -> Inquiry | None:
        """Asks what of a prompt the asked tier has. None: there is none that takes part.

        Args:
            first: the blocks before it can be brought already.
        """
        with self._lock:
            for number, tiers in self._asked.items():
                if not self._takes_part(number) or first >= len(keys):
                    continue
                if len(tiers) == 1:
                    return Inquiry(keys, first, tiers[0].look_up(keys[first:]))
                first = self._cache.num_held(keys)  # some of them without what further groups need
                leading = tiers[0].look_up(keys[first:]) if first < len(keys) else None
                inquiry = Inquiry(keys, first, leading, list(self._fewest_places_first))
                self._inquiries.append(inquiry)
                self._ask_for_parts()
                return inquiry
        return None

    def _ask_for_parts(self) -> None:
        """Asks for the next further group where it is known how far those before it reach."""
        for inquiry in self._inquiries:
            if not inquiry.waits:
                (number,) = self._asked
                self._ask_for_part(number, inquiry)
        self._inquiries = [inquiry for inquiry in self._inquiries if inquiry.to_ask]

    def _ask_for_part(self, number: int, inquiry: Inquiry) -> None:
        keys = inquiry.keys[: inquiry.first + inquiry.num_found]
        found = {
            group: [start + position for position in question.positions]
            for group, (start, question) in inquiry.parts.items()
        }
        known, reached = self._cache.num_to_go_on(keys), self._cache.num_to_go_on_with(keys, found)
        if known >= reached or not self._takes_part(number):
            inquiry.to_ask.clear()
            return
        group = inquiry.to_ask.pop(0)
        window = self._storage.more_groups[group - 1].window_blocks
        first = max(0, known + 1 - window)
        inquiry.parts[group] = first, self._asked[number][group].look_up(keys[first:reached], window)

    def learn(self, inquiry: Inquiry) -> int:
        """Takes an answer in. Returns how many of the leading blocks that were asked for the first group can
        bring now."""
        with self._lock:
            (number,) = self._asked
            keys, first = inquiry.keys, inquiry.first
            parent = keys[first - 1] if first else None
            num_known = self._cache.learn(number, parent, keys[first : first + inquiry.num_found])
            for group, (start, question) in inquiry.parts.items():
                for begin, end in question.runs:
                    self._cache.learn(number, None, keys[start + begin : start + end], group)
            return num_known

    def unpin(self, lease: int) -> None:
        with self._lock:
            self._cache.unpin(self._leases.pop(lease, ()))

    # ---- creating ----

    def create_get(self, blocks: BlockKeys | SequenceMeta, tokens: TokenIds | None = None) -> KVTask:
        """Task that brings the leading held blocks to the device; READY. See GlobalCacheEngine.plan_get."""
        with self._lock:
            self.poll()
            return self._add(self._cache.plan_get(blocks, tokens))

    def create_load(self, keys: BlockKeys, cpu_slots: Slots) -> KVTask:
        """Task that brings to the device what another process has in these slots of the CPU tier, int64
        [blocks], and keeps there meanwhile; READY."""
        with self._lock:
            self.poll()
            return self._add(self._cache.plan_load(keys, cpu_slots))

    def create_nothing(self) -> KVTask:
        """Task for which there is nothing to do; COMPLETED."""
        task = KVTask(next(self._ids), None, TaskStatus.READY)
        task.become(TaskStatus.COMPLETED)
        return task

    def create_put(
        self,
        parent: BlockKeys | None,
        keys: BlockKeys,
        tokens: TokenIds | None = None,
        *,
        importance: int = 0,
        on_device: Mapping[int, int] | None = None,
    ) -> KVTask:
        """Task that stores the blocks that the CPU tier does not hold; READY. Its plan is None if there is no
        room. See GlobalCacheEngine.plan_put."""
        with self._lock:
            self.poll()
            return self._add(
                self._cache.plan_put(parent, keys, tokens, importance=importance, on_device=on_device)
            )

    def put(
        self,
        parent: BlockKeys | None,
        keys: BlockKeys,
        tokens: TokenIds | None,
        slots: Slots | SlotsOnTheirWay,
        places_for: Callable[[TransferPlan | None], Slots | None],
    ) -> KVTask:
        """Stores the blocks that the CPU tier does not hold, so that all of them get to the lower tiers:
        ``create_put`` and ``launch`` in one, put off while too much waits for these. ``poll`` starts it then.

        Args:
            slots: device token slots.
            places_for: which blocks of these the plan's blocks are, asked for when the task has its plan.

        Raises:
            ValueError: the slots are not right; if that turns out later the task fails.
        """
        with self._lock:
            self.poll()
            task = KVTask(next(self._ids), None)
            self._tasks[task.task_id] = task
            put = _WaitingPut(task, parent, keys, tokens, slots, places_for)
            if self._waiting_puts or not self._may_put(put):
                self._waiting_puts[task.task_id] = put
                return task
            try:
                self._start_put(put)
            except BaseException:
                self.cancel(task)
                self.forget(task)
                raise
            return task

    def _may_put(self, put: _WaitingPut) -> bool:
        coming: Counter[int] = Counter()
        for task in self._by_graph.values():
            if task.plan is not None and task.plan.kind is PlanKind.PUT:
                for op in task.plan.graph.ops:
                    coming[op.group] += len(op.block_positions)
        return self._cache.may_put(len(put.keys), coming)

    def _start_put(self, put: _WaitingPut) -> None:
        task = put.task
        task.plan = self._cache.plan_put(put.parent, put.keys, put.tokens)
        task.become(TaskStatus.READY)
        if task.plan is not None:
            task.plan.made_room = True
        self.launch(task, put.slots, places=put.places_for(task.plan))

    def _start_puts(self) -> None:
        while self._waiting_puts:
            put = next(iter(self._waiting_puts.values()))
            if not self._may_put(put):
                return
            del self._waiting_puts[put.task.task_id]
            try:
                self._start_put(put)
            except ValueError as error:
                self._finish(put.task, None)
                put.task.error = str(error)
                put.task.become(TaskStatus.RUNNING)
                put.task.become(TaskStatus.FAILED)

    def start_prefetch(self, keys: BlockKeys) -> Fetch | None:
        """Starts to bring the leading held blocks of ``keys`` into the CPU tier. None: nothing to do."""
        with self._lock:
            self.poll()
            pieces = self._reads_in_pieces
            size = max(1, _FETCH_BYTES // self.slot_bytes) if pieces else max(1, len(keys))
            fetch = Fetch([])
            if pieces and len(self._cache.groups) > 1:
                for each in self._cache.plan_prefetches(keys, size):
                    self._start_fetching(fetch, each)
                return fetch if fetch.tasks else None
            for first in range(0, len(keys), size):
                piece = keys[first : first + size]
                plan = self._cache.plan_prefetch(piece)
                if plan is not None:
                    self._start_fetching(fetch, plan)
                # What follows a gap is of no use.
                if (plan.num_blocks if plan is not None else self._cache.match(piece).num_cpu_blocks) < len(
                    piece
                ):
                    break
            return fetch if fetch.tasks else None

    def _start_fetching(self, fetch: Fetch, plan: TransferPlan) -> None:
        task = self._add(plan)
        self.launch(task)
        fetch.tasks.append(task)
        self._fetches[task.task_id] = fetch

    def forget_fetch(self, fetch: Fetch) -> None:
        for task in fetch.tasks:
            self.forget(task)

    def _add(self, plan: TransferPlan | None) -> KVTask:
        task = KVTask(next(self._ids), plan)
        task.become(TaskStatus.READY)
        self._tasks[task.task_id] = task
        self._unlaunched[task.task_id] = task
        for read in plan.reads if plan is not None else ():
            self._reads[read] = task
        return task

    def _finish(self, task: KVTask, result: _core.GraphResult | None) -> None:
        """Ends a task's plan, which gives back what it held; see GlobalCacheEngine.finish."""
        if task.plan is not None:
            for read in task.plan.reads:
                self._reads.pop(read, None)
            self._fetches.pop(task.task_id, None)
            self._cache.finish(task.plan, result)

    # ---- running ----

    def token_slots(self, slot_mapping: object) -> Slots | SlotsOnTheirWay:
        """Token slots for ``launch`` from a torch tensor, a numpy array or a list. What the pool's GPU has is
        copied in the order of its current stream, and nobody waits for what that stream holds."""
        if isinstance(slot_mapping, torch.Tensor):
            if slot_mapping.is_cuda and slot_mapping.device.index == self.device.cuda_device:
                return self._transfer.read_slots(slot_mapping)
            slot_mapping = slot_mapping.detach().cpu().numpy()
        return np.ascontiguousarray(slot_mapping, dtype=np.int64)

    def launch(
        self,
        task: KVTask,
        token_slots: Slots | SlotsOnTheirWay | None = None,
        *,
        places: Slots | None = None,
        gate: _core.LayerGate | None = None,
        wait_events: Sequence[object] = (),
        timeout_s: float = 0.0,
        more_slots: Mapping[int, Slots | SlotsOnTheirWay] | None = None,
    ) -> None:
        """Starts a READY task. One that has ended meanwhile is left alone. A put or a prefetch is cancelled
        instead while too many of its kind are on their way (see TransferEngine).

        Args:
            token_slots: device token slots, int64 [tokens], see ``token_slots``.
            places: which blocks of these the plan's blocks are, int64 [blocks]; None: the first ones.
            gate: opened layer by layer as a get arrives. It must have been told to expect ``num_loads`` of
                every task that shares it, before the first of them is launched. Of a put, a gate with one
                layer that expects ``num_stores``: opened when the device's slots may be written again.
            wait_events: torch.cuda.Event objects that must have happened before the device pool is touched.
            more_slots: slots in the pools of the further groups, int64 [slots], by group: of the last blocks
                of the plan.
        """
        with self._lock:
            if task.ended:
                return
            self._unlaunched.pop(task.task_id, None)
            plan = task.plan
            if plan is None or not plan.graph.ops:
                self._finish(task, None)
                task.become(TaskStatus.COMPLETED)
                return
            if token_slots is not None:
                plan.graph.bind_device_slots(token_slots, self.config.tokens_per_block, places)
                for group, slots in (more_slots or {}).items():
                    of_each = self._storage.more_groups[group - 1].slots_of(self.config.tokens_per_block)
                    there = len(slots) // of_each
                    places = np.arange(plan.num_blocks) - (plan.num_blocks - there)
                    plan.graph.bind_device_slots(slots, of_each, places, group=group)
            task.core_graph = self._transfer.submit(
                plan.graph,
                gate=gate,
                wait_events=[event.cuda_event for event in wait_events],  # type: ignore[attr-defined]
                timeout_s=timeout_s,
                background=plan.kind in (PlanKind.PUT, PlanKind.PREFETCH),
            )
            if task.core_graph == 0:
                self._finish(task, None)
                task.error = "too many transfers are on their way"
                task.become(TaskStatus.CANCELLED)
                return
            task.held_events = list(wait_events)
            task.become(TaskStatus.RUNNING)
            self._by_graph[task.core_graph] = task

    def poll(self) -> list[KVTask]:
        """Takes in what has ended and starts what waited for it. Returns the tasks that ended."""
        ended = []
        with self._lock:
            for result in self._transfer.poll():
                task = self._by_graph.pop(result.graph)
                assert task.plan is not None
                self._finish(task, result)
                if self._trace is not None:
                    self._trace.add(task.plan.kind.value, task.plan.graph, result, self._transfer.name_of)
                task.held_events.clear()
                task.error = result.error
                if task.plan.discarded and task.plan.kind is not PlanKind.GET:
                    task.become(TaskStatus.CANCELLED)  # moved, but not kept
                elif result.done:
                    task.become(TaskStatus.COMPLETED)
                elif any(op.status == _core.OpStatus.FAILED for op in result.ops):
                    task.become(TaskStatus.FAILED)
                else:
                    task.become(TaskStatus.CANCELLED)
                if task.plan.kind is PlanKind.SPILL:
                    self._spills_running[task.plan.parts[0].group, task.plan.tier] -= 1
                    self._tasks.pop(task.task_id, None)
                ended.append(task)
            self._reclaim()
            if not self._closed:
                for (group, number), life in self._lives.items():
                    life.poll()
                    self._start_spills(group, number)
                self._start_puts()
                self._ask_for_parts()
        return ended

    def _reclaim(self) -> None:
        """Cancels tasks that were created and never launched."""
        while self._unlaunched:
            task = next(iter(self._unlaunched.values()))
            age_s = time.monotonic() - task.created_s
            if age_s < self.config.lease_timeout_s:
                return
            logger.warning("task %d was not launched for %.0f s and is cancelled", task.task_id, age_s)
            self.cancel(task)

    def _start_spills(self, group: int, tier: int) -> None:
        while self._spills_running[group, tier] < _SPILLS_MAX:
            plan = self._cache.plan_spill(tier, group)
            if plan is None:
                return
            self._spills_running[group, tier] += 1
            self.launch(self._add(plan))

    def wait(self, tasks: Iterable[KVTask], timeout_s: float) -> bool:
        """Waits until all have ended. False when the time is up first; the tasks go on."""
        deadline = time.monotonic() + timeout_s
        for task in tasks:
            while not task.ended:
                if task.status is TaskStatus.READY:
                    raise RuntimeError(
                        f"task {task.task_id} is {task.status.value}: launch it before waiting"
                    )
                left = deadline - time.monotonic()
                # In steps: a tier that hangs is noticed by poll, and nobody else may be calling it.
                self._transfer.wait(self._what_ends_next(task), max(0.0, min(left, _WAIT_STEP_S)))
                self.poll()
                if left <= 0 and not task.ended:
                    return False
        return True

    def _what_ends_next(self, task: KVTask) -> int:
        """The graph to wait for on behalf of a task: its own, or what holds a put up."""
        with self._lock:
            if task.status is TaskStatus.RUNNING or not self._by_graph:
                return task.core_graph
            spills = (g for g, t in self._by_graph.items() if t.plan and t.plan.kind is PlanKind.SPILL)
            return next(spills, next(iter(self._by_graph)))

    def cancel(self, task: KVTask) -> None:
        """Ends a task that has not started, and asks a running one to end (it does so by itself, soon)."""
        with self._lock:
            if task.status is TaskStatus.RUNNING:
                self._transfer.cancel(task.core_graph)
            elif not task.ended:
                self._unlaunched.pop(task.task_id, None)
                self._waiting_puts.pop(task.task_id, None)
                self._finish(task, None)
                task.become(TaskStatus.CANCELLED)

    def forget(self, task: KVTask) -> None:
        """Drops the record of a task that has ended (or ends by itself)."""
        with self._lock:
            self._tasks.pop(task.task_id, None)

    # ---- all at once ----

    def drain(self, timeout_s: float) -> bool:
        """Waits until no transfer runs; the next ``poll`` takes their outcomes in. False when the time is up
        first."""
        return self._transfer.drain(timeout_s)

    def quiesce(self) -> None:
        """Cancels everything and waits until nothing touches the device. Keeps what the tiers hold. What is
        on its way from or to a lower tier ends by itself: nobody waits for a disk here."""
        with self._lock:
            waiting = [put.task for put in self._waiting_puts.values()]
            for task in [*self._tasks.values(), *self._by_graph.values(), *waiting]:
                self.cancel(task)
            while not self._transfer.drain_device(_QUIESCE_WARN_S):
                logger.warning("still waiting for copies from or to the device to end")
            closed, self._closed = self._closed, True  # no new spills
            self.poll()
            self._closed = closed

    def clear(self) -> None:
        """Forgets every block in every tier. Nothing touches the device when it returns."""
        with self._lock:
            self.quiesce()
            self._tasks.clear()  # nobody comes back for what a flush took away
            self.clear_tiers()

    def clear_tiers(self, *tiers: int) -> None:
        """Forgets every block of these tiers and what is on its way there, in this process and for the next
        one. May come at any time: tasks go on, and a get brings what it was planned for.

        Args:
            tiers: their numbers; none: all of them.
        """
        tiers = tiers or tuple(range(len(self._tier_names)))
        with self._lock:
            self._discard(
                task
                for task in [*self._tasks.values(), *self._by_graph.values()]
                if task.plan is not None and task.plan.tier in tiers
            )
            self._cache.clear(tiers)
            flush = self._name_flush()
            for (_, number), life in self._lives.items():
                if number in tiers:
                    life.clear(flush)

    def _name_flush(self) -> bytes:
        """All ranks flush as often as this one, so it is the same on all of them."""
        self._num_flushes += 1
        return make_namespace({"seed": self._flush_seed.hex(), "flush": self._num_flushes})

    def stop_persisting(self) -> None:
        """Empties the lower tiers and marks them: no other process finds what is in them from now on. For the
        moment when the weights stop being those that the namespace stands for."""
        with self._lock:
            flush = self._name_flush()
            for (group, number), life in self._lives.items():
                self._discard(self._tasks_of(number, group))
                life.stop_persisting(flush)
            self._cache.clear(range(1, len(self._tier_names)))

    @staticmethod
    def _discard(tasks: Iterable[KVTask]) -> None:
        for task in tasks:
            if task.plan is not None:
                task.plan.discarded = True

    def _tasks_of(self, tier: int, group: int) -> list[KVTask]:
        """Running tasks that load from a lower tier of a group or store in it."""
        return [
            task
            for task in self._by_graph.values()
            if task.plan is not None
            and any((op.tier, op.group) == (tier, group) for op in task.plan.graph.ops)
        ]

    def _num_tasks_of(self, tier: int, group: int) -> int:
        return len(self._tasks_of(tier, group))

    def _cancel_tasks_of(self, tier: int, group: int) -> None:
        tasks = self._tasks_of(tier, group)
        self._discard(tasks)
        for task in tasks:
            self.cancel(task)

    def flush_spills(self, timeout_s: float) -> bool:
        """Waits until all that waits for a lower tier is there. False when the time is up first."""
        deadline = time.monotonic() + timeout_s
        while self._cache.num_waiting_spills or self._spills_running.total() or self._waiting_puts:
            if time.monotonic() > deadline:
                return False
            self._transfer.drain(0.05)
            self.poll()
        return True

    def sync(self, timeout_s: float) -> bool:
        """Waits until all that is stored is in the lower tiers and would survive a power failure. False when
        the time is up first, a tier does not let it, or there is none."""
        deadline = time.monotonic() + timeout_s
        return (
            self.flush_spills(timeout_s)
            and bool(self._lives)
            and all(life.sync(max(0.0, deadline - time.monotonic())) for life in self._lives.values())
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if the index is inconsistent, or holds leases or reservations while no task
        runs."""
        with self._lock:
            self.poll()
            # A running task may have been forgotten by its creator; it still owns what it holds.
            known = {**self._tasks, **{task.task_id: task for task in self._by_graph.values()}}
            live = [task for task in known.values() if not task.ended and task.plan is not None]
            parts = [part for task in live if task.plan is not None for part in task.plan.parts]
            for cache in self._cache.groups:
                index, number = cache.index, cache.group
                problem = index.check_integrity()
                assert not problem, f"index of group {number}: {problem}"
                leases = sum(bool(part.lease) for part in parts if part.group == number)
                leases += sum(group == number for held in self._leases.values() for group, _ in held)
                leases += cache.num_waiting_leases
                reservations = sum(bool(part.txn) for part in parts if part.group == number)
                assert index.num_leases == leases, f"{index.num_leases} leases, {leases} with an owner"
                assert index.num_transactions == reservations, (
                    f"{index.num_transactions} reservations, {reservations} with an owner"
                )
            reads = {read for task in live if task.plan is not None for read in task.plan.reads}
            assert self._reads.keys() == reads, f"reads {set(self._reads)}, running are {reads}"

    def load_stats(self) -> list[dict[str, float]]:
        """Of the loads from each tier, by its number: to the device from the CPU tier, to the CPU tier from
        the others. See TransferEngine.stats."""
        stats, name_of = self._transfer.stats(), self._transfer.name_of
        return [
            stats[name_of(TransferType.LOWER2H if tier else TransferType.H2D, tier)]
            for tier in range(len(self._tier_names))
        ]

    def stats(self) -> dict[str, dict[str, float]]:
        """Tiers by name (see CacheEngine.stats and TierLife.stats; saved_write_bytes where not every block is
        admitted; of a further group with its name behind), transfers (see TransferEngine.stats), and tasks:
        how many are kept, because nobody has forgotten them yet, and how many run."""
        with self._lock:
            out: dict[str, dict[str, float]] = {}
            out["tasks"] = {"kept": len(self._tasks), "running": len(self._by_graph)}
            names = ["", *(f" {group.name}" for group in self._storage.more_groups)]
            for cache, storage, of_group in zip(self._cache.groups, self._storage.groups, names, strict=True):
                for number, name in enumerate(self._tier_names):
                    of_tier = out[name + of_group] = cache.stats(number)
                    if number == CPU:
                        continue
                    of_tier.update(self._lives[cache.group, number].stats())
                    if storage.lower[number - 1].admission is Admission.REUSE:
                        saved = max(0, of_tier["offered"] - of_tier["admitted"])
                        of_tier["saved_write_bytes"] = saved * storage.slot_bytes
            out.update(self._transfer.stats())
            return out

    def close(self) -> None:
        """Ends everything and gives memory, files and locks back, except what a medium that hangs keeps: that
        goes with the process. Safe to call twice.

        Raises:
            BaseException: that of the first step that failed, when all others are done.
        """
        with self._lock:
            if self._closed:
                return
            run_all(
                self._flush_before_close,
                self.quiesce,
                self._take_no_more,
                self._write_trace,
                self._stop_tiers,
                self._close_transfer,
                self._close_tiers,
            )

    def _flush_before_close(self) -> None:
        if self._cache.stores_below:
            self.flush_spills(_CLOSE_FLUSH_S)  # the next process finds what is in a lower tier by then

    def _stop_tiers(self) -> None:
        run_all(*(life.stop for life in self._lives.values()))

    def _close_transfer(self) -> None:
        self._hangs = not self._transfer.drain(_CLOSE_WAIT_S)
        if not self._hangs:
            self._transfer.close()

    def _close_tiers(self) -> None:
        steps: list[Callable[[], object]] = [life.close for life in self._lives.values()]
        if self._hangs:  # what it may still write to stays until it has ended
            steps.insert(0, self._transfer.close)
        if not Patience().call(lambda: run_all(*steps), 0.0 if self._hangs else _CLOSE_WAIT_S):
            logger.error(
                "a lower tier does not answer and is left to itself: what it holds goes when it answers, or "
                "with the process"
            )

    def _take_no_more(self) -> None:
        self._closed = True

    def _write_trace(self) -> None:
        path = self.config.trace_file
        if self._trace is None or path is None:
            return
        path = path.with_stem(f"{path.stem}-{self._rank_tag}")
        try:
            num_ops = self._trace.write(path)
        except OSError as error:
            logger.error("trace_file: %s cannot be written: %s", path, error.strerror)
        else:
            logger.info("timeline of the last %d transfers written to %s", num_ops, path)
