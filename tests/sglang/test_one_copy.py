"""Ranks of one machine that compute the same KV have one copy of it. Each is a thread here, with a device of
its own; what they share is real memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import TIMEOUT_S, Rig, assert_same
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    check_landed,
    check_runs_again,
    forget_failed_loads,
    invalidate_cpu_tier,
    sequence,
)
from rank_group import Group, join, together

from sglang_flexkv import _core
from sglang_flexkv.integration import one_copy
from sglang_flexkv.integration.compat.requests import name_of

CPU_BLOCKS = 12


class Server:
    """A rank per rig. Calls are made on all of them, as by schedulers that run the same requests."""

    def __init__(self, make_rig: MakeRig, num_ranks: int, here: int, **options: Any) -> None:
        self.group = Group(num_ranks)
        joined = join(self.group, here)
        self.copies = [copy for copy in joined if copy is not None]
        assert len(self.copies) == num_ranks
        memory = together(self.group, lambda number: self.copies[number].memory(CPU_BLOCKS))
        self.rigs: list[Rig] = []
        for copy, of_rank in zip(self.copies, memory, strict=True):
            own = {"num_cpu_blocks": CPU_BLOCKS, **options} if copy.keeps else {"num_cpu_blocks": 1}
            if "ssd_dir" in own:
                own["ssd_dir"] /= str(copy.copy)
                own["ssd_dir"].mkdir()
            rig = make_rig(
                "mla",
                **own,
                single_rank=False,
                reads_under_forwards=False,
                one_copy=copy,
                memory=of_rank,
                num_lower_tiers=int("ssd_dir" in options),
            )
            copy.close()
            self.rigs.append(rig)

    def on_all(self, do: Callable[[Rig], Any]) -> list[Any]:
        with ExitStack() as stack:
            for number, rig in enumerate(self.rigs):
                stack.enter_context(self.group.serves(number, rig.cache))
            return together(self.group, lambda number: do(self.rigs[number]))

    def insert(self, tokens: list[int], seed: int) -> list[torch.Tensor]:
        expected, *others = self.on_all(lambda rig: rig.insert(tokens, seed))
        for other in others:
            assert_same(other, expected)
        self.on_all(lambda rig: rig.evict_all())
        return list(expected)

    def load(self, tokens: list[int], expected: list[torch.Tensor]) -> list[int]:
        """Loads on all ranks. Returns how many tokens each had from the tiers."""

        def of_rank(rig: Rig) -> int:
            req = rig.request(tokens)
            slots = rig.admit(req)
            rig.start_batch()
            rig.forward()
            assert rig.cache.finish_external_linker_loads([req]) == []
            if len(slots):
                check_landed(rig, req, slots, expected)
                rig.evict_all()
            else:
                rig.abort(req)
            return len(slots)

        return self.on_all(of_rank)


def fill(rig: Rig, num_blocks: int, name: int = 0) -> None:
    """Other blocks in place of what can go from the CPU tier, with bytes that nobody expects."""
    keys = np.arange(2 * num_blocks, dtype=np.uint64).reshape(-1, 2) + np.uint64(2**40 + 2**20 * name)
    task = rig.engine.create_put(None, keys)
    assert task.plan is not None
    slots = rig.allocate(num_blocks * PAGE)
    assert slots is not None
    rig.write(slots, seed=99)
    rig.engine.launch(task, rig.engine.token_slots(slots))
    assert rig.engine.wait([task], 60.0)
    rig.engine.forget(task)
    rig.allocator.free(slots)


@pytest.mark.parametrize(("num_ranks", "here"), [(2, 2), (4, 4), (4, 2)])
def test_what_one_rank_has_stored_all_load(make_rig: MakeRig, num_ranks: int, here: int) -> None:
    server = Server(make_rig, num_ranks, here)
    keepers = [rig for rig, copy in zip(server.rigs, server.copies, strict=True) if copy.keeps]
    assert len(keepers) == num_ranks // here
    expected = server.insert(sequence(1), seed=1)
    assert [rig.stats("CPU")["ready"] for rig in keepers] == [PAGES] * len(keepers)
    assert server.load(sequence(1), expected) == [PAGES * PAGE] * num_ranks
    for rig in server.rigs:
        assert rig.stats("H2D")["bytes"] > 0
        assert (rig.stats("D2H")["bytes"] > 0) == (rig in keepers)
    # One machine has lost it: nobody loads, and nothing is left held.
    invalidate_cpu_tier(keepers[-1])
    assert server.load(sequence(1), expected) == [0] * num_ranks


def test_what_the_keeper_has_stored_is_stored_for_all(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each rank would offer it again at every use."""
    server = Server(make_rig, 2, 2)
    outcomes: list[bool] = []
    for rig in server.rigs:
        wrapper = rig.cache.linker
        assert wrapper is not None

        def commit(
            successes: list[bool], commit: Callable[..., None] = wrapper.commit_completed_offloads
        ) -> None:
            outcomes.extend(map(bool, successes))
            commit(successes)

        monkeypatch.setattr(wrapper, "commit_completed_offloads", commit)
    server.insert(sequence(1), seed=1)
    assert outcomes == [True, True]


def test_what_others_still_read_stays_where_it_is(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper is through with a load, and has other blocks to keep, before the other rank has begun."""
    server = Server(make_rig, 2, 2)
    expected = server.insert(sequence(1), seed=1)
    keeper, other = server.rigs
    through, finish = threading.Event(), keeper.linker.finish_layer_wise_loading

    def finish_and_say(index: int) -> set[str]:
        landed = finish(index)
        through.set()
        return landed

    monkeypatch.setattr(keeper.linker, "finish_layer_wise_loading", finish_and_say)

    def load(rig: Rig) -> None:
        req = rig.request(sequence(1))
        slots = rig.admit(req)
        if rig is other:
            assert through.wait(TIMEOUT_S)
            for name in range(2):  # the second drives out all that can go
                fill(keeper, CPU_BLOCKS - PAGES, name)
            assert keeper.stats("CPU")["pinned"] == PAGES
        rig.start_batch()
        rig.forward()
        assert rig.cache.finish_external_linker_loads([req]) == []
        assert rig.stats("CPU")["pinned"] == 0
        check_landed(rig, req, slots, expected)

    server.on_all(load)
    keeper.evict_all()
    fill(keeper, CPU_BLOCKS)  # then it may go


def test_a_flush_under_a_load_lets_go_of_what_it_reads(make_rig: MakeRig) -> None:
    server = Server(make_rig, 2, 2)
    server.insert(sequence(1), seed=1)

    def load(rig: Rig) -> None:
        req = rig.request(sequence(1))
        slots = rig.admit(req)
        assert len(slots) == PAGES * PAGE
        index = rig.start_batch()
        rig.forward()
        rig.linker.reset()
        assert rig.stats("CPU")["pinned"] == 0
        rig.linker.check_idle()
        assert rig.linker.finish_layer_wise_loading(index) == set()
        assert rig.cache.finish_external_linker_loads([req]) == []
        forget_failed_loads(rig)
        rig.cache.on_release(req, checkpointed=False)
        rig.abort(req, slots)

    server.on_all(load)


def test_a_load_that_goes_away_before_it_runs_lets_go_on_all_ranks(make_rig: MakeRig) -> None:
    server = Server(make_rig, 2, 2)
    server.insert(sequence(1), seed=1)

    def admit_and_abort(rig: Rig) -> None:
        req = rig.request(sequence(1))
        slots = rig.admit(req)
        assert len(slots) == PAGES * PAGE
        rig.abort(req, slots)
        assert rig.stats("CPU")["pinned"] == 0

    server.on_all(admit_and_abort)


@pytest.mark.parametrize("fails", [0, 1], ids=["keeper", "other"])
def test_a_load_that_fails_on_one_rank_has_failed_on_all(make_rig: MakeRig, fails: int) -> None:
    server = Server(make_rig, 2, 2)
    server.insert(sequence(1), seed=1)

    def load(rig: Rig) -> None:
        req = rig.request(sequence(1))
        slots = rig.admit(req)
        if rig is server.rigs[fails]:
            rig.engine.cancel(rig.linker._next_batch[name_of(req)].task)
        rig.start_batch()
        rig.forward()
        assert rig.cache.finish_external_linker_loads([req]) == []
        check_runs_again(rig, req)
        assert rig.stats("CPU")["pinned"] == 0
        rig.abort(req, slots)

    server.on_all(load)


@pytest.mark.parametrize("on_disk", [False, True], ids=["gone", "on_disk"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_a_keeper_has_no_more_in_memory_is_computed_by_all(
    make_rig: MakeRig, tmp_path: Path, num_ranks: int, on_disk: bool
) -> None:
    """Of one machine. The others do not load what its keeper has not read yet."""
    server = Server(make_rig, num_ranks, 2, **({"ssd_dir": tmp_path} if on_disk else {}))
    server.insert(sequence(1), seed=1)
    keeper = server.rigs[-2]
    if on_disk:
        assert keeper.engine.flush_spills(60.0)

    def admit(rig: Rig) -> int:
        req = rig.request(sequence(1))
        match = rig.match(req)
        assert match.host_hit_length == PAGES * PAGE
        if rig is keeper:
            rig.linker.states.end_lease(name_of(req))
            invalidate_cpu_tier(rig)
            keys = rig.linker.states.known(name_of(req)).found.keys
            assert rig.engine.match(keys).num_blocks == (PAGES if on_disk else 0)
        slots = rig.admit(req, match)
        rig.abort(req, slots)
        return len(slots)

    assert server.on_all(admit) == [0] * num_ranks


def test_requests_wait_together_for_what_the_keeper_reads(make_rig: MakeRig, tmp_path: Path) -> None:
    server = Server(make_rig, 2, 2, ssd_dir=tmp_path)
    expected = server.insert(sequence(1), seed=1)
    keeper = server.rigs[0]
    assert keeper.engine.flush_spills(60.0)
    invalidate_cpu_tier(keeper)

    def wait(rig: Rig) -> int:
        req = rig.request(sequence(1))
        match = rig.match(req)
        assert match.host_hit_length == 0  # no forward reads it
        rig.cache.prefetch_from_storage(
            req.cache_request_handle, match.last_host_node, [], matched_prefix_tokens=[]
        )
        waited = 0
        while not rig.cache.check_prefetch_progress(req.cache_request_handle):
            waited += 1
            rig.engine.drain(60.0)
        slots = rig.admit(req)
        assert len(slots) == PAGES * PAGE
        rig.start_batch()
        rig.forward()
        assert rig.cache.finish_external_linker_loads([req]) == []
        check_landed(rig, req, slots, expected)
        return waited

    waited = server.on_all(wait)
    assert waited[0] == waited[1]  # not at all, where the disk is faster than the test
    assert keeper.stats("DISK2H")["bytes"] > 0


def test_a_flush_forgets_on_all_ranks(make_rig: MakeRig) -> None:
    server = Server(make_rig, 2, 2)
    expected = server.insert(sequence(1), seed=1)
    server.on_all(lambda rig: rig.cache.reset())
    assert server.load(sequence(1), expected) == [0, 0]
    expected = server.insert(sequence(1), seed=2)
    assert server.load(sequence(1), expected) == [PAGES * PAGE] * 2


@pytest.mark.parametrize("fault", ["no_memfd", "strict_overcommit", "no_proc", "another_file"])
def test_ranks_that_cannot_open_each_others_memory_have_none_in_common(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    opened = os.open

    def refuse(*_: Any) -> int:
        raise PermissionError("no")

    def another(path: Any, *_: Any) -> int:
        assert str(path).startswith("/proc/")
        return opened("/dev/zero", os.O_RDWR)

    if fault == "no_memfd":
        monkeypatch.setattr(_core.HostPool, "make_file", refuse)
    elif fault == "strict_overcommit":
        monkeypatch.setattr(one_copy, "overcommit_is_strict", lambda: True)
    else:
        monkeypatch.setattr(os, "open", refuse if fault == "no_proc" else another)
    before = len(os.listdir("/proc/self/fd"))
    assert join(Group(4), 2) == [None] * 4
    assert caplog.text.count("each keeps a copy of its own") == 4
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("num_ranks", "here"), [(1, 1), (2, 1), (4, 3)])
def test_ranks_that_are_alone_on_their_machine_ask_nobody(num_ranks: int, here: int) -> None:
    group = Group(num_ranks)
    assert join(group, here) == [None] * num_ranks
    assert group.num_reduced == 0


def test_a_python_that_makes_no_files_in_memory_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was built for an old C library has no function for it, and its kernel does."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    copies = [copy for copy in join(Group(2), 2) if copy is not None]
    assert [copy.keeps for copy in copies] == [True, False]
    for copy in copies:
        copy.close()


def test_the_keeper_says_how_large_the_memory_is() -> None:
    """Ranks that look at what is free do not find the same."""
    group = Group(4)
    copies = [copy for copy in join(group, 2) if copy is not None]
    memory = together(group, lambda number: copies[number].memory(10 + number))
    assert [of_rank.num_slots for of_rank in memory] == [10, 10, 12, 12]
    for copy in copies:
        copy.close()
