"""The SSD tier after the process was killed and after the power failed: what was synced is there, what is
served is right, and nothing comes back that was given up."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_flexkv_testing import PowerLossDisk
from ssd_rig import Memory, Rig, memory_directory

from sglang_flexkv import _core

KILLS = 200
KILLS_PER_STORE = 20
POWER_FAILURES = 64
SLOTS = 64
BATCH_MAX = 8

_LETTER = struct.Struct("<ci")  # what, and how many pairs follow
_PAIR = struct.Struct("<iq")  # slot, number


class Ledger:
    """What must be there, told by whoever writes before and after each step."""

    def __init__(self) -> None:
        self.current: dict[int, int] = {}  # slot -> number, written or being written
        self.durable: dict[int, int] = {}  # of them: synced and not touched since
        self.oldest_allowed = 0  # numbers below were cleared away for good
        self._cleared_at = 0

    def overwrite(self, blocks: dict[int, int]) -> None:
        for slot, number in blocks.items():
            self.durable.pop(slot, None)
            self.current[slot] = number

    def drop(self, slot: int) -> None:
        self.durable.pop(slot, None)
        self.current.pop(slot, None)

    def clear(self, next_number: int) -> None:
        self.current, self.durable = {}, {}
        self._cleared_at = next_number

    def synced(self) -> None:
        self.durable = dict(self.current)
        self.oldest_allowed = self._cleared_at

    def check(self, rig: Rig) -> int:
        """Compares with what a store came back with; returns how many blocks it serves."""
        served, _ = rig.read()  # which compares the bytes of what is served
        for slot, number in self.durable.items():
            assert rig.found.get(slot) == number, f"slot {slot}: block {number} was synced and is not found"
            assert slot in served, f"slot {slot}: block {number} was synced and does not verify"
        for number in rig.found.values():
            assert number >= self.oldest_allowed, f"block {number} was cleared and is back"
        # From here on the files hold what was found; the rest was rejected and may be written at will.
        self.current = {slot: rig.found[slot] for slot in served}
        self.durable = dict(self.current)
        # A clear that was not synced may not have happened; the next sync says nothing about it.
        self._cleared_at = self.oldest_allowed
        return len(served)


# ---- SIGKILL ----


def _live(directory: Path, seed: int, io_engine: _core.IoEngineKind, report: int) -> None:
    """What a server does to its files, until it is killed. Reports each step before it is taken, and a sync
    after it."""
    rng = random.Random(seed)
    rig = Rig(directory, Memory(SLOTS, 2, 8192), io_engine=io_engine)
    number = seed * 100_000

    def say(what: bytes, blocks: dict[int, int]) -> None:
        os.write(report, _LETTER.pack(what, len(blocks)) + b"".join(_PAIR.pack(*b) for b in blocks.items()))

    while True:
        blocks = {
            slot: number + i for i, slot in enumerate(rng.sample(range(SLOTS), rng.randint(1, BATCH_MAX)))
        }
        number += len(blocks)
        say(b"W", blocks)
        assert rig.write(blocks)
        if rng.random() < 0.3:
            assert rig.store.sync(30.0)
            say(b"S", {})


def _take_in(ledger: Ledger, log: bytes) -> int:
    """Returns how many syncs the child reported."""
    at = syncs = 0
    while at < len(log):
        what, count = _LETTER.unpack_from(log, at)
        at += _LETTER.size
        if what == b"W":
            ledger.overwrite(dict(_PAIR.unpack_from(log, at + i * _PAIR.size) for i in range(count)))
        else:
            ledger.synced()
            syncs += 1
        at += count * _PAIR.size
    return syncs


def _killed_child(directory: Path, seed: int, io_engine: _core.IoEngineKind, after_s: float) -> bytes:
    """Runs a child on the directory and kills it; returns what it said."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of the test runner may run here: no exception gets out, no exit handler is called.
        try:
            os.close(reads)
            _live(directory, seed, io_engine, writes)
        except BaseException as error:
            os.write(2, f"child failed: {error!r}\n".encode())
        finally:
            os._exit(1)
    os.close(writes)
    log = []
    reader = threading.Thread(target=lambda: log.extend(iter(lambda: os.read(reads, 1 << 16), b"")))
    reader.start()  # so that a full pipe does not hold the child back
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    reader.join()
    os.close(reads)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return b"".join(log)


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What others have left in memory is not looked at by each of many collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("io_engine", ["IO_URING", "THREADS"])
def test_killed_at_any_moment(tmp_path: Path, io_engine: str) -> None:
    kind = getattr(_core.IoEngineKind, io_engine)
    rng = random.Random(io_engine)
    served = syncs = empty_handed = 0
    ledger, directory = Ledger(), tmp_path
    for kill in range(KILLS // 2):
        if kill % KILLS_PER_STORE == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            ledger = Ledger()
        gc.collect()  # the engine of the last look must be gone: its threads do not survive a fork
        # Often early: opening and replaying is when the files are most vulnerable.
        log = _killed_child(directory, kill + 1, kind, rng.choice([0.02, 0.1, 0.2]) * rng.random())
        empty_handed += not log
        syncs += _take_in(ledger, log)
        rig = Rig(directory, Memory(SLOTS, 2, 8192), io_engine=kind)
        served += ledger.check(rig)
        rig.close()
        del rig
    # Otherwise nothing was tested.
    assert syncs > KILLS // 2
    assert served > 10 * KILLS // 2
    assert 0 < empty_handed < KILLS // 4


# ---- power loss ----


@pytest.fixture
def fast_directory() -> Iterator[Path]:
    yield from memory_directory()


def _work(rig: Rig, ledger: Ledger, rng: random.Random, steps: int, number: int) -> int:
    """Random steps until the disk is off, or these are done. Returns the next number."""
    for _ in range(steps):
        what = rng.random()
        if what < 0.55:
            slots = rng.sample(range(SLOTS), rng.randint(1, BATCH_MAX))
            blocks = {slot: number + i for i, slot in enumerate(slots)}
            number += len(blocks)
            ledger.overwrite(blocks)
            if not rig.write(blocks):
                return number
        elif what < 0.8:
            if not rig.store.sync(30.0):
                return number
            ledger.synced()
        elif what < 0.86:
            slot = rng.randrange(SLOTS)
            ledger.drop(slot)
            rig.store.drop([slot])
        elif what < 0.89:
            ledger.clear(number)
            rig.store.clear(True)
        elif ledger.current:
            # Again what is there: records by the hundred, which is what makes a journal be written anew.
            for _ in range(rng.randint(20, 150)):
                rig.publish(ledger.current)
                if not rig.store.sync(30.0):
                    return number
                ledger.synced()
    return number


@pytest.mark.parametrize("part", range(4))
def test_power_fails_at_any_moment(fast_directory: Path, part: int) -> None:
    served = lost_sectors = compactions = clears = 0
    memory = Memory(SLOTS, 16, 4096)
    for seed in range(part, POWER_FAILURES, 4):
        rng = random.Random(seed)
        directory = fast_directory / str(seed)
        directory.mkdir()
        ledger, number = Ledger(), 0
        # More than once on the same files: what a recovery leaves behind must be recovered as well.
        for _ in range(2):
            disk = PowerLossDisk()
            rig = Rig(directory, memory, disk=disk)
            number = _work(rig, ledger, rng, rng.randint(2, 80), number)
            lost: list[int] = []
            moment_s, chance = rng.random() * rng.choice([0.0005, 0.01, 0.05]), rng.getrandbits(63)
            switch = threading.Timer(moment_s, lambda d=disk, s=chance, out=lost: out.append(d.power_fail(s)))
            switch.start()
            number = _work(rig, ledger, rng, 10_000, number)
            switch.join()
            lost_sectors += sum(lost)
            compactions += rig.store.stats()["compactions"]
            rig.close()

            rig = Rig(directory, memory)
            served += ledger.check(rig)
            clears += ledger.oldest_allowed > 0
            rig.close()
        shutil.rmtree(directory)
    # Otherwise nothing was tested.
    assert served > 10 * POWER_FAILURES / 4
    assert lost_sectors > POWER_FAILURES
    assert compactions > 0
    assert clears > 0


@pytest.mark.parametrize("seed", range(8))
def test_cleared_and_synced_is_gone_after_power_loss(fast_directory: Path, seed: int) -> None:
    memory = Memory(SLOTS, 2, 8192)
    disk = PowerLossDisk()
    rig = Rig(fast_directory, memory, disk=disk)
    assert rig.write({slot: slot for slot in range(SLOTS)})
    assert rig.store.sync(30.0)
    rig.store.clear(True)
    assert rig.store.sync(30.0)
    assert rig.write({3: 1003})
    assert rig.store.sync(30.0)
    rig.end(rig.start_write({slot: 2000 + slot for slot in range(10, 20)}))  # never published
    disk.power_fail(seed)
    rig.close()

    rig = Rig(fast_directory, memory)
    assert rig.found == {3: 1003}
    assert rig.read() == ({3}, set())
    rig.close()


@pytest.mark.parametrize("seed", range(8))
def test_what_must_not_be_kept_is_gone_after_power_loss(fast_directory: Path, seed: int) -> None:
    memory = Memory(SLOTS, 2, 8192)
    disk = PowerLossDisk()
    rig = Rig(fast_directory, memory, disk=disk)
    rig.store.clear(False)  # from here on the weights are not those of the namespace
    assert rig.write({slot: slot for slot in range(SLOTS)})
    assert rig.store.sync(30.0)
    disk.power_fail(seed)
    rig.close()

    rig = Rig(fast_directory, memory)
    assert rig.found == {}
    rig.close()
