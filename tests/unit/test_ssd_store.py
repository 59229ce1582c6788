"""The files of the SSD tier: who may have a directory, what is reserved, and what the next one finds."""

from __future__ import annotations

import errno
import logging
import os
import resource
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import HANG_S, TIMEOUT_S, Memory, Rig, run_until_killed

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace, make_namespace
from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_files, ssd_store
from sglang_flexkv.storage.ssd_files import ShardFiles, check_free_space, shards_in
from sglang_flexkv.storage.ssd_store import SsdStore

SLOT = 4096
PAGE = 4096
OURS, THEIRS = make_namespace({"model": "a"}), make_namespace({"model": "b"})
HEADER = _core.SSD_SLOTS_OFFSET
HOLD_THE_LOCK = """
    import sys
    from pathlib import Path
    from sglang_flexkv.storage.ssd_store import SsdStore
    store = SsdStore((Path(sys.argv[1]),), 4, [4096], "rank0", namespace=bytes(16))
    print("locked", flush=True)
    sys.stdin.read()
"""


def open_store(
    *directories: Path,
    slots: int = 8,
    slices: tuple[int, ...] = (SLOT,),
    rank: str = "rank0",
    namespace: Namespace = OURS,
    **options: Any,
) -> SsdStore:
    return SsdStore(directories, slots, slices, rank, namespace=namespace, **options)


def names(*values: int) -> np.ndarray:
    return np.array([(value, value + 1000) for value in values], dtype=np.uint64).reshape(-1, 2)


def publish(store: SsdStore, blocks: dict[int, int]) -> None:
    """Blocks by slot, each the child of the one before it."""
    keys = names(*blocks.values())
    parents = np.zeros_like(keys)
    parents[1:] = keys[:-1]
    store.core.publish(keys, parents, np.array([*blocks], dtype=np.int64))


def found(store: SsdStore) -> dict[int, int]:
    """Blocks by slot that were found, least recently written first."""
    keys, _, slots = store.core.take_recovered()
    assert all(int(hi) == int(lo) + 1000 for lo, hi in keys)
    return {int(slot): int(key[0]) for slot, key in zip(slots, keys, strict=True)}


def reopened(*directories: Path, **options: Any) -> dict[int, int]:
    """What the next store finds."""
    store = open_store(*directories, **options)
    try:
        return found(store)
    finally:
        store.close()


def filled(*directories: Path, blocks: dict[int, int], **options: Any) -> None:
    """A directory that some server left with these blocks."""
    store = open_store(*directories, **options)
    publish(store, blocks)
    store.close()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip_bit(path: Path, offset: int) -> None:
    patch(path, offset, bytes([path.read_bytes()[offset] ^ 4]))


@pytest.fixture
def slots_file(tmp_path: Path) -> Path:
    return tmp_path / "flexkv-rank0.slots"


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "flexkv-rank0.journal"


@pytest.fixture
def notes() -> Iterator[list[str]]:
    """Warnings so far."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    ssd_store.logger.addHandler(handler)
    yield messages
    ssd_store.logger.removeHandler(handler)


# ---- what a store has ----


def test_space_is_really_reserved(tmp_path: Path, slots_file: Path) -> None:
    store = open_store(tmp_path, slots=100)
    stat = slots_file.stat()
    assert stat.st_size == HEADER + 100 * SLOT
    assert stat.st_blocks * 512 >= 100 * SLOT  # a sparse file would have next to none
    assert store.core.num_slots == 100
    store.close()


def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    filled(tmp_path, blocks={0: 1})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_slots_are_divided_between_directories(tmp_path: Path) -> None:
    directories = tuple(tmp_path / name for name in "abc")
    for directory in directories:
        directory.mkdir()
    filled(*directories, slots=10, blocks={0: 1, 1: 2, 5: 3, 9: 4})
    for directory in directories:
        assert (directory / "flexkv-rank0.slots").stat().st_size == HEADER + 4 * SLOT
    shards = [ShardFiles(directory, "rank0") for directory in directories]
    readers = {s.directory.name: _core.SsdReader(str(s.slots), str(s.journal)) for s in shards}
    live = {name: reader.live_slots.tolist() for name, reader in readers.items()}
    assert live == {"a": [0, 3], "b": [0], "c": [1]}
    assert reopened(*directories, slots=10) == {0: 1, 1: 2, 5: 3, 9: 4}


def test_close_gives_files_and_lock_back(tmp_path: Path) -> None:
    def opened() -> list[str]:
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return [to for to in (os.readlink(fd) for fd in links if os.path.islink(fd)) if str(tmp_path) in to]

    store = open_store(tmp_path)
    assert len(opened()) == 3
    store.close()
    assert opened() == []
    assert files(tmp_path) == ["flexkv-rank0.journal", "flexkv-rank0.lock", "flexkv-rank0.slots"]
    store.close()  # again is nothing
    open_store(tmp_path).close()


def test_the_lock_of_a_dead_server_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "flexkv-rank0.lock").write_text("4194304\n")
    store = open_store(tmp_path)
    assert int((tmp_path / "flexkv-rank0.lock").read_text()) == os.getpid()
    store.close()


def test_ranks_share_a_directory(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path, rank="rank1")
    assert len(files(tmp_path)) == 6
    publish(first, {0: 1})
    publish(second, {0: 2})
    second.close()
    first.close()
    assert [shard.rank_tag for shard in shards_in(tmp_path)] == ["rank0", "rank1"]
    assert reopened(tmp_path) == {0: 1}
    assert reopened(tmp_path, rank="rank1") == {0: 2}


# ---- what the next one finds ----


def test_what_was_published_is_found_with_its_parents(tmp_path: Path, notes: list[str]) -> None:
    store = open_store(tmp_path)
    assert found(store) == {}
    publish(store, {5: 10, 2: 11, 7: 12})
    publish(store, {0: 20})
    store.close()
    store = open_store(tmp_path)
    keys, parents, slots = store.core.take_recovered()
    assert slots.tolist() == [5, 2, 7, 0]  # in the order in which they were written
    assert np.array_equal(keys, names(10, 11, 12, 20))
    assert np.array_equal(parents[1:3], keys[:2])
    assert not parents[[0, 3]].any()
    assert found(store) == {}  # once
    store.close()
    assert reopened(tmp_path) == {5: 10, 2: 11, 7: 12, 0: 20}
    assert notes == []


def test_the_last_word_on_a_slot_counts(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    publish(store, {0: 1, 1: 2, 2: 3, 3: 4})
    publish(store, {1: 5})
    store.core.drop(np.array([2, 3]))
    publish(store, {3: 6})
    store.close()
    store = open_store(tmp_path)
    assert found(store) == {0: 1, 1: 5, 3: 6}
    publish(store, {0: 7})  # outranks what was found
    store.core.drop(np.array([1]))
    store.close()
    assert reopened(tmp_path) == {3: 6, 0: 7}


def test_slots_out_of_range_are_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for slot in (-1, 8):
        with pytest.raises(ValueError, match="slot"):
            publish(store, {slot: 1})
        with pytest.raises(ValueError, match="slot"):
            store.core.drop(np.array([slot]))
    store.close()
    assert reopened(tmp_path) == {}


def test_what_a_killed_server_had_synced_is_found(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        import numpy as np
        from sglang_flexkv.storage.ssd_store import SsdStore
        store = SsdStore((Path(sys.argv[1]),), 8, [4096], "rank0", namespace=bytes.fromhex(sys.argv[2]))
        keys = np.array([[7, 1007]], dtype=np.uint64)
        store.core.publish(keys, np.zeros_like(keys), np.array([3]))
        print(store.core.sync(20.0), flush=True)
    """
    run_until_killed(program, str(tmp_path), OURS.hex())
    assert reopened(tmp_path) == {3: 7}


def test_more_slots_keep_what_is_there(tmp_path: Path, slots_file: Path) -> None:
    filled(tmp_path, blocks={0: 1, 7: 2})
    assert reopened(tmp_path, slots=64) == {0: 1, 7: 2}
    assert slots_file.stat().st_size == HEADER + 64 * SLOT
    filled(tmp_path, slots=64, blocks={63: 3})
    assert reopened(tmp_path, slots=64) == {0: 1, 7: 2, 63: 3}


def test_fewer_slots_keep_what_fits(tmp_path: Path, slots_file: Path, notes: list[str]) -> None:
    filled(tmp_path, slots=64, blocks={0: 1, 7: 2, 8: 3, 63: 4})
    assert reopened(tmp_path) == {0: 1, 7: 2}
    assert slots_file.stat().st_size == HEADER + 8 * SLOT
    assert reopened(tmp_path, slots=64) == {0: 1, 7: 2}, "what was cut off came back"
    assert notes == []


def test_another_directory_keeps_what_the_first_one_holds(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    filled(a, blocks={0: 1, 3: 2, 7: 3})
    assert reopened(a, b, slots=16) == {0: 1, 6: 2, 14: 3}
    filled(a, b, slots=16, blocks={1: 4, 15: 5})
    assert reopened(a, b, slots=16) == {0: 1, 6: 2, 14: 3, 1: 4, 15: 5}
    # And without it only its own are gone.
    assert reopened(a) == {0: 1, 3: 2, 7: 3}
    assert reopened(b) == {0: 4, 7: 5}


def test_a_long_life_does_not_make_a_long_journal(tmp_path: Path, journal: Path) -> None:
    slots, rounds = 4096, 40
    store = open_store(tmp_path, slots=slots)
    for n in range(rounds):
        publish(store, {slot: 1 + n * slots + slot for slot in range(slots)})
        assert store.core.sync(60.0)
    stats = store.core.stats()
    assert stats["compactions"] >= 1
    assert stats["published"] == stats["durable"] == rounds * slots
    assert stats["journal_bytes"] < 6 << 20 < rounds * slots * 56
    store.close()
    assert journal.stat().st_size < 12 << 20
    assert reopened(tmp_path, slots=slots) == {s: 1 + (rounds - 1) * slots + s for s in range(slots)}


# ---- files of somebody else ----


def refuse(*directories: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_store(*directories, **options)
    message = str(caught.value)
    assert message.startswith("ssd_cache_dir: ")
    assert "ssd_on_mismatch: fresh" in message
    assert "sglang-flexkv ssd clear" in message
    assert "\n" not in message
    return message


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(
    "other",
    [{"namespace": THEIRS}, {"slices": (2 * SLOT,)}, {"slices": (SLOT, SLOT)}],
    ids=["namespace", "slot size", "slices"],
)
def test_the_cache_of_another_model_is_refused_and_left_alone(
    tmp_path: Path, other: dict[str, Any], notes: list[str]
) -> None:
    mine = {"label": "llama, bfloat16"}
    filled(tmp_path, blocks={0: 1}, **mine)
    before = contents(tmp_path)
    message = refuse(tmp_path, **other)
    assert "holds the cache of another model or setting (llama, bfloat16)" in message
    assert contents(tmp_path) == before
    assert reopened(tmp_path, **mine) == {0: 1}  # also the lock is free
    assert notes == []
    # Only who says so may give it up.
    assert reopened(tmp_path, fresh_on_mismatch=True, **mine) == {0: 1}
    assert reopened(tmp_path, fresh_on_mismatch=True, **other) == {}
    assert len(notes) == 1
    assert "started empty" in notes[0]
    assert "another model or setting (llama, bfloat16)" in notes[0]
    filled(tmp_path, blocks={0: 2}, **other)
    assert reopened(tmp_path, **other) == {0: 2}
    refuse(tmp_path)


@pytest.mark.parametrize("data", [b"GGUF", b"x" * 100_000], ids=["small", "large"])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, slots_file: Path, data: bytes, notes: list[str]
) -> None:
    slots_file.write_bytes(data)
    assert f"{slots_file} is not a file of sglang-flexkv" in refuse(tmp_path)
    assert contents(tmp_path) == {slots_file.name: data}
    assert reopened(tmp_path, fresh_on_mismatch=True) == {}
    assert "is not a file of sglang-flexkv" in notes[0]
    filled(tmp_path, blocks={1: 2})
    assert reopened(tmp_path) == {1: 2}


VERSION_AT = 8  # of a header page: behind its magic


@pytest.mark.parametrize("where", ["both copies", "one copy", "journal"])
def test_an_unknown_version_is_refused_and_left_alone(
    tmp_path: Path, slots_file: Path, journal: Path, where: str
) -> None:
    filled(tmp_path, blocks={0: 1})
    version = struct.pack("<I", _core.SSD_FORMAT_VERSION + 1)
    if where == "journal":
        patch(journal, VERSION_AT, version)
    else:
        patch(slots_file, PAGE + VERSION_AT, version)
    if where == "both copies":
        patch(slots_file, VERSION_AT, version)
    before = contents(tmp_path)
    known = _core.SSD_FORMAT_VERSION
    assert f"has format version {known + 1}, this program knows version {known}" in refuse(tmp_path)
    assert contents(tmp_path) == before
    assert reopened(tmp_path, fresh_on_mismatch=True) == {}
    filled(tmp_path, blocks={1: 2})
    assert reopened(tmp_path) == {1: 2}


def test_a_directory_that_is_refused_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    filled(a, slots=8, blocks={0: 1, 7: 2})
    filled(b, slots=8, namespace=THEIRS, blocks={0: 3})
    before = contents(a)
    refuse(a, b, slots=8)
    assert contents(a) == before
    assert reopened(a, slots=8) == {0: 1, 7: 2}


# ---- damage ----


DAMAGE = {
    "one bit": lambda path, at: flip_bit(path, at + 20),
    "the magic": lambda path, at: patch(path, at, b"\xff"),
    "zeros": lambda path, at: patch(path, at, bytes(PAGE)),
    "garbage": lambda path, at: patch(path, at, bytes(range(1, 256)) * 16),
    "half": lambda path, at: patch(path, at + PAGE // 2, b"\xee" * (PAGE // 2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("copy", [0, 1], ids=["A", "B"])
def test_one_good_copy_of_the_superblock_is_enough(
    tmp_path: Path, slots_file: Path, copy: int, damage: str, notes: list[str]
) -> None:
    filled(tmp_path, blocks={0: 1, 3: 2})
    DAMAGE[damage](slots_file, copy * PAGE)
    assert reopened(tmp_path) == {0: 1, 3: 2}
    # It was repaired: now the other one may go.
    DAMAGE[damage](slots_file, (1 - copy) * PAGE)
    assert reopened(tmp_path) == {0: 1, 3: 2}
    assert notes == []


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name not in ("the magic", "garbage")])
def test_without_a_superblock_it_starts_empty(
    tmp_path: Path, slots_file: Path, damage: str, notes: list[str]
) -> None:
    filled(tmp_path, blocks={0: 1, 3: 2})
    for copy in (0, 1):
        DAMAGE[damage](slots_file, copy * PAGE)
    assert reopened(tmp_path) == {}
    assert len(notes) == 1
    assert f"{tmp_path}: started empty: its header is damaged" in notes[0]
    filled(tmp_path, blocks={4: 5})
    assert reopened(tmp_path) == {4: 5}
    assert len(notes) == 1


def test_a_journal_of_another_generation_is_not_believed(
    tmp_path: Path, journal: Path, notes: list[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    filled(tmp_path, blocks={0: 1})
    filled(other, blocks={0: 9})
    journal.write_bytes((other / journal.name).read_bytes())
    assert reopened(tmp_path) == {}
    assert len(notes) == 1
    assert "started empty: its journal is missing, damaged, or belongs to other contents" in notes[0]
    filled(tmp_path, blocks={4: 5})
    assert reopened(tmp_path) == {4: 5}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "header", "zeros"])
def test_without_a_journal_it_starts_empty(
    tmp_path: Path, journal: Path, damage: str, notes: list[str]
) -> None:
    filled(tmp_path, blocks={0: 1})
    if damage == "missing":
        journal.unlink()
    elif damage in ("empty", "cut"):
        os.truncate(journal, 0 if damage == "empty" else 100)
    elif damage == "header":
        flip_bit(journal, 30)
    else:
        patch(journal, 0, bytes(PAGE))
    assert reopened(tmp_path) == {}
    assert len(notes) == 1
    assert "started empty: its journal" in notes[0]
    filled(tmp_path, blocks={4: 5})
    assert reopened(tmp_path) == {4: 5}


def test_a_slot_file_that_was_cut_is_made_whole(tmp_path: Path, slots_file: Path, notes: list[str]) -> None:
    filled(tmp_path, blocks={0: 1, 7: 2})
    os.truncate(slots_file, HEADER + SLOT)
    # What the file does not reach is gone, and stays gone when the file has its size again.
    assert reopened(tmp_path) == {0: 1}
    (note,) = notes
    assert f"{tmp_path}: the slot file was cut, what the last 7 slots held is lost" in note
    assert slots_file.stat().st_size == HEADER + 8 * SLOT
    assert reopened(tmp_path) == {0: 1}
    os.truncate(slots_file, 0)
    assert reopened(tmp_path) == {}


def commit_one_by_one(directory: Path, count: int) -> list[int]:
    """Leaves blocks n in slots n, each in a frame of its own; returns where the frames begin."""
    store = open_store(directory)
    begins = []
    for n in range(count):
        begins.append(store.core.stats()["journal_bytes"])
        publish(store, {n: n + 1})
        assert store.core.sync(20.0)
    store.close()
    return begins


@pytest.mark.parametrize("byte", [1, 10, 25, 50, 60, 90, 110])
def test_a_flipped_bit_in_the_journal_costs_one_frame(
    tmp_path: Path, journal: Path, byte: int, notes: list[str]
) -> None:
    begins = commit_one_by_one(tmp_path, 5)
    flip_bit(journal, begins[2] + byte)
    assert reopened(tmp_path) == {0: 1, 1: 2, 3: 4, 4: 5}
    assert len(notes) == 1
    assert f"{tmp_path}: 4096 damaged bytes of the journal skipped" in notes[0]
    # The damage was written away.
    filled(tmp_path, blocks={6: 7})
    assert reopened(tmp_path) == {0: 1, 1: 2, 3: 4, 4: 5, 6: 7}
    assert len(notes) == 1


@pytest.mark.parametrize("left", [0, 30, 100])
def test_a_journal_that_ends_in_the_middle_of_a_frame(
    tmp_path: Path, journal: Path, left: int, notes: list[str]
) -> None:
    begins = commit_one_by_one(tmp_path, 5)
    os.truncate(journal, begins[4] + left)
    filled(tmp_path, blocks={6: 7})
    assert reopened(tmp_path) == {0: 1, 1: 2, 2: 3, 3: 4, 6: 7}
    assert notes == []


def test_an_old_frame_that_was_copied_to_the_end_changes_nothing(tmp_path: Path, journal: Path) -> None:
    store = open_store(tmp_path)
    publish(store, {0: 1})
    assert store.core.sync(20.0)
    publish(store, {0: 2})
    assert store.core.sync(20.0)
    end = store.core.stats()["journal_bytes"]
    store.close()
    patch(journal, end, journal.read_bytes()[PAGE : 2 * PAGE])
    assert reopened(tmp_path) == {0: 2}


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_never_stops_it_and_never_invents_a_block(
    tmp_path: Path, slots_file: Path, journal: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    commit_one_by_one(tmp_path, 5)
    whole = {path: path.read_bytes() for path in (slots_file, journal)}
    for _ in range(30):
        for path, data in whole.items():
            path.write_bytes(data)
        for _ in range(int(rng.integers(1, 5))):
            path = (slots_file, journal)[rng.integers(2)]
            flip_bit(path, int(rng.integers(6 * PAGE)))
        blocks = reopened(tmp_path, fresh_on_mismatch=True)
        assert blocks.items() <= {n: n + 1 for n in range(5)}.items()


# ---- forgetting ----


@pytest.mark.parametrize("synced", [False, True], ids=["closed at once", "synced"])
@pytest.mark.parametrize("keep", [False, True], ids=["keep=False", "keep=True"])
def test_what_was_cleared_is_not_found(tmp_path: Path, keep: bool, synced: bool, notes: list[str]) -> None:
    filled(tmp_path, blocks={0: 1, 3: 2})
    store = open_store(tmp_path)
    publish(store, {4: 3})
    store.core.clear(keep)
    publish(store, {1: 5})
    if synced:
        assert store.core.sync(20.0)
    store.close()
    assert reopened(tmp_path) == ({1: 5} if keep else {})
    if keep:
        assert notes == []
    else:
        assert len(notes) == 1
        assert "started empty: its contents were computed with weights that only" in notes[0]
    # The next one keeps what it stores, whatever the one before did.
    filled(tmp_path, blocks={6: 7})
    assert reopened(tmp_path) == ({1: 5, 6: 7} if keep else {6: 7})
    assert len(notes) == (not keep)


def test_what_must_not_be_kept_stands_in_nobodys_way(tmp_path: Path, notes: list[str]) -> None:
    store = open_store(tmp_path, slots=16)
    store.core.clear(False)
    publish(store, {0: 1})
    store.close()
    assert reopened(tmp_path, namespace=THEIRS, slices=(2 * SLOT,)) == {}
    assert "started empty" in notes[0]
    filled(tmp_path, namespace=THEIRS, slices=(2 * SLOT,), blocks={1: 2})
    assert reopened(tmp_path, namespace=THEIRS, slices=(2 * SLOT,)) == {1: 2}


def test_clearing_while_others_publish(tmp_path: Path) -> None:
    store = open_store(tmp_path, slots=64)
    stop = threading.Event()

    def write() -> None:
        rng = np.random.default_rng(0)
        while not stop.is_set():
            publish(store, {int(slot): 1 for slot in rng.permutation(64)[:8]})

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(20):
        store.core.clear(True)
        assert store.core.sync(20.0)
    stop.set()
    writer.join()
    store.core.clear(True)
    publish(store, {5: 2})
    store.close()
    assert reopened(tmp_path, slots=64) == {5: 2}


# ---- durability ----


def test_sync_means_that_it_is_on_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.core.sync(0.0)  # nothing to wait for
    publish(store, {0: 1, 1: 2})
    assert store.core.stats()["published"] == 2
    assert store.core.sync(20.0)
    stats = store.core.stats()
    assert stats["durable"] == 2
    assert stats["commits"] == 1
    # Without being asked it happens as well.
    publish(store, {2: 3})
    deadline = time.monotonic() + TIMEOUT_S
    while store.core.stats()["durable"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert store.core.error == ""
    store.close()


def test_sync_does_not_wait_for_company(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Memory(8, 1, SLOT), commit_interval_s=HANG_S)
    rig.publish({0: 1})
    assert rig.store.sync(TIMEOUT_S)
    rig.close()


@pytest.mark.parametrize("operation", ["sync", "write"])
def test_a_journal_that_cannot_be_written_is_said_so(tmp_path: Path, operation: str) -> None:
    disk = FaultyDisk(1)
    store = open_store(tmp_path, disk=disk)
    publish(store, {0: 1})
    assert store.core.sync(20.0)
    disk.set_fault(operation, 1.0, errno.EIO)
    publish(store, {1: 2})
    assert not store.core.sync(20.0)
    assert store.core.error == f"the journal in {tmp_path} cannot be written: {os.strerror(errno.EIO)}"
    disk.clear_faults()
    publish(store, {2: 3})
    assert not store.core.sync(1.0), "a journal that has failed is not to be trusted any more"
    assert store.core.stats()["durable"] == 1
    store.close()
    assert reopened(tmp_path).items() >= {0: 1}.items()


def test_sync_does_not_wait_for_a_disk_that_hangs(tmp_path: Path) -> None:
    disk = FaultyDisk(1)
    store = open_store(tmp_path, disk=disk)
    disk.set_fault("sync", 1.0, delay_s=HANG_S)
    publish(store, {0: 1})
    start = time.monotonic()
    assert not store.core.sync(0.2)
    publish(store, {1: 2})  # nor does anybody else
    assert time.monotonic() - start < HANG_S
    disk.clear_faults()
    assert store.core.sync(20.0)
    store.close()
    assert reopened(tmp_path) == {0: 1, 1: 2}


@pytest.mark.parametrize("suffix", ["slots", "journal"])
def test_files_that_somebody_removes_are_missed(tmp_path: Path, suffix: str) -> None:
    store = open_store(tmp_path)
    (tmp_path / f"flexkv-rank0.{suffix}").unlink()
    publish(store, {0: 1})
    assert not store.core.sync(20.0)
    assert "its files were removed" in store.core.error
    store.close()
    assert reopened(tmp_path) == {}


# ---- directories that cannot be used ----


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"ssd_cache_dir: .*/nowhere does not exist; create it or name another"
    ):
        open_store(tmp_path / "nowhere")


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ConfigError, match=r"ssd_cache_dir: .*/file is not a directory; create it or name"):
        open_store(path)


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    # Permissions do not bind root, but sysfs lets nobody create files.
    directory = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path
    if os.geteuid() != 0:
        directory.chmod(0o500)
    with pytest.raises(ConfigError, match=r"ssd_cache_dir: .*: Permission denied; give user \d+ access"):
        open_store(directory)


def test_the_same_directory_twice(tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=rf"ssd_cache_dir lists .* twice \({tmp_path} and {alias}\)"):
        open_store(tmp_path, alias)
    assert files(tmp_path) == ["alias"]


@pytest.fixture
def other_server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD_THE_LOCK), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_directory_of_another_server(tmp_path: Path, other_server: subprocess.Popen[str]) -> None:
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path, fresh_on_mismatch=True)
    assert f"{tmp_path} is in use by another server (process {other_server.pid})" in str(caught.value)
    assert "give each server a directory of its own" in str(caught.value)
    assert contents(tmp_path) == before, "the owner's files were touched"
    # The lock dies with its owner, however it dies.
    other_server.kill()
    other_server.wait()
    open_store(tmp_path, fresh_on_mismatch=True).close()


def test_a_directory_that_fails_gives_the_others_back(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        open_store(good, tmp_path / "nowhere")
    assert files(good) == []
    open_store(good).close()


@pytest.mark.parametrize("operation", ["open", "read", "write", "sync", "reserve", "rename"])
def test_a_disk_that_fails_at_the_start_is_named(tmp_path: Path, operation: str) -> None:
    filled(tmp_path, blocks={0: 1})
    disk = FaultyDisk(1)
    disk.set_fault(operation, 1.0, errno.EIO)
    # Only a new journal is renamed, and only a damaged or smaller one is new.
    slots = 4 if operation == "rename" else 8
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path, slots=slots, disk=disk)
    assert str(caught.value).startswith(f"ssd_cache_dir: {tmp_path}")
    assert os.strerror(errno.EIO) in str(caught.value)
    assert "check the disk" in str(caught.value)
    assert reopened(tmp_path) == {0: 1}


# ---- space ----


def test_more_than_the_disk_has_is_refused_before_it_is_filled(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    too_many = 10 * stat.f_bavail * stat.f_frsize // SLOT
    with pytest.raises(ConfigError, match=r"ssd_cache_gb: .* GiB free and cannot take .* lower ssd_cache_gb"):
        open_store(tmp_path, slots=too_many)
    assert files(tmp_path) == ["flexkv-rank0.lock"]


def disk_usage(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def test_a_reservation_that_the_kernel_refuses_takes_no_space(tmp_path: Path) -> None:
    # A limit on file sizes refuses like a full disk, in the middle of it, and endangers nobody's disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SLOT, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot reserve 0\.00 GiB: File too large; lower .*ulimit -f"):
            open_store(tmp_path, slots=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk_usage(tmp_path) <= SLOT  # the lock
    assert reopened(tmp_path) == {}


def test_a_reservation_that_is_refused_costs_nothing_that_is_there(tmp_path: Path, slots_file: Path) -> None:
    filled(tmp_path, blocks={0: 1, 7: 2})
    size = slots_file.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10 * SLOT, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot reserve 0\.00 GiB: File too large"):
            open_store(tmp_path, slots=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert slots_file.stat().st_size == size
    assert reopened(tmp_path) == {0: 1, 7: 2}


ON_A_SMALL_DISK = """
    mount -t tmpfs -o size={size} tmpfs {directory}
    exec {python} - {directory} <<'PROGRAM'
{program}
PROGRAM
"""


def on_a_small_disk(tmp_path: Path, size: str, program: str) -> str:
    """Runs a program with a tmpfs of its own mounted on ``tmp_path``; returns what it printed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    script = ON_A_SMALL_DISK.format(
        size=size, directory=tmp_path, python=sys.executable, program=textwrap.dedent(program)
    )
    done = subprocess.run(
        ["unshare", "-m", "bash", "-ec", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_disk_that_fills_while_it_is_reserved(tmp_path: Path) -> None:
    program = """\
import sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_store
directory = Path(sys.argv[1])
ssd_store.free_bytes = lambda _: 2**40  # somebody else takes the space after we asked
try:
    ssd_store.SsdStore((directory,), 1000, [4096], "rank0", namespace=bytes(16))
except ConfigError as error:
    print(error)
(directory / "all").write_bytes(bytes(1900 * 1024))  # the space is free again
(directory / "all").unlink()
ssd_store.SsdStore((directory,), 100, [4096], "rank0", namespace=bytes(16)).close()
"""
    out = on_a_small_disk(tmp_path, "2m", program)
    assert "cannot reserve 0.00 GiB: No space left on device; 1024.00 GiB are free: lower ssd_cache_gb" in out


def test_a_disk_without_a_single_free_byte(tmp_path: Path) -> None:
    program = """\
import sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_store import SsdStore
directory = Path(sys.argv[1])
(directory / "all").write_bytes(bytes(64 * 1024))
try:
    SsdStore((directory,), 1, [4096], "rank0", namespace=bytes(16))
except ConfigError as error:
    print(error)
"""
    assert "ssd_cache_gb:" in on_a_small_disk(tmp_path, "64k", program)


def test_a_read_only_disk(tmp_path: Path) -> None:
    program = """\
import subprocess, sys
from pathlib import Path
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_store import SsdStore
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
try:
    SsdStore((Path(sys.argv[1]),), 1, [4096], "rank0", namespace=bytes(16))
except ConfigError as error:
    print(error)
"""
    out = on_a_small_disk(tmp_path, "64k", program)
    assert "cannot be written: Read-only file system; mount it writable or name another one" in out


def test_free_space_is_checked_over_all_directories_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    monkeypatch.setattr(ssd_files, "free_bytes", lambda _: 3 * GIB)
    check_free_space({a: GIB, b: 2 * GIB})
    with pytest.raises(ConfigError, match=r"ssd_cache_gb: .* has 3.00 GiB free and cannot take 4.00 GiB"):
        check_free_space({a: 2 * GIB, b: 2 * GIB})


def test_slots_that_are_there_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, slots=1000, rank="dp0-tp0", blocks={3: 4})
    for module in (ssd_files, ssd_store):
        monkeypatch.setattr(module, "free_bytes", lambda _: 0)
    check_free_space({tmp_path: HEADER + 1000 * SLOT})
    with pytest.raises(ConfigError, match="ssd_cache_gb"):
        check_free_space({tmp_path: HEADER + 2000 * SLOT})
    # A full disk does not keep them from being used.
    assert reopened(tmp_path, slots=1000, rank="dp0-tp0") == {3: 4}
    with pytest.raises(ConfigError, match="ssd_cache_gb"):
        open_store(tmp_path, slots=2000, rank="dp0-tp0")
