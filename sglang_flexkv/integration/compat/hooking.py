"""How a function of SGLang is patched: a hook on it, by SGLang's own registry, if it is as we know it."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration.compat.version import SUPPORTED_SGLANG


@dataclass(frozen=True)
class Patch:
    """One hook on one function of SGLang."""

    name: str
    target: str  # dotted path of the function
    kind: str  # before | after | around, as in SGLang's HookType
    hook: Callable[..., Any]
    parameters: tuple[str, ...]  # of the target, as they were when the hook was written
    reason: str
    remove_when: str


def problem_with(patch: Patch) -> str | None:
    """Why a patch cannot be applied to the installed SGLang, None if it can."""
    parent_path, _, name = patch.target.rpartition(".")
    try:
        target = getattr(pkgutil.resolve_name(parent_path), name)
    except (ImportError, AttributeError) as error:
        return f"{patch.target} does not exist ({error})"
    try:
        parameters = tuple(inspect.signature(inspect.unwrap(target)).parameters)
    except (TypeError, ValueError) as error:
        return f"{patch.target} is not a function any more ({error})"
    if parameters != patch.parameters:
        return f"{patch.target} takes ({', '.join(parameters)}), expected ({', '.join(patch.parameters)})"
    return None


# Those of this process: SGLang's registry does not tell whose hooks it has.
_registered: list[Patch] = []


def apply(patches: Sequence[Patch]) -> None:
    """Registers patches with SGLang's hook registry.

    Raises:
        IncompatibleError: a target is missing or has changed; nothing is registered then.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    problems = [problem for problem in map(problem_with, patches) if problem]
    if problems:
        raise IncompatibleError(
            "this SGLang is not as expected, so nothing was patched: "
            + "; ".join(problems)
            + f". Install an unmodified sglang=={SUPPORTED_SGLANG[-1]}"
        )
    # Named here and not by SGLang, which knows no source when the monkey-patch calls.
    source = HookSource("flexkv", "sglang-flexkv")
    for patch in patches:
        HookRegistry.register(patch.target, patch.hook, HookType(patch.kind), source=source)
        _registered.append(patch)


def check_applied() -> None:
    """Raises IncompatibleError unless every patch that was registered is in effect in this process.

    SGLang only logs a hook that it fails to apply, and runs with the others.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [patch.name for patch in _registered if patch.target not in HookRegistry._patched]
    if missing:
        raise IncompatibleError(
            f"SGLang did not apply the patches {', '.join(missing)}; its log says why under 'Failed to apply "
            f"hooks'. Install an unmodified sglang=={SUPPORTED_SGLANG[-1]}, and leave out other plugins that "
            "replace these functions"
        )
