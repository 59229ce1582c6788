"""The SSD tier's files: in each directory a preallocated slot file and the journal of what it holds.

A directory belongs to one writer at a time (a lock file says so) and its space is really reserved, so that a
full disk is an error at start-up and not a surprise at night. What the files hold outlives the server: format
and rules are in docs/ssd-format.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_files import ShardFiles, disk_bytes, free_bytes, lock_files, no_space

logger = logging.getLogger(__name__)

# A journal record waits so long for others, so that a sync of the disk serves them all. A crash forgets what
# was stored in the last moments; nothing else depends on it.
_COMMIT_INTERVAL_S = 0.1


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
                self._locks.append(lock_files(shard))
                if file_bytes > free_bytes(shard.directory) + disk_bytes(shard.slots):
                    raise no_space(shard.directory, file_bytes)
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
