"""Entry point of SGLang's plugin group ``sglang.srt.plugins``. Runs in every process of a server."""

from __future__ import annotations

import logging
import sys

from sglang_flexkv.common.errors import FlexKVError

logger = logging.getLogger(__name__)

_done = False


def register() -> None:
    """Registers the patches, once per process: the entry point and the monkey-patch may both call.

    SGLang logs and swallows what a plugin raises, and with --enable-flexkv it would go on with another cache.
    So when something is wrong and the flag was given, this ends the process with the reason.
    """
    global _done
    if _done:
        return
    _done = True
    try:
        from sglang_flexkv.integration import patches

        patches.check_version()
        patches.check_core()
        patches.apply_all()
    # Whatever it is: an error that leaves this function makes SGLang go on without us.
    except Exception as error:
        if "--enable-flexkv" in sys.argv:
            sys.exit(f"sglang-flexkv cannot start: {_reason(error)}")
        _refuse_when_enabled(_reason(error))


def _reason(error: Exception) -> str:
    """Our own messages as they are; of an unforeseen error also its type."""
    return str(error) if isinstance(error, FlexKVError) else f"{type(error).__name__}: {error}"


def _refuse_when_enabled(reason: str) -> None:
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
