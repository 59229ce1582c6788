"""Stand-in for SGLang's compiled kernels where the wheel `sglang-kernel` cannot be loaded.

The wheel is bound to the torch release SGLang pins. On a machine with another torch, this package has the few
functions that a dense bf16 model (MHA, GQA or MLA) reaches on a CUDA device (`functions.py`), written with
Triton and torch; the rest of what SGLang runs are its own run-time compiled kernels and FlashInfer's, which
are the real ones. Every other name exists, because SGLang imports many, and raises when it is called: a
computation that would need a missing kernel stops with a clear message and never returns a made-up value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sgl_kernel import functions

__version__ = "0.4.10"

# Those that SGLang imports from and that are no file here. They have what the package has.
_SUBMODULES = {
    "allreduce",
    "attention",
    "cutlass_moe",
    "elementwise",
    "expert_specialization",
    "flash_attn",
    "flash_mla",
    "gemm",
    "grammar",
    "kvcacheio",
    "mamba",
    "memory",
    "moe",
    "quantization",
    "sampling",
    "spatial",
    "speculative",
    "top_k",
}


def _lookup(module: ModuleType, name: str) -> Any:
    # Special names are Python's own probes: pretending to have them misleads importers.
    if name.startswith("__"):
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    found = getattr(functions, name, None) if name in functions.__all__ else None
    setattr(module, name, found or _missing(f"{module.__name__}.{name}"))
    return getattr(module, name)


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{name} was called, but this environment has a stand-in for sgl_kernel that does not implement "
            "it: the model or the flags in use need the real package"
        )

    kernel.__name__ = kernel.__qualname__ = name.rpartition(".")[2]
    return kernel


class _Submodules:
    """Meta-path finder and loader of the submodules that are no file."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, submodule = name.partition(".")
        if package != __name__ or submodule not in _SUBMODULES:
            return None
        return ModuleSpec(name, cls)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__getattr__ = lambda name: _lookup(module, name)  # type: ignore[method-assign]


sys.meta_path.append(_Submodules)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    return _lookup(sys.modules[__name__], name)
