"""The SSD tier's files: in each directory a preallocated slot file and the journal of what it holds.

A directory belongs to one writer at a time (a lock file says so) and its space is really reserved, so that a
full disk is an error at start-up and not a surprise at night. What the files hold outlives the server: format
and rules are in docs/ssd-format.md.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.paths import reason, remedy
from sglang_flexkv.storage import ssd_identity
from sglang_flexkv.storage.ssd_files import (
    ShardFiles,
    check_directories,
    disk_bytes,
    free_bytes,
    lock_files,
    no_space,
)
from sglang_flexkv.storage.ssd_identity import Conflict, Identity

logger = logging.getLogger(__name__)

# A journal record waits so long for others, so that a sync of the disk serves them all. A crash forgets what
# was stored in the last moments; nothing else depends on it.
_COMMIT_INTERVAL_S = 0.1


def mismatch(what: str) -> ConfigError:
    """That the files of a directory are not ours to use."""
    return ConfigError(
        f"ssd_cache_dir: {what}; name another directory, set ssd_on_mismatch: fresh to give it up, "
        "or remove it with 'sglang-flexkv ssd clear DIR'"
    )


class SsdStore:
    """Locks, opens and reserves the files of one rank; what they hold is known to ``core``.

    Args:
        directories: existing, writable directories; slot s lives in directory s % len(directories).
        num_slots: slots over all directories.
        slice_bytes: bytes of each slice of a slot, multiples of 4096.
        rank_tag: tells ranks that share a directory apart, e.g. ``rank0``.
        namespace: of the keys.
        label: what people are told the files hold.
        identity: what ``namespace`` stands for, if somebody can say; kept beside the files.
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
        identity: Identity | None = None,
        fresh_on_mismatch: bool = False,
        disk: _core.Disk | None = None,
    ) -> None:
        self._locks: list[int] = []
        check_directories(directories)
        slots_per_file = -(-num_slots // len(directories))
        file_bytes = _core.SSD_SLOTS_OFFSET + slots_per_file * sum(slice_bytes)
        files = [ShardFiles(directory, rank_tag) for directory in directories]
        try:
            for shard in files:
                self._locks.append(lock_files(shard))
                held, free = disk_bytes(shard.slots), free_bytes(shard.directory)
                if free is not None and file_bytes > free + held:
                    raise no_space(shard.directory, file_bytes)
                if file_bytes > held:  # may take a while where it has to be written
                    size = f"{file_bytes / GIB:.2f} GiB"
                    logger.info("SSD tier: reserving %s in %s", size, shard.directory)

            def open_files(fresh: bool) -> _core.SsdStore:
                return _core.SsdStore(
                    [(str(f.directory), str(f.slots), str(f.journal)) for f in files],
                    namespace,
                    num_slots,
                    slice_bytes,
                    label,
                    fresh,
                    _COMMIT_INTERVAL_S,
                    disk or _core.Disk(),
                )

            try:
                self.core = open_files(fresh_on_mismatch)
            except _core.CoreMismatchError:
                if identity is None or not _worth_nothing(files, identity):
                    raise
                self.core = open_files(True)
            if identity is not None:
                for shard in files:
                    ssd_identity.write(shard, identity)
        except _core.CoreMismatchError as error:
            self._unlock()
            raise mismatch(str(_first_conflict(files, identity) or error)) from None
        except _core.CoreDiskError as error:
            self._unlock()
            raise ConfigError(f"ssd_cache_dir: {error.strerror}; {_remedy(error)}") from None
        except _core.CoreSystemError as error:
            self._unlock()
            raise ConfigError(f"ssd_cache_dir: {error}; lower ssd_cache_gb") from None
        except OSError as error:  # of a directory that went away just now
            self._unlock()
            raise ConfigError(f"ssd_cache_dir: {error.filename}: {reason(error)}") from None
        except BaseException:
            self._unlock()
            raise
        for note in self.core.notes.splitlines():
            logger.warning("SSD tier: %s", note)

    def _unlock(self) -> None:
        locks, self._locks = self._locks, []
        run_all(*(partial(os.close, lock) for lock in locks))  # which releases them

    def close(self) -> None:
        """Writes out what the journals still lack and gives the directories back; what the files hold is
        found by the next one. The transfer engine must not use the store any more."""
        if self._locks:
            del self.core
            self._unlock()


def _conflicts(files: Sequence[ShardFiles], wanted: Identity) -> list[Conflict]:
    found = [ssd_identity.conflict(shard, wanted) for shard in files]
    return [each for each in found if each is not None]


def _worth_nothing(files: Sequence[ShardFiles], wanted: Identity) -> bool:
    """Whether nobody would miss what the files hold of others."""
    try:
        found = _conflicts(files, wanted)
    except _core.CoreSystemError:
        return False
    if not all(each.worth_nothing for each in found):
        return False
    for each in found:
        logger.warning("SSD tier: %s: started empty: %s", each.files.directory, each.worth_nothing)
    return bool(found)


def _first_conflict(files: Sequence[ShardFiles], wanted: Identity | None) -> Conflict | None:
    """With what differs, if that is recorded."""
    if wanted is None:
        return None
    try:
        return next((each for each in _conflicts(files, wanted) if not each.worth_nothing), None)
    except _core.CoreSystemError:
        return None


def _remedy(error: _core.CoreDiskError) -> str:
    if error.errno == errno.ENOSPC:
        free = free_bytes(Path(error.filename).parent)
        left = "" if free is None else f"{free / GIB:.2f} GiB are free: "
        return f"{left}lower ssd_cache_gb or free space"
    if error.errno in (errno.EDQUOT, errno.EFBIG):
        return f"lower ssd_cache_gb, spread it over more directories, or {remedy(error.errno)}"
    return f"{remedy(error.errno)}, or name another directory"
