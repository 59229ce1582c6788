"""What ``--enable-flexkv`` needs from this machine and its SGLang, and what of it is there.

Looks, and changes nothing. Imports the rest of the package only inside functions, so that it can also speak
when that fails.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.integration import startup

PYTHON_MIN = (3, 11)
_GROUP = "sglang.srt.plugins"
_ENTRY_POINT = "sglang_flexkv.integration.plugin:register"


class Level(Enum):
    OK = "ok"
    NOTE = "note"  # works, but not as well or not as usual
    PROBLEM = "problem"  # --enable-flexkv would not work


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    level: Level
    found: str
    remedy: str = ""  # of notes and problems: what to do


def prerequisites() -> list[Finding]:
    """Everything but how SGLang finds us: interpreter, compiled core, SGLang, targets of the patches."""
    python = _interpreter()
    if python.level is Level.PROBLEM:
        return [python]  # nothing else of this package can be imported then
    try:
        from sglang_flexkv.integration.compat import patches  # noqa: F401
    except ImportError as error:
        remedy = "install what it needs: pip install sglang-flexkv"
        return [python, Finding("dependencies", Level.PROBLEM, str(error), remedy)]
    return [python, *_core(), *_sglang()]


def ways_in(directory: Path | None = None) -> list[Finding]:
    """Whether SGLang runs our plugin: through the entry point, the monkey-patch, or not at all.

    Args:
        directory: where the monkey-patch is looked for; default: this interpreter's site-packages.
    """
    directory = directory or startup.site_packages()
    patch = startup.state(directory)
    patched = patch is startup.PatchState.CURRENT
    entry_point = why_no_entry_point()
    if entry_point is None:
        first = Finding("entry point", Level.OK, "SGLang sees it")
    elif patched:
        first = Finding("entry point", Level.NOTE, entry_point, "nothing: the monkey-patch stands in for it")
    else:
        first = Finding("entry point", Level.PROBLEM, entry_point, "run 'sglang-flexkv install'")
    if patch is startup.PatchState.OUTDATED:
        remedy = "run 'sglang-flexkv install --force' to renew it, or 'sglang-flexkv uninstall'"
        second = Finding("monkey-patch", Level.NOTE, f"{patch.value} ({directory})", remedy)
    else:
        where = f" in {directory}" if patched else ""
        second = Finding("monkey-patch", Level.OK, f"{patch.value}{where}")
    return [first, second]


def why_no_entry_point() -> str | None:
    """Why SGLang would not run our entry point, None if it would."""
    ours = [point for point in metadata.entry_points(group=_GROUP) if point.value == _ENTRY_POINT]
    if not ours:
        return f"no installed package brings the entry point of group {_GROUP}"
    from sglang_flexkv.integration.compat.version import plugins_named

    listed = plugins_named()
    allowed = {name.strip() for name in listed.split(",") if name.strip()}
    if allowed and ours[0].name not in allowed:
        return f"SGLANG_PLUGINS={listed} leaves out {ours[0].name!r}"
    return None


def _interpreter() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON_MIN:
        wanted = ".".join(map(str, PYTHON_MIN))
        remedy = f"use an environment with Python {wanted} or newer"
        return Finding("interpreter", Level.PROBLEM, f"Python {version}", remedy)
    return Finding("interpreter", Level.OK, f"Python {version} ({sys.executable})")


def _core() -> list[Finding]:
    from sglang_flexkv.integration import checks

    problem = _problem("compiled core", checks.check_core)
    if problem:
        return [problem]
    from sglang_flexkv import _core as core

    engine, note = core.probe_io_engine()
    remedy = (
        "nothing, but io_uring is faster: allow it in the container's seccomp profile and in "
        "/proc/sys/kernel/io_uring_disabled"
    )
    return [
        Finding("compiled core", Level.OK, core.__file__),
        Finding("SSD I/O", Level.NOTE, f"{engine}: {note}", remedy)
        if note
        else Finding("SSD I/O", Level.OK, engine),
    ]


def _sglang() -> list[Finding]:
    from sglang_flexkv.integration.compat import hooking, version
    from sglang_flexkv.integration.compat.patches import PATCHES

    wrong = _problem("SGLang", version.check_version)
    installed = version.installed_sglang()
    if installed is None:
        return [wrong] if wrong else []
    supported = ", ".join(version.SUPPORTED_SGLANG)
    findings = [wrong or Finding("SGLang", Level.OK, f"{installed} (supported: {supported})")]
    changed = []
    for patch in PATCHES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SGLang warns about hardware that is not there
                problem = hooking.problem_with(patch)
        except Exception as error:  # importing an SGLang we do not know can end in anything
            problem = f"{patch.target} cannot be imported ({type(error).__name__}: {error})"
        if problem:
            remedy = f"install an unmodified SGLang: pip install sglang=={version.SUPPORTED_SGLANG[-1]}"
            changed.append(Finding(f"patch {patch.name}", Level.PROBLEM, problem, remedy))
    fit = Finding("patches", Level.OK, f"all {len(PATCHES)} fit what they change")
    return [*findings, *(changed or [fit])]


def _problem(what: str, check: Callable[[], None]) -> Finding | None:
    """Runs a check whose message ends with ``: <remedy>``."""
    try:
        check()
    except FlexKVError as error:
        found, _, remedy = str(error).rpartition(": ")
        return Finding(what, Level.PROBLEM, found, remedy)
    return None
