"""The engine behind SGLang's interface for an external KV store under the radix tree.

SGLang calls everything here from its scheduler's main thread, in the same order on every rank. What a rank
answers from its own state (a hit, a finished copy) is reduced over the ranks by SGLang's wrapper before it
matters; what SGLang takes as agreed already (``load``, ``offload``) never depends on local state here.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from sglang_flexkv import _core
from sglang_flexkv.cache.load_or_recompute import LoadOrRecompute, Prompt
from sglang_flexkv.common.block import BlockKeys, Namespace, keys_from_page_hashes
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.common.config import GIB, FlexKVConfig, PrefetchPolicy
from sglang_flexkv.integration.layer_counter import LayerLoadCounter
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.integration.page_hashes import PageHashes
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus, as_token_slots

logger = logging.getLogger(__name__)

# Blocks promised to requests that wait in the queue may hold this share of the CPU tier; beyond it the oldest
# promise goes (its request looks again when its turn comes).
_HELD_SHARE_MAX = 0.5
# A promise nobody came back for, say of a request that found its prefix on the device after all.
_HOLD_AGE_MAX_S = 60.0
# A spill of a leaving node waits for its copy. Copies take milliseconds; this is for the day they do not.
_SPILL_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 120.0
# Times that one request waits for reads from SSD. Two or three bring all of a prompt, each what the one
# before left; it takes more if blocks are evicted again meanwhile, which must not go on for ever.
_WAITS_MAX = 8


@dataclass
class _Hold:
    lease: int
    num_cpu_blocks: int  # pinned
    since_s: float


@dataclass
class _Lookup:
    """What the last lookup of a request was about, and what was decided."""

    keys: BlockKeys  # of everything it asked for
    held: npt.NDArray[np.uint8]  # of each leading block that is held the tier that it would come from
    num_to_load: int  # of these

    @property
    def num_cpu_blocks(self) -> int:
        """Leading blocks to load that the CPU tier holds."""
        on_ssd = np.flatnonzero(self.held[: self.num_to_load] != int(_core.Tier.CPU))
        return int(on_ssd[0]) if len(on_ssd) else self.num_to_load

    @property
    def num_ssd_blocks(self) -> int:
        return int(np.count_nonzero(self.held[: self.num_to_load] == int(_core.Tier.SSD)))


@dataclass
class _QueuedLoad:
    task: KVTask
    token_slots: np.ndarray
    complete: bool  # the plan covers all that was promised


@dataclass
class Prefetch:
    """Blocks of one waiting request on their way from SSD to the CPU tier."""

    task: KVTask | None  # None: this rank has nothing to bring; another one has, or somebody else does it
    joined: KVTask | None  # of somebody else, who brings what comes next
    keys: BlockKeys  # of everything the request asked for
    num_ssd_blocks: int
    wait_s: float | None  # None: as long as it takes
    deadline_s: float | None = None  # counted from when the request's turn came

    @property
    def done(self) -> bool:
        return all(task is None or task.ended for task in (self.task, self.joined))

    @property
    def late(self) -> bool:
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s


class FlexKVLinker(UnifiedCacheLinker):
    """Links the tree to one rank's engine."""

    def __init__(
        self,
        engine: KVTaskEngine,
        config: FlexKVConfig,
        namespace: Namespace,
        *,
        num_layers: int,
        single_rank: bool,
        metrics: Metrics,
    ) -> None:
        self.engine = engine
        self.config = config
        self.namespace = namespace
        device = engine.device
        self.on_gpu = device.device.type != "cpu"
        self.layer_done_counter = LayerLoadCounter(
            num_layers,
            engine.make_gate,
            engine.poll,
            # torch.cuda.current_stream() takes ten times as long, and this is asked twice per layer.
            partial(torch._C._cuda_getCurrentRawStream, device.cuda_device) if self.on_gpu else None,
            self.order_spills,
        )
        self.pools = {PoolName.KV: device}
        self._single_rank = single_rank
        self._page = engine.config.tokens_per_block
        self.page_hashes = PageHashes(engine.config.tokens_per_block, namespace)
        self.load_or_recompute = LoadOrRecompute(
            config.load_policy,
            block_bytes=engine.slot_bytes,
            tokens_per_block=engine.config.tokens_per_block,
        )
        self.metrics = metrics
        self._prompts: dict[str, tuple[int, int]] = {}  # tokens on the device, tokens in all
        self._lookups: dict[str, _Lookup] = {}
        self._waits: dict[str, int] = {}  # times that a request waited for a read from SSD
        self._gave_up: set[str] = set()  # requests that load nothing any more: a load of theirs failed
        self._holds: OrderedDict[str, _Hold] = OrderedDict()
        self._held_blocks = 0
        self._queued: OrderedDict[str, _QueuedLoad] = OrderedDict()
        self._loading: dict[int, dict[str, _QueuedLoad]] = {}
        self._offloads: deque[KVTask] = deque()
        # Nodes that left the device, and whose slots no stream has been told to leave alone yet.
        self._spills: list[tuple[_core.LayerGate, KVTask]] = []
        self._closed = False
        self._summary = "in what state is not known"

    def attach_scheduler(self, scheduler: Any) -> None:
        """Asks SGLang where forwards run: with overlap (``event_loop_overlap``) on a stream of their own,
        without on the stream on which batches are scheduled, which is the current one at any call here."""
        self.forward_stream = scheduler.forward_stream if scheduler.enable_overlap else None

    # ---- lookup ----

    def begin_lookup(self, rid: str, device_tokens: int, total_tokens: int) -> None:
        """What the lookup that follows is about, for those that SGLang's interface does not tell it."""
        self._prompts[rid] = (device_tokens, total_tokens)

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Leading pages of the tail that should be loaded; every shorter prefix can be, too."""
        keys = self.page_hashes.keys(rid, transfers[0].keys or ())
        return list(range(1, self._hold(rid, keys) + 1))

    def _hold(self, rid: str, keys: BlockKeys) -> int:
        """Pins the leading held blocks until they are loaded or let go. Returns how many should be loaded."""
        self.release_hold(rid)
        if rid in self._gave_up:
            self._lookups[rid] = _Lookup(keys, np.empty(0, np.uint8), 0)
            return 0
        lease, held = self.engine.hold(keys)
        device_tokens, total_tokens = self._prompts.get(rid, (0, len(keys) * self._page))
        num_cpu_blocks = int(np.count_nonzero(held == int(_core.Tier.CPU)))
        # Asked for only where it matters: this runs at every attempt to match a waiting prompt.
        queued_bytes = self.engine.queued_ssd_read_bytes if num_cpu_blocks < len(held) else 0
        found = _Lookup(
            keys,
            held,
            self.load_or_recompute.blocks_to_load(Prompt(held, device_tokens, total_tokens, queued_bytes)),
        )
        self._lookups[rid] = found
        if len(held) == 0:
            return 0
        if found.num_to_load == 0:
            self.engine.unhold(lease)
            return 0
        self._holds[rid] = _Hold(lease, num_cpu_blocks, time.monotonic())
        self._held_blocks += num_cpu_blocks
        while (
            self._held_blocks > _HELD_SHARE_MAX * self.engine.config.num_cpu_blocks and len(self._holds) > 1
        ):
            self.release_hold(next(iter(self._holds)))
        return found.num_to_load

    def release_hold(self, rid: str) -> None:
        hold = self._holds.pop(rid, None)
        if hold is not None:
            self._held_blocks -= hold.num_cpu_blocks
            self.engine.unhold(hold.lease)

    def forget_request(self, rid: str) -> None:
        """Lets go of everything a request was promised but did not load."""
        self.release_hold(rid)
        found = self._lookups.pop(rid, None)
        if found is not None and len(found.held):
            # Never loaded, so all of it was computed: by decision, or because it did not come to it.
            self.metrics.recomputed((len(found.held) - found.num_to_load) * self._page)
        self._prompts.pop(rid, None)
        self._waits.pop(rid, None)
        self._gave_up.discard(rid)
        self.page_hashes.forget(rid)

    def forget_lookup(self, rid: str) -> None:
        """A request looks again."""
        self._lookups.pop(rid, None)

    def give_up(self, rid: str) -> None:
        """A load of this request failed: until it ends it loads nothing any more."""
        self._gave_up.add(rid)

    def tick(self) -> None:
        """Called at each step of the scheduler: takes in what has ended, and lets go of promises that are too
        old."""
        self.engine.poll()
        self.metrics.spill_dropped(self.engine.num_spill_dropped_blocks)
        oldest = next(iter(self._holds.items()), None)
        if oldest is not None and time.monotonic() - oldest[1].since_s > _HOLD_AGE_MAX_S:
            self.forget_request(oldest[0])

    # ---- prefetch: SSD -> CPU while the request waits ----

    def ssd_part(self, rid: str) -> tuple[int, int]:
        """Of what the last lookup of ``rid`` decided to load: the first token of the prompt that only SSD
        holds, and how many blocks."""
        found = self._lookups.get(rid)
        if found is None:
            return 0, 0
        device_tokens, _ = self._prompts.get(rid, (0, 0))
        return device_tokens + found.num_cpu_blocks * self._page, found.num_ssd_blocks

    def hides_its_reads(self, rid: str, chunk_tokens: int | None) -> bool:
        """Whether what the last lookup decided to load from SSD is read while the request's first chunk is
        computed. If not, a forward would wait for the disk, and with it all that run beside the request."""
        found = self._lookups.get(rid)
        costs = self.load_or_recompute
        if found is None or not (costs.prefill.known and costs.from_ssd.known):
            return False
        device_tokens, total_tokens = self._prompts.get(rid, (0, 0))
        start = min(total_tokens, device_tokens + found.num_to_load * self._page)
        end = min(total_tokens, start + chunk_tokens) if chunk_tokens else total_tokens
        read_s = costs.from_ssd.seconds(
            self.engine.queued_ssd_read_bytes + found.num_ssd_blocks * self.engine.slot_bytes
        )
        return read_s <= costs.prefill.seconds(start, end)

    def may_wait(self, rid: str, before: Prefetch | None) -> bool:
        """Whether a request may wait for a read from SSD, after ``before`` if it has just waited."""
        return (
            self.config.prefetch_policy is not PrefetchPolicy.BEST_EFFORT
            and rid not in self._gave_up
            and self._waits.get(rid, 0) < _WAITS_MAX
            and not (before is not None and before.late)
        )

    def read_to_join(self, rid: str) -> KVTask | None:
        """Somebody else's read that brings from SSD what ``rid`` should load next, if waiting for it beats
        computing. Until it has ended no lookup finds these blocks."""
        found = self._lookups.get(rid)
        if found is None or not self.engine.num_ssd_reads:
            return None
        # What it found on SSD (the read may have begun later), and where it ended.
        for first in sorted({found.num_cpu_blocks, len(found.held)} - {len(found.keys)}):
            task = self.engine.find_read(found.keys[first])
            if task is not None:
                return task if self._is_worth_waiting(rid, found, first, task) else None
        return None

    def _is_worth_waiting(self, rid: str, found: _Lookup, first: int, read: KVTask) -> bool:
        """Whether to wait for a read that brings the block ``first`` of a prompt, and more behind it."""
        device_tokens, total_tokens = self._prompts.get(rid, (0, len(found.keys) * self._page))
        reached = self.engine.match(found.keys).num_blocks  # with what is being read
        num_bytes = self.engine.queued_ssd_read_bytes
        if read.status is TaskStatus.READY and read.plan is not None:
            num_bytes += read.plan.num_ssd_blocks * self.engine.slot_bytes
        return self.load_or_recompute.is_worth_waiting(
            num_bytes,
            device_tokens + first * self._page,
            device_tokens + reached * self._page,
            total_tokens,
        )

    def start_prefetch(
        self, rid: str, joined: KVTask | None = None, before: Prefetch | None = None
    ) -> Prefetch:
        """Starts to bring what the last lookup of ``rid`` decided to load from SSD to the CPU tier.

        Args:
            joined: a task of somebody else that the request waits for as well.
            before: the wait that this one continues: both together may take as long as one.
        """
        found = self._lookups.get(rid)
        keys = found.keys if found is not None else np.empty((0, 2), np.uint64)
        task = self.engine.start_prefetch(keys[: found.num_to_load if found is not None else 0])
        if task is not None:
            self.release_hold(rid)  # the plan has leases of its own
        self._waits[rid] = self._waits.get(rid, 0) + 1
        wait_s = {
            PrefetchPolicy.BEST_EFFORT: 0.0,
            PrefetchPolicy.TIMEOUT: self.config.prefetch_timeout_s,
            PrefetchPolicy.WAIT_COMPLETE: None,
        }[self.config.prefetch_policy]
        return Prefetch(
            task,
            joined,
            keys,
            task.plan.num_ssd_blocks if task is not None and task.plan is not None else 0,
            wait_s,
            before.deadline_s if before is not None else None,
        )

    def prefetch_ready(self, prefetch: Prefetch) -> bool:
        """Whether the request should stop waiting: all is there, or it has let others pass for long enough.
        Asked when its turn comes."""
        self.engine.poll()
        if prefetch.deadline_s is None and prefetch.wait_s is not None:
            prefetch.deadline_s = time.monotonic() + prefetch.wait_s
        return prefetch.done or prefetch.late

    def end_prefetch(self, rid: str, prefetch: Prefetch) -> int:
        """Ends a prefetch, keeping what has arrived pinned for the request. Returns the blocks that came from
        SSD. One that is still running goes on by itself: whoever comes next joins it, or hits."""
        arrived = 0
        if prefetch.task is not None:
            if prefetch.task.status is TaskStatus.COMPLETED:
                arrived = prefetch.num_ssd_blocks
            self.engine.forget(prefetch.task)
        self._hold(rid, prefetch.keys)
        return arrived

    # ---- load: CPU -> device, layer by layer under the forward ----

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        (transfer,) = transfers
        keys = self.page_hashes.keys(rid, transfer.keys or ())
        task = self.engine.create_get(keys)
        self.release_hold(rid)  # the plan has a lease of its own now
        complete = task.plan is not None and task.plan.num_blocks == len(keys)
        if not complete and self._single_rank:
            # No room for what comes from SSD: the request is recomputed.
            self.engine.cancel(task)
            self.engine.forget(task)
            return False
        found = self._lookups.pop(rid, None)
        if found is not None:
            self.metrics.recomputed((len(found.held) - len(keys)) * self._page)
        self._queued[rid] = _QueuedLoad(task, as_token_slots(transfer.device_indices), complete)
        return True

    def ssd_span(self, rid: str) -> tuple[int, int]:
        """Of a queued load: its first block that comes from SSD, and how many blocks from there on do."""
        queued = self._queued.get(rid)
        if queued is None or queued.task.plan is None or not queued.task.plan.num_ssd_blocks:
            return 0, 0
        (read,) = (op for op in queued.task.plan.graph.ops if not op.transfer_type.touches_device)
        return int(read.block_positions[0]), len(read.block_positions)

    def cancel_queued_load(self, rid: str) -> bool:
        queued = self._queued.pop(rid, None)
        if queued is None:
            return False
        self.engine.cancel(queued.task)
        self.engine.forget(queued.task)
        return True

    def start_layer_wise_loading(self) -> int:
        self.order_spills()  # what is loaded may go to slots of a node that left
        if not self._queued:
            return -1
        batch, self._queued = self._queued, OrderedDict()
        loads = batch.values()
        index, gate = self.layer_done_counter.open_batch()
        # On a GPU work queued before may still use the slots: stream order, not a host wait.
        events = self.record_offload_ready() if self.on_gpu else []
        # Announced before the first one starts: one that lands before the next is announced would open the
        # gate for both.
        for load in loads:
            load.complete = load.complete and not load.task.ended
        expected = sum(load.task.num_loads for load in loads if load.complete)
        gate.expect(expected)
        if not expected:
            self.layer_done_counter.close_batch(index)  # nobody would ever open it
        for load in loads:
            if load.complete:
                self.engine.launch(load.task, load.token_slots, gate=gate, wait_events=events)
            else:
                self.engine.cancel(load.task)
        self._loading[index] = batch
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> set[str]:
        """Waits until nothing of the batch is written any more.

        Returns:
            The requests whose load landed. A verdict for each, where SGLang's own wrapper takes one for all.
        """
        batch = self._loading.pop(counter_index, None)
        if batch is None:  # a flush took the batch away: what its slots hold is anybody's guess
            return set()
        running = [load.task for load in batch.values() if not load.task.ended]
        while not self.engine.wait(running, _FINISH_TIMEOUT_S):
            # The slots belong to requests that live: nobody may go on while something writes to them.
            logger.error("a load has not ended after %.0f s; still waiting for it", _FINISH_TIMEOUT_S)
        # What has landed since a forward went on without waiting may have been read before.
        waited = self.layer_done_counter.close_batch(counter_index)
        landed = set()
        for rid, load in batch.items():
            if waited and load.task.status is TaskStatus.COMPLETED:
                landed.add(rid)
                if (plan := load.task.plan) is not None:
                    self.metrics.loaded("cpu", (plan.num_blocks - plan.num_ssd_blocks) * self._page)
                    self.metrics.loaded("ssd", plan.num_ssd_blocks * self._page)
            self.engine.forget(load.task)
        self._learn_speeds()
        return landed

    def _learn_speeds(self) -> None:
        stats = self.engine.transfer_stats()
        for link, name in (
            (self.load_or_recompute.to_device, "H2D"),
            (self.load_or_recompute.from_ssd, "DISK2H"),
        ):
            link.observe(stats[name]["bytes"], stats[name]["busy_s"])

    # ---- offload: device -> CPU ----

    def offload(
        self,
        transfers: list[PoolTransfer],
        session_id: str | None = None,
        *,
        parent_hash: str | None = None,
        importance: int = 0,
    ) -> bool:
        """Queues a node's pages. Always accepted, on every rank alike; no room is a failed offload later."""
        self._offloads.append(self._start_put(transfers, parent_hash, importance))
        return True

    def spill(self, transfers: list[PoolTransfer], parent_hash: str | None) -> None:
        """Stores a node that is about to leave the device, and returns when its slots may be given to others.

        On a GPU that is at once. Before the next forward is queued, or the next load, the stream of
        forwards, which alone writes to the slots, is told to wait for the copy; loads wait for what is on
        that stream."""
        gate = self.engine.make_gate(1) if self.on_gpu else None
        task = self._start_put(transfers, parent_hash, gate=gate)
        if gate is not None and not task.ended:
            self._spills.append((gate, task))
            return
        self._end_spill(task)

    def order_spills(self) -> None:
        """Puts what comes next on the stream of forwards behind the copies of nodes that have left."""
        if not self._spills:
            return
        spills, self._spills = self._spills, []
        stream = self.forward_stream or torch.cuda.current_stream()
        for gate, task in spills:
            if gate.stream_wait(0, stream.cuda_stream, _SPILL_TIMEOUT_S):
                self.engine.forget(task)
            else:
                self._end_spill(task)

    def _end_spill(self, task: KVTask) -> None:
        if not task.ended and not self.engine.wait([task], _SPILL_TIMEOUT_S):
            logger.error("a spill has not ended after %.0f s; its node is dropped", _SPILL_TIMEOUT_S)
            self.engine.cancel(task)
            while not self.engine.wait([task], _SPILL_TIMEOUT_S):
                pass
        self.engine.forget(task)

    def _start_put(
        self,
        transfers: Sequence[PoolTransfer],
        parent_hash: str | None,
        importance: int = 0,
        gate: _core.LayerGate | None = None,
    ) -> KVTask:
        (transfer,) = transfers
        keys = keys_from_page_hashes(transfer.keys or (), self.namespace)
        parent = keys_from_page_hashes([parent_hash], self.namespace)[0] if parent_hash else None
        task = self.engine.create_put(parent, keys, importance=importance)
        if task.plan is None:
            self.metrics.put_without_room()
            self.engine.cancel(task)  # a failed offload, tried again at the next use
            return task
        # Asking a GPU tensor for its values waits for the stream that computed them, so only where needed.
        slots = as_token_slots(transfer.device_indices) if task.plan.graph.ops else None
        events = self.record_offload_ready() if self.on_gpu and slots is not None else []
        if gate is not None:
            gate.expect(1)
        self.engine.launch(task, slots, gate=gate, wait_events=events)
        return task

    def wait_for_offloads(self) -> None:
        """Waits until the copies of all offloads have ended. One that hangs is left."""
        running = [task for task in self._offloads if not task.ended]
        if not self.engine.wait(running, _SPILL_TIMEOUT_S):
            logger.error("an offload has not ended after %.0f s", _SPILL_TIMEOUT_S)

    def num_completed_offloads(self) -> int:
        self.engine.poll()
        count = 0
        for task in self._offloads:
            if not task.ended:
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        task = self._offloads.popleft()
        self.engine.forget(task)
        return task.status is TaskStatus.COMPLETED

    # ---- lifecycle ----

    def reset(self) -> None:
        """SGLang's flush. It also runs after the weights changed, when nothing that was computed before
        may be used again, so every tier is emptied."""
        self._abandon()
        self.engine.clear()

    def clear_storage(self) -> None:
        """Forgets what the tiers hold, for this process and the next one. Not a reset: it may come at any
        time, and copies that run still have somebody who waits for them."""
        for rid in list(self._holds):
            self.release_hold(rid)
        self.engine.clear_tiers(_core.Tier.CPU, _core.Tier.SSD)

    def weights_changed(self) -> None:
        """No other process may find what is stored from now on, nor what was stored and may now be mixed with
        it: the names of blocks stand for the weights that this process has loaded. For this process nothing
        changes; whether it may go on with old KV is SGLang's to say, which flushes if not."""
        logger.info("sglang-flexkv: the weights change; KV on SSD is for this process only from now on")
        self.engine.stop_persisting()

    def close(self) -> None:
        """Ends everything. The log says what the cache did, and whether anything was left held.

        Raises:
            BaseException: that of the first step that failed, when all others are done.
        """
        if self._closed:
            return
        self._closed = True
        run_all(self._sum_up, self._abandon, self.engine.close, self._log_summary)

    def _sum_up(self) -> None:
        try:
            self.check_idle()
            left = "nothing left held"
        except AssertionError as error:
            left = f"closed while busy ({error})"
        stats = self.engine.stats()
        moved = ", ".join(f"{name} {s['bytes'] / GIB:.2f} GiB" for name, s in stats.items() if "bytes" in s)
        saved = stats["SSD"].get("saved_write_bytes", 0.0)
        if saved:
            moved += f"; not written to SSD because it came only once: {saved / GIB:.2f} GiB"
        self._summary = f"{left}; moved {moved}"

    def _log_summary(self) -> None:
        logger.info("sglang-flexkv closed: %s", self._summary)

    def _abandon(self) -> None:
        for rid in list(self._holds):
            self.release_hold(rid)
        self._lookups.clear()
        self._prompts.clear()
        self._waits.clear()
        self._gave_up.clear()
        self.page_hashes.clear()
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        self._loading.clear()
        self._offloads.clear()
        self._spills.clear()
        self.layer_done_counter.reset()

    def check_idle(self) -> None:
        """Raises AssertionError if anything is held, queued or in flight."""
        assert not self._holds, f"promises left: {list(self._holds)}"
        assert not self._queued, "loads left in the queue"
        assert not self._loading, "loads left running"
        assert not self._offloads, "offloads left"
        for notes in (self._prompts, self._lookups, self._waits, self._gave_up):
            assert not notes, f"notes left on requests that have ended: {list(notes)}"
        self.engine.check_integrity()
