"""What SGLang needs on a machine with a GPU, another torch than the one it pins, and no network.

Python imports this module at the start of every interpreter that has this folder in PYTHONPATH, so it also
reaches the processes SGLang spawns. It sets defaults for environment variables (a value that is set wins),
makes SGLang take its run-time compiled modules from `prebuilt_jit/` where they are there, gives
`--load-format dummy` weights whose answers depend on the whole context, and does without CUTLASS's Python
packages.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

ENVIRONMENT_DEFAULTS = {
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",  # sgl_kernel is a stand-in
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "FLASHINFER_DISABLE_VERSION_CHECK": "1",
    "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    "TOKENIZERS_PARALLELISM": "false",
    # The core in Rust is bound to the torch that SGLang pins: with another one it panics at the first insert.
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}

_LOADER = "sglang.kernels.jit.utils.compile.loader"
_WEIGHTS = "sglang.srt.model_loader.weight_utils"
_CHOICE = "flashinfer.utils"
_DUAL_GEMM = "sglang.srt.layers.dual_gemm"
_CONVOLUTION = "sglang.srt.layers.attention.mamba.causal_conv1d"
_CHANGED = (_LOADER, _WEIGHTS, _CHOICE, _DUAL_GEMM, _CONVOLUTION)


class Finder:
    """Meta-path finder that acts on a few modules: it changes a function of each after it has run."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _CHANGED:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module):
            run_module(module)
            if name == _LOADER:
                module.load_jit = _with_prebuilt(module.load_jit)
            elif name == _WEIGHTS:
                module.initialize_dummy_weights = sharp_weights
            elif name == _DUAL_GEMM:
                # A kernel for small batches in CUTLASS's Python, which does not travel: two plain products.
                module.DualGemm._select_mode = lambda *args: None
            elif name == _CONVOLUTION:
                module._HAS_CONV1D_KERNEL = False  # the stand-in has none: SGLang's own in Triton
            elif os.environ.get("FLEXKV_KIT_FA2") == "1":
                # Where the fa3 kernels are not to be had: FlashInfer's second generation, which is as real.
                module.determine_attention_backend = lambda *args, **kwargs: "fa2"

        spec.loader.exec_module = exec_module
        return spec


def sharp_weights(model, *args, **kwargs):
    """Random weights, the same in every process, with which an answer shows what KV it was computed from.

    Stock dummy weights are so small that every prompt has nearly the same answer. Here norms are ones, every
    matrix keeps the variance of its input, attention is sharp, and rows of the output head differ in length,
    so that the best token wins by a margin. A tensor depends on its name and shape alone.
    """
    import hashlib
    import math

    import torch

    gains = {"q_proj": 1.5, "k_proj": 1.5, "qkv_proj": 1.5, "kv_a_proj": 1.5, "o_proj": 2.0, "down_proj": 1.7}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not torch.is_floating_point(tensor) or "cos_sin" in name:
                continue
            if tensor.dim() < 2:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
            generator = torch.Generator(device=tensor.device).manual_seed(seed)
            if "embed_tokens" in name:
                tensor.normal_(0.0, 1.0, generator=generator)
                continue
            if "lm_head" in name:
                tensor.normal_(0.0, 3.0 / math.sqrt(tensor.shape[-1]), generator=generator)
                lengths = torch.empty((tensor.shape[0], 1), device=tensor.device, dtype=torch.float32)
                tensor.mul_(lengths.normal_(0.0, 0.3, generator=generator).exp().to(tensor.dtype))
                tensor[:3].zero_()  # special tokens: an answer does not end early
                continue
            gain = next((value for part, value in gains.items() if part in name), 1.0)
            tensor.normal_(0.0, gain / math.sqrt(tensor.shape[-1]), generator=generator)


def _with_prebuilt(load_jit):
    import functools

    @functools.wraps(load_jit)
    def load(*args, **kwargs):
        name = "sgl_kernel_jit_" + "_".join(str(arg) for arg in args)
        library = HERE / "prebuilt_jit" / f"{name}.so"
        found = library.exists() and os.environ.get("FLEXKV_KIT_PREBUILT", "1") == "1"
        # One line per module: afterwards the log says which were compiled on this machine.
        print(f"flexkv kit: {'prebuilt' if found else 'compiling'} {name}", file=sys.stderr, flush=True)
        if found:
            try:
                from tvm_ffi import load_module

                return load_module(str(library))
            except Exception as error:
                print(f"flexkv kit: compiling {name} after all: {error}", file=sys.stderr, flush=True)
        return load_jit(*args, **kwargs)

    return load


for _name, _value in ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
if not any(finder is Finder for finder in sys.meta_path):
    sys.meta_path.insert(0, Finder)
