"""Paths that people name: what they may look like, and what is wrong with one, in words."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_REMEDIES = {
    errno.EDQUOT: "raise the quota of this user",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f, or that of the file system)",
    errno.EINVAL: "the file system there cannot do what is needed",
    errno.EIO: "check the disk",
    errno.ELOOP: "correct its symbolic links",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENAMETOOLONG: "shorten it",
    errno.ENFILE: "raise the system's limit on open files (fs.file-max)",
    errno.ENOSPC: "free space",
    errno.EROFS: "mount it writable",
}


def parse_path(text: str | Path) -> Path:
    """The path that somebody wrote down, with ``~`` replaced, and absolute: what it means must not change
    with the working directory.

    Raises:
        ValueError: it cannot be meant, or has no meaning here.
    """
    name = str(text).strip() if isinstance(text, str) else str(text)
    if not name:
        raise ValueError("is empty; name a path, or leave the setting out")
    if not name.isprintable():
        # A line break out of a configuration file, or bytes that are no text: no message could name them.
        raise ValueError(f"{name!r} has line breaks, other control characters or no UTF-8; name another path")
    try:
        return Path(name).expanduser().absolute()
    except (RuntimeError, OSError) as error:  # no such user, no working directory
        raise ValueError(f"{name} cannot be resolved ({error}); write the path in full") from None


def remedy(number: int | None) -> str:
    """What to do about a path for which a call failed with this errno; continues a sentence."""
    if number in (errno.EACCES, errno.EPERM):
        return f"give user {os.geteuid()} access to it and to every directory above it"
    return _REMEDIES.get(number or 0, "correct it")


def reason(error: OSError) -> str:
    """Why a path cannot be used, and what to do about it."""
    return f"{error.strerror or error}; {remedy(error.errno)} or name another one"


def why_not_writable(path: Path) -> str | None:
    """Why a file cannot be written, and what to do about it; None if it seems to be possible. Changes
    nothing."""
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return "is a directory; name a file"
        target, wanted = path, os.W_OK
    except FileNotFoundError:
        target, wanted = path.parent, os.W_OK | os.X_OK
        if not target.is_dir():  # which can be entered: that it could not would have been the error
            return f"cannot be written: {target} does not exist; create it or name another file"
    except OSError as error:
        return f"cannot be written: {reason(error)}"
    if not os.access(target, wanted, effective_ids=True):
        return (
            f"cannot be written: {target} is on a read-only file system or not open to user "
            f"{os.geteuid()}; give it access or name another file"
        )
    return None
