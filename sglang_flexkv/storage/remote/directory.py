"""A directory that several machines have mounted (NFS, Lustre, a FUSE file system): a file per value.

::

    <root>/fkv1/<2 digits>/<namespace>-<key>      digits: the first of the key
    <root>/fkv1/tmp/<host>-<process>-<number>     being written

A file gets its name when all of it is written, so who finds a name finds a value. Any number of processes on
any number of machines may write; none of them knows of the others. Keys are hashes, so files spread evenly
over the directories, and one of these says how full all are: the bound on the size is kept for each of the
256 directories by whoever writes there.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sglang_flexkv import _core
from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.paths import remedy
from sglang_flexkv.common.patience import Patience
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    fits,
    leading,
    outcomes_of,
    value_bytes,
)

T = TypeVar("T")

_DIRECTORIES = 256
# A bound of fewer values for a directory would be too coarse: then the whole tree has one.
_PART_VALUES_MIN = 8
# Whoever has written so much of the bound looks how much there is. The more there are who write, the more
# often somebody looks.
_SLACK = 1 / 32
# A file's time of change is that of its last use, this exactly: an update of it costs a write.
_TOUCH_S = 600.0
# Values that are not smaller go past the page cache: below, the wait for the disk takes more of a core than
# the copy does.
_DIRECT_MIN = 256 << 10
# What is stored is what people have said to a model: all servers that share it run as one user.
_MODE = 0o600
# What nobody has finished writing by then, nobody will.
_TMP_AGE_S = 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A mount that is only read, or a directory of somebody else's.
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# The server of a network file system is away, or has forgotten us.
_AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH)


class DirectoryStore(Store):
    """
    Args:
        url: its option ``max_gb`` bounds the size in GiB, for all processes together that give the same;
            without it three quarters of what is free at the start, and what is there already. With
            ``mounted=yes`` it is away while the directory is on the file system of ``/``.
    """

    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        self._timeout_s = timeout_s  # of opening; other calls on files cannot be given one
        self._must_be_mounted = url.options.get("mounted") == "yes"
        self._opening = Patience()
        self.root = url.path
        self.tree = os.path.join(self.root, "fkv1")
        self.name = f"directory {self.root}"
        max_gb = url.number("max_gb")
        self.max_bytes = int(max_gb * GIB) if max_gb else 0
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._written: dict[str, int] = {}  # bytes since the part was looked through, by its name
        self.direct = True  # O_DIRECT, until the file system says that it has none

    def open(self) -> None:
        # A mount that hangs holds whoever asks it for anything.
        if not self._opening.call(self._open_tree, self._timeout_s):
            raise AwayError(f"remote: {self.root} does not answer; check what serves it")

    def _open_tree(self) -> None:
        try:
            if not os.path.isdir(self.root):
                os.stat(self.root)
                raise ConfigError(f"remote: {self.root} is no directory; name one")
            if self._must_be_mounted and not self._is_mounted():
                raise AwayError(f"remote: nothing is mounted at {self.root}; mount it")
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.tree, 0o700)
            os.makedirs(os.path.join(self.tree, "tmp"), exist_ok=True)
            probe = self._temporary()
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE))
            os.unlink(probe)
            if not self.max_bytes:
                free = os.statvfs(self.root)
                self.max_bytes = int(0.75 * free.f_bavail * free.f_frsize) + self.used_bytes_estimate()
        except OSError as error:
            why = f"remote: {self.root} cannot be used: {error.strerror}"
            if error.errno in _AWAY:
                raise AwayError(f"{why}; check what serves it") from None
            what = "create it or mount what belongs there" if error.errno == errno.ENOENT else None
            raise ConfigError(f"{why}; {what or remedy(error.errno)}") from None

    def session(self) -> Session:
        return _DirectorySession(self)

    def _is_mounted(self) -> bool:
        return os.stat(self.root).st_dev != os.stat("/").st_dev

    def notes(self) -> list[str]:
        own = "is on the file system of /: if a mount belongs there, mount it; ?mounted=yes waits for one"
        return ([] if self._is_mounted() else [own]) + [
            f"bounded at {self.max_bytes / GIB:.1f} GiB (max_gb), about "
            f"{self.used_bytes_estimate() / GIB:.1f} GiB are used"
        ]

    # ---- names ----

    def path_of(self, name: str) -> str:
        """Where the value of this name is, whatever namespace it is of."""
        _, namespace, key = name.split("/")
        return f"{self.tree}/{key[:2]}/{namespace}-{key}"

    def _temporary(self) -> str:
        host = socket.gethostname().replace("/", "_")
        return f"{self.tree}/tmp/{host}-{os.getpid()}-{id(self):x}-{next(self._numbers)}"

    # ---- values ----

    def write(self, name: str, value: Value) -> None:
        """Raises OSError."""
        self._direct_or_not(self._write, name, value)

    def read(self, name: str, value: Value, sizes: list[int] | None = None) -> tuple[Outcome, int]:
        """Also how many bytes came; see ``Session.get`` for sizes. Raises OSError."""
        return self._direct_or_not(lambda name, value: self._read(name, value, sizes), name, value)

    def _direct_or_not(self, call: Callable[[str, Value], T], name: str, value: Value) -> T:
        """Where O_DIRECT is taken and its alignment is not, through the page cache."""
        direct = self.direct
        try:
            return call(name, value)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self.direct = False
            return call(name, value)

    def _write(self, name: str, value: Value) -> None:
        path, temporary = self.path_of(name), self._temporary()
        fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, value)
        try:
            try:
                _whole(os.pwritev, fd, value)
            finally:
                os.close(fd)
            try:
                os.rename(temporary, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        self._keep_bound(name.rpartition("/")[2][:2], value_bytes(value))

    def _read(self, name: str, value: Value, sizes: list[int] | None) -> tuple[Outcome, int]:
        path = self.path_of(name)
        try:
            # What is no file must not hold whoever opens it.
            fd = self._open(path, os.O_RDONLY | os.O_NONBLOCK, value)
        except FileNotFoundError:
            return Outcome.MISSING, 0
        try:
            found = os.fstat(fd)
            if not fits(found.st_size, value, sizes):
                return Outcome.CORRUPT, 0
            if _whole(os.preadv, fd, leading(value, found.st_size)) != found.st_size:
                return Outcome.CORRUPT, 0
            if time.time() - found.st_mtime > _TOUCH_S:
                with contextlib.suppress(OSError):  # somebody else's file, or a mount that is only read
                    os.utime(path)
            return Outcome.GOOD, found.st_size
        finally:
            os.close(fd)

    def _open(self, path: str, flags: int, value: Value) -> int:
        """Past the page cache where that is worth it, and the file system and the memory allow it."""
        aligned = all(len(piece) % mmap.PAGESIZE == 0 for piece in value)
        if self.direct and aligned and value_bytes(value) >= _DIRECT_MIN:
            try:
                return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, _MODE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
                with contextlib.suppress(FileNotFoundError):  # made before the flag was refused
                    if flags & os.O_CREAT:
                        os.unlink(path)
        return os.open(path, flags | os.O_CLOEXEC, _MODE)

    # ---- the bound ----

    def _keep_bound(self, part: str, num_bytes: int) -> None:
        """Called after a value was written to a directory."""
        max_bytes = self.max_bytes // _DIRECTORIES
        if max_bytes < _PART_VALUES_MIN * num_bytes:
            part, max_bytes = "", self.max_bytes
        with self._lock:
            first = part not in self._written
            written = self._written[part] = self._written.get(part, 0) + num_bytes
            # At the first time somewhere in between, or all processes would look at the same moment.
            if written < max(num_bytes, max_bytes * _SLACK) * (random.random() if first else 1):
                return
            self._written[part] = 0
        self._evict(part, max_bytes)

    def _evict(self, part: str, max_bytes: int) -> None:
        """Removes what was used least recently of a part of the tree, until it keeps the bound."""
        files = [
            (status.st_mtime, status.st_size, path)
            for path, status in self._files([part] if part else self._directories())
        ]
        excess = sum(size for _, size, _ in files) - max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):  # another one was faster
                os.unlink(path)
            excess -= size
        for entry in _entries(f"{self.tree}/tmp"):
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _TMP_AGE_S:
                    os.unlink(entry.path)

    def used_bytes_estimate(self) -> int:
        """From a few of the directories: what is in them is a fair sample."""
        parts = self._directories()
        sample = random.sample(parts, min(8, len(parts)))
        used = sum(status.st_size for _, status in self._files(sample))
        return used * len(parts) // max(1, len(sample))

    def _directories(self) -> list[str]:
        return [entry.name for entry in _entries(self.tree) if re.fullmatch("[0-9a-f]{2}", entry.name)]

    def _files(self, parts: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
        for part in parts:
            for entry in _entries(f"{self.tree}/{part}"):
                with contextlib.suppress(OSError):
                    yield entry.path, entry.stat()


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _whole(transfer: object, fd: int, value: Value) -> int:
    """All of a value by calls that may do a part. Returns how many bytes were moved: fewer where the file
    ends."""
    wanted, done = value_bytes(value), 0
    rest = list(value)
    while done < wanted:
        moved: int = transfer(fd, rest, done)  # type: ignore[operator]
        if moved == 0:
            break
        done += moved
        while moved:
            if moved < len(rest[0]):
                rest[0] = rest[0][moved:]
                break
            moved -= len(rest.pop(0))
    return done


class _DirectorySession(Session):
    def __init__(self, store: DirectoryStore) -> None:
        self._store = store

    def exists(self, names: Sequence[str]) -> list[bool]:
        return self._find(names, leading=False)

    def count_leading(self, names: Sequence[str]) -> int:
        there = self._find(names, leading=True)
        return len(there) if all(there) else len(there) - 1

    def _find(self, names: Sequence[str], *, leading: bool) -> list[bool]:
        errors = _core.find_files([self._store.path_of(name) for name in names], leading)
        for number in errors:
            if number not in (0, errno.ENOENT, errno.ENOTDIR):
                raise self._error("look for a value", OSError(number, os.strerror(number)))
        return [number == 0 for number in errors]

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        try:
            got = [self._store.read(name, value, sizes) for name, value in zip(names, values, strict=True)]
        except OSError as error:
            raise self._error("read a value", error) from None
        return outcomes_of(got, sizes)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        try:
            for name, value in zip(names, values, strict=True):
                self._store.write(name, value)
        except OSError as error:
            failed = self._error("write a value", error)
            takes_nothing = error.errno in (*_FULL, *_READ_ONLY)  # and can be read
            raise StoreFullError(str(failed)) if takes_nothing else failed from None
        return [Outcome.GOOD] * len(names)

    def close(self) -> None:
        pass

    def _error(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"{self._store.name}: cannot {what}: {error.strerror}")
