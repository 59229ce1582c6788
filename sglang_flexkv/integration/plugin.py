"""Entry point of SGLang's plugin group ``sglang.srt.plugins``. Runs in every process of a server."""

from __future__ import annotations

import sys

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.integration.compat.fallback import refuse_when_enabled

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
        from sglang_flexkv.integration import checks
        from sglang_flexkv.integration.compat import hooking, version
        from sglang_flexkv.integration.compat.patches import PATCHES

        version.check_version()
        checks.check_core()
        hooking.apply(PATCHES)
    # Whatever it is: an error that leaves this function makes SGLang go on without us.
    except Exception as error:
        if "--enable-flexkv" in sys.argv:
            sys.exit(f"sglang-flexkv cannot start: {_reason(error)}")
        refuse_when_enabled(_reason(error))


def _reason(error: Exception) -> str:
    """Our own messages as they are; of an unforeseen error also its type."""
    return str(error) if isinstance(error, FlexKVError) else f"{type(error).__name__}: {error}"
