"""Loads that fail after their request was admitted: it runs again, the others of its batch go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from kit import TIMEOUT_S, cut
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    admit_without_its_lease,
    check_landed,
    check_runs_again,
    forget_failed_loads,
    invalidate_cpu_tier,
    sequence,
    store_on_ssd_alone,
)
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import HANG_S

from sglang_flexkv import _core


def test_what_is_gone_before_it_is_loaded_is_recomputed(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    free = rig.allocator.available_size()
    assert len(admit_without_its_lease(rig, req)) == 0
    assert rig.allocator.available_size() == free
    rig.abort(req)


def test_a_forward_that_went_on_without_a_layer_is_nobodys(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What landed after that may have been read before it did."""
    monkeypatch.setattr("sglang_flexkv.integration.layer_counter._LAYER_TIMEOUT_S", 0.2)
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    for seed, tokens in enumerate(prompts):
        rig.insert(tokens, seed)
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    held_back: list[Callable[[], None]] = []
    launch = rig.engine.launch

    def hold_the_second_back(task: Any, *args: Any, **kwargs: Any) -> None:
        if held_back or rig.stats("tasks")["running"]:
            held_back.append(lambda: launch(task, *args, **kwargs))
        else:
            launch(task, *args, **kwargs)

    with mock.patch.object(rig.engine, "launch", hold_the_second_back):
        rig.start_batch()
    assert len(held_back) == 1
    rig.forward()
    held_back[0]()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, *reqs)
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.abort(req, slots)


def test_what_cannot_run_again_is_left_to_sglang(make_rig: MakeRig) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    slots = admit_without_its_lease(rig, req)
    req.session, req.multimodal_inputs = mock.Mock(streaming=False), mock.Mock()
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == [req]
    assert len(rig.cache.failed_loads) == 0
    rig.abort(req, slots)


def test_a_block_that_is_damaged_on_ssd_is_not_used_and_not_looked_for_again(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(_core.SSD_SLOTS_OFFSET)
        file.write(bytes(rig.engine.slot_bytes))
    req = rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert len(rig.cache.failed_loads) == 1
    forget_failed_loads(rig)
    rig.abort(req, slots)
    assert rig.stats("SSD")["ready"] < PAGES
    # Another request has what is left.
    again = rig.request(tokens)
    assert rig.match(again).host_hit_length < PAGES * PAGE
    rig.abort(again)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_of_a_batch_only_the_request_whose_blocks_are_damaged_runs_again(
    make_rig: MakeRig, tmp_path: Path, damaged: int
) -> None:
    rig = make_rig(ssd_dir=tmp_path, num_pages=64)
    prompts = [sequence(10000 * (n + 1)) for n in range(3)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    second_page = b"".join(rows.numpy().tobytes() for rows in cut(expected[damaged], PAGE, 2 * PAGE))
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(slots_file.read_bytes().index(second_page))
        file.write(bytes(64))
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, reqs[damaged])
    assert rig.linker.metrics.total["loaded ssd"] == 2 * PAGES * PAGE  # those of the others
    for i, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if i == damaged:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[i])


def test_a_disk_that_hangs_is_noticed_while_a_forward_waits(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FaultyDisk(1)
    rig = make_rig(ssd_dir=tmp_path, disk=disk)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    disk.set_fault("read", 1.0, delay_s=HANG_S)
    monkeypatch.setattr("sglang_flexkv.tierlife._STALL_S", 0.3)
    req = rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    started_s = time.monotonic()
    rig.forward()
    assert time.monotonic() - started_s < TIMEOUT_S
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert len(rig.cache.failed_loads) == 1
    forget_failed_loads(rig)
    rig.abort(req, slots)
    disk.clear_faults()
    while rig.stats("tasks")["running"]:
        rig.engine.poll()
