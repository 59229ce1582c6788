"""What is left when nothing could be patched, in whatever version of SGLang this is."""

from __future__ import annotations

import logging

from sglang_flexkv.common.errors import FlexKVError

logger = logging.getLogger(__name__)


def refuse_when_enabled(reason: str) -> None:
    """The flag can also come from Python or a config file, later: make it fail there."""
    try:
        from sglang.srt.mem_cache import registry
    except ImportError:
        # An SGLang so different that nothing of what we know is there.
        logger.warning("sglang-flexkv is not in effect: %s", reason)
        return

    stock = registry.default_radix_cache_factory

    def refuse(ctx: object) -> object:
        # Of the context nothing but this is relied on: SGLang may be any version here, and a server
        # without the flag must not notice us.
        if getattr(getattr(ctx, "server_args", None), "enable_flexkv", False):
            raise FlexKVError(f"sglang-flexkv cannot start: {reason}")
        return stock(ctx)

    registry.default_radix_cache_factory = refuse
