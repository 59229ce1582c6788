"""A disk that fails, hangs, lies or goes away under a running cache: it costs hits, never bytes and never
requests, and when it works again the tier comes back."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import HANG_S, TIMEOUT_S

from sglang_flexkv import (
    CacheConfig,
    KVCacheLayout,
    KVCacheLayoutType,
    KVManager,
    KVResponse,
    KVResponseStatus,
    ModelConfig,
    tierlife,
)
from sglang_flexkv.kvtask import KVTaskEngine

BLOCK = 16
CPU_BLOCKS, SSD_BLOCKS = 16, 128
POOL = 32  # blocks of the device
SEQUENCE = 8  # blocks
STALL_S = 0.3  # of the tier, where the disk hangs; elsewhere a slow machine must not look like that


class Cache:
    """A manager over a faulty disk. The KV of sequence i is drawn from i: a get can be checked."""

    def __init__(self, directory: Path, io_engine: str) -> None:
        self.directory = directory
        self.disk = FaultyDisk(5)
        layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, 2, POOL, BLOCK, 2, 64)
        self.kv = torch.zeros(layout.kv_shape, dtype=torch.float32)
        self.manager = KVManager(
            ModelConfig(num_layers=2, num_kv_heads=2, head_size=64, dtype=torch.float32, model_name="faults"),
            CacheConfig(
                tokens_per_block=BLOCK,
                num_cpu_blocks=CPU_BLOCKS,
                enable_ssd=True,
                num_ssd_blocks=SSD_BLOCKS,
                ssd_cache_dir=(directory,),
                io_engine=io_engine,
            ),
        )
        self.manager.register_kv_caches(self.kv, layout)
        assert self.manager._device is not None
        self.manager._engine = KVTaskEngine(
            self.manager.cache_config,
            self.manager._device,
            namespace=self.manager.namespace,
            disk=self.disk,
            keep_tokens=True,
        )
        self.engine = self.manager.engine
        self.slots = np.arange(SEQUENCE * BLOCK)

    @property
    def times_out(self) -> int:
        return int(self.engine.stats()["SSD"]["times_out"])

    def tokens(self, sequence: int) -> np.ndarray:
        return np.arange(SEQUENCE * BLOCK) + sequence * 10_000

    def content(self, sequence: int) -> torch.Tensor:
        """KV of the sequence's blocks, [layer, kv, block, ...]."""
        generator = torch.Generator().manual_seed(sequence)
        return torch.rand(self.kv[:, :, :SEQUENCE].shape, generator=generator)

    def put(self, sequence: int) -> None:
        self.kv[:, :, :SEQUENCE] = self.content(sequence)
        task = self.manager.put_async(self.tokens(sequence), self.slots)
        response = self.manager.wait([task], TIMEOUT_S)[task]
        assert response.status is KVResponseStatus.SUCCESS, response.error

    def start_get(self, sequence: int) -> int:
        self.kv[:, :, :SEQUENCE] = -1
        return self.manager.get_async(self.tokens(sequence), self.slots)

    def check(self, sequence: int, response: KVResponse) -> int:
        """Returns how many blocks came, all with the right bytes."""
        assert response.status is not KVResponseStatus.TIMEOUT, "a get hangs on the disk"
        mask = response.return_mask.reshape(-1, BLOCK)[:, 0]
        if response.status is KVResponseStatus.SUCCESS:
            assert torch.equal(self.kv[:, :, :SEQUENCE][:, :, mask], self.content(sequence)[:, :, mask])
        else:
            assert not mask.any()
        return int(mask.sum())

    def get(self, sequence: int) -> int:
        task = self.start_get(sequence)
        return self.check(sequence, self.manager.wait([task], TIMEOUT_S)[task])

    def fill(self, sequences: range) -> None:
        """Puts sequences and waits until each is on SSD; only the last two stay in memory as well."""
        for sequence in sequences:
            self.put(sequence)
            assert self.engine.sync(TIMEOUT_S)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, what
            self.engine.poll()
            time.sleep(0.01)

    @property
    def online(self) -> bool:
        return bool(self.engine.stats()["SSD"]["online"])

    @property
    def away(self) -> bool:
        ssd = self.engine.stats()["SSD"]
        return not ssd["online"] and not ssd["leaving"]

    def until_away(self) -> None:
        self.until(lambda: self.away, "the tier has not gone")

    @property
    def running(self) -> float:
        return self.engine.stats()["tasks"]["running"]

    def put_until_out(self) -> int:
        """Puts sequences from 10 on until the tier is out, and returns the last. How many that takes is open:
        a spill that has to wait is left out, and then nothing is written."""
        sequence = 9

        def is_out() -> bool:
            nonlocal sequence
            sequence += 1
            self.put(sequence)
            self.engine.sync(0.2)
            return self.times_out > 0

        self.until(is_out, "the tier stays in")
        return sequence

    def heals(self) -> None:
        """The tier comes back, and new blocks get there and come from there."""
        self.disk.clear_faults()
        # A fault just before may have failed the journal without the tier having looked yet: online it is
        # only when nothing of the past is left to be noticed.
        self.until(lambda: not self.running, "something never ends")

        def is_well() -> bool:
            synced = self.engine.sync(1.0)
            self.engine.poll()
            return synced and self.online

        self.until(is_well, "the tier does not come back")
        self.fill(range(50, 54))
        assert self.get(50) == SEQUENCE
        assert self.engine.stats()["DISK2H"]["ops_done"] > 0


@pytest.fixture(params=["io_uring", "threads"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.05)
    monkeypatch.setattr(tierlife, "_RETRY_MAX_S", 0.2)
    monkeypatch.setattr(tierlife, "_STALL_S", TIMEOUT_S)
    monkeypatch.setattr(tierlife, "_CHECK_EVERY_S", 0.0)
    directory = tmp_path / "ssd"
    directory.mkdir()
    cache = Cache(directory, request.param)
    yield cache
    cache.disk.clear_faults()
    cache.engine.quiesce()
    cache.until(lambda: not cache.running, "something never ends")
    cache.engine.check_integrity()
    cache.manager.shutdown()


def test_reads_fail(cache: Cache) -> None:
    cache.fill(range(8))
    cache.disk.set_fault("read", 1.0, errno.EIO)
    for sequence in range(3):
        assert cache.get(sequence) == 0
    cache.until(lambda: cache.times_out == 1, "the tier stays in")
    assert cache.get(7) == SEQUENCE  # in memory
    assert cache.get(5) == 0
    assert not cache.online
    cache.heals()


def test_a_read_that_fails_once_costs_one_miss(cache: Cache) -> None:
    cache.fill(range(8))
    cache.disk.set_fault("read", 1.0, errno.EIO)
    assert cache.get(0) == 0
    cache.disk.clear_faults()
    assert cache.online
    assert cache.get(1) == SEQUENCE
    assert cache.times_out == 0


def test_writes_fail(cache: Cache) -> None:
    cache.fill(range(4))
    cache.disk.set_fault("write", 1.0, errno.EIO)
    last = cache.put_until_out()
    cache.put(last + 1)
    assert cache.get(last + 1) == SEQUENCE
    cache.heals()


@pytest.mark.parametrize("operation", ["write", "reserve", "sync"])
def test_disk_is_full(cache: Cache, operation: str) -> None:
    cache.fill(range(4))
    # Reserving is asked for again when the files are opened again: full for good, until it is not.
    for each in {operation, "reserve"}:
        cache.disk.set_fault(each, 1.0, errno.ENOSPC)
    if operation == "reserve":  # all space was reserved at the start
        cache.fill(range(10, 16))
        last = 15
    else:
        last = cache.put_until_out()
    assert cache.get(last) == SEQUENCE
    cache.heals()


def test_read_only(cache: Cache) -> None:
    cache.fill(range(4))
    for operation in ("open", "write", "sync", "reserve", "rename"):
        cache.disk.set_fault(operation, 1.0, errno.EROFS)
    last = cache.put_until_out()
    cache.until_away()
    assert cache.get(last) == SEQUENCE
    cache.put(last + 1)
    tried = cache.disk.injected().get("open", 0)
    cache.until(lambda: cache.disk.injected().get("open", 0) >= tried + 2, "nobody looks for the disk")
    assert cache.away
    cache.heals()
    assert cache.get(0) == SEQUENCE  # what was there before is there again


@pytest.mark.parametrize("operation", ["read", "write"])
def test_disk_hangs(cache: Cache, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    cache.fill(range(8))
    cache.disk.set_fault(operation, 1.0, delay_s=HANG_S)
    monkeypatch.setattr(tierlife, "_STALL_S", STALL_S)
    if operation == "read":
        assert cache.get(0) == 0
    else:
        cache.put(10)
    cache.until(lambda: cache.times_out == 1, "the tier stays in")
    assert cache.get(7 if operation == "read" else 10) == SEQUENCE
    monkeypatch.setattr(tierlife, "_STALL_S", TIMEOUT_S)
    cache.heals()


def test_sync_hangs(cache: Cache) -> None:
    cache.fill(range(8))
    cache.disk.set_fault("sync", 1.0, delay_s=HANG_S)
    cache.put(10)
    assert not cache.engine.sync(0.5)
    assert cache.get(10) == SEQUENCE
    assert cache.get(0) == SEQUENCE  # reading goes on
    cache.heals()


def test_clear_does_not_wait_for_the_disk(cache: Cache) -> None:
    cache.fill(range(8))
    cache.disk.set_fault("read", 1.0, delay_s=HANG_S)
    cache.start_get(0)
    started_s = time.monotonic()
    cache.manager.clear()
    assert time.monotonic() - started_s < TIMEOUT_S
    cache.until(lambda: not cache.running, "the read never ends")
    assert cache.get(0) == cache.get(7) == 0
    cache.heals()
    for sequence in range(8):
        assert cache.get(sequence) == 0


def test_cleared_while_away(cache: Cache) -> None:
    cache.fill(range(8))
    for operation in ("read", "open"):
        cache.disk.set_fault(operation, 1.0, errno.EIO)
    for sequence in range(3):
        cache.get(sequence)
    cache.until_away()
    cache.manager.clear()
    cache.heals()
    for sequence in range(8):  # the files came back with them
        assert cache.get(sequence) == 0


def test_shutdown_while_the_disk_hangs(cache: Cache) -> None:
    cache.fill(range(8))
    cache.disk.set_fault("read", 1.0, delay_s=HANG_S)
    cache.start_get(0)
    started_s = time.monotonic()
    cache.manager.shutdown()
    assert time.monotonic() - started_s < TIMEOUT_S
    cache.__init__(cache.directory, "threads")  # type: ignore[misc]  # the lock is free, the files are in order
    assert cache.get(3) == SEQUENCE


def test_short_transfers(cache: Cache) -> None:
    cache.disk.set_fault("short", 0.7)
    cache.fill(range(8))
    for sequence in range(8):
        assert cache.get(sequence) == SEQUENCE
    assert cache.disk.injected()["short"] > 0
    assert cache.times_out == 0


def test_bits_flip(cache: Cache) -> None:
    cache.fill(range(14))
    cache.disk.set_fault("flip", 0.1)
    came = [cache.get(sequence) for sequence in range(12)]
    assert cache.disk.injected()["flip"] > 0
    assert 0 in came
    assert cache.engine.stats()["DISK2H"]["corrupt_blocks"] > 0
    # A disk that answers is not taken out for it.
    assert cache.times_out == 0
    cache.heals()


def test_directory_is_removed(cache: Cache) -> None:
    cache.fill(range(4))
    shutil.rmtree(cache.directory)
    last = cache.put_until_out()
    cache.until_away()
    cache.put(last + 1)  # one that no pinned spill keeps out of memory
    assert cache.get(last + 1) == SEQUENCE
    cache.directory.mkdir()
    cache.heals()
    assert cache.get(1) == 0


def test_everything_at_once(cache: Cache) -> None:
    cache.fill(range(4))
    for operation in ("open", "read", "write", "sync", "reserve", "rename"):
        cache.disk.set_fault(operation, 0.1, errno.EIO)
    for operation in ("short", "flip"):
        cache.disk.set_fault(operation, 0.1)
    rng = np.random.default_rng(3)
    deadline = time.monotonic() + 120
    rounds = 0
    # While the tier is out nothing reaches the disk: how many rounds it takes is open.
    while rounds < 150 or sum(cache.disk.injected().values()) <= 20:
        assert time.monotonic() < deadline
        rounds += 1
        sequence = int(rng.integers(0, 24))
        if cache.get(sequence) < SEQUENCE:
            cache.put(sequence)
    cache.heals()
