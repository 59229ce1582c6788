"""Entry point of SGLang's plugin group ``sglang.srt.plugins``. Runs in every process of a server."""

from __future__ import annotations

import sys

from sglang_flexkv.common.errors import FlexKVError


def register() -> None:
    """Registers the patches.

    SGLang logs and swallows what a plugin raises, and with --enable-flexkv it would go on with another cache.
    So when something is wrong and the flag was given, this ends the process with the reason.
    """
    try:
        from sglang_flexkv.integration import patches

        patches.check_version()
        patches.apply_all()
    except (FlexKVError, ImportError, OSError) as error:
        if "--enable-flexkv" in sys.argv:
            sys.exit(f"sglang-flexkv cannot start: {error}")
        _refuse_when_enabled(error)


def _refuse_when_enabled(reason: Exception) -> None:
    """The flag can also come from Python or a config file, later: make it fail there."""
    from sglang.srt.mem_cache import registry

    stock = registry.default_radix_cache_factory

    def refuse(ctx: object) -> object:
        from sglang.srt.runtime_context import get_memory

        if get_memory().enable_flexkv:
            raise FlexKVError(f"sglang-flexkv cannot start: {reason}")
        return stock(ctx)

    registry.default_radix_cache_factory = refuse
