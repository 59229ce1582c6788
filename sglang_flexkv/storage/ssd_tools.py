"""Looks at, checks and removes the SSD tier's files while no server uses them. Prints nothing."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sglang_flexkv import _core
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.paths import parse_path, reason
from sglang_flexkv.storage import ssd_identity
from sglang_flexkv.storage.ssd_files import ShardFiles, shards_in, why_no_directory
from sglang_flexkv.storage.ssd_identity import Identity

# Slots that are read between two reports of progress.
_BATCH_SLOTS = 32
_AGAIN_S = 0.05
_TO_DO = "name a directory of ssd_cache_dir"


class SsdFilesError(FlexKVError):
    """Files of the SSD tier cannot be read, are not ours, or belong to a running server."""


@dataclass(frozen=True)
class Inspection:
    """What the files of one rank in one directory hold."""

    files: ShardFiles
    owner: str | None  # the process that uses them
    format_version: int
    label: str
    namespace: bytes
    identity: Identity | None  # None: not recorded
    num_slots: int
    slot_bytes: int
    file_bytes: int  # of the slot file
    live_blocks: int
    journal_bytes: int
    journal_records: int
    damaged_bytes: int  # of the journal
    given_up_because: str  # why the next server starts empty whatever it serves; "" if it does not

    @property
    def live_bytes(self) -> int:
        return self.live_blocks * self.slot_bytes


@dataclass(frozen=True)
class Verification:
    """What reading every block of one rank in one directory came to."""

    files: ShardFiles
    num_blocks: int
    num_bytes: int
    bad_slots: tuple[int, ...]
    damaged_bytes: int  # of the journal


@dataclass(frozen=True)
class Remains:
    """Everything of one rank in one directory, also where its slot file is gone."""

    files: ShardFiles
    owner: str | None
    paths: tuple[Path, ...]
    disk_bytes: int


def find(directories: Sequence[Path]) -> list[ShardFiles]:
    """The ranks in these directories. Raises SsdFilesError for a directory without any."""
    found = []
    for directory in _distinct(directories):
        if why := why_no_directory(directory, _TO_DO):
            raise SsdFilesError(f"{directory} {why}")
        with _reported(directory, "cannot be listed"):
            shards = shards_in(directory)
        if not shards:
            raise SsdFilesError(f"{directory} holds no files of the SSD tier")
        found += shards
    return found


def inspect(files: ShardFiles) -> Inspection:
    """Reads header and journal; also while a server uses the files, as a glimpse of what changes."""
    reader = _open(files)
    live = len(reader.live_slots)
    identity = ssd_identity.recorded(files, reader.namespace)
    with _reported(files.slots, "cannot be read"):
        file_bytes = files.slots.stat().st_size
    return Inspection(
        files=files,
        owner=owner(files),
        format_version=_core.SSD_FORMAT_VERSION,  # others are refused
        label=reader.label,
        namespace=reader.namespace,
        identity=identity,
        num_slots=reader.num_slots,
        slot_bytes=reader.slot_bytes,
        file_bytes=file_bytes,
        live_blocks=live,
        journal_bytes=reader.journal_bytes if reader.has_journal else 0,
        journal_records=reader.journal_records,
        damaged_bytes=reader.damaged_bytes,
        given_up_because=_why_given_up(reader)
        or (ssd_identity.WORTH_NOTHING if identity is not None and identity.nonce else ""),
    )


def verify(files: ShardFiles, progress: Callable[[int, int], None]) -> Verification:
    """Reads every block from the disk and compares it with its checksums.

    No server can start on the files meanwhile.

    Args:
        progress: called with the number of blocks that were read and that there are.

    Raises:
        SsdFilesError: the files are in use, not ours, or hold nothing that could be compared.
    """
    with _held(files):
        reader = _open(files)
        with _reported(files.slots, "cannot be read"):
            _check_whole(files, reader)
            _forget_cached_pages(files.slots)
        if not reader.has_journal:
            raise SsdFilesError(f"{files.slots} cannot be verified: {_why_given_up(reader)}")
        slots = reader.live_slots.tolist()
        bad: list[int] = []
        progress(0, len(slots))
        for start in range(0, len(slots), _BATCH_SLOTS):
            batch = slots[start : start + _BATCH_SLOTS]
            bad += reader.verify(batch).tolist()
            progress(start + len(batch), len(slots))
        return Verification(
            files, len(slots), len(slots) * reader.slot_bytes, tuple(bad), reader.damaged_bytes
        )


def remains(directories: Sequence[Path]) -> list[Remains]:
    """What there is to remove. A directory that does not exist holds nothing."""
    found = []
    for directory in _distinct(directories):
        if _is_missing(directory):
            continue
        if why := why_no_directory(directory, _TO_DO):
            raise SsdFilesError(f"{directory} {why}")
        with _reported(directory, "cannot be listed"):
            names = os.listdir(directory)
            for tag in sorted(_tags(names)):
                files = ShardFiles(directory, tag)
                paths = tuple(path for path in _paths(files) if path.name in names)
                used = sum(path.lstat().st_blocks * 512 for path in paths)
                found.append(Remains(files, owner(files), paths, used))
    return found


def clear(found: Sequence[Remains]) -> int:
    """Removes the files and returns how many bytes of disk that freed. If one is in use, none is removed.

    Raises:
        SsdFilesError: a server uses some of them, or they cannot be removed.
    """
    if not found:
        return 0
    first, *rest = found
    with _held(first.files):
        freed = clear(rest)
        for path in first.paths:
            with _reported(path, "cannot be removed"):
                path.unlink(missing_ok=True)
    return freed + first.disk_bytes


def owner(files: ShardFiles, patience_s: float = 0.0) -> str | None:
    """The process that uses the files: its id, or "unknown"; None if there is none.

    Args:
        patience_s: for one that is about to end.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        try:
            with _held(files, sign=False):
                return None
        except _InUseError as error:
            if time.monotonic() >= deadline_s:
                return error.owner
        time.sleep(_AGAIN_S)


class _InUseError(SsdFilesError):
    def __init__(self, files: ShardFiles, owner: str) -> None:
        super().__init__(f"{files.slots} is in use by process {owner}; stop it first")
        self.owner = owner


@contextmanager
def _held(files: ShardFiles, *, sign: bool = True) -> Iterator[None]:
    """Keeps servers away. Without a lock file (a copy, a read-only mount) nobody is kept away.

    Args:
        sign: tell servers this process' id, and fail if the lock is another user's, whose server may run.
    """
    try:
        lock = os.open(files.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if sign and isinstance(error, PermissionError):
            raise SsdFilesError(f"{files.lock} cannot be opened: {reason(error)}") from None
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.pread(lock, 32, 0).decode(errors="replace").strip()
            raise _InUseError(files, process or "unknown") from None
        except OSError:  # no locks there, so no server either
            pass
        if sign:
            with suppress(OSError):  # for messages only
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _open(files: ShardFiles) -> _core.SsdReader:
    try:
        return _core.SsdReader(str(files.slots), str(files.journal))
    except _core.CoreDiskError as error:
        raise SsdFilesError(error.strerror) from None
    except _core.CoreSystemError as error:
        raise SsdFilesError(str(error)) from None


@contextmanager
def _reported(path: Path, what: str) -> Iterator[None]:
    """Calls on a path that fail: what it is that does not work, and why."""
    try:
        yield
    except OSError as error:
        raise SsdFilesError(f"{path} {what}: {reason(error)}") from None


def _check_whole(files: ShardFiles, reader: _core.SsdReader) -> None:
    """Blocks behind the end of a file that was cut are not looked for: say so instead of finding fewer."""
    whole = _core.SSD_SLOTS_OFFSET + reader.num_slots * reader.slot_bytes
    size = files.slots.stat().st_size
    if reader.slot_bytes and size < whole:
        raise SsdFilesError(f"{files.slots} was cut off: it has {size} of {whole} bytes")


def _why_given_up(reader: _core.SsdReader) -> str:
    if reader.slot_bytes == 0:
        return "its header is blank or damaged"
    if not reader.keep:
        return "its contents were computed with weights that only the process before had"
    if not reader.has_journal:
        return "its journal is missing, damaged, or belongs to other contents"
    return ""


def _forget_cached_pages(path: Path) -> None:
    """What counts is what is on the disk, not what memory still holds of it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _paths(files: ShardFiles) -> tuple[Path, ...]:
    """All names of a rank's files; the lock last, which guards the others."""
    unfinished = [path.with_name(path.name + ".new") for path in (files.journal, files.identity)]
    return (files.slots, files.journal, files.identity, *unfinished, files.lock)


def _tags(names: Sequence[str]) -> set[str]:
    """The ranks that files of these names belong to."""
    tags = set()
    for path in _paths(ShardFiles(Path(), "*")):
        prefix, suffix = path.name.split("*")
        tags |= {n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix) and n.endswith(suffix)}
    return tags


def _is_missing(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:  # there may be something
        pass
    return False


def _distinct(directories: Sequence[Path]) -> list[Path]:
    try:
        return list({os.path.realpath(parse_path(path)): path.expanduser() for path in directories}.values())
    except ValueError as error:
        raise SsdFilesError(str(error)) from None
