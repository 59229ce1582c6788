"""SHA-256 of a model's files: read once on a machine, and remembered.

Weights are many gigabytes, and each rank of each start needs them. What was computed lies in
``~/.cache/sglang-flexkv/sha256.json`` (``XDG_CACHE_HOME``), under what tells that a file is still the same:
device, inode, size and times. Of several processes the first one reads and the others wait for it.

Files in the cache of the Hugging Face hub are links to files that are named by their SHA-256 already.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_flexkv.common.config import environment

logger = logging.getLogger(__name__)

_REMEMBERED_MAX = 10_000
_READERS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Small files go by the hash that git gives them.
_NAMED_BY_CONTENTS = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def is_named_by_contents(path: Path) -> bool:
    """Whether a file is one of the hub's cache, so that other contents would have another name."""
    target = path.resolve()
    return (
        path.is_symlink()
        and target.parent.name == "blobs"
        and bool(_NAMED_BY_CONTENTS.fullmatch(target.name))
    )


def sha256_of(paths: Sequence[Path]) -> list[str]:
    """Of each file its SHA-256, in hex.

    Raises:
        OSError: a file cannot be read, or changes meanwhile.
    """
    digests = {}
    for path in paths:
        target = path.resolve()
        if is_named_by_contents(path) and _SHA256.fullmatch(target.name):
            digests[path] = target.name
    unread = [path for path in paths if path not in digests]
    if unread:
        digests |= zip(unread, _remembered_or_read(unread), strict=True)
    return [digests[path] for path in paths]


def _remembered_or_read(paths: Sequence[Path]) -> list[str]:
    folder = Path(environment().get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sglang-flexkv"
    with _locked(folder):
        remembered = _recall(folder)
        stamps = [_stamp(path) for path in paths]
        unread = [(path, stamp) for path, stamp in zip(paths, stamps, strict=True) if stamp not in remembered]
        if unread:
            start_s = time.monotonic()
            with ThreadPoolExecutor(_READERS) as pool:
                new = dict(
                    zip(
                        (stamp for _, stamp in unread),
                        pool.map(_read, *zip(*unread, strict=True)),
                        strict=True,
                    )
                )
            num_bytes = sum(path.stat().st_size for path, _ in unread)
            if num_bytes > 1 << 30:
                logger.info(
                    "sglang-flexkv: read %.1f GB of weights in %.0f s, to know them elsewhere; noted in %s",
                    num_bytes / 1e9,
                    time.monotonic() - start_s,
                    folder,
                )
            remembered |= new
            _remember(folder, remembered)
        return [remembered[stamp] for stamp in stamps]


def _stamp(path: Path) -> str:
    status = path.stat()
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join(map(str, numbers))


def _read(path: Path, stamp: str) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(path) != stamp:
        raise OSError(f"{path} changes while it is read")
    return digest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; where nothing can be written or locked, each by itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "sha256.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recall(folder: Path) -> dict[str, str]:
    """What an earlier start has read; nothing if that is not there or damaged."""
    try:
        found = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and _SHA256.fullmatch(v)}


def _remember(folder: Path, digests: dict[str, str]) -> None:
    newest = dict(list(digests.items())[-_REMEMBERED_MAX:])
    whole = folder / f"sha256.json.{os.getpid()}"
    with contextlib.suppress(OSError):
        whole.write_text(json.dumps(newest), encoding="utf-8")
        whole.replace(folder / "sha256.json")
