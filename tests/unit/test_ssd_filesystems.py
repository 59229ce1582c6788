"""The SSD tier on file systems that lack something: space that cannot be reserved, O_DIRECT, syncs. On real
ones where the machine may mount them, and on a disk that refuses calls."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sglang_flexkv_testing import FaultyDisk
from ssd_rig import NAMESPACE, Memory, Rig, key_of, memory_directory, slots_of

from sglang_flexkv import _core
from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_files
from sglang_flexkv.storage.ssd_files import check_free_space
from sglang_flexkv.storage.ssd_store import SsdStore

SLOTS, SLICE = 16, 4096
HEADER = _core.SSD_SLOTS_OFFSET
BLOCKS = {slot: slot + 100 for slot in range(10)}


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory(SLOTS, 2, SLICE)


@pytest.fixture
def directory() -> Iterator[Path]:
    yield from memory_directory()


def refusing(**faults: int) -> _core.Disk:
    """A disk on which these calls always end with these errors."""
    disk = FaultyDisk(1)
    for operation, error in faults.items():
        disk.set_fault(operation, 1.0, error)
    return disk


def check_tier(directory: Path, memory: Memory, disk: _core.Disk) -> str:
    """Blocks are written, read, and found again; what the tier remarked about its first opening."""
    rig = Rig(directory, memory, disk=disk)
    notes = rig.store.notes
    assert rig.write(BLOCKS)
    assert rig.read(BLOCKS) == (set(BLOCKS), set())
    assert rig.store.sync(20.0), rig.store.error
    rig.close()
    rig = Rig(directory, memory, disk=disk)
    assert rig.found == BLOCKS
    assert rig.read() == (set(BLOCKS), set())
    rig.close()
    return notes


def open_store(directory: Path, slots: int, disk: _core.Disk | None = None) -> SsdStore:
    return SsdStore((directory,), slots, [SLICE], "rank0", namespace=NAMESPACE, disk=disk)


def holds(store: SsdStore) -> list[int]:
    _, _, slots = store.core.take_recovered()
    store.close()
    return slots.tolist()


def filled(directory: Path, slots: int = SLOTS) -> Path:
    """A store whose slots 2 to 9 hold bytes of their own; its slot file."""
    store = open_store(directory, slots)
    numbers = list(range(2, 10))
    keys = key_of(numbers)
    store.core.publish(keys, keys * 0, slots_of(numbers))
    assert store.core.sync(20.0)
    store.close()
    path = directory / "flexkv-rank0.slots"
    with path.open("r+b") as file:
        for slot in numbers:
            file.seek(HEADER + slot * SLICE)
            file.write(bytes([slot]) * SLICE)
    return path


def check_filled(path: Path) -> None:
    with path.open("rb") as file:
        for slot in range(2, 10):
            file.seek(HEADER + slot * SLICE)
            assert file.read(SLICE) == bytes([slot]) * SLICE


# ---- calls that are refused ----


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_space_that_cannot_be_reserved_is_written(directory: Path, memory: Memory, error: int) -> None:
    notes = check_tier(directory, memory, refusing(reserve=error))
    assert "does not support fallocate; the SSD tier's space was reserved by writing zeros" in notes
    assert (directory / "slots").stat().st_blocks * 512 >= HEADER + SLOTS * memory.slot_bytes
    rig = Rig(directory, memory, disk=refusing(reserve=error))
    assert rig.store.notes == "", "what is there was written again"
    rig.close()


@pytest.mark.parametrize("slots", [4, SLOTS, 3000])
def test_what_the_file_holds_stays_when_it_is_reserved_by_writing(directory: Path, slots: int) -> None:
    path = filled(directory)
    store = open_store(directory, slots, refusing(reserve=errno.EOPNOTSUPP))
    assert path.stat().st_size == HEADER + slots * SLICE
    assert path.stat().st_blocks * 512 >= HEADER + slots * SLICE
    assert holds(store) == [slot for slot in range(2, 10) if slot < slots]
    if slots >= 10:
        check_filled(path)


def test_holes_are_filled_and_nothing_else(directory: Path) -> None:
    """A copy may be sparse, and end anywhere."""
    path = filled(directory)
    sparse = directory / "sparse"
    with path.open("rb") as source, sparse.open("wb") as target:
        for offset in range(0, path.stat().st_size, 512):
            piece = source.read(512)
            if piece.strip(b"\0"):
                target.seek(offset)
                target.write(piece)
        target.truncate(HEADER + 12 * SLICE + 700)
    sparse.replace(path)
    assert path.stat().st_blocks * 512 < HEADER, "not sparse: this shows nothing"
    store = open_store(directory, SLOTS, refusing(reserve=errno.EOPNOTSUPP))
    assert path.stat().st_blocks * 512 >= HEADER + SLOTS * SLICE
    assert holds(store) == list(range(2, 10))
    check_filled(path)


@pytest.mark.parametrize(
    ("error", "to_do"),
    [
        (errno.ENOSPC, r"\d+\.\d\d GiB are free: lower ssd_cache_gb or free space$"),
        (errno.EDQUOT, r"lower ssd_cache_gb, .* or raise the quota of this user$"),
        (errno.EFBIG, r"lower ssd_cache_gb, spread it over more directories, or raise the limit .*ulimit -f"),
        (errno.EIO, r"check the disk, or name another directory$"),
    ],
)
@pytest.mark.parametrize("by_writing", [False, True])
def test_what_is_missing_is_named(directory: Path, error: int, to_do: str, by_writing: bool) -> None:
    path = filled(directory)
    size = path.stat().st_size
    faults = {"reserve": errno.EOPNOTSUPP, "write": error} if by_writing else {"reserve": error}
    disk = refusing(**faults)
    wanted = f"cannot reserve 0.01 GiB: {os.strerror(error)}; "
    with pytest.raises(ConfigError, match=rf"^ssd_cache_dir: {path}: {wanted}{to_do}"):
        open_store(directory, 3000, disk)
    assert path.stat().st_size == size
    assert holds(open_store(directory, SLOTS)) == list(range(2, 10))


@pytest.mark.parametrize("refused", ["open_direct", "direct"])
@pytest.mark.parametrize("reserve", [False, True])
def test_without_o_direct(directory: Path, memory: Memory, refused: str, reserve: bool) -> None:
    faults = {refused: errno.EINVAL} | ({} if reserve else {"reserve": errno.EOPNOTSUPP})
    assert "does not support O_DIRECT" in check_tier(directory, memory, refusing(**faults))


def test_without_syncs(directory: Path, memory: Memory) -> None:
    check_tier(directory, memory, refusing(sync=errno.EINVAL))


def test_a_file_that_cannot_be_cut(directory: Path) -> None:
    path = filled(directory)
    with pytest.raises(ConfigError, match=r"slots: cannot be resized: .*; check the disk, or name another"):
        open_store(directory, 12, refusing(truncate=errno.EIO))
    assert holds(open_store(directory, 12)) == list(range(2, 10))
    check_filled(path)


def test_a_disk_that_does_not_say_what_is_free(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(ssd_files.os, "statvfs", lambda _: zeros)
    check_free_space({directory: GIB})
    open_store(directory, SLOTS).close()
    with pytest.raises(ConfigError, match=r"cannot reserve .*: No space left on device; lower ssd_cache_gb"):
        open_store(directory, 3000, refusing(reserve=errno.ENOSPC))


# ---- real file systems ----

# Name, how to make it in $IMAGE, how to mount that on $DIRECTORY.
FILE_SYSTEMS = {
    "ext3": ("mkfs.ext3 -q $IMAGE", "mount -o loop $IMAGE $DIRECTORY"),
    "ext4 with blocks of 1 KiB": ("mkfs.ext4 -q -b 1024 $IMAGE", "mount -o loop $IMAGE $DIRECTORY"),
    "ext4 on sectors of 4 KiB": (
        "mkfs.ext4 -q -b 4096 $IMAGE",
        "LOOP=$(losetup -f --show --sector-size 4096 $IMAGE); mount $LOOP $DIRECTORY; losetup -d $LOOP",
    ),
    "xfs": ("mkfs.xfs -q $IMAGE", "mount -o loop $IMAGE $DIRECTORY"),
    "btrfs": ("mkfs.btrfs -q $IMAGE", "mount -o loop $IMAGE $DIRECTORY"),
    "tmpfs": ("true", "mount -t tmpfs tmpfs $DIRECTORY"),
}
BY_WRITING = {"ext3"}


@contextmanager
def mounted(name: str, tmp_path: Path) -> Iterator[Path]:
    """A file system of this kind, in a mount namespace of its own: it goes with the process that holds it."""
    make, mount = FILE_SYSTEMS[name]
    if make != "true" and shutil.which(make.split()[0]) is None:
        pytest.skip(f"{make.split()[0]} is not installed")
    image, directory = tmp_path / "image", tmp_path / "mounted"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)  # sparse; mkfs.xfs takes no less than 300 MiB
    with subprocess.Popen(
        ["unshare", "-m", "bash", "-ec", f"({make}) > /dev/null; {mount}; echo mounted; read || true"],
        env=os.environ | {"IMAGE": str(image), "DIRECTORY": str(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != "mounted\n":
            _, why = holder.communicate()
            pytest.skip(f"{name} cannot be mounted here: {' '.join(why.split())}")
        yield Path(f"/proc/{holder.pid}/root{directory}")


@pytest.mark.parametrize("name", FILE_SYSTEMS)
def test_a_real_file_system(name: str, tmp_path: Path, memory: Memory) -> None:
    with mounted(name, tmp_path) as directory:
        notes = check_tier(directory, memory, _core.Disk())
        assert ("does not support fallocate" in notes) == (name in BY_WRITING)
        tier = directory / "tier"
        tier.mkdir()
        path = filled(tier)
        for slots in (3000, 12, SLOTS):
            assert holds(open_store(tier, slots)) == list(range(2, 10))
            assert path.stat().st_blocks * 512 >= HEADER + slots * SLICE
            check_filled(path)


def test_the_start_says_what_takes_so_long(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    open_store(directory, SLOTS).close()
    assert f"reserving 0.00 GiB in {directory}" in caplog.text
    caplog.clear()
    open_store(directory, SLOTS).close()
    assert "reserving" not in caplog.text
