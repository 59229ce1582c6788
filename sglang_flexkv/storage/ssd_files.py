"""Names, locks and disk space of the SSD tier's files.

Needs nothing of the compiled core: SGLang's arguments are checked with it before the core is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError

# Names of a rank's files: flexkv-<rank tag>.slots, .journal, .identity and .lock.
_PREFIX, _SLOTS, _JOURNAL, _IDENTITY, _LOCK = "flexkv-", ".slots", ".journal", ".identity", ".lock"


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
    def identity(self) -> Path:
        return self.directory / f"{_PREFIX}{self.rank_tag}{_IDENTITY}"

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


def check_distinct(directories: Sequence[Path]) -> None:
    """Raises ConfigError if two of them are one."""
    if len({path.resolve() for path in directories}) != len(directories):
        raise ConfigError("ssd_cache_dir lists the same directory twice; list each once")


def check_free_space(wanted_bytes: Mapping[Path, int]) -> None:
    """Raises ConfigError if a file system lacks the space for slot files of these sizes per directory.

    Slot files that are there already count as free: they are used again.
    """
    by_device: dict[int, list[Path]] = defaultdict(list)
    for directory in wanted_bytes:
        by_device[directory.stat().st_dev].append(directory)
    for directories in by_device.values():
        wanted = sum(wanted_bytes[directory] for directory in directories)
        left_behind = sum(disk_bytes(f) for d in directories for f in d.glob(f"{_PREFIX}*{_SLOTS}"))
        if wanted > free_bytes(directories[0]) + left_behind:
            raise no_space(directories[0], wanted)


def lock_files(files: ShardFiles) -> int:
    """Takes a directory's lock file; returns its descriptor, which holds the lock until it is closed.

    Raises:
        ConfigError: the directory is missing or not writable, or another server uses it.
    """
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
        raise in_use(files.directory, owner) from None
    except OSError as error:
        os.close(lock)
        raise _not_writable(files.directory, error) from None
    # For messages only: a disk that is full of our own slots may have no room for it.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def free_bytes(directory: Path) -> int:
    """What an unprivileged process may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # its owner closed it just now
        return 0


def _not_writable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"ssd_cache_dir: {directory} is not writable ({error.strerror}); "
        "fix its permissions or name another one"
    )


def in_use(directory: Path, owner: str) -> ConfigError:
    return ConfigError(
        f"ssd_cache_dir: {directory} is in use by another server (process {owner}); "
        "give each server a directory of its own"
    )


def no_space(directory: Path, wanted_bytes: int) -> ConfigError:
    free = free_bytes(directory)
    return ConfigError(
        f"ssd_cache_gb: {directory} has {free / GIB:.2f} GiB free and cannot take "
        f"{wanted_bytes / GIB:.2f} GiB; lower ssd_cache_gb or free space"
    )
