"""What has to be so before a server starts, checked as early as it can be known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sglang_flexkv.common.config import GIB, FlexKVConfig, SsdMismatch
from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.storage.ssd_files import (
    check_directories,
    check_free_space,
    check_usable,
    in_use,
    shards_in,
)

_PARENT = Path(__file__).parents[2]  # of this package
# A server that was killed keeps its files until its memory has been given back.
_ENDING_S = 10.0


def check_core() -> None:
    """Raises IncompatibleError if the compiled part of this package cannot be loaded."""
    try:
        from sglang_flexkv import _core  # noqa: F401
    except ImportError as error:
        remedy = "build it for this interpreter with pip install --force-reinstall --no-deps sglang-flexkv"
        if (_PARENT / "CMakeLists.txt").is_file():
            # python -m looks where it is started, before it looks for what is installed.
            remedy = f"start it elsewhere than in {_PARENT}, where Python finds our sources first"
        raise IncompatibleError(
            f"the compiled core of sglang-flexkv cannot be loaded ({error}): {remedy}"
        ) from None


def check_machine(config: FlexKVConfig) -> None:
    """Raises ConfigError for what can be known before the model is loaded: memory and paths."""
    config.check_memory()
    check_directories(config.ssd_cache_dir)
    for directory in config.ssd_cache_dir:
        check_usable(directory)
    if config.ssd_cache_dir:
        share = int(config.ssd_cache_gb * GIB) // len(config.ssd_cache_dir)
        check_free_space({directory: share for directory in config.ssd_cache_dir})


def check_ssd(config: FlexKVConfig, view: Any, model: Any) -> None:
    """Raises ConfigError if files in the SSD directories belong to a running server or hold the cache of
    another model or setting. ``check_machine`` has looked at the directories themselves.

    What the device pool adds to the setting is not known yet, and files can come and go, so it is looked at
    again when they are opened.

    Args:
        view: SGLang's resolved arguments.
        model: SGLang's ModelConfig.
    """
    from sglang_flexkv import _core
    from sglang_flexkv.integration.model_identity import model_identity
    from sglang_flexkv.storage import ssd_identity, ssd_tools
    from sglang_flexkv.storage.ssd_store import mismatch

    # SGLang makes replicas, or divides the ranks of one server (DP attention): one of the two numbers is 1.
    num_dp = max(1, view.dp_size * view.attn_dp_size)
    ranks = {f"dp{dp}-tp{tp}" for dp in range(num_dp) for tp in range(view.tp_size)}
    shards = [files for d in config.ssd_cache_dir for files in shards_in(d) if files.rank_tag in ranks]
    for files in shards:
        owner = ssd_tools.owner(files, patience_s=_ENDING_S)
        if owner is not None:
            raise in_use(files.directory, owner)
    if not shards or config.ssd_on_mismatch is SsdMismatch.FRESH:
        return

    def read(name: str) -> Any:
        return getattr(view, name)

    # This process loads nothing, so it does not matter whether files have changed since it started.
    wanted = model_identity(read, model.model_path, model.revision, started_s=math.inf)
    if wanted.nonce:
        return  # the files may be downloaded yet
    for files in shards:
        try:
            found = ssd_identity.conflict(files, wanted, before_pool=True)
        except _core.CoreMismatchError as error:
            raise mismatch(str(error)) from None
        except _core.CoreSystemError:
            continue  # said better where they are opened
        if found is not None and not found.worth_nothing:
            raise mismatch(str(found))
