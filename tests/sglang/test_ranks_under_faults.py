"""Four ranks whose disks are not alike, or whose ways to a store that they share: one is slow, one fails, one
flips bits. They take the same decisions, and ask each other for the same at the same time; where ranks do
not, SGLang stands still for ever."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dict_store import Values
from kit import TIMEOUT_S, Rig, assert_same
from linker_steps import PAGE, MakeRig, forget_failed_loads, may_run, nobody_else, prefetch, sequence
from rank_group import Group, join, together
from remote_faults import Faults, FaultyStore, try_again_soon
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang_flexkv_testing import FaultyDisk

from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import LoadPolicy, PrefetchPolicy
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.storage.remote import tier as remote_tier

RANKS = 4
REQUESTS = 60
PROMPTS = 12
DEVICE_PAGES = 16  # two or three prompts
BATCH_MAX = 3
# By rank: what becomes of its reads.
FAULTS: list[tuple[Any, ...]] = [(), ("read", 0.1, errno.EIO), ("read", 0.5, 0, 0.03), ("flip", 0.1)]
REMOTE_FAULTS: list[dict[str, float]] = [
    {},
    {"flip": 0.1, "lies": 0.1},
    {"missing": 0.2},
    {"full": 0.2, "lost": 0.1},
]
CLEARED_AFTER = 20  # requests, where the storage is cleared on the way


class Rank:
    """One rank's scheduler, which does as SGLang's: of its queue it asks those it comes to, until the batch
    is full or its memory is."""

    def __init__(self, rig: Rig, seed: int, *, clears: bool = False) -> None:
        self.rig, self.rng, self._clears = rig, random.Random(seed), clears
        self._computed: dict[tuple[int, int], list[torch.Tensor]] = {}  # by prompt and page
        self.waiting: list[Any] = []
        self.decided: list[Any] = []
        self.num_failed = self.num_waited = 0
        scheduler = nobody_else()
        scheduler.waiting_queue = self.waiting
        # Of a request that comes when nothing else is there, the forward reads; others wait for their reads.
        self.idle = True
        scheduler.running_batch = SimpleNamespace(is_empty=lambda: self.idle, reqs=[])
        rig.cache.attach_scheduler(scheduler)

    def run(self) -> None:
        left = REQUESTS
        while left or self.waiting:
            self.idle = self.rng.random() < 0.6
            for _ in range(min(left, self.rng.randint(0, 3))):
                left -= 1
                prompt = self.rng.randrange(PROMPTS)
                tokens = sequence(10_000 * prompt, pages=self.rng.randint(3, 6))
                req = self.rig.request(tokens)
                prefetch(self.rig, req)
                self.waiting.append(req)
            self.rig.cache.check_hicache_events()
            if self._clears and left < REQUESTS - CLEARED_AFTER:
                self._clears = False
                assert self.rig.cache.clear_storage_backend()
            batch = self.choose()
            self.decided.append(
                (
                    [(req.rid, len(slots)) for req, slots in batch],
                    self.rig.allocator.available_size(),
                    self.rig.cache.full_evictable_size(),
                )
            )
            if batch:
                self.forward(batch)
            elif self.rng.random() < 0.5:
                assert self.rig.engine.drain(TIMEOUT_S)

    def choose(self) -> list[tuple[Any, torch.Tensor]]:
        batch: list[tuple[Any, torch.Tensor]] = []
        for req in list(self.waiting):
            if len(batch) == BATCH_MAX:
                break
            if any(other.origin_input_ids[0] == req.origin_input_ids[0] for other, _ in batch):
                continue
            if not may_run(self.rig, req):
                self.num_waited += 1
                continue
            match = self.rig.match(req)
            room = self.rig.allocator.available_size() + self.rig.cache.full_evictable_size()
            if len(req.origin_input_ids) > room:
                break
            slots = self.rig.admit(req, match)
            missing = len(req.origin_input_ids) - len(slots)
            short = missing - self.rig.allocator.available_size()
            if short > 0:
                self.rig.cache.evict(EvictParams(num_tokens=short))
            new = self.rig.allocate(missing)
            assert new is not None
            for at in range(0, missing, PAGE):
                page = req.origin_input_ids[0], (len(slots) + at) // PAGE
                self._computed[page] = self.rig.write(new[at : at + PAGE], seed=sum(page))
            batch.append((req, torch.cat([slots, new])))
            self.waiting.remove(req)
        return batch

    def forward(self, batch: list[tuple[Any, torch.Tensor]]) -> None:
        reqs = [req for req, _ in batch]
        self.rig.start_batch()
        self.rig.forward()
        assert self.rig.cache.finish_external_linker_loads(reqs) == []
        forget_failed_loads(self.rig)
        for req, slots in batch:
            if req.discard_output_reason:
                self.num_failed += 1
                self.rig.cache.on_release(req, checkpointed=False)
                self.rig.abort(req, slots)
            else:
                for at in range(0, len(slots), PAGE):
                    expected = self._computed[req.origin_input_ids[0], at // PAGE]
                    assert_same(self.rig.read(slots[at : at + PAGE]), expected)
                self.rig.finish(req, slots)


def run_all(group: Group, ranks: list[Rank]) -> None:
    """Runs the ranks side by side, and checks that they decide alike."""

    def run(number: int) -> None:
        with group.serves(number, ranks[number].rig.cache):
            ranks[number].run()
            group.leave(number)

    together(group, run)
    for other in ranks[1:]:
        assert other.decided == ranks[0].decided


@pytest.mark.parametrize("policy", [PrefetchPolicy.WAIT_COMPLETE, PrefetchPolicy.TIMEOUT])
def test_ranks_whose_disks_differ_decide_alike(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy
) -> None:
    group, ranks, disks = Group(RANKS), [], []
    for number in range(RANKS):
        (tmp_path / str(number)).mkdir()
        disks.append(FaultyDisk(number))
        rig = make_rig(
            num_pages=DEVICE_PAGES,
            num_cpu_blocks=14 + number,  # what leaves it is each rank's own
            num_ssd_blocks=128,
            ssd_dir=tmp_path / str(number),
            disk=disks[-1],
            single_rank=False,
            load_policy=LoadPolicy.LOAD,
            prefetch_policy=policy,
            prefetch_timeout_s=0.002,
        )
        ranks.append(Rank(rig, seed=5))
        if FAULTS[number]:
            disks[-1].set_fault(*FAULTS[number])
    run_all(group, ranks)
    for disk in disks:
        disk.clear_faults()
    first = ranks[0]
    # The history is worth something: there were waits, faults on some ranks alone, and hits.
    assert first.num_waited > 0
    assert all(bool(disk.injected()) == bool(fault) for disk, fault in zip(disks, FAULTS, strict=True))
    assert first.num_failed < REQUESTS / 2
    assert group.num_reduced > REQUESTS
    assert sum(length for batch, *_ in first.decided for _, length in batch) > 0
    for rank in ranks:
        reads = rank.rig.stats("DISK2H")
        assert reads["ops_done"] + reads["ops_failed"] > 0
        rank.rig.settle()
        assert rank.rig.engine.flush_spills(TIMEOUT_S)


@pytest.mark.parametrize("policy", [PrefetchPolicy.WAIT_COMPLETE, PrefetchPolicy.TIMEOUT])
def test_ranks_that_have_one_copy_decide_alike(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy
) -> None:
    """Two machines of two ranks. One of each has memory and a disk; one disk is slow, the other a bad one."""
    group, ranks, disks = Group(RANKS), [], []

    copies = [copy for copy in join(group, RANKS // 2) if copy is not None]
    assert len(copies) == RANKS
    all_memory = together(group, lambda number: copies[number].memory(14 + number))
    for copy, memory in zip(copies, all_memory, strict=True):
        own: dict[str, Any] = {"num_cpu_blocks": 1}
        if copy.keeps:
            (tmp_path / str(copy.copy)).mkdir()
            disks.append(FaultyDisk(copy.copy))
            own = {"num_cpu_blocks": memory.num_slots, "num_ssd_blocks": 128, "disk": disks[-1]}
            own["ssd_dir"] = tmp_path / str(copy.copy)
        rig = make_rig(
            "mla",
            num_pages=DEVICE_PAGES,
            **own,
            single_rank=False,
            reads_under_forwards=False,
            load_policy=LoadPolicy.LOAD,
            prefetch_policy=policy,
            prefetch_timeout_s=0.002,
            one_copy=copy,
            memory=memory,
            num_lower_tiers=1,
        )
        copy.close()
        ranks.append(Rank(rig, seed=5, clears=True))
    for number, *faults in (0, FAULTS[2]), (1, FAULTS[1], FAULTS[3]):
        for fault in faults:
            disks[number].set_fault(*fault)
    run_all(group, ranks)
    for disk in disks:
        disk.clear_faults()
        assert disk.injected()
    assert ranks[0].num_waited > 0
    assert sum(length for batch, *_ in ranks[0].decided for _, length in batch) > 0
    for number, rank in enumerate(ranks):
        rank.rig.settle()
        assert rank.rig.engine.flush_spills(TIMEOUT_S)
        assert rank.rig.stats("H2D")["bytes"] == ranks[0].rig.stats("H2D")["bytes"] > 0
        if number % 2 == 0:
            assert rank.rig.stats("DISK2H")["bytes"] > 0
        else:
            assert rank.rig.stats("D2H")["bytes"] == 0


@pytest.mark.parametrize("policy", [PrefetchPolicy.WAIT_COMPLETE, PrefetchPolicy.TIMEOUT])
def test_ranks_that_share_blocks_in_a_store_decide_alike(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, policy: PrefetchPolicy
) -> None:
    """Each stores some, loads all, and has a way of its own to the store."""
    try_again_soon(monkeypatch)
    group, ranks, values = Group(RANKS), [], Values()
    all_faults = [Faults(number) for number in range(RANKS)]
    for number, faults in enumerate(all_faults):
        monkeypatch.setattr(
            remote_tier, "STORES", {"file": lambda *_, faults=faults: FaultyStore(values, faults)}
        )
        rig = make_rig(
            "mla",
            num_pages=DEVICE_PAGES,
            num_cpu_blocks=14 + number,
            remote="file:///tmp",
            shared=SharedBlocks(make_namespace({"of": "all"}), number, RANKS, bytes(16)),
            single_rank=False,
            load_policy=LoadPolicy.LOAD,
            prefetch_policy=policy,
            prefetch_timeout_s=0.002,
        )
        ranks.append(Rank(rig, seed=5, clears=True))
        for kind, probability in REMOTE_FAULTS[number].items():
            setattr(faults, kind, probability)
    run_all(group, ranks)
    for faults in all_faults:
        faults.heal()
    for rank in ranks:
        rank.rig.settle()
        assert rank.rig.engine.flush_spills(TIMEOUT_S)
        stats = rank.rig.stats("REMOTE")
        assert stats["admitted"] < stats["asked_blocks"]
        assert rank.rig.stats("REMOTE2H")["bytes"] > 0
    assert ranks[0].num_waited > 0
    assert sum(length for batch, *_ in ranks[0].decided for _, length in batch) > 0
