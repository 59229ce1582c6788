"""What has to be so before a server starts, checked as early as it can be known."""

from __future__ import annotations

import os
from typing import Any

from sglang_flexkv.common.config import GIB, FlexKVConfig
from sglang_flexkv.common.errors import ConfigError, IncompatibleError
from sglang_flexkv.storage.ssd_files import check_directory, check_free_space

# Flag, whether it is set in a way we cannot serve, and what to do. Fields are SGLang's own names.
_CONFLICTS = (
    ("enable_hierarchical_cache", bool, "--enable-hierarchical-cache, another host cache; drop it"),
    ("enable_lmcache", bool, "--enable-lmcache, another external cache; drop it"),
    (
        "enable_unified_cache_external_linker",
        bool,
        "--enable-unified-cache-external-linker, which selects another external cache; drop it",
    ),
    ("radix_cache_backend", bool, "--radix-cache-backend, which selects another cache; drop it"),
    ("disable_radix_cache", bool, "--disable-radix-cache, which leaves nothing to extend; drop it"),
    (
        "enable_unified_memory",
        bool,
        "--enable-unified-memory, which moves KV between slots on its own; drop it",
    ),
    ("enable_hisparse", bool, "--enable-hisparse, which keeps KV on the host on its own; drop it"),
    (
        "speculative_algorithm",
        bool,
        "--speculative-algorithm, which keeps KV of a draft model that is not cached yet; drop it",
    ),
    ("pp_size", lambda v: v > 1, "--pp-size above 1 yet; use --tp-size"),
    ("dcp_size", lambda v: v > 1, "--dcp-size above 1 yet; leave it at 1"),
    ("attn_cp_size", lambda v: v > 1, "--attn-cp-size above 1 yet; leave it at 1"),
    (
        "disaggregation_mode",
        lambda v: v not in (None, "null"),
        "--disaggregation-mode yet; run prefill and decode in one server",
    ),
)

_DEVICES = ("cpu", "cuda")


def check_flags(view: Any) -> None:
    """Raises IncompatibleError if flags of SGLang cannot be combined with --enable-flexkv.

    Args:
        view: SGLang's resolved arguments.
    """
    for name, refused, remedy in _CONFLICTS:
        if refused(getattr(view, name)):
            raise IncompatibleError(f"--enable-flexkv does not work with {remedy}")
    if view.device not in _DEVICES:
        raise IncompatibleError(
            f"--device {view.device} is not supported: sglang-flexkv copies from and to {', '.join(_DEVICES)}"
        )


def check_machine(config: FlexKVConfig) -> None:
    """Raises ConfigError for what can be known before the model is loaded: memory and directories."""
    config.check_memory()
    for directory in config.ssd_cache_dir:
        check_directory(directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ConfigError(
                f"ssd_cache_dir: {directory} is not writable; fix its permissions or name another one"
            )
    if config.ssd_cache_dir:
        share = int(config.ssd_cache_gb * GIB) // len(config.ssd_cache_dir)
        check_free_space({directory: share for directory in config.ssd_cache_dir})


def check_components(tree_components: tuple[Any, ...]) -> None:
    """Raises IncompatibleError for models whose state is more than full-attention KV."""
    others = [str(component) for component in tree_components if component.name != "FULL"]
    if others:
        raise IncompatibleError(
            f"this model keeps {', '.join(others)} state beside full-attention KV (sliding windows or Mamba "
            "hybrids), which sglang-flexkv does not store yet; start without --enable-flexkv"
        )
