"""The engine behind SGLang's interface for an external KV store under the radix tree.

SGLang calls everything here from its scheduler's main thread, in the same order on every rank. What is
answered from this rank's own state (a hit, a finished copy) is made common before it matters (``ranks``).
What SGLang takes as agreed already (``load``, ``offload``) never depends on local state here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from sglang_flexkv import _core
from sglang_flexkv.cache.load_or_recompute import LoadOrRecompute, Prompt
from sglang_flexkv.common.block import BlockKeys, Namespace, keys_from_page_hashes
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.common.config import GIB, FlexKVConfig
from sglang_flexkv.common.lower_tier import CPU
from sglang_flexkv.common.transfer import Slots, SlotsOnTheirWay
from sglang_flexkv.integration.compat.kv_events import NodeTokens
from sglang_flexkv.integration.compat.linker_interface import PoolName, PoolTransfer, UnifiedCacheLinker
from sglang_flexkv.integration.compat.scheduler import SchedulerView
from sglang_flexkv.integration.layer_counter import LayerLoadCounter
from sglang_flexkv.integration.metrics import Metrics
from sglang_flexkv.integration.one_copy import OneCopy
from sglang_flexkv.integration.page_hashes import PageHashes
from sglang_flexkv.integration.request_state import NOTHING_FOUND, Lookup, RequestStates
from sglang_flexkv.integration.tier_events import TierEvents
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus

logger = logging.getLogger(__name__)

# Leases of requests that wait in the queue may pin this share of the CPU tier.
_LEASED_SHARE_MAX = 0.5
# A leaving node waits for its copy. Copies take milliseconds; this is for the day they do not.
_WRITE_BACK_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 120.0
# Figures of the remote tier are told so often.
_METRICS_EVERY_S = 1.0
# Those of them that further groups add to.
_OF_ALL_GROUPS = {
    *("times_out", "lookups_failed", "lookup_s", "there_already", "full"),
    *("compressed_bytes", "compressed_to_bytes", "expanded_bytes"),
}


@dataclass
class _Load:
    """What one request of a batch loads."""

    task: KVTask
    token_slots: Slots | SlotsOnTheirWay
    complete: bool  # the plan covers all that was agreed on
    lease: int  # on what all ranks of a machine load; 0: each has a cache of its own
    more_slots: Mapping[int, Slots | SlotsOnTheirWay]  # in the pools of further groups


class FlexKVLinker(UnifiedCacheLinker):
    """Links the tree to one rank's engine. Requests go by their names (``compat.requests``)."""

    def __init__(
        self,
        engine: KVTaskEngine,
        config: FlexKVConfig,
        namespace: Namespace,
        *,
        num_layers: int,
        single_rank: bool,
        metrics: Metrics,
        by_layer: bool = True,
        has_draft: bool = False,
        reads_under_forwards: bool = True,
        one_copy: OneCopy | None = None,
        num_lower_tiers: int | None = None,
    ) -> None:
        """
        Args:
            one_copy: that this rank has in common with others; the engine is its keeper's, or has nothing.
            num_lower_tiers: of the keeper; None: of the engine.
            reads_under_forwards: a forward may wait for what its requests read from disks. If not, it loads
                what the CPU tier holds, and a load does not fail for a disk's sake.
        """
        self.engine = engine
        self.config = config
        self.namespace = namespace
        self.metrics = metrics
        device = engine.device
        self.on_gpu = device.device.type != "cpu"
        self.layer_done_counter = LayerLoadCounter(
            num_layers,
            engine.make_gate,
            engine.poll,
            # torch.cuda.current_stream() takes ten times as long, and this is asked twice per layer.
            partial(torch._C._cuda_getCurrentRawStream, device.cuda_device) if self.on_gpu else None,
            self.order_write_backs,
            by_layer=by_layer,
        )
        # The tree's components by the engine's groups; what has no part here the tree does not offer.
        self.pools: dict[PoolName, object] = {PoolName.KV: device}
        self._group_names = [PoolName.KV, *(PoolName(name) for name in engine.group_names)]
        self.pools.update(dict.fromkeys(self._group_names[1:], None))
        self.has_parts = len(self._group_names) > 1
        self._single_rank = single_rank
        self._has_draft = has_draft
        self._page = engine.config.tokens_per_block
        self._reads_under_forwards = reads_under_forwards
        self._one_copy = one_copy
        self._keeps = one_copy is None or one_copy.keeps
        if num_lower_tiers is None:
            num_lower_tiers = len(engine.tier_names) - 1
        self.has_lower_tiers = num_lower_tiers > 0
        # Tiers whose blocks have to be in the CPU tier before a forward loads them.
        self.read_before = (
            engine.asked_tiers if reads_under_forwards else frozenset(range(1, num_lower_tiers + 1))
        )
        self.page_hashes = PageHashes(self._page, namespace)
        self.load_or_recompute = LoadOrRecompute(
            config.load_policy,
            block_bytes=engine.slot_bytes,
            tokens_per_block=self._page,
            loaded_before=self.read_before,
            windows=engine.windows,
        )
        self.states = RequestStates(engine.unpin, _LEASED_SHARE_MAX * engine.config.num_cpu_blocks)
        self.tier_events = TierEvents(engine, namespace) if engine.watched else None
        self._blocks_per_window = engine.blocks_per_window
        self._next_batch: dict[str, _Load] = {}  # of the requests admitted so far, in the order of admission
        self._loading: dict[int, dict[str, _Load]] = {}  # batches that run, by their gate's index
        self._ended_leases: list[int] = []  # of loads that have ended here, and may not have elsewhere
        self._offloads: deque[KVTask] = deque()
        # Nodes that left the device, and whose slots no stream has been told to leave alone yet.
        self._write_backs: list[tuple[_core.LayerGate, KVTask]] = []
        self._told_metrics_s = 0.0
        self._closed = False
        self._summary = "in what state is not known"

    def attach_scheduler(self, scheduler: SchedulerView) -> None:
        self.forward_stream = scheduler.forward_stream

    # ---- lookup: what is held of a prompt, and how much of it should be loaded ----

    def begin_lookup(self, rid: str, device_tokens: int, total_tokens: int) -> None:
        """What the lookup that follows is about, which SGLang's interface does not say."""
        state = self.states.of(rid)
        state.device_tokens, state.total_tokens = device_tokens, total_tokens

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Leading pages of the tail that should be loaded, and the shorter prefixes that can be, too."""
        if not self._keeps:
            return list(range(1, len(transfers[0].keys or ()) + 1))  # as many as the keeper says
        keys = self.page_hashes.keys(rid, transfers[0].keys or ())
        num_pages = self.find_and_pin(rid, keys)
        ready = self.states.known(rid).found.ready
        if ready is None:
            return list(range(1, num_pages + 1))
        shorter: list[int] = ready[ready <= num_pages].tolist()
        return shorter

    def find_and_pin(self, rid: str, keys: BlockKeys) -> int:
        """Pins the leading blocks that are held until they are loaded or let go. Returns how many should be
        loaded by the request's forward."""
        self.states.end_lease(rid)
        state = self.states.of(rid)
        if state.gave_up:
            state.found = replace(NOTHING_FOUND, keys=keys)
            return 0
        lease, pinned = self.engine.pin(keys)
        held, ends, num_held = pinned.tiers, pinned.ends, pinned.num_held
        num_cpu_blocks = int(np.count_nonzero(held == CPU))
        # Asked for only where it matters: this runs at every attempt to match a waiting prompt.
        queued_bytes = self.engine.queued_read_bytes() if num_cpu_blocks < len(held) else {}
        prompt = Prompt(held, state.device_tokens, state.total_tokens, queued_bytes, ends)
        num_to_load = self.load_or_recompute.blocks_to_load(prompt)
        if ends is not None and 0 < num_to_load < len(held):
            self.engine.unpin(lease)  # a shorter prefix needs other windows
            lease, pinned = self.engine.pin(keys[:num_to_load])
            held = pinned.tiers
            num_to_load = len(held)
        state.found = Lookup(keys, held, num_to_load, self.read_before, pinned.ready, num_held)
        if state.found.num_to_load:
            # Each pins a window as well, or a state, of which a tier may have few.
            self.states.add_lease(rid, lease, max(num_cpu_blocks, self._blocks_per_window))
        elif len(held):
            self.engine.unpin(lease)
        return state.found.num_for_forward

    def forget_lookup(self, rid: str) -> None:
        """A request looks again; what it found before does not count."""
        self.states.known(rid).found = NOTHING_FOUND

    def forget_request(self, rid: str) -> None:
        """A request has ended, or will look again from the start."""
        found = self.states.forget(rid).found
        # Never loaded, so all of it was computed: by decision, or because it did not come to it.
        self.metrics.recomputed((len(found.held) - found.num_to_load) * self._page)
        self.page_hashes.forget(rid)

    def give_up(self, rid: str) -> None:
        """A load of this request failed: until it ends it loads nothing any more."""
        self.states.of(rid).gave_up = True

    def tick(self) -> None:
        """Called at each step of the scheduler: takes in what has ended, and ends leases that are too old."""
        self.engine.poll()
        self.metrics.spill_dropped(self.engine.num_spill_dropped_blocks)
        self.states.end_old_leases()
        now_s = time.monotonic()
        if self.metrics.wants_remote and now_s - self._told_metrics_s >= _METRICS_EVERY_S:
            self._told_metrics_s = now_s
            self.metrics.remote(self._remote_figures())

    def _remote_figures(self) -> dict[str, float]:
        stats = self.engine.stats()
        (number,) = self.engine.asked_tiers
        name = self.engine.tier_names[number]
        loads, stores = stats[f"{name}2H"], stats[f"H2{name}"]
        of_tier = dict(stats[name])
        for group in self.engine.group_names:  # prompts, hits and misses are what the first one says
            of_group = stats[f"{name} {group}"]
            of_tier["online"] = min(of_tier["online"], of_group["online"])
            for figure in _OF_ALL_GROUPS & of_group.keys() & of_tier.keys():
                of_tier[figure] += of_group[figure]
        return {
            **of_tier,
            "loaded_bytes": loads["bytes"],
            "loading_s": loads["busy_s"],
            "missing_blocks": loads["missing_blocks"],
            "corrupt_blocks": loads["corrupt_blocks"],
            "stored_bytes": stores["bytes"],
            "storing_s": stores["busy_s"],
        }

    # ---- load: CPU -> device, layer by layer under the forward ----

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        transfer = transfers[0]
        keys = self.page_hashes.keys(rid, transfer.keys or ())
        get = self._get_here(keys) if self._one_copy is None else self._get_together(keys, self._one_copy)
        self.states.end_lease(rid)  # the plan has a lease of its own now
        if get is None:
            return False  # the request is recomputed
        task, complete, lease = get
        state = self.states.of(rid)
        self.metrics.recomputed(max(0, len(state.found.held) - len(keys)) * self._page)
        state.found = NOTHING_FOUND  # counted
        self._next_batch[rid] = _Load(
            task,
            self.engine.token_slots(transfer.device_indices),
            complete,
            lease,
            self._more_slots(transfers),
        )
        return True

    def _get_here(self, keys: BlockKeys) -> tuple[KVTask, bool, int] | None:
        """A get from this rank's own tiers, and whether it covers all that was agreed on. None: it does not,
        and no other rank has to be told."""
        task = self.engine.create_get(keys)
        plan = task.plan
        complete = plan is not None and plan.num_blocks == len(keys)
        if plan is not None and plan.num_lower_blocks and not self._reads_under_forwards:
            complete = False  # evicted since it was found
        if not complete and self._single_rank:
            # No room for what comes from a lower tier, or not in time.
            self._drop(task)
            return None
        return task, complete, 0

    def _get_together(self, keys: BlockKeys, one_copy: OneCopy) -> tuple[KVTask, bool, int] | None:
        """A get from what the ranks of this machine have in common, and the keeper's lease for all of them.
        None, on every rank, if a keeper cannot bring all of it."""
        task, slots, lease = None, None, 0
        if one_copy.keeps:
            task = self.engine.create_get(keys)
            if (plan := task.plan) is not None and plan.num_blocks == len(keys) and not plan.num_lower_blocks:
                slots = plan.cpu_slots
                lease, _ = self.engine.pin(keys)
        agreed = one_copy.slots_to_load(slots, len(keys))
        if agreed is None:
            self.engine.unpin(lease)
            if task is not None:
                self._drop(task)
            return None
        return task or self.engine.create_load(keys, agreed), True, lease

    def _drop(self, task: KVTask) -> None:
        self.engine.cancel(task)
        self.engine.forget(task)

    def _more_slots(self, transfers: Sequence[PoolTransfer]) -> dict[int, Slots | SlotsOnTheirWay]:
        """By further group the slots of the last blocks, as many as it has of them."""
        return {
            self._group_names.index(transfer.name): self.engine.token_slots(transfer.device_indices)
            for transfer in transfers[1:]
        }

    def storage_span(self, rid: str) -> tuple[int, int]:
        """Of a queued load: its first block that comes from a lower tier (SGLang's word is storage), and how
        many blocks do."""
        load = self._next_batch.get(rid)
        if load is None or load.task.plan is None or not load.task.plan.num_lower_blocks:
            return 0, 0
        lower = np.flatnonzero(load.task.plan.tiers)
        return int(lower[0]), len(lower)

    def sources(self, rid: str) -> dict[str, int]:
        """Tokens that a request has from lower tiers when its queued load has ended, by the tier's name for
        clients."""
        blocks = self.states.known(rid).brought.copy()
        load = self._next_batch.get(rid)
        if load is not None and load.task.plan is not None:
            blocks += load.task.plan.lower_blocks
        return {self.engine.tier_kinds[n]: count * self._page for n, count in sorted(blocks.items())}

    def cancel_queued_load(self, rid: str) -> bool:
        load = self._next_batch.pop(rid, None)
        if load is None:
            return False
        self._drop(load.task)
        self.engine.unpin(load.lease)
        return True

    def start_layer_wise_loading(self) -> int:
        self.order_write_backs()  # what is loaded may go to slots of a node that left
        if not self._next_batch:
            return -1
        batch, self._next_batch = self._next_batch, {}
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
                self.engine.launch(
                    load.task,
                    load.token_slots,
                    gate=gate,
                    wait_events=events,
                    more_slots=load.more_slots,
                )
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
                    for number, name in enumerate(self.engine.tier_names):
                        self.metrics.loaded(name, plan.num_blocks_from(number) * self._page)
            self.engine.forget(load.task)
            if load.lease:
                self._ended_leases.append(load.lease)
        self._learn_speeds()
        return landed

    def loads_have_ended_everywhere(self) -> None:
        """Those that ``finish_layer_wise_loading`` was about, on all ranks."""
        for lease in self._ended_leases:
            self.engine.unpin(lease)
        self._ended_leases.clear()

    def _learn_speeds(self) -> None:
        loads, costs = self.engine.load_stats(), self.load_or_recompute
        for number, of_tier in enumerate(loads):
            link = costs.to_device if number == CPU else costs.from_tier[number]
            link.observe(of_tier["bytes"], of_tier["busy_s"])

    # ---- offload: device -> CPU ----

    def offload(
        self,
        transfers: list[PoolTransfer],
        session_id: str | None = None,
        *,
        parent_hash: str | None = None,
        importance: int = 0,
        tokens: NodeTokens | None = None,
    ) -> bool:
        """Queues a node's pages. Always accepted, on every rank alike; no room is a failed offload later.

        Args:
            tokens: of the pages, if routers are to be told of them.
        """
        self._offloads.append(self._start_put(transfers, parent_hash, importance, tokens=tokens))
        return True

    def write_back(
        self, transfers: list[PoolTransfer], parent_hash: str | None, tokens: NodeTokens | None = None
    ) -> None:
        """Stores a node that is about to leave the device, and returns when its slots may be given to others.

        On a GPU that is at once. Before the next forward is queued, or the next load, the stream of
        forwards, which alone writes to the slots, is told to wait for the copy; loads wait for what is on
        that stream."""
        gate = self.engine.make_gate(1) if self.on_gpu else None
        task = self._start_put(transfers, parent_hash, gate=gate, tokens=tokens)
        if gate is not None and not task.ended:
            self._write_backs.append((gate, task))
            if self._has_draft:  # it writes to slots before the forward of the target is announced
                self.order_write_backs()
            return
        self._end_write_back(task)

    def order_write_backs(self) -> None:
        """Puts what comes next on the stream of forwards behind the copies of nodes that have left."""
        if not self._write_backs:
            return
        write_backs, self._write_backs = self._write_backs, []
        stream = self.forward_stream or torch.cuda.current_stream()
        for gate, task in write_backs:
            if gate.stream_wait(0, stream.cuda_stream, _WRITE_BACK_TIMEOUT_S):
                self.engine.forget(task)
            else:
                self._end_write_back(task)

    def _end_write_back(self, task: KVTask) -> None:
        if not task.ended and not self.engine.wait([task], _WRITE_BACK_TIMEOUT_S):
            logger.error(
                "a write-back has not ended after %.0f s; its node is dropped", _WRITE_BACK_TIMEOUT_S
            )
            self.engine.cancel(task)
            while not self.engine.wait([task], _WRITE_BACK_TIMEOUT_S):
                pass
        self.engine.forget(task)

    def _start_put(
        self,
        transfers: Sequence[PoolTransfer],
        parent_hash: str | None,
        importance: int = 0,
        gate: _core.LayerGate | None = None,
        tokens: NodeTokens | None = None,
    ) -> KVTask:
        if not self._keeps:
            return self.engine.create_nothing()
        transfer, *others = transfers
        keys = keys_from_page_hashes(transfer.keys or (), self.namespace)
        parent = keys_from_page_hashes([parent_hash], self.namespace)[0] if parent_hash else None
        on_device = {self._group_names.index(other.name): len(other.keys or ()) for other in others}
        task = self.engine.create_put(parent, keys, importance=importance, on_device=on_device)
        if self.tier_events is not None and tokens is not None:
            self.tier_events.note(parent, keys, tokens)
        if task.plan is None:
            self.metrics.put_without_room()
            self.engine.cancel(task)  # a failed offload, tried again at the next use
            return task
        slots = self.engine.token_slots(transfer.device_indices) if task.plan.graph.ops else None
        more_slots = self._more_slots(transfers) if slots is not None else {}
        events = self.record_offload_ready() if self.on_gpu and slots is not None else []
        if gate is not None:
            gate.expect(task.num_stores)
        self.engine.launch(task, slots, gate=gate, wait_events=events, more_slots=more_slots)
        return task

    def wait_for_offloads(self) -> None:
        """Waits until the copies of all offloads have ended. One that hangs is left."""
        running = [task for task in self._offloads if not task.ended]
        if not self.engine.wait(running, _WRITE_BACK_TIMEOUT_S):
            logger.error("an offload has not ended after %.0f s", _WRITE_BACK_TIMEOUT_S)

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
        if self.tier_events is not None:
            self.tier_events.clear()

    def clear_storage(self) -> None:
        """Forgets what the tiers hold, for this process and the next one. Not a reset: it may come at any
        time, and copies that run still have somebody who waits for them."""
        self.states.end_leases()
        self.engine.clear_tiers()

    def weights_changed(self) -> None:
        """No other process may find what is stored from now on, nor what was stored and may now be mixed with
        it: the names of blocks stand for the weights that this process has loaded. For this process nothing
        changes; whether it may go on with old KV is SGLang's to say, which flushes if not."""
        logger.info("sglang-flexkv: the weights change; only this process finds KV in lower tiers now")
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
        for name in self.engine.tier_names:
            if saved := stats[name].get("saved_write_bytes", 0.0):
                moved += f"; not written to {name} because it came only once: {saved / GIB:.2f} GiB"
        self._summary = f"{left}; moved {moved}"

    def _log_summary(self) -> None:
        logger.info("sglang-flexkv closed: %s", self._summary)

    def _abandon(self) -> None:
        self.states.clear()
        self.page_hashes.clear()
        for rid in list(self._next_batch):
            self.cancel_queued_load(rid)
        # Other ranks may be reading yet, but what a batch has got that was taken away nobody uses.
        self._ended_leases += [load.lease for batch in self._loading.values() for load in batch.values()]
        self.loads_have_ended_everywhere()
        self._loading.clear()
        self._offloads.clear()
        self._write_backs.clear()
        self.layer_done_counter.reset()

    def check_idle(self) -> None:
        """Raises AssertionError if anything is held, queued or in flight."""
        assert not self._next_batch, "loads left in the queue"
        assert not self._loading, "loads left running"
        assert not self._ended_leases, "leases left of loads that have ended"
        assert not self._offloads, "offloads left"
        self.states.check_empty()
        self.engine.check_integrity()
