"""The library as a user meets it: the seeds' quick start, both layouts, every tier, every way to end."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import run_until_killed

from sglang_flexkv import (
    CacheConfig,
    KVCacheLayout,
    KVCacheLayoutType,
    KVManager,
    KVResponse,
    KVResponseStatus,
    ModelConfig,
)
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.transfer.transfer_engine import TransferEngine

BLOCK = 16
ROOT = Path(__file__).parents[2]


class Pool:
    """A manager over a device pool whose KV of token t at slot s we choose."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        layout_type: KVCacheLayoutType = KVCacheLayoutType.LAYERWISE,
        mla: bool = False,
        dtype: torch.dtype = torch.float16,
        cpu_blocks: int = 32,
        ssd_blocks: int = 0,
        num_layers: int = 3,
        block: int = BLOCK,
        tenant: str = "",
        **ssd: Any,
    ) -> None:
        self.layout = KVCacheLayout(layout_type, num_layers, 64, block, 1 if mla else 2, 32, is_mla=mla)
        raw = torch.randint(0, 2**16, (torch.zeros(self.layout.kv_shape).numel(),), dtype=torch.int32)
        self.kv = raw.to(torch.int16).view(torch.int16).reshape(self.layout.kv_shape)
        if dtype.itemsize == 2:
            self.kv = self.kv.view(dtype)
        self.manager = KVManager(
            ModelConfig(
                num_layers=num_layers,
                num_kv_heads=self.layout.num_head,
                head_size=32,
                use_mla=mla,
                dtype=dtype,
            ),
            CacheConfig(
                tokens_per_block=block,
                num_cpu_blocks=cpu_blocks,
                enable_ssd=ssd_blocks > 0,
                num_ssd_blocks=ssd_blocks,
                ssd_cache_dir=str(tmp_path) if ssd_blocks else "",
                **ssd,
            ),
            tenant,
        )
        caches = list(self.kv) if layout_type is KVCacheLayoutType.LAYERWISE else self.kv
        self.manager.register_kv_caches(caches, self.layout)
        self.manager.start()

    def bytes_at(self, slots: torch.Tensor) -> torch.Tensor:
        """[layer, kv, token, head * head_dim] as int16."""
        kv = self.kv.view(torch.int16)
        if self.layout.type is KVCacheLayoutType.LAYERWISE:
            return kv.flatten(2, 3)[:, :, slots].clone()
        return kv.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, slots].clone()

    def wipe(self, slots: torch.Tensor) -> None:
        kv = self.kv.view(torch.int16)
        if self.layout.type is KVCacheLayoutType.LAYERWISE:
            kv.view(*kv.shape[:2], -1, *kv.shape[4:])[:, :, slots] = 0
        else:
            kv[slots[::BLOCK] // BLOCK] = 0

    def put(self, tokens: torch.Tensor, slots: torch.Tensor) -> int:
        task = self.manager.put_async(tokens, slots)
        response = self.manager.wait([task])[task]
        assert response.status is KVResponseStatus.SUCCESS
        return int(response.return_mask.sum())

    def try_get(self, tokens: torch.Tensor, slots: torch.Tensor) -> KVResponse:
        task, _ = self.manager.get_match(tokens)
        self.manager.launch([task], [slots])
        return self.manager.wait([task])[task]

    def get(self, tokens: torch.Tensor, slots: torch.Tensor) -> int:
        response = self.try_get(tokens, slots)
        assert response.status is KVResponseStatus.SUCCESS
        return int(response.return_mask.sum())

    def save(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`put`, and all the way to SSD. Returns the bytes."""
        self.put(tokens, slots)
        assert self.manager.engine.flush_spills(20.0)
        return self.bytes_at(slots)

    def until(self, condition: Callable[[], bool]) -> None:
        """Lets the engine go on until something is so."""
        deadline = time.monotonic() + 20.0
        while not condition():
            assert time.monotonic() < deadline
            self.manager.engine.poll()
            time.sleep(0.01)


@pytest.fixture
def make(tmp_path: Path) -> Iterator:
    pools: list[Pool] = []

    def build(**options) -> Pool:
        pools.append(Pool(tmp_path, **options))
        return pools[-1]

    yield build
    for pool in pools:
        if pool.manager._engine is not None:
            pool.manager.engine.poll()
            pool.manager.engine.check_integrity()
            pool.manager.shutdown()


def tokens(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count)


SLOTS = torch.arange(0, 64)
OTHER = torch.arange(512, 512 + 64)


@pytest.mark.parametrize("mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("layout_type", list(KVCacheLayoutType), ids=lambda v: v.value)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_comes_back_is_byte_for_byte_what_was_stored(make, layout_type, mla, dtype) -> None:
    pool = make(layout_type=layout_type, mla=mla, dtype=dtype)
    before = pool.bytes_at(SLOTS)
    assert pool.put(tokens(100, 64), SLOTS) == 64
    pool.wipe(SLOTS)
    assert pool.get(tokens(100, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)


@pytest.mark.parametrize("block", [1, 3, 24])
@pytest.mark.parametrize("layout_type", list(KVCacheLayoutType), ids=lambda v: v.value)
def test_a_block_may_have_any_number_of_tokens(make, layout_type, block) -> None:
    pool = make(layout_type=layout_type, block=block, cpu_blocks=8, ssd_blocks=32)
    count = 5 * block
    stored, other = torch.arange(count), torch.arange(20 * block, 20 * block + count)
    before = pool.save(tokens(100, count + block - 1), torch.arange(count + block - 1))[:, :, :count]
    for n in range(1, 3):  # pushes it out of the CPU tier
        pool.save(tokens(1000 * n, count), stored + 8 * n * block)
    assert pool.get(tokens(100, count), other) == count
    assert torch.equal(pool.bytes_at(other), before)
    assert pool.manager.engine.stats()["DISK2H"]["ops_done"] > 0


def test_what_the_cpu_tier_had_to_forget_comes_back_from_ssd(make) -> None:
    pool = make(cpu_blocks=8, ssd_blocks=64)
    before = {}
    for n in range(6):
        slots = torch.arange(n * 64, n * 64 + 64)
        before[n] = pool.bytes_at(slots)
        pool.put(tokens(1000 * (n + 1), 64), slots)
        assert pool.manager.engine.flush_spills(20.0)
    assert pool.manager.engine.stats()["CPU"]["evicted"] >= 16
    for n in range(6):
        assert pool.get(tokens(1000 * (n + 1), 64), OTHER) == 64
        assert torch.equal(pool.bytes_at(OTHER), before[n])
    assert pool.manager.engine.stats()["DISK2H"]["ops_done"] >= 4


def slot_file(directory: Path) -> Path:
    (path,) = directory.glob("*.slots")
    return path


def test_an_ssd_that_loses_its_data_gives_misses_and_comes_back(make, tmp_path, caplog) -> None:
    pool = make(cpu_blocks=8, ssd_blocks=64)
    for n in range(8):
        pool.save(tokens(1000 * (n + 1), 64), SLOTS)
    os.truncate(slot_file(tmp_path), 0)
    for n in range(3):
        response = pool.try_get(tokens(1000 * (n + 1), 64), OTHER)
        assert response.status is KVResponseStatus.FAILED
        assert "SSD read failed: the file is shorter than it should be" in response.error
        assert not response.return_mask.any()
        assert pool.get(tokens(1000 * (n + 1), 64), OTHER) == 0  # known by now
    engine = pool.manager.engine
    pool.until(lambda: engine.stats()["SSD"]["times_out"] == 1)
    (message,) = [r.message for r in caplog.records if "taken out" in r.message]
    assert "3 failures in a row, the last one: SSD read failed" in message
    # The CPU tier goes on, and nothing is looked for on SSD.
    assert engine.stats()["SSD"]["ready"] == 0
    before = pool.bytes_at(SLOTS)
    pool.put(tokens(9000, 64), SLOTS)
    assert pool.get(tokens(9000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)
    # The disk works, so the tier is back, with what its files still hold: nothing.
    pool.until(lambda: engine.stats()["SSD"]["online"] == 1)
    assert engine.stats()["SSD"]["recovered"] == 0
    saved = pool.save(tokens(20000, 64), SLOTS)
    for n in range(2):
        pool.save(tokens(30000 + 1000 * n, 64), SLOTS)  # out of the CPU tier
    pool.wipe(OTHER)
    assert pool.get(tokens(20000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), saved)
    assert engine.stats()["SSD"]["times_out"] == 1


def test_a_block_that_rots_on_ssd_is_never_served(make, tmp_path, caplog) -> None:
    pool = make(cpu_blocks=4, ssd_blocks=64)
    before = pool.save(tokens(1000, 64), SLOTS)
    pool.save(tokens(2000, 64), SLOTS)
    block = before[:, :, 2 * BLOCK : 3 * BLOCK].contiguous().numpy().tobytes()
    offset = slot_file(tmp_path).read_bytes().index(block) + 777
    with slot_file(tmp_path).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    pool.wipe(OTHER)
    response = pool.try_get(tokens(1000, 64), OTHER)
    assert response.status is KVResponseStatus.FAILED
    assert "a block is not what was written" in response.error
    assert not response.return_mask.any()
    rotten = OTHER[2 * BLOCK : 3 * BLOCK]
    assert not pool.bytes_at(rotten).any(), "what was not verified reached the device"
    stats = pool.manager.engine.stats()
    assert stats["DISK2H"]["corrupt_blocks"] == 1
    assert [r.message for r in caplog.records if "count as misses" in r.message]
    # The blocks before it are good, and it is no reason to give the disk up.
    assert pool.get(tokens(1000, 64), OTHER) == 32
    assert torch.equal(pool.bytes_at(OTHER[:32]), before[:, :, :32])
    assert stats["SSD"]["online"] == 1
    assert stats["SSD"]["times_out"] == 0
    # Computed again, it is written again.
    before = pool.save(tokens(1000, 64), SLOTS)
    pool.save(tokens(3000, 64), torch.arange(64, 128))
    assert pool.get(tokens(1000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)


# ---- what outlives the process ----


def restart(make, pool: Pool, **options: Any) -> Pool:
    pool.manager.engine.check_integrity()
    pool.manager.shutdown()
    return make(**options)


@pytest.mark.parametrize("layout_type", list(KVCacheLayoutType), ids=lambda v: v.value)
def test_a_restart_finds_byte_for_byte_what_was_stored(make, layout_type) -> None:
    options = {"layout_type": layout_type, "cpu_blocks": 8, "ssd_blocks": 64}
    pool = make(**options)
    before = {}
    for n in range(6):
        slots = torch.arange(n * 64, n * 64 + 64)
        before[n] = pool.bytes_at(slots)
        pool.put(tokens(1000 * (n + 1), 64), slots)
        if n < 5:  # a stop writes out what still waits
            assert pool.manager.engine.flush_spills(20.0)
    for _ in range(2):
        pool = restart(make, pool, **options)
        stats = pool.manager.engine.stats()
        assert stats["CPU"]["ready"] == 0
        assert stats["SSD"]["ready"] == stats["SSD"]["recovered"] == 24
        for n in range(6):
            branched = torch.cat([tokens(1000 * (n + 1), 40), tokens(70000, 24)])
            task, mask = pool.manager.get_match(branched)
            assert mask.sum() == 32
            pool.manager.cancel([task])
            pool.manager.wait([task])
            pool.wipe(OTHER)
            assert pool.get(tokens(1000 * (n + 1), 64), OTHER) == 64
            assert torch.equal(pool.bytes_at(OTHER), before[n])
    # What was found is extended and evicted like anything else.
    assert pool.get(tokens(1000, 64), torch.arange(256, 256 + 64)) == 64
    longer = pool.save(tokens(1000, 128), torch.arange(256, 256 + 128))
    pool.save(tokens(80000, 64), SLOTS)
    assert pool.get(tokens(1000, 128), torch.arange(512, 512 + 128)) == 128
    assert torch.equal(pool.bytes_at(torch.arange(576, 640)), longer[:, :, 64:])
    assert torch.equal(pool.bytes_at(OTHER), before[0])


def test_a_restart_with_less_room_keeps_what_fits(make) -> None:
    pool = make(ssd_blocks=64)
    before = pool.save(tokens(1000, 64), SLOTS)
    pool.save(tokens(2000, 64), SLOTS)
    pool = restart(make, pool, ssd_blocks=4)
    assert pool.manager.engine.stats()["SSD"]["ready"] == 4
    held = pool.get(tokens(1000, 64), OTHER) + pool.get(tokens(2000, 64), torch.arange(600, 664))
    assert held == 64
    assert torch.equal(pool.bytes_at(OTHER), before)


def test_what_a_killed_process_had_synced_is_found(make, tmp_path) -> None:
    program = """
        import sys
        from pathlib import Path
        sys.path += sys.argv[2:]
        import torch
        from test_kvmanager import SLOTS, Pool, tokens
        torch.manual_seed(9)
        pool = Pool(Path(sys.argv[1]), ssd_blocks=64)
        pool.put(tokens(1000, 64), SLOTS)
        print(pool.manager.engine.sync(20.0), flush=True)
    """
    here = Path(__file__).parent
    run_until_killed(program, str(tmp_path), str(here), str(here.with_name("support")))
    torch.manual_seed(9)
    pool = make(ssd_blocks=64)
    before = pool.bytes_at(SLOTS)  # by the same seed
    assert pool.get(tokens(1000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)


def test_what_was_cleared_does_not_come_back(make) -> None:
    pool = make(ssd_blocks=64)
    pool.save(tokens(1000, 64), SLOTS)
    pool.manager.clear()
    before = pool.save(tokens(2000, 64), SLOTS)
    pool = restart(make, pool, ssd_blocks=64)
    assert pool.get(tokens(1000, 64), OTHER) == 0
    assert pool.get(tokens(2000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)
    pool.manager.clear()
    pool = restart(make, pool, ssd_blocks=64)
    assert pool.manager.engine.stats()["SSD"]["recovered"] == 0
    assert pool.get(tokens(2000, 64), OTHER) == 0


def test_new_weights_stay_in_the_process_that_has_them(make) -> None:
    pool = make(cpu_blocks=4, ssd_blocks=64)
    pool.save(tokens(1000, 64), SLOTS)
    pool.manager.engine.stop_persisting()
    assert pool.manager.engine.stats()["SSD"]["ready"] == 0
    before = pool.save(tokens(2000, 64), SLOTS)
    pool.save(tokens(3000, 64), SLOTS)
    assert pool.get(tokens(2000, 64), OTHER) == 64  # from SSD: the tier works on
    assert torch.equal(pool.bytes_at(OTHER), before)
    pool = restart(make, pool, cpu_blocks=4, ssd_blocks=64)
    assert pool.manager.engine.stats()["SSD"]["recovered"] == 0
    before = pool.save(tokens(4000, 64), SLOTS)
    pool = restart(make, pool, cpu_blocks=4, ssd_blocks=64)
    assert pool.get(tokens(4000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)


@pytest.mark.parametrize(
    "other",
    [{"tenant": "b"}, {"dtype": torch.bfloat16}, {"num_layers": 4}],
    ids=["tenant", "dtype", "layers"],
)
def test_another_model_on_the_same_directory_is_refused(make, other, caplog) -> None:
    pool = make(ssd_blocks=64)
    before = pool.save(tokens(1000, 64), SLOTS)
    pool.manager.shutdown()
    with pytest.raises(ConfigError, match=r"another model or setting .*ssd_on_mismatch: fresh") as caught:
        make(ssd_blocks=64, **other)
    assert "sglang-flexkv ssd clear" in str(caught.value)
    # Nothing was lost, and the directory is free.
    pool = make(ssd_blocks=64)
    assert pool.get(tokens(1000, 64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)
    pool.manager.shutdown()
    pool = make(ssd_blocks=64, ssd_on_mismatch="fresh", **other)
    assert "started empty" in caplog.text
    assert pool.manager.engine.stats()["SSD"]["recovered"] == 0
    assert pool.get(tokens(1000, 64), OTHER) == 0
    assert pool.put(tokens(1000, 64), SLOTS) == 64


def test_only_what_is_used_again_goes_to_ssd_if_so_configured(make) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=64, ssd_admission="reuse")
    for n in range(4):
        pool.save(tokens(1000 * (n + 1), 64), SLOTS)
    assert pool.manager.engine.stats()["SSD"]["ready"] == 0
    assert pool.get(tokens(2000, 64), OTHER) == 64
    assert pool.manager.engine.flush_spills(20.0)
    stats = pool.manager.engine.stats()["SSD"]
    assert stats["ready"] == 4
    assert stats["saved_write_bytes"] == 12 * pool.manager.engine.slot_bytes
    pool = restart(make, pool, cpu_blocks=32, ssd_blocks=64, ssd_admission="reuse")
    assert [pool.get(tokens(1000 * (n + 1), 64), OTHER) for n in range(4)] == [0, 64, 0, 0]


# ---- what is stored ----


def test_an_incomplete_block_is_dropped(make) -> None:
    pool = make()
    assert pool.put(tokens(5, 39), SLOTS[:39]) == 32
    assert pool.get(tokens(5, 39), OTHER[:39]) == 32


def test_only_the_common_prefix_is_found(make) -> None:
    pool = make()
    pool.put(tokens(0, 64), SLOTS)
    branched = torch.cat([tokens(0, 40), tokens(7000, 24)])
    task, mask = pool.manager.get_match(branched)
    assert mask.sum() == 32
    pool.manager.cancel([task])
    assert pool.manager.wait([task])[task].status is KVResponseStatus.CANCELLED


def test_what_is_held_is_not_stored_again(make) -> None:
    pool = make()
    assert pool.put(tokens(0, 32), SLOTS[:32]) == 32
    assert pool.put(tokens(0, 64), SLOTS) == 32
    assert pool.put(tokens(0, 64), SLOTS) == 0
    assert pool.manager.engine.stats()["D2H"]["bytes"] == 4 * 3 * 2 * BLOCK * 2 * 32 * 2


def test_a_mask_leaves_out_what_the_device_has(make) -> None:
    pool = make()
    before = pool.bytes_at(SLOTS)
    pool.put(tokens(0, 64), SLOTS)
    on_device = np.arange(64) >= 32
    task, mask = pool.manager.get_match(tokens(0, 64), on_device)
    assert mask.tolist() == on_device.tolist()
    pool.wipe(OTHER)
    pool.manager.launch([task], [OTHER[32:]])  # only the slots of the masked tokens
    assert pool.manager.wait([task])[task].status is KVResponseStatus.SUCCESS
    assert torch.equal(pool.bytes_at(OTHER[32:]), before[:, :, 32:])
    assert not pool.bytes_at(OTHER[:32]).any()


def test_tenants_never_share(make) -> None:
    first, second = make(tenant="a"), make(tenant="b")
    assert first.manager.namespace != second.manager.namespace
    keys = [m.manager._sequence(tokens(0, 64), None)[0].block_keys for m in (first, second)]
    assert not np.intersect1d(keys[0].ravel(), keys[1].ravel()).size


def test_the_seeds_quick_start_runs_as_written(make) -> None:
    pool = make()
    kv_manager, token_ids, slot_mapping = pool.manager, tokens(0, 64), SLOTS
    task_id = kv_manager.put_async(token_ids, slot_mapping)
    kv_manager.launch([task_id], [slot_mapping])  # running already: left alone
    assert kv_manager.wait([task_id])[task_id].status is KVResponseStatus.SUCCESS
    task_id = kv_manager.get_async(token_ids, slot_mapping)
    kv_manager.launch([task_id], [slot_mapping])
    response = kv_manager.wait([task_id])
    assert response[task_id].return_mask.all()
    with pytest.raises(KeyError, match="taken already"):
        kv_manager.wait([task_id])


def test_try_wait_returns_what_has_ended_and_waits_for_nothing(make) -> None:
    pool = make()
    ready, _ = pool.manager.put_match(tokens(0, 64))
    done = pool.manager.put_async(tokens(500, 64), SLOTS)
    pool.manager.engine.drain(20.0)
    assert set(pool.manager.try_wait([ready, done])) == {done}
    pool.manager.cancel([ready])
    assert pool.manager.try_wait([ready])[ready].status is KVResponseStatus.CANCELLED


def test_a_cancelled_put_gives_its_room_back(make) -> None:
    pool = make(cpu_blocks=4)
    task, _ = pool.manager.put_match(tokens(0, 64))
    assert pool.manager.engine.stats()["CPU"]["writing"] == 4
    pool.manager.cancel([task])
    pool.manager.wait([task])
    assert pool.manager.engine.stats()["CPU"]["free"] == 4
    assert pool.put(tokens(900, 64), SLOTS) == 64


@pytest.mark.parametrize(("policy", "stored"), [("adaptive", 32), ("lru", 0)])
def test_of_a_put_larger_than_the_cpu_tier_its_head_is_stored_where_that_pays(
    make, policy: str, stored: int
) -> None:
    pool = make(cpu_blocks=2, cpu_eviction_policy=policy)
    before = pool.bytes_at(SLOTS[:stored])
    assert pool.put(tokens(0, 64), SLOTS) == stored
    assert pool.get(tokens(0, 64), OTHER) == stored
    assert torch.equal(pool.bytes_at(OTHER[:stored]), before)


def test_what_is_cleared_while_it_is_on_its_way_to_ssd_is_not_found_by_the_next_process(make) -> None:
    """The way of SGLang's endpoint for clearing the storage, which may come at any time."""
    pool = make(cpu_blocks=32, ssd_blocks=64)
    engine = pool.manager.engine
    pool.save(tokens(1000, 64), SLOTS)
    with mock.patch.object(TransferEngine, "poll", return_value=[]):  # from here on outcomes come too late
        put = pool.manager.put_async(tokens(2000, 64), SLOTS)
        assert engine.drain(20.0)
    engine.poll()  # which starts the spill
    with mock.patch.object(TransferEngine, "poll", return_value=[]):
        late = pool.manager.put_async(tokens(3000, 64), OTHER)
        assert engine.stats()["tasks"]["running"] == 2
        engine.clear_tiers(0, 1)
        assert engine.drain(20.0)
    answers = pool.manager.wait([put, late])
    assert answers[put].status is KVResponseStatus.SUCCESS
    assert answers[late].status is KVResponseStatus.CANCELLED  # it is not held, and may be put again
    assert engine.flush_spills(20.0)
    stats = engine.stats()
    assert stats["CPU"]["ready"] == stats["SSD"]["ready"] == stats["CPU"]["pinned"] == 0
    again = restart(make, pool, cpu_blocks=32, ssd_blocks=64)
    assert again.manager.engine.stats()["SSD"]["recovered"] == 0
    assert again.put(tokens(3000, 64), OTHER) == 64


def test_one_tier_is_cleared_and_the_other_keeps_what_it_holds(make) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=64)
    before = pool.save(tokens(1000, 64), SLOTS)
    pool.manager.engine.clear_tiers(1)
    assert pool.get(tokens(1000, 64), OTHER) == 64  # from memory
    pool.manager.engine.clear_tiers(0)
    assert pool.get(tokens(1000, 64), OTHER) == 0
    pool.save(tokens(1000, 64), SLOTS)
    pool.manager.engine.clear_tiers(0)
    pool.wipe(OTHER)
    assert pool.get(tokens(1000, 64), OTHER) == 64  # from SSD
    assert torch.equal(pool.bytes_at(OTHER), before)


def test_clear_forgets_everything_in_every_tier(make) -> None:
    pool = make(ssd_blocks=64)
    pool.put(tokens(0, 64), SLOTS)
    assert pool.manager.engine.flush_spills(20.0)
    pool.manager.clear()
    assert pool.get(tokens(0, 64), OTHER) == 0
    stats = pool.manager.engine.stats()
    assert stats["CPU"]["free"] == 32
    assert stats["SSD"]["free"] == 64


def test_shutdown_with_work_in_flight_gives_files_and_locks_back(tmp_path) -> None:
    pool = Pool(tmp_path, ssd_blocks=64)
    before = {n: pool.bytes_at(SLOTS + 64 * n) for n in range(8)}
    for n in range(8):
        pool.manager.put_async(tokens(1000 * n, 64), SLOTS + 64 * n)
    pool.manager.shutdown()
    pool.manager.shutdown()
    open_files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [path for path in open_files if path.startswith(str(tmp_path))]
    again = Pool(tmp_path, ssd_blocks=64)  # the lock is free
    for n in range(8):  # whatever got there in time is good
        held = again.get(tokens(1000 * n, 64), OTHER)
        assert torch.equal(again.bytes_at(OTHER[:held]), before[n][:, :, :held])
    again.manager.engine.check_integrity()
    again.manager.shutdown()


def test_misuse_says_what_to_do(make, tmp_path) -> None:
    pool = make()
    with pytest.raises(ValueError, match="slot mapping"):
        pool.manager.put_async(tokens(0, 64), SLOTS[:7])
    with pytest.raises(ValueError, match="one slot mapping per task"):
        pool.manager.launch([1], [])
    with pytest.raises(ValueError, match="token_mask"):
        pool.manager.get_match(tokens(0, 64), np.arange(64) < 32)
    task, _ = pool.manager.put_match(tokens(3, 64))
    with pytest.raises(RuntimeError, match="launch it before waiting"):
        pool.manager.wait([task], 1.0)
    with pytest.raises(ValueError, match="outside the pool"):
        pool.manager.launch([task], [SLOTS + 10**6])
    pool.manager.cancel([task])
    unregistered = KVManager(ModelConfig(num_layers=1, num_kv_heads=1, head_size=8), CacheConfig())
    unregistered.start()
    with pytest.raises(RuntimeError, match="register_kv_caches"):
        unregistered.get_match(tokens(0, 64))
    with pytest.raises(ValueError, match="not that of the model"):
        unregistered.register_kv_caches([], pool.layout)


def forget(pool: Pool, task_id: int) -> None:
    """Makes a task older than tasks get that somebody means to launch."""
    task_of(pool, task_id).created_s -= 2 * pool.manager.cache_config.lease_timeout_s


@pytest.mark.parametrize("kind", ["get_match", "put_match"])
def test_a_task_that_nobody_launches_gives_its_promise_back(make, caplog, kind) -> None:
    pool = make()
    pool.put(tokens(100, 64), SLOTS)

    def promised() -> float:
        return pool.manager.engine.stats()["CPU"]["pinned"]  # what is read and what is written

    task, mask = getattr(pool.manager, kind)(tokens(100 if kind == "get_match" else 9000, 64))
    assert mask.all()
    assert promised() == 4
    forget(pool, task)
    assert pool.manager.try_wait([task])[task].status is KVResponseStatus.CANCELLED
    assert promised() == 0
    assert "was not launched" in caplog.text


def test_a_task_that_was_reclaimed_can_be_launched_to_no_effect(make) -> None:
    pool = make()
    pool.put(tokens(100, 64), SLOTS)
    before = pool.bytes_at(OTHER)
    task, _ = pool.manager.get_match(tokens(100, 64))
    forget(pool, task)
    pool.manager.engine.poll()
    pool.manager.launch([task], [OTHER])
    assert pool.manager.wait([task])[task].status is KVResponseStatus.CANCELLED
    assert torch.equal(pool.bytes_at(OTHER), before)


def test_a_task_that_was_launched_is_not_reclaimed(make) -> None:
    pool = make()
    pool.put(tokens(100, 64), SLOTS)
    task, _ = pool.manager.get_match(tokens(100, 64))
    pool.manager.launch([task], [OTHER])
    forget(pool, task)
    assert pool.manager.wait([task])[task].status is KVResponseStatus.SUCCESS


def test_a_timeline_of_transfers_is_written_at_the_end(make, tmp_path) -> None:
    pool = make(cpu_blocks=8, ssd_blocks=64, trace_file=tmp_path / "t.json")
    for n in range(3):
        pool.put(tokens(1000 * n, 64), SLOTS)
        assert pool.manager.engine.flush_spills(20.0)
    pool.get(tokens(0, 64), OTHER)
    pool.manager.shutdown()
    events = json.loads((tmp_path / "t-rank0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events]
    assert names.count("put D2H") == 3
    assert names.count("spill H2DISK") == 3
    assert names.count("get H2D") == names.count("get DISK2H") == 1
    read, load = (next(e for e in events if e["name"] == name) for name in ("get DISK2H", "get H2D"))
    assert load["args"]["follows_layers_of"] == read["args"]["op"]
    assert load["ts"] > read["ts"] > 0
    assert load["ts"] + load["dur"] >= read["ts"] + read["dur"] > read["ts"]
    assert {event["args"]["status"] for event in events} == {"DONE"}


def test_a_timeline_that_cannot_be_written_is_only_a_message(make, tmp_path, caplog) -> None:
    directory = tmp_path / "traces"
    directory.mkdir()
    pool = make(trace_file=directory / "t.json")
    pool.put(tokens(0, 64), SLOTS)
    directory.rmdir()
    pool.manager.shutdown()
    assert "trace_file" in caplog.text


def test_ids_of_32_and_of_64_bits_are_the_same_tokens(make) -> None:
    pool = make()
    before = pool.bytes_at(SLOTS)
    assert pool.put(tokens(100, 64).to(torch.int32), SLOTS) == 64
    assert pool.put(tokens(100, 64).to(torch.int64), SLOTS) == 0
    assert pool.get(tokens(100, 64).to(torch.int64), OTHER) == 64
    assert torch.equal(pool.bytes_at(OTHER), before)
    with pytest.raises(ValueError, match="32 bits"):
        pool.manager.get_match(torch.full((64,), 2**40))


def test_a_task_cannot_go_back() -> None:
    task = KVTask(1, None, TaskStatus.COMPLETED)
    with pytest.raises(RuntimeError, match="cannot go from completed to running"):
        task.become(TaskStatus.RUNNING)


def test_the_example_runs() -> None:
    out = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"], capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0, out.stderr
    assert "bytes identical: True" in out.stdout


# ---- faster than the disk ----


def slow_to_write(pool: Any, tmp_path: Path) -> FaultyDisk:
    """Puts a disk under the pool that takes its time for every write."""
    disk = FaultyDisk(1)
    disk.set_fault("write", 1.0, delay_s=0.005)
    pool.manager.shutdown()
    pool.manager = KVManager(pool.manager.model_config, pool.manager.cache_config)
    pool.manager.register_kv_caches(list(pool.kv), pool.layout)
    assert pool.manager._device is not None
    pool.manager._engine = KVTaskEngine(
        pool.manager.cache_config,
        pool.manager._device,
        namespace=pool.manager.namespace,
        keep_tokens=True,
        disk=disk,
    )
    return disk


def task_of(pool: Pool, task_id: int) -> KVTask:
    return pool.manager._requests[task_id].task


@pytest.mark.parametrize("blocks", [1, 4, 12, 32], ids=lambda n: f"{n}_blocks_each")
def test_puts_that_are_faster_than_the_disk_wait_for_it_and_lose_nothing(make, tmp_path, blocks) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=512)
    slow_to_write(pool, tmp_path)
    each = blocks * BLOCK
    slots = [torch.arange(n * each, (n + 1) * each) % 1024 for n in range(96 // blocks)]
    before = [pool.bytes_at(part) for part in slots]
    tasks = [pool.manager.put_async(tokens(10_000 * n, each), part) for n, part in enumerate(slots, start=1)]
    statuses = {task_of(pool, task).status for task in tasks}
    assert TaskStatus.CREATED in statuses, "none had to wait"
    for task, response in pool.manager.wait(tasks).items():
        assert response.status is KVResponseStatus.SUCCESS, task
        assert response.return_mask.all()
    assert pool.manager.engine.flush_spills(20.0)
    assert pool.manager.engine.stats()["SSD"]["dropped"] == 0
    target = torch.arange(each)
    for n, expected in enumerate(before, start=1):
        pool.wipe(target)
        assert pool.get(tokens(10_000 * n, each), target) == each
        assert torch.equal(pool.bytes_at(target), expected)


def test_a_put_that_waits_can_be_cancelled_and_fails_alone(make, tmp_path) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=512)
    slow_to_write(pool, tmp_path)
    first = pool.manager.put_async(tokens(1000, 512), torch.arange(512))
    cancelled = pool.manager.put_async(tokens(2000, 64), SLOTS)
    wrong = pool.manager.put_async(tokens(3000, 64), SLOTS[:5])
    last = pool.manager.put_async(tokens(4000, 64), SLOTS)
    pool.manager.cancel([cancelled])
    answers = pool.manager.wait([first, cancelled, wrong, last])
    assert [answers[task].status.value for task in (first, cancelled, wrong, last)] == [
        "success",
        "cancelled",
        "failed",
        "success",
    ]
    assert "a slot mapping for this task has 64 slots" in answers[wrong].error
    # One whose mapping is wrong at once is not there at all.
    assert pool.manager.engine.flush_spills(20.0)
    with pytest.raises(ValueError, match="a slot mapping"):
        pool.manager.put_async(tokens(5000, 64), SLOTS[:5])
    assert pool.manager.engine.stats()["tasks"]["kept"] == 0


def test_what_waits_for_the_disk_is_flushed_away_too(make, tmp_path) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=512)
    slow_to_write(pool, tmp_path)
    engine = pool.manager.engine
    tasks = [task_of(pool, pool.manager.put_async(tokens(1000 * n, 64), SLOTS)) for n in range(1, 9)]
    engine.forget(tasks[-1])  # its creator does not ask any more
    assert tasks[-1].status is TaskStatus.CREATED
    pool.manager.clear()
    assert all(task.ended for task in tasks)
    pool.until(lambda: engine.stats()["tasks"]["running"] == 0)
    assert engine.stats()["CPU"]["ready"] == engine.stats()["CPU"]["pinned"] == 0


def test_nothing_holds_a_put_up_while_the_ssd_tier_is_out(make, tmp_path) -> None:
    pool = make(cpu_blocks=32, ssd_blocks=512)
    disk = slow_to_write(pool, tmp_path)
    disk.set_fault("write", 1.0, errno.EIO)
    disk.set_fault("open", 1.0, errno.EIO)
    tasks = [pool.manager.put_async(tokens(10_000 * n, 64), SLOTS) for n in range(1, 30)]
    for response in pool.manager.wait(tasks).values():
        assert response.status is KVResponseStatus.SUCCESS
    engine = pool.manager.engine
    pool.until(lambda: engine.stats()["SSD"]["times_out"] == 1)
    assert engine.stats()["SSD"]["dropped"] > 0
    for n in range(30, 60):
        task = pool.manager.put_async(tokens(10_000 * n, 64), SLOTS)
        assert task_of(pool, task).status is TaskStatus.RUNNING
        pool.manager.wait([task])
    disk.clear_faults()


def test_who_does_not_wait_for_the_disk_loses_to_it_what_is_counted(make, tmp_path) -> None:
    """The way of SGLang's scheduler: it never waits, and what is new is always taken in."""
    pool = make(cpu_blocks=32, ssd_blocks=512)
    slow_to_write(pool, tmp_path)
    engine = pool.manager.engine
    for n in range(1, 41):
        task, mask = pool.manager.put_match(tokens(10_000 * n, 64))
        assert mask.all()
        pool.manager.launch([task], [SLOTS])
        assert pool.manager.wait([task])[task].status is KVResponseStatus.SUCCESS
        assert engine.stats()["CPU"]["pinned"] <= 8 + 4
    assert engine.flush_spills(20.0)
    stats = engine.stats()
    assert stats["CPU"]["puts_without_room"] == 0
    assert stats["SSD"]["dropped"] > 0
    assert stats["SSD"]["ready"] + stats["SSD"]["dropped"] == 160
