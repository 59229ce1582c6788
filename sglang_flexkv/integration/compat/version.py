"""Which SGLang is installed, and which ones this package was written for."""

from __future__ import annotations

import importlib.util
from importlib import metadata

from sglang_flexkv.common.errors import IncompatibleError

# Versions whose hook targets were read and run. The linker's interface changes between minor releases, so a
# newer one is refused until it was tried.
SUPPORTED_SGLANG = ("0.5.22", "0.5.23")


def installed_sglang() -> str | None:
    """Version of the SGLang that would be imported, None if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        pass
    if importlib.util.find_spec("sglang") is None:
        return None
    from sglang.version import __version__  # a source checkout on the path has no metadata

    return str(__version__)


def is_0_5_22() -> bool:
    """Whether what 0.5.23 added has to be made up for."""
    return (installed_sglang() or "").split("+")[0] == "0.5.22"


def check_version() -> None:
    """Raises IncompatibleError unless the installed SGLang is one this package was written for."""
    version = installed_sglang()
    if version is None:
        raise IncompatibleError(
            f"SGLang is not installed in this environment: pip install sglang=={SUPPORTED_SGLANG[-1]}"
        )
    if version.split("+")[0] not in SUPPORTED_SGLANG:
        raise IncompatibleError(
            f"sglang-flexkv supports SGLang {', '.join(SUPPORTED_SGLANG)}, not {version}: "
            f"pip install sglang=={SUPPORTED_SGLANG[-1]}, or run a newer one without --enable-flexkv and "
            "with the dynamic linker (docs/models.md)"
        )


def plugins_named() -> str:
    """``SGLANG_PLUGINS``: the plugins that may run, by commas; empty: all of them, or there is no SGLang."""
    try:
        from sglang.srt.environ import envs
    except ImportError:
        return ""
    return str(envs.SGLANG_PLUGINS.get() or "")
