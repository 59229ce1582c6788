"""The library as a user meets it: the seeds' quick start, both layouts, every tier, every way to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_flexkv import (
    CacheConfig,
    KVCacheLayout,
    KVCacheLayoutType,
    KVManager,
    KVResponseStatus,
    ModelConfig,
)
from sglang_flexkv.kvtask import KVTask, TaskStatus

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
        tenant: str = "",
    ) -> None:
        self.layout = KVCacheLayout(layout_type, 3, 64, BLOCK, 1 if mla else 2, 32, is_mla=mla)
        raw = torch.randint(0, 2**16, (torch.zeros(self.layout.kv_shape).numel(),), dtype=torch.int32)
        self.kv = raw.to(torch.int16).view(torch.int16).reshape(self.layout.kv_shape)
        if dtype.itemsize == 2:
            self.kv = self.kv.view(dtype)
        self.manager = KVManager(
            ModelConfig(
                num_layers=3,
                num_kv_heads=self.layout.num_head,
                head_size=32,
                use_mla=mla,
                dtype=dtype,
            ),
            CacheConfig(
                tokens_per_block=BLOCK,
                num_cpu_blocks=cpu_blocks,
                enable_ssd=ssd_blocks > 0,
                num_ssd_blocks=ssd_blocks,
                ssd_cache_dir=str(tmp_path) if ssd_blocks else "",
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

    def get(self, tokens: torch.Tensor, slots: torch.Tensor) -> int:
        task, _ = self.manager.get_match(tokens)
        self.manager.launch([task], [slots])
        response = self.manager.wait([task])[task]
        assert response.status is KVResponseStatus.SUCCESS
        return int(response.return_mask.sum())


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


def test_an_ssd_that_loses_its_data_gives_misses_and_is_taken_out(make, tmp_path, caplog) -> None:
    pool = make(cpu_blocks=8, ssd_blocks=64)
    for n in range(8):
        pool.put(tokens(1000 * (n + 1), 64), SLOTS)
        assert pool.manager.engine.flush_spills(20.0)
    os.truncate(next(tmp_path.glob("*.slots")), 0)
    for n in range(5):
        task, mask = pool.manager.get_match(tokens(1000 * (n + 1), 64))
        pool.manager.launch([task], [OTHER])
        response = pool.manager.wait([task])[task]
        if mask.any():
            assert response.status is KVResponseStatus.FAILED
            assert "SSD read failed" in response.error
        assert not response.return_mask.any()
    assert not pool.manager.engine.cache.ssd_alive
    assert [r.message for r in caplog.records if "taken out" in r.message]
    assert len([r for r in caplog.records if r.message.startswith("SSD tier: ")]) == 1
    # The CPU tier goes on.
    pool.put(tokens(9000, 64), SLOTS)
    assert pool.get(tokens(9000, 64), OTHER) == 64


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
    pool.manager.engine.transfer.drain(20.0)
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


def test_a_put_larger_than_the_cpu_tier_stores_nothing_and_fails_nothing(make) -> None:
    pool = make(cpu_blocks=2)
    assert pool.put(tokens(0, 64), SLOTS) == 0
    assert pool.get(tokens(0, 64), OTHER) == 0


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
    for n in range(8):
        pool.manager.put_async(tokens(1000 * n, 64), SLOTS)
    pool.manager.shutdown()
    pool.manager.shutdown()
    assert list(tmp_path.glob("*.slots")) == []
    again = Pool(tmp_path, ssd_blocks=64)  # the lock is free
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
