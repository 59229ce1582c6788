"""The monkey-patch: how our plugin runs in interpreters where SGLang does not see its entry point.

Owns two files in an interpreter's site-packages, and nothing else: a ``.pth`` file, which Python executes at
the start of every process of that interpreter, those that SGLang spawns included, and the module that it
imports. ``_sglang_flexkv_startup.py`` here is that module as it is copied; it is never imported from here.
"""

from __future__ import annotations

import os
import sysconfig
from contextlib import suppress
from enum import Enum
from pathlib import Path

from sglang_flexkv.common.errors import FlexKVError

_MODULE = "_sglang_flexkv_startup"
_PTH = "sglang_flexkv_startup.pth"
# One line, since Python takes a .pth file line by line, and silent if somebody deletes the module alone.
_PTH_TEXT = f'exec("try:\\n import {_MODULE}\\nexcept ImportError:\\n pass")\n'
_PTH_TEXT = "import sys; " + _PTH_TEXT  # only lines that start with `import` are executed


class PatchState(Enum):
    """What is in site-packages."""

    ABSENT = "not installed"
    CURRENT = "installed"
    OUTDATED = "installed by another version, or incomplete"


def site_packages() -> Path:
    """Where this interpreter looks for ``.pth`` files at its start."""
    return Path(sysconfig.get_path("purelib"))


def state(directory: Path) -> PatchState:
    """Compares what is in ``directory`` with what ``install`` would write."""
    wanted = _files(directory)
    found = {path: path.read_text(errors="replace") for path in wanted if path.is_file()}
    if not found:
        return PatchState.ABSENT
    return PatchState.CURRENT if found == wanted else PatchState.OUTDATED


def install(directory: Path) -> list[Path]:
    """Writes the monkey-patch into ``directory``; files that are right already are left alone.

    Returns:
        The files that were written.

    Raises:
        FlexKVError: the directory cannot be written.
    """
    written = []
    for path, text in _files(directory).items():
        if path.is_file() and path.read_text(errors="replace") == text:
            continue
        # An interpreter that starts now must see a whole file or none.
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(text)
            partial.replace(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise _cannot("write", path, error) from None
        written.append(path)
    return written


def uninstall(directory: Path) -> list[Path]:
    """Removes what ``install`` wrote, and what Python compiled from it.

    Returns:
        The files that were removed; none if there were none.

    Raises:
        FlexKVError: a file cannot be removed.
    """
    # The .pth file first: without it nobody imports the module.
    paths = [*reversed(_files(directory)), *(directory / "__pycache__").glob(f"{_MODULE}.*.pyc")]
    removed = []
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _cannot("remove", path, error) from None
        removed.append(path)
    return removed


def _files(directory: Path) -> dict[Path, str]:
    """What belongs into ``directory``, in the order in which it is written."""
    return {
        directory / f"{_MODULE}.py": Path(__file__).with_name(f"{_MODULE}.py").read_text(),
        directory / _PTH: _PTH_TEXT,
    }


def _cannot(what: str, path: Path, error: OSError) -> FlexKVError:
    return FlexKVError(
        f"cannot {what} {path}: {error.strerror}; run this as the user who owns that environment, "
        "or use a virtual environment"
    )
