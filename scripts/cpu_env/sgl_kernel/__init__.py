"""Stand-in for SGLang's compiled kernels on a machine without an accelerator.

SGLang imports names of `sgl_kernel` at module level even where it then takes a
plain torch path. Every name exists here, and nearly everything raises when it is
called: a computation that would really need a kernel stops with a clear message
and never returns a made-up value. The exceptions are written out (`speculative.py`).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_MESSAGE = (
    "sgl_kernel.{name} was called, but this environment has only a stand-in for sgl_kernel "
    "(no NVIDIA GPU was found when scripts/setup.sh ran). The feature in use needs the real "
    "kernels: run scripts/setup.sh on a machine with a GPU."
)

# Not imported before somebody asks for one: PyTorch is slow to import.
_WRITTEN_OUT = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


def _missing_kernel(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(_MESSAGE.format(name=name))

    kernel.__name__ = kernel.__qualname__ = name
    kernel.__doc__ = f"Not available: raises RuntimeError (stand-in for sgl_kernel.{name})."
    return kernel


def __getattr__(name: str) -> Callable[..., NoReturn]:
    # Special names are Python's own probes (`__path__`, `__version__`, …): pretending
    # to have them would mislead importers and version checks.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _WRITTEN_OUT:
        from importlib import import_module

        kernel = getattr(import_module(".speculative", __name__), name)
    else:
        kernel = _missing_kernel(name)
    globals()[name] = kernel
    return kernel
