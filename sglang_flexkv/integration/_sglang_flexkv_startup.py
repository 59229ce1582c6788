"""Runs sglang-flexkv's plugin where SGLang does not find its entry point.

`sglang-flexkv install` copies this file into site-packages, where a .pth file imports it at the start of
every interpreter; `sglang-flexkv uninstall` removes both. It needs nothing but `sys` until SGLang's plugin
loader is imported, and it depends on sglang_flexkv only then: a package that is gone breaks nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # the real one is in `typing`, which is too slow to import at every start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_PLUGIN_LOADER = "sglang.srt.plugins"


class StartupFinder:
    """Meta-path finder that acts on exactly one module name."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _PLUGIN_LOADER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is StartupFinder else finder.find_spec(name, path, target)
            if spec is not None:
                _run_afterwards(spec)
                return spec
        return None


def _run_afterwards(spec: ModuleSpec) -> None:
    """Has the module patched right after it ran, before anybody can take `load_plugins` from it."""
    loader = spec.loader
    if loader is None:
        return
    run_module = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run_module(module)
        # Some loaders serve more than one module.
        if module.__name__ == _PLUGIN_LOADER:
            _wrap(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]


def _wrap(plugins: ModuleType) -> None:
    from functools import wraps

    stock = plugins.load_plugins

    # Ours goes first, since the stock function applies what was registered when it ends.
    @wraps(stock)
    def load_plugins(*args: object, **kwargs: object) -> object:
        _register()
        return stock(*args, **kwargs)

    plugins.load_plugins = load_plugins  # type: ignore[attr-defined]


def _register() -> None:
    try:
        from sglang_flexkv.integration.plugin import register
    except Exception as error:  # whatever is wrong with it, a server without the flag must run
        reason = (
            f"sglang-flexkv cannot start: its monkey-patch {__file__} is installed, but the package cannot "
            f"be imported ({type(error).__name__}: {error}). Make it importable again, or delete that file "
            "and sglang_flexkv_startup.pth beside it"
        )
        if "--enable-flexkv" in sys.argv:
            sys.exit(reason)
        print(reason, file=sys.stderr)
        return
    register()  # does its work once, whether the entry point calls it too or not


if StartupFinder not in sys.meta_path:
    sys.meta_path.insert(0, StartupFinder)
