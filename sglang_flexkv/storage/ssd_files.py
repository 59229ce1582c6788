"""Names, locks and disk space of the SSD tier's files.

Needs nothing of the compiled core: SGLang's arguments are checked with it before the core is loaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.paths import reason

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
    """The ranks whose files a directory holds. Raises OSError if it cannot be listed."""
    names = sorted(n for n in os.listdir(directory) if n.startswith(_PREFIX) and n.endswith(_SLOTS))
    return [ShardFiles(directory, name.removeprefix(_PREFIX).removesuffix(_SLOTS)) for name in names]


def why_no_directory(directory: Path, to_do: str) -> str | None:
    """What is wrong with a directory, and what to do about it; None if there is one that can be entered.

    Args:
        to_do: about one that does not exist.
    """
    try:
        if not stat.S_ISDIR(directory.stat().st_mode):
            return f"is not a directory; {to_do}"
        os.stat(os.path.join(directory, "."))  # which asks for the right to enter it
    except FileNotFoundError:
        if directory.is_symlink():
            return f"is a symbolic link to {os.readlink(directory)}, which does not exist; {to_do}"
        return f"does not exist; {to_do}"
    except OSError as error:
        return f"cannot be used: {reason(error)}"
    return None


def check_directories(directories: Sequence[Path]) -> None:
    """Raises ConfigError if one is no directory that can be entered, or two are the same."""
    seen: dict[tuple[int, int], Path] = {}
    for directory in directories:
        if why := why_no_directory(directory, "create it or name another one"):
            raise ConfigError(f"ssd_cache_dir: {directory} {why}")
        found = directory.stat()
        # By identity: links and bind mounts give a directory many names.
        first = seen.setdefault((found.st_dev, found.st_ino), directory)
        if first is not directory:
            both = f"{first}" if first == directory else f"{first} and {directory}"
            raise ConfigError(f"ssd_cache_dir lists the same directory twice ({both}); list each once")


def check_usable(directory: Path) -> None:
    """Raises ConfigError if a directory cannot be listed, takes no files, or has no locks. Leaves nothing
    behind."""
    try:
        os.listdir(directory)
        with tempfile.TemporaryFile(dir=directory) as file:
            _lock(file.fileno(), directory)
    except OSError as error:
        raise ConfigError(f"ssd_cache_dir: {directory} cannot be written: {reason(error)}") from None


def check_free_space(wanted_bytes: Mapping[Path, int]) -> None:
    """Raises ConfigError if a file system lacks the space for slot files of these sizes per directory.

    Slot files that are there already count as free: they are used again.
    """
    by_device: dict[int, list[Path]] = defaultdict(list)
    for directory in wanted_bytes:
        by_device[directory.stat().st_dev].append(directory)
    for directories in by_device.values():
        wanted = sum(wanted_bytes[directory] for directory in directories)
        left_behind = sum(disk_bytes(files.slots) for d in directories for files in shards_in(d))
        free = free_bytes(directories[0])
        if free is not None and wanted > free + left_behind:
            raise no_space(directories[0], wanted)


def lock_files(files: ShardFiles) -> int:
    """Takes a directory's lock file; returns its descriptor, which holds the lock until it is closed.

    Raises:
        ConfigError: the directory is not writable, has no locks, or another server uses it.
    """
    try:
        lock = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"ssd_cache_dir: {files.lock} cannot be written: {reason(error)}") from None
    try:
        if not _lock(lock, files.directory):
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise in_use(files.directory, owner)
    except BaseException:
        os.close(lock)
        raise
    # For messages only: a disk that is full of our own slots may have no room for it.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _lock(fd: int, directory: Path) -> bool:
    """False if somebody else has the lock. Raises ConfigError where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigError(
            f"ssd_cache_dir: the file system of {directory} has no file locks (flock: {error.strerror}), and "
            "without them two servers could use it at once; mount it with locks (NFS: with lockd, or "
            "local_lock=flock) or name another directory"
        ) from None
    return True


def free_bytes(directory: Path) -> int | None:
    """What an unprivileged process may still write there; None if the file system does not tell."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # not there yet, or gone just now
        return 0


def in_use(directory: Path, owner: str) -> ConfigError:
    return ConfigError(
        f"ssd_cache_dir: {directory} is in use by another server (process {owner}); "
        "give each server a directory of its own"
    )


def no_space(directory: Path, wanted_bytes: int) -> ConfigError:
    free = free_bytes(directory)
    left = "too little" if free is None else f"{free / GIB:.2f} GiB"
    return ConfigError(
        f"ssd_cache_gb: {directory} has {left} free and cannot take "
        f"{wanted_bytes / GIB:.2f} GiB; lower ssd_cache_gb or free space"
    )
