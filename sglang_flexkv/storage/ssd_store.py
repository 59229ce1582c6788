"""The SSD tier's files: in each directory a preallocated slot file and the journal of what it holds.

A directory belongs to one writer at a time (a lock file says so) and its space is really reserved, so that a
full disk is an error at start-up and not a surprise at night. What the files hold outlives the server: format
and rules are in docs/ssd-format.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace
from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError

logger = logging.getLogger(__name__)

# Names of a rank's files: flexkv-<rank tag>.slots, .journal and .lock.
_PREFIX, _SLOTS, _JOURNAL, _LOCK = "flexkv-", ".slots", ".journal", ".lock"

# A journal record waits so long for others, so that a sync of the disk serves them all. A crash forgets what
# was stored in the last moments; nothing else depends on it.
_COMMIT_INTERVAL_S = 0.1


@dataclass(frozen=True)
class ShardFiles:
    """Names of the files of one rank in one directory."""

    directory: Path
    rank_tag: str

    @property
    def slots(self) -> Path:
        return self.directory / f"{_PREFIX}{self.rank_tag}{_SLOTS}"

    @property
    def journal(self) -> Path:
        return self.directory / f"{_PREFIX}{self.rank_tag}{_JOURNAL}"

    @property
    def lock(self) -> Path:
        return self.directory / f"{_PREFIX}{self.rank_tag}{_LOCK}"


def shards_in(directory: Path) -> list[ShardFiles]:
    """The ranks whose files a directory holds."""
    names = sorted(path.name for path in directory.glob(f"{_PREFIX}*{_SLOTS}"))
    return [ShardFiles(directory, name.removeprefix(_PREFIX).removesuffix(_SLOTS)) for name in names]


def check_directory(directory: Path) -> None:
    """Raises ConfigError if it is not a directory."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise ConfigError(f"ssd_cache_dir: {directory} {what}; create it or name another one")


def check_free_space(wanted_bytes: Mapping[Path, int]) -> None:
    """Raises ConfigError if a file system lacks the space for slot files of these sizes per directory.

    Slot files that are there already count as free: they are used again.
    """
    by_device: dict[int, list[Path]] = defaultdict(list)
    for directory in wanted_bytes:
        by_device[directory.stat().st_dev].append(directory)
    for directories in by_device.values():
        wanted = sum(wanted_bytes[directory] for directory in directories)
        left_behind = sum(_disk_bytes(f) for d in directories for f in d.glob(f"{_PREFIX}*{_SLOTS}"))
        if wanted > _free_bytes(directories[0]) + left_behind:
            raise _no_space(directories[0], wanted)


class SsdStore:
    """Locks, opens and reserves the files of one rank; what they hold is known to ``core``.

    Args:
        directories: existing, writable directories; slot s lives in directory s % len(directories).
        num_slots: slots over all directories.
        slice_bytes: bytes of each slice of a slot, multiples of 4096.
        rank_tag: tells ranks that share a directory apart, e.g. ``rank0``.
        namespace: of the keys.
        label: what people are told the files hold.
        fresh_on_mismatch: give up files that hold another namespace or have another format.

    Raises:
        ConfigError: a directory is missing, not writable, full, listed twice, in use by another server, or
            holds files that are not ours to use.
    """

    def __init__(
        self,
        directories: tuple[Path, ...],
        num_slots: int,
        slice_bytes: Sequence[int],
        rank_tag: str,
        *,
        namespace: Namespace,
        label: str = "",
        fresh_on_mismatch: bool = False,
        disk: _core.Disk | None = None,
    ) -> None:
        self._locks: list[int] = []
        resolved = [path.resolve() for path in directories]
        if len(set(resolved)) != len(resolved):
            raise ConfigError("ssd_cache_dir lists the same directory twice; list each once")
        slots_per_file = -(-num_slots // len(directories))
        file_bytes = _core.SSD_SLOTS_OFFSET + slots_per_file * sum(slice_bytes)
        files = [ShardFiles(directory, rank_tag) for directory in directories]
        try:
            for shard in files:
                self._locks.append(_lock(shard))
                if file_bytes > _free_bytes(shard.directory) + _disk_bytes(shard.slots):
                    raise _no_space(shard.directory, file_bytes)
            self.core = _core.SsdStore(
                [(str(f.directory), str(f.slots), str(f.journal)) for f in files],
                namespace,
                num_slots,
                slice_bytes,
                label,
                fresh_on_mismatch,
                _COMMIT_INTERVAL_S,
                disk or _core.Disk(),
            )
        except _core.CoreMismatchError as error:
            self._unlock()
            raise ConfigError(
                f"ssd_cache_dir: {error}; name another directory, set ssd_on_mismatch: fresh to give it up, "
                "or remove it with 'sglang-flexkv ssd clear DIR'"
            ) from None
        except _core.CoreSystemError as error:
            self._unlock()
            raise ConfigError(
                f"ssd_cache_dir: {error}; check the disk, its free space and its permissions, or name "
                "another directory"
            ) from None
        except BaseException:
            self._unlock()
            raise
        for note in self.core.notes.splitlines():
            logger.warning("SSD tier: %s", note)

    def _unlock(self) -> None:
        for lock in self._locks:
            os.close(lock)  # which releases it
        self._locks = []

    def close(self) -> None:
        """Writes out what the journals still lack and gives the directories back; what the files hold is
        found by the next one. The transfer engine must not use the store any more."""
        if self._locks:
            del self.core
            self._unlock()


def _lock(files: ShardFiles) -> int:
    """Opens and takes a directory's lock file. Held as long as the descriptor is open."""
    check_directory(files.directory)
    try:
        lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_writable(files.directory, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ConfigError(
            f"ssd_cache_dir: {files.directory} is in use by another server (process {owner}); "
            "give each server a directory of its own"
        ) from None
    except OSError as error:
        os.close(lock)
        raise _not_writable(files.directory, error) from None
    # For messages only: a disk that is full of our own slots may have no room for it.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _free_bytes(directory: Path) -> int:
    """What an unprivileged process may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # its owner closed it just now
        return 0


def _not_writable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"ssd_cache_dir: {directory} is not writable ({error.strerror}); "
        "fix its permissions or name another one"
    )


def _no_space(directory: Path, wanted_bytes: int) -> ConfigError:
    free = _free_bytes(directory)
    return ConfigError(
        f"ssd_cache_gb: {directory} has {free / GIB:.2f} GiB free and cannot take "
        f"{wanted_bytes / GIB:.2f} GiB; lower ssd_cache_gb or free space"
    )
