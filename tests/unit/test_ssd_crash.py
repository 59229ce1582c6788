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
from ssd_rig import TIMEOUT_S, Memory, Rig, memory_directory

from sglang_flexkv import _core

KILLS = 200
KILLS_PER_STORE = 20
EARLY = 0.3  # of the kills: opening and replaying is when the files are most vulnerable
STEPS_MAX = 20  # that are waited for before the others
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
    """What a server does to its files, until it is killed. Reports that they are open, each step before it is
    taken, and a sync after it."""
    rng = random.Random(seed)
    rig = Rig(directory, Memory(SLOTS, 2, 8192), io_engine=io_engine)
    number = seed * 100_000

    def say(what: bytes, blocks: dict[int, int]) -> None:
        os.write(report, _LETTER.pack(what, len(blocks)) + b"".join(_PAIR.pack(*b) for b in blocks.items()))

    say(b"O", {})
    while True:
        blocks = {
            slot: number + i for i, slot in enumerate(rng.sample(range(SLOTS), rng.randint(1, BATCH_MAX)))
        }
        number += len(blocks)
        say(b"W", blocks)
        assert rig.write(blocks)
        if rng.random() < 0.3:
            assert rig.store.sync(TIMEOUT_S)
            say(b"S", {})


class Reports:
    """What a child says, as it says it. Read at once: a full pipe would hold the child back."""

    def __init__(self, pipe: int) -> None:
        self.letters: list[tuple[bytes, dict[int, int]]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(pipe,))
        self._reader.start()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb") as stream:
            while len(head := stream.read(_LETTER.size)) == _LETTER.size:
                what, count = _LETTER.unpack(head)
                pairs = stream.read(count * _PAIR.size)
                if len(pairs) < count * _PAIR.size:
                    return  # killed while it said so
                with self._news:
                    self.letters.append((what, dict(_PAIR.iter_unpack(pairs))))
                    self._news.notify()

    def wait_for(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.letters) >= count, TIMEOUT_S), "the child hangs"

    def all(self) -> list[tuple[bytes, dict[int, int]]]:
        """After the child has ended."""
        self._reader.join()
        return self.letters


class Pace:
    """How fast children are here and now, so that moments can be drawn that do not depend on the machine."""

    def __init__(self) -> None:
        self.opening_s = 0.0  # of the last child that was seen to get so far
        self.step_s = 0.0


def _killed_child(
    directory: Path, seed: int, io_engine: _core.IoEngineKind, rng: random.Random, pace: Pace
) -> list[tuple[bytes, dict[int, int]]]:
    """Runs a child on the directory and kills it: while it opens the files, or after some of its reports and
    a part of another step. Returns what it said."""
    early = pace.opening_s > 0 and rng.random() < EARLY
    reads, writes = os.pipe()
    started_s = time.monotonic()
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
    reports = Reports(reads)
    try:
        if early:
            time.sleep(pace.opening_s * rng.random())
        else:
            reports.wait_for(1)
            opened_s = time.monotonic()
            count = rng.randint(1, STEPS_MAX)
            reports.wait_for(count + 1)
            pace.opening_s, pace.step_s = opened_s - started_s, (time.monotonic() - opened_s) / count
            time.sleep(pace.step_s * rng.random())
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        said = reports.all()
    assert os.WIFSIGNALED(status), "the child ended by itself"
    return said


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
    rng, pace = random.Random(io_engine), Pace()
    served = syncs = empty_handed = 0
    ledger, directory = Ledger(), tmp_path
    for kill in range(KILLS // 2):
        if kill % KILLS_PER_STORE == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            ledger = Ledger()
        gc.collect()  # the engine of the last look must be gone: its threads do not survive a fork
        said = _killed_child(directory, kill + 1, kind, rng, pace)
        empty_handed += not said
        for what, blocks in said:
            if what == b"W":
                ledger.overwrite(blocks)
            elif what == b"S":
                ledger.synced()
                syncs += 1
        rig = Rig(directory, Memory(SLOTS, 2, 8192), io_engine=kind)
        served += ledger.check(rig)
        rig.close()
        del rig
    # Otherwise nothing was tested.
    assert syncs > KILLS // 2
    assert served > 10 * KILLS // 2
    assert empty_handed > 0


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
            if not rig.store.sync(TIMEOUT_S):
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
                if not rig.store.sync(TIMEOUT_S):
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
    assert rig.store.sync(TIMEOUT_S)
    rig.store.clear(True)
    assert rig.store.sync(TIMEOUT_S)
    assert rig.write({3: 1003})
    assert rig.store.sync(TIMEOUT_S)
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
    assert rig.store.sync(TIMEOUT_S)
    disk.power_fail(seed)
    rig.close()

    rig = Rig(fast_directory, memory)
    assert rig.found == {}
    rig.close()
