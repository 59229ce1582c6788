"""The SSD tier's files: preallocated slot files, one per directory, striped slot by slot.

A directory belongs to one writer at a time (a lock file says so) and its space is really reserved, so that a
full disk is an error at start-up and not a surprise at night. What the slots hold is known to the index in
memory only: the files are scratch space and go when the store is closed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError

logger = logging.getLogger(__name__)

# Names of a rank's files: flexkv-<rank tag>.slots and .lock.
_PREFIX, _SLOTS, _LOCK = "flexkv-", ".slots", ".lock"


def check_directory(directory: Path) -> None:
    """Raises ConfigError if it is not a directory."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise ConfigError(f"ssd_cache_dir: {directory} {what}; create it or name another one")


def check_free_space(wanted_bytes: Mapping[Path, int]) -> None:
    """Raises ConfigError if a file system lacks the space for slot files of these sizes per directory.

    Slot files that a crash left behind count as free: the next start truncates them.
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
    """Opens, locks and reserves the files of one rank.

    Args:
        directories: existing, writable directories; slot s lives in directory s % len(directories).
        num_slots: slots over all directories.
        slot_bytes: bytes of a slot, a multiple of 4096.
        rank_tag: tells ranks that share a directory apart, e.g. ``rank0``.

    Raises:
        ConfigError: a directory is missing, not writable, full, listed twice, or in use by another server.
    """

    def __init__(self, directories: tuple[Path, ...], num_slots: int, slot_bytes: int, rank_tag: str) -> None:
        self.num_slots = num_slots
        self.fds: list[int] = []
        self._locks: list[int] = []
        self._files: list[Path] = []
        slots_per_file = -(-num_slots // len(directories))
        resolved = [path.resolve() for path in directories]
        if len(set(resolved)) != len(resolved):
            raise ConfigError("ssd_cache_dir lists the same directory twice; list each once")
        try:
            for directory in directories:
                self._open(directory, slots_per_file * slot_bytes, rank_tag)
        except BaseException:
            self.close()
            raise

    def _open(self, directory: Path, size: int, rank_tag: str) -> None:
        check_directory(directory)
        lock_path = directory / f"{_PREFIX}{rank_tag}{_LOCK}"
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _not_writable(directory, error) from None
        self._locks.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"ssd_cache_dir: {directory} is in use by another server (process {owner}); "
                "give each server a directory of its own"
            ) from None

        path = directory / f"{_PREFIX}{rank_tag}{_SLOTS}"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _not_writable(directory, error) from None
            logger.warning(
                "%s does not support O_DIRECT; the SSD tier goes through the page cache", directory
            )
            fd = os.open(path, flags, 0o600)
        self.fds.append(fd)
        self._files.append(path)
        # Asked first: a file system that finds out half way has been full for everybody by then.
        if size > _free_bytes(directory):
            raise _no_space(directory, size)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise ConfigError(
                    f"ssd_cache_dir: cannot reserve {size / GIB:.2f} GiB in {directory} ({error.strerror}); "
                    "check the file system or name another directory"
                ) from None
            raise _no_space(directory, size) from None

    def close(self) -> None:
        """Gives the space and the directories back. The engine must not use the fds any more."""
        for path in self._files:
            path.unlink(missing_ok=True)
        for fd in (*self.fds, *self._locks):
            os.close(fd)  # closing the lock file releases the lock
        self._files, self.fds, self._locks = [], [], []


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
