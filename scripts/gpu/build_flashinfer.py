"""Compiles the FlashInfer modules that the checks on the GPU need, on a machine without a GPU.

    FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=DIR python build_flashinfer.py OUT [NAME ...]

Every module becomes OUT/<module>/<module>.so, the layout of FlashInfer's own ahead-of-time folder
(flashinfer/data/aot). NAMEs pick some of them; see SPECS.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer.prefill
import torch
from flashinfer.jit import (
    gen_batch_decode_module,
    gen_batch_mla_module,
    gen_batch_prefill_module,
)
from flashinfer.jit.cascade import gen_cascade_module

BF16, I32 = torch.bfloat16, torch.int32


def prefill(backend: str, qk: int, vo: int) -> Any:
    """SGLang's and the benchmarks' calls: bf16, 32-bit indices, no position encoding, window or cap."""
    make = gen_batch_prefill_module
    if backend == "fa2":
        make = flashinfer.prefill._gen_batch_prefill_primary_module
    return make(backend, BF16, BF16, BF16, I32, qk, vo, 0, False, False, False)


# In the order of what a check without them would lose. On Hopper FlashInfer takes its third generation of
# kernels (fa3) where it chooses; SGLang asks for the second one (fa2) for a paged cache, and for decoding.
# Models with a latent are run so that they prefill from it (see real_sglang.py): heads of 192 take two cores
# 39 minutes.
SPECS: dict[str, Callable[[], Any]] = {
    "prefill-fa2-128": lambda: prefill("fa2", 128, 128),
    "cascade": gen_cascade_module,
    "prefill-fa3-128": lambda: prefill("fa3", 128, 128),
    "mla-fa3": lambda: gen_batch_mla_module("fa3", BF16, BF16, BF16, I32, 512, 64, False),
    "decode-128": lambda: gen_batch_decode_module(BF16, BF16, BF16, I32, 128, 128, 0, False, False),
    "mla-fa2": lambda: gen_batch_mla_module("fa2", BF16, BF16, BF16, I32, 512, 64, False),
}


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(SPECS)
    failed = []
    for name in names:
        begin = time.monotonic()
        try:
            spec = SPECS[name]()
            target = out / spec.name / f"{spec.name}.so"
            if not target.exists():
                spec.build(verbose=False)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(spec.jit_library_path, target)
                subprocess.run(["strip", "--strip-unneeded", str(target)], check=False)
            size = target.stat().st_size / 1e6
            print(f"{name}: {spec.name}: {size:.2f} MB, {time.monotonic() - begin:.0f} s", flush=True)
        except Exception as error:  # the others are worth having
            failed.append(name)
            print(f"{name}: FAILED after {time.monotonic() - begin:.0f} s: {error}"[:3000], flush=True)
    if failed:
        raise SystemExit(f"not built: {', '.join(failed)}")


if __name__ == "__main__":
    main()
