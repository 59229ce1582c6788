"""Every place where this package deviates from stock SGLang, in one table.

Each patch is one hook on one function, with the signature it was written for, the reason, and when it can
go. ``docs`` of each stand in ``patches/`` of the repository. Nothing is patched that is not listed here, and
nothing is patched unless the target still has the expected signature.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration import hooks

# Versions whose hook targets were read and run. The linker's interface changes between minor releases, so a
# newer one is refused until it was tried.
SUPPORTED_SGLANG = ("0.5.23",)


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


PATCHES = (
    Patch(
        "open-linker-gates",
        "sglang.srt.managers.scheduler.Scheduler.__init__",
        "around",
        hooks.around_scheduler_init,
        ("self", "server_args", "port_args"),
        "The scheduler calls the external-linker and queue-time prefetch methods of its cache only if its own "
        "flags say so, and no flag means 'a plugin brings the linker'.",
        "SGLang asks the tree cache what it supports instead of reading flags.",
    ),
    Patch(
        "build-our-cache",
        "sglang.srt.mem_cache.registry.create_unified_radix_cache",
        "around",
        hooks.around_create_unified_radix_cache,
        ("ctx", "cache_class"),
        "--enable-flexkv builds SGLang's in-tree FlexKV cache; ours is a subclass of UnifiedRadixCache with a "
        "linker behind it.",
        "register_radix_cache_backend factories can bring a linker and take part in the scheduler's gates.",
    ),
    Patch(
        "never-another-cache",
        "sglang.srt.mem_cache.registry.create_tree_cache",
        "after",
        hooks.after_create_tree_cache,
        ("ctx",),
        "Errors in a plugin are logged and swallowed, and another cache is built silently.",
        "SGLang stops when a plugin that a flag asks for cannot be loaded.",
    ),
    Patch(
        "block-size-default",
        "sglang.srt.arg_groups.overrides._page_size_default",
        "around",
        hooks.around_page_size_default,
        ("view",),
        "SGLang's default page of one token makes blocks of one token: an index entry and an I/O for each.",
        "SGLang lets a cache choose the default page size.",
    ),
    Patch(
        "check-flags-early",
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "after",
        hooks.after_check_server_args,
        ("self",),
        "SGLang does not know which of its flags cannot work together with ours.",
        "Plugins can take part in argument validation.",
    ),
)


def installed_sglang() -> str | None:
    """Version of the installed SGLang, None if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Raises IncompatibleError unless the installed SGLang is one this package was written for."""
    version = installed_sglang()
    if version is None:
        raise IncompatibleError("SGLang is not installed in this environment: pip install sglang==0.5.23")
    if version.split("+")[0] not in SUPPORTED_SGLANG:
        raise IncompatibleError(
            f"sglang-flexkv supports SGLang {', '.join(SUPPORTED_SGLANG)}, not {version}: "
            f"pip install sglang=={SUPPORTED_SGLANG[-1]}"
        )


def problem_with(patch: Patch) -> str | None:
    """Why a patch cannot be applied to the installed SGLang, None if it can."""
    module_path, _, name = patch.target.rpartition(".")
    try:
        target = getattr(pkgutil.resolve_name(module_path), name)
    except (ImportError, AttributeError) as error:
        return f"{patch.target} does not exist ({error})"
    target = inspect.unwrap(target)
    parameters = tuple(inspect.signature(target).parameters)
    if parameters != patch.parameters:
        return f"{patch.target} takes {parameters}, expected {patch.parameters}"
    return None


def apply_all() -> None:
    """Registers every patch with SGLang's hook registry.

    Raises:
        IncompatibleError: a target is missing or has changed; nothing is registered then.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    problems = [problem for problem in map(problem_with, PATCHES) if problem]
    if problems:
        raise IncompatibleError(
            "this SGLang is not as expected, so nothing was patched: "
            + "; ".join(problems)
            + f". Install an unmodified sglang=={SUPPORTED_SGLANG[-1]}"
        )
    for patch in PATCHES:
        HookRegistry.register(patch.target, patch.hook, HookType(patch.kind))
