"""HiCache of SGLang 0.5.23 on a machine without a GPU. In force where this directory is on PYTHONPATH.

What HiCache asks of CUDA, and what it gets here:

* Streams and events: nothing. SGLang takes ``torch.cpu`` for the device's module, whose streams and events do
  nothing; a copy has ended when its call returns, so what they would order is in order.
* Registered and pinned host memory: ordinary memory, touched when it is allocated, as pinning does.
* The copy kernels of ``sgl_kernel.kvcacheio``: the same calls in torch (``hicache_cpu_kernels.py``).

HiCache's own code, its tree, controller, policies and threads, is as it is, and so is a server without
HiCache, which uses none of this. Part of a comparison, not of the package that is shipped.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # the real one is in `typing`, which every interpreter would have to load for it
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_POOLS = "sglang.srt.mem_cache.pool_host."


def _give_kernels(pool: ModuleType) -> None:
    """SGLang imports the kernels only where it finds CUDA: here the names are missing."""
    import hicache_cpu_kernels

    for name in hicache_cpu_kernels.__all__:
        if not hasattr(pool, name):
            setattr(pool, name, getattr(hicache_cpu_kernels, name))


def _pin_nothing(base: ModuleType) -> None:
    original = base.HostKVCache.__init__

    def without_pinning(self: Any, *args: Any, **kwargs: Any) -> None:
        # Of the whole pool, not of its buffer alone: the pages that a storage backend reads into ask for
        # pinned memory too, torch refuses that here, and every read from disk would fail without a word.
        kwargs["pin_memory"] = False
        original(self, *args, **kwargs)
        self.kv_buffer.zero_()  # or the first copies would pay for touching it

    base.HostKVCache.__init__ = without_pinning


_AFTER_IMPORT = {_POOLS + "base": _pin_nothing, _POOLS + "mha": _give_kernels, _POOLS + "mla": _give_kernels}


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        complete = _AFTER_IMPORT.get(name)
        if complete is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            complete(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# The development environment sets this variable where there is no GPU, in a file that runs before this one.
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
