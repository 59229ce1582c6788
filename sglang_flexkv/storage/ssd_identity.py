"""Whose KV the SSD tier's files hold: the fields behind a namespace, kept readable beside the files.

A namespace is a digest, so a start that finds another one knows that it may not use the files, not why. The
fields are in a file of their own, not in the slot file: they are text of any length, nothing that is read or
written depends on them, and a file that lacks them, or whose fields are damaged, is still good for its owner.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace, make_namespace
from sglang_flexkv.storage.ssd_files import ShardFiles

_VERSION = 1
_BYTES_MAX = 1 << 20
_VALUE_CHARS_MAX = 120  # of a value in a message
# Of files whose identity has a nonce.
WORTH_NOTHING = "what they hold could be found by the process that wrote it only"


@dataclass(frozen=True)
class Identity:
    """Everything that changes the bytes of a block, by the names under which users know it.

    Values are for people, too: no secrets in them.
    """

    settings: Mapping[str, str] = field(default_factory=dict)  # known before the model is loaded
    pool: Mapping[str, str] = field(default_factory=dict)  # known when the device pool is there
    # Of these nobody has judged whether they change KV. They count, but for a difference in them alone no
    # start is refused.
    unclassified: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""  # not empty: the KV can be found by the process that computed it only

    @property
    def namespace(self) -> Namespace:
        return make_namespace({name: _canonical(value) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Conflict:
    """Files that hold another identity's KV."""

    files: ShardFiles
    label: str
    fields: tuple[str, ...]  # what differs, old and new; empty: not known
    worth_nothing: str  # why they may be given up without asking; "": somebody may want what they hold

    def __str__(self) -> str:
        differ = "; ".join(self.fields) or "what differs is not recorded"
        return f"{self.files.slots} holds the cache of another model or setting ({self.label}): {differ}"


def digest(value: str) -> str:
    """Stands for a value that must not be shown."""
    return f"({hashlib.blake2b(value.encode(), digest_size=8).hexdigest()})" if value else ""


def write(files: ShardFiles, identity: Identity) -> None:
    """Puts the fields beside the files. Without them only messages say less, so a fault is no error."""
    body = {"version": _VERSION, **asdict(identity)}
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, sort_keys=True) + "\n"
    partial = files.identity.with_name(files.identity.name + ".new")
    try:
        if files.identity.is_file() and files.identity.read_text(encoding="utf-8") == text:
            return
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(files.identity)
    except (OSError, UnicodeError):
        return


def read(files: ShardFiles) -> Identity | None:
    """The fields beside the files; None if there are none that can be believed."""
    try:
        with files.identity.open("rb") as file:
            body = json.loads(file.read(_BYTES_MAX))
        checksum = body.pop("checksum")
        if body.pop("version") != _VERSION or checksum != _checksum({"version": _VERSION, **body}):
            return None
        return Identity(**body)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def recorded(files: ShardFiles, namespace: bytes) -> Identity | None:
    """The fields behind the namespace that the files have; None if they are not recorded."""
    found = read(files)
    return found if found is not None and found.namespace == namespace else None


def conflict(files: ShardFiles, wanted: Identity, *, before_pool: bool = False) -> Conflict | None:
    """How what the files hold differs from what is wanted. None if it does not, or if they hold nothing.

    Args:
        before_pool: what the device pool adds to ``wanted`` is not known yet. Only the rest is compared, and
            None is the answer as well if what the files hold is not recorded.

    Raises:
        CoreSystemError: the files cannot be read, are not ours, or have another format.
    """
    if not files.slots.is_file():
        return None
    if before_pool and (there := read(files)) is not None and _without_pool(there) == wanted:
        return None  # the usual case, told without reading the journal
    reader = _core.SsdReader(str(files.slots), str(files.journal))
    if reader.slot_bytes == 0 or not reader.keep or reader.namespace == wanted.namespace:
        return None
    there = recorded(files, reader.namespace)
    if there is None:
        return None if before_pool else Conflict(files, reader.label, (), "")
    if before_pool:
        there = _without_pool(there)
    known = {**there.settings, **there.pool}, {**wanted.settings, **wanted.pool}
    fields = _differences(*known)
    if there.nonce:
        worth_nothing = WORTH_NOTHING
    elif not fields and not wanted.nonce:
        names = _differences(there.unclassified, wanted.unclassified, values=False)
        worth_nothing = f"only variables differ that nobody has classified: {', '.join(names)}"
    else:
        worth_nothing = ""
    return Conflict(files, reader.label, tuple(fields), worth_nothing)


def _without_pool(identity: Identity) -> Identity:
    return Identity(identity.settings, {}, identity.unclassified, identity.nonce)


def _differences(old: Mapping[str, str], new: Mapping[str, str], *, values: bool = True) -> list[str]:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not values:
        return names
    return [f"{name}: {_shown(old.get(name))} there, {_shown(new.get(name))} now" for name in names]


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= _VALUE_CHARS_MAX else f"{value[: _VALUE_CHARS_MAX - 3]}..."


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.blake2b(_canonical(body).encode(), digest_size=16).hexdigest()
