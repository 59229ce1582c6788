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

TYPE_CHECKING = False  # the real one is in `typing`, which every interpreter would have to load for it
if TYPE_CHECKING:
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


# The development environment sets this variable where there is no GPU, in a file that runs before this one
# and completes modules after their import.
if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    from sglang_cpu_env import AFTER_IMPORT

    AFTER_IMPORT.update(
        {_POOLS + "base": _pin_nothing, _POOLS + "mha": _give_kernels, _POOLS + "mla": _give_kernels}
    )
