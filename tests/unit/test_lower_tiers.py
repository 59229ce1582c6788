"""The contract of lower tiers, on each of them: the SSD tier, the stores of the remote tier, and a tier in
memory that only tests have.

A tier that is new here is a class like ``Medium``'s below and a line in ``MEDIA``.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from memory_tier import MemoryTier
from redis_server import RedisServer
from remote_faults import Faults, faulty_stores
from sglang_flexkv_testing import FaultyDisk

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, tierlife
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import LowerTier
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.storage import storage_engine
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.ssd_tier import SsdTier

BLOCK = 16
LAYERS = 6
SEQUENCE = 8  # blocks
CPU_BLOCKS, LOWER_BLOCKS = 16, 96
NAMESPACE = make_namespace({"test": "lower tiers"})
PATIENCE_S = 60.0


class Medium(Protocol):
    """A medium under a tier, with a switch for each fault."""

    name: str
    knows_what_it_holds: bool  # when it is opened; or it is asked

    def config(self) -> dict[str, object]:
        """Settings that ask for the tier."""

    def disk(self) -> FaultyDisk | None: ...
    def fail(self, *, loads: bool = False, stores: bool = False) -> None: ...
    def stall(self) -> None: ...
    def damage(self) -> None:
        """Everything that is held, or is read from now on, is not what was stored."""

    def refuse_to_open(self) -> None: ...
    def heal(self) -> None: ...


class SsdMedium:
    name = "SSD"
    knows_what_it_holds = True

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory, self._disk = directory, FaultyDisk(3)

    def config(self) -> dict[str, object]:
        return {"enable_ssd": True, "num_ssd_blocks": LOWER_BLOCKS, "ssd_cache_dir": (self._directory,)}

    def disk(self) -> FaultyDisk:
        return self._disk

    def fail(self, *, loads: bool = False, stores: bool = False) -> None:
        self._disk.set_fault("read", float(loads), errno.EIO)
        self._disk.set_fault("write", float(stores), errno.EIO)

    def stall(self) -> None:
        self._disk.set_fault("read", 1.0, 0, 2.0)

    def damage(self) -> None:
        self._disk.set_fault("flip", 1.0)

    def refuse_to_open(self) -> None:
        self._disk.set_fault("open", 1.0, errno.EIO)

    def heal(self) -> None:
        self._disk.clear_faults()


class MemoryMedium:
    name = "MEMORY"
    knows_what_it_holds = True

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tier = MemoryTier(LOWER_BLOCKS)
        registered = [*storage_engine.LOWER_TIERS, lambda _: self._tier]  # the line of registration
        monkeypatch.setattr(storage_engine, "LOWER_TIERS", registered)

    def config(self) -> dict[str, object]:
        return {}

    def disk(self) -> None:
        return None

    def fail(self, *, loads: bool = False, stores: bool = False) -> None:
        self._tier.core.set_failing(loads, stores)

    def stall(self) -> None:
        self._tier.core.set_stalled(True)

    def damage(self) -> None:
        for slot in range(LOWER_BLOCKS):
            self._tier.core.damage(slot)

    def refuse_to_open(self) -> None:
        self._tier.opens_fail = True

    def heal(self) -> None:
        self._tier.core.set_failing(False, False)
        self._tier.core.set_stalled(False)
        self._tier.opens_fail = False


class RemoteMedium:
    """A store behind one that fails on demand."""

    name = "REMOTE"
    knows_what_it_holds = False

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._url, self.faults = self.url(directory), Faults()
        monkeypatch.setattr(remote_tier, "STORES", faulty_stores(self.faults))
        monkeypatch.setattr(remote_tier, "_ABSENT_S", 0.0)

    def url(self, directory: Path) -> str:
        raise NotImplementedError

    def config(self) -> dict[str, object]:
        return {"remote": self._url, "num_remote_blocks": LOWER_BLOCKS, "remote_timeout_s": 5.0}

    def disk(self) -> None:
        return None

    def fail(self, *, loads: bool = False, stores: bool = False) -> None:
        self.faults.loads_fail, self.faults.stores_fail = loads, stores

    def stall(self) -> None:
        self.faults.stall()

    def damage(self) -> None:
        self.faults.flip = 1.0

    def refuse_to_open(self) -> None:
        self.faults.opens_fail = True

    def heal(self) -> None:
        self.faults.heal()

    def go_away(self) -> None:
        self.faults.away = True

    def come_back(self) -> None:
        self.faults.away = False

    def end(self) -> None:
        pass


class DirectoryMedium(RemoteMedium):
    def url(self, directory: Path) -> str:
        return f"file://{directory}?max_gb=1"


class RedisMedium(RemoteMedium):
    """Blocks are compressed here."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = RedisServer(directory)
        super().__init__(directory, monkeypatch)

    def url(self, directory: Path) -> str:
        return self._server.url

    def config(self) -> dict[str, object]:
        return {**super().config(), "remote_compression": "always"}

    def go_away(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server.start()

    def end(self) -> None:
        self._server.stop()


MEDIA: list[Callable[[Path, pytest.MonkeyPatch], Medium]] = [
    SsdMedium,
    MemoryMedium,
    DirectoryMedium,
    RedisMedium,
]


class Cache:
    """An engine over a device pool. The KV of sequence i is drawn from i: a get can be checked."""

    def __init__(self, medium: Medium, **config: object) -> None:
        self.medium = medium
        layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, LAYERS, SEQUENCE, BLOCK, 2, 64)
        self.kv = torch.zeros(layout.kv_shape)
        settings = {"tokens_per_block": BLOCK, "num_cpu_blocks": CPU_BLOCKS, **medium.config(), **config}
        self.engine = KVTaskEngine(
            CacheConfig(**settings),
            layout.device_buffers(list(self.kv)),
            namespace=NAMESPACE,
            disk=medium.disk(),
            keep_tokens=True,
        )
        self.slots = np.arange(SEQUENCE * BLOCK)

    def sequence(self, number: int) -> SequenceMeta:
        return SequenceMeta(np.arange(SEQUENCE * BLOCK) + number * 10_000, BLOCK, NAMESPACE)

    def content(self, number: int) -> torch.Tensor:
        return torch.rand(self.kv.shape, generator=torch.Generator().manual_seed(number))

    def put(self, number: int, blocks: int = SEQUENCE) -> None:
        self.kv[:] = self.content(number)
        sequence = self.sequence(number)
        task = self.engine.create_put(
            None, sequence.block_keys[:blocks], sequence.token_ids[: blocks * BLOCK]
        )
        self.engine.launch(task, self.slots)
        assert self.engine.wait([task], PATIENCE_S)
        self.engine.forget(task)

    def ask(self, number: int) -> None:
        """Learns what a tier that is asked has of a sequence."""
        keys = self.sequence(number).block_keys
        question = self.engine.ask(keys) if self.engine.can_ask else None
        if question is not None:
            self.until(lambda: question.is_over, "a question is never over")
            self.engine.learn(question)

    def start_get(self, number: int) -> KVTask:
        self.ask(number)
        self.kv[:] = -1
        task = self.engine.create_get(self.sequence(number))
        self.engine.launch(task, self.slots)
        return task

    def end_get(self, number: int, task: KVTask) -> int:
        """How many blocks came, all of them with the right bytes. A get that failed brings none."""
        assert self.engine.wait([task], PATIENCE_S), "a get hangs on a lower tier"
        self.engine.forget(task)
        if task.status is not TaskStatus.COMPLETED or task.plan is None:
            return 0
        blocks = task.plan.num_blocks
        assert torch.equal(self.kv[:, :, :blocks], self.content(number)[:, :, :blocks])
        return blocks

    def get(self, number: int) -> int:
        return self.end_get(number, self.start_get(number))

    def fill(self, numbers: range) -> None:
        """Puts sequences, each all the way down; the CPU tier keeps the last two."""
        for number in numbers:
            self.put(number)
            assert self.engine.flush_spills(PATIENCE_S)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, what
            self.engine.poll()
            time.sleep(0.005)

    def of_tier(self, what: str) -> float:
        return self.engine.stats()[self.medium.name][what]

    def until_out(self) -> None:
        self.until(
            lambda: not self.of_tier("online") and not self.of_tier("leaving"), "the tier has not gone"
        )

    def lose_tier(self) -> None:
        """Loads fail until the tier has gone, and it cannot come back before the medium is healed."""
        self.medium.fail(loads=True)
        self.medium.refuse_to_open()
        for number in range(3):
            self.get(number)
        self.until_out()

    def until_back(self) -> None:
        self.until(lambda: self.of_tier("online") == 1, "the tier has not come back")

    def close(self) -> None:
        self.medium.heal()
        self.engine.quiesce()
        self.until(lambda: self.engine.stats()["tasks"]["running"] == 0, "something never ends")
        self.engine.check_integrity()
        self.engine.close()


@pytest.fixture(params=MEDIA, ids=lambda medium: medium.__name__.removesuffix("Medium"))
def medium(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Medium]:
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.05)
    monkeypatch.setattr(tierlife, "_RETRY_MAX_S", 0.2)
    monkeypatch.setattr(tierlife, "_CHECK_EVERY_S", 0.0)
    made: Medium = request.param(tmp_path, monkeypatch)
    yield made
    if isinstance(made, RemoteMedium):
        made.end()


@pytest.fixture
def cache(medium: Medium) -> Iterator[Cache]:
    made = Cache(medium)
    yield made
    made.close()


def test_what_comes_back_is_what_was_stored(cache: Cache) -> None:
    cache.fill(range(6))
    assert cache.of_tier("ready") == 6 * SEQUENCE
    for number in range(6):
        assert cache.get(number) == SEQUENCE
    loads = {name: stats for name, stats in cache.engine.stats().items() if name.endswith("2H")}
    assert sum(stats["ops_done"] for stats in loads.values()) >= 4
    assert cache.engine.num_spill_dropped_blocks == 0


def test_a_load_may_be_followed_layer_by_layer(cache: Cache) -> None:
    cache.fill(range(3))
    gate = cache.engine.make_gate(LAYERS)
    cache.kv[:] = -1
    task = cache.engine.create_get(cache.sequence(0))
    gate.expect(task.num_loads)
    cache.engine.launch(task, cache.slots, gate=gate)
    wanted = cache.content(0)
    for layer in range(LAYERS):
        assert gate.wait(layer, PATIENCE_S)
        assert torch.equal(cache.kv[layer], wanted[layer]), f"layer {layer} was opened before it was there"
    assert cache.end_get(0, task) == SEQUENCE


def test_a_damaged_block_is_a_miss_and_is_not_looked_for_again(cache: Cache) -> None:
    cache.fill(range(4))
    cache.medium.damage()
    task = cache.start_get(0)
    assert cache.end_get(0, task) == 0
    assert task.status is TaskStatus.FAILED
    cache.medium.heal()
    assert cache.get(0) == 0  # forgotten: nothing is tried
    assert cache.of_tier("times_out") == 0  # a damaged block says nothing about the medium
    cache.fill(range(1))
    assert cache.get(0) == SEQUENCE


def test_what_is_wrong_with_block_after_block_is_said_once(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.fill(range(10))
    cache.medium.damage()
    for number in range(8):
        assert cache.get(number) == 0
    said = [text for text in caplog.messages if "count as misses" in text]
    assert said
    assert len(said) == len(set(said))


def test_a_tier_that_fails_is_taken_out_and_comes_back_with_what_it_holds(cache: Cache) -> None:
    cache.fill(range(8))
    held = cache.of_tier("ready")
    cache.medium.fail(loads=True)
    cache.medium.refuse_to_open()  # or it would be back before we look
    for number in range(3):
        assert cache.get(number) == 0
    cache.until(lambda: cache.of_tier("times_out") == 1, "the tier stays in")
    assert cache.get(7) == SEQUENCE  # the CPU tier goes on
    assert cache.get(3) == 0
    cache.until_out()
    cache.medium.heal()
    cache.until_back()
    assert 0 < cache.of_tier("recovered") <= held or not cache.medium.knows_what_it_holds
    assert cache.get(4) == SEQUENCE


def test_blocks_that_cannot_be_stored_are_counted_and_cost_nothing_else(cache: Cache) -> None:
    cache.medium.fail(stores=True)
    for number in range(8):
        cache.put(number)
        cache.engine.flush_spills(1.0)
    cache.until(lambda: cache.of_tier("times_out") >= 1, "the tier stays in")
    assert cache.of_tier("dropped") > 0
    assert cache.get(7) == SEQUENCE
    cache.medium.heal()
    cache.until_back()
    cache.fill(range(20, 24))
    assert cache.get(20) == SEQUENCE


def test_nobody_waits_for_a_tier_that_hangs(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.fill(range(4))
    monkeypatch.setattr(tierlife, "_STALL_S", 0.3)
    cache.medium.stall()
    task = cache.start_get(0)
    cache.until(lambda: cache.of_tier("times_out") == 1, "the tier stays in")
    assert cache.get(3) == SEQUENCE
    assert cache.end_get(0, task) in (0, SEQUENCE)
    cache.medium.heal()
    cache.until_back()


def test_who_stops_waits_for_a_call_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the GIL, which the call needs to end."""
    medium = DirectoryMedium(tmp_path, monkeypatch)
    cache = Cache(medium)
    cache.fill(range(4))
    medium.stall()  # for two seconds
    cache.start_get(0)
    assert medium.faults.num_held.acquire(timeout=PATIENCE_S)
    cache.engine.close()
    assert "left to itself" not in caplog.text


def test_what_cannot_be_opened_is_tried_again_and_said_once(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.fill(range(4))
    tried = threading.Semaphore(0)
    for made in (SsdTier, MemoryTier, remote_tier.RemoteTier):

        def count_and_open(tier: LowerTier, open_tier: Callable[[LowerTier], None] = made.open) -> None:
            tried.release()
            open_tier(tier)

        monkeypatch.setattr(made, "open", count_and_open)
    cache.lose_tier()
    for _ in range(3):
        assert tried.acquire(timeout=PATIENCE_S), "nobody tries"
    assert cache.of_tier("online") == 0
    assert caplog.text.count("still out") == 1
    cache.medium.heal()
    cache.until_back()


def test_a_start_says_what_cannot_be_opened(medium: Medium) -> None:
    medium.refuse_to_open()
    with pytest.raises(ConfigError):
        Cache(medium)
    medium.heal()
    Cache(medium).close()  # nothing was left held


def test_what_is_cleared_is_gone_for_the_next_one_too(medium: Medium) -> None:
    first = Cache(medium)
    first.fill(range(4))
    first.engine.clear_tiers()
    assert first.get(0) == 0
    first.fill(range(10, 12))
    first.close()
    second = Cache(medium)
    assert second.of_tier("recovered") == 2 * SEQUENCE * second.medium.knows_what_it_holds
    assert second.get(10) == SEQUENCE
    assert second.get(0) == 0
    second.close()


def test_what_is_cleared_while_the_tier_is_out_does_not_come_back_with_it(cache: Cache) -> None:
    cache.fill(range(6))
    cache.lose_tier()
    cache.engine.clear_tiers()
    cache.medium.heal()
    cache.until_back()
    assert cache.of_tier("recovered") == 0
    assert [cache.get(number) for number in range(6)] == [0] * 6


def test_what_must_not_persist_is_found_by_this_process_only(medium: Medium) -> None:
    first = Cache(medium)
    first.engine.stop_persisting()
    first.fill(range(4))
    assert first.get(0) == SEQUENCE
    first.close()
    second = Cache(medium)
    assert second.of_tier("recovered") == 0
    assert second.get(0) == 0
    second.close()


def test_what_was_synced_is_found_by_the_next_one(medium: Medium) -> None:
    first = Cache(medium)
    first.fill(range(4))
    assert first.engine.sync(PATIENCE_S)
    first.close()
    second = Cache(medium)
    assert second.of_tier("recovered") == 4 * SEQUENCE * second.medium.knows_what_it_holds
    for number in range(4):
        assert second.get(number) == SEQUENCE
    second.close()


def test_a_cancelled_load_ends_and_leaves_the_tier_as_it_was(cache: Cache) -> None:
    cache.fill(range(4))
    for _ in range(10):
        task = cache.start_get(0)
        cache.engine.cancel(task)
        cache.end_get(0, task)
        cache.fill(range(2, 4))  # pushes it out of the CPU tier
    assert cache.of_tier("times_out") == 0
    assert cache.get(0) == SEQUENCE


def test_the_tier_evicts_when_it_is_full(cache: Cache) -> None:
    cache.fill(range(LOWER_BLOCKS // SEQUENCE + 4))
    assert cache.of_tier("evicted") > 0
    assert cache.of_tier("ready") <= LOWER_BLOCKS
    came = [cache.get(number) for number in range(LOWER_BLOCKS // SEQUENCE + 4)]
    assert came[-1] == SEQUENCE
    assert sum(came) >= LOWER_BLOCKS // 2


@pytest.mark.parametrize("kind", [DirectoryMedium, RedisMedium], ids=["Directory", "Redis"])
def test_a_store_that_is_away_at_the_start_comes_in_later(
    kind: type[RemoteMedium],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.05)
    monkeypatch.setattr(tierlife, "_RETRY_MAX_S", 0.2)
    medium = kind(tmp_path, monkeypatch)
    medium.go_away()
    cache = Cache(medium)
    assert caplog.text.count("The server goes on without it") == 1
    assert cache.of_tier("online") == 0
    assert not cache.engine.can_ask
    cache.put(0)
    assert cache.get(0) == SEQUENCE  # the CPU tier goes on
    medium.come_back()
    cache.until_back()
    cache.fill(range(1, 4))
    cache.engine.clear_tiers(0)
    assert cache.get(1) == SEQUENCE
    cache.close()
    medium.end()


# ---- two lower tiers ----


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cache, SsdMedium, MemoryMedium]]:
    """The SSD tier, and below it the one in memory."""
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.05)
    monkeypatch.setattr(tierlife, "_CHECK_EVERY_S", 0.0)
    ssd, memory = SsdMedium(tmp_path, monkeypatch), MemoryMedium(tmp_path, monkeypatch)
    cache = Cache(ssd)
    yield cache, ssd, memory
    memory.heal()
    cache.close()


def test_a_block_goes_to_every_lower_tier_and_comes_from_the_nearest(both: tuple) -> None:
    cache, _, _ = both
    assert list(cache.engine.tier_names) == ["CPU", "SSD", "MEMORY"]
    cache.fill(range(6))
    stats = cache.engine.stats()
    assert stats["SSD"]["ready"] == stats["MEMORY"]["ready"] == 6 * SEQUENCE
    assert cache.get(0) == SEQUENCE
    stats = cache.engine.stats()
    assert stats["DISK2H"]["ops_done"] == 1
    assert stats["MEMORY2H"]["ops_done"] == 0
    cache.engine.clear_tiers(0, 1)
    assert cache.get(1) == SEQUENCE
    assert cache.engine.stats()["MEMORY2H"]["ops_done"] == 1


def test_one_get_brings_blocks_from_three_tiers(both: tuple) -> None:
    cache, _, _ = both
    third, two_thirds = SEQUENCE // 3, 2 * SEQUENCE // 3
    for blocks, forgotten in ((SEQUENCE, (0, 1)), (two_thirds, (0,)), (third, ())):
        cache.put(0, blocks)
        assert cache.engine.flush_spills(PATIENCE_S)
        if forgotten:
            cache.engine.clear_tiers(*forgotten)
    task = cache.start_get(0)
    assert task.plan is not None
    assert task.plan.tiers.tolist() == [0] * third + [1] * (two_thirds - third) + [2] * (
        SEQUENCE - two_thirds
    )
    assert cache.end_get(0, task) == SEQUENCE


def test_one_lower_tier_serves_while_the_other_is_out(both: tuple) -> None:
    cache, ssd, memory = both
    cache.fill(range(8))
    ssd.fail(loads=True, stores=True)
    ssd.refuse_to_open()
    for number in range(3):
        cache.get(number)
    cache.until(lambda: cache.engine.stats()["SSD"]["online"] == 0, "the SSD tier stays in")
    assert cache.engine.stats()["MEMORY"]["online"] == 1
    cache.until_out()
    assert cache.get(4) == SEQUENCE
    cache.fill(range(20, 24))  # goes on to what is left
    assert cache.get(20) == SEQUENCE
    ssd.heal()
    cache.until_back()
    cache.fill(range(30, 34))
    memory.fail(loads=True)
    assert cache.get(30) == SEQUENCE
    assert cache.engine.stats()["SSD"]["online"] == 1
