"""Do the kernels that SGLang will use load on this machine, and do they compute what they should?

    python kernels.py --json FILE

FlashInfer's, SGLang's run-time compiled ones and the stand-ins, each against a plain computation. The seconds
of each say whether it was carried along or compiled here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative; NaN counts as wrong."""
    got, want = got.double(), want.double()
    error = float((got - want).norm() / want.norm())
    return error if math.isfinite(error) else float("inf")


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """[token, head, size]; the queries are the last tokens."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) / q.shape[-1] ** 0.5
    if causal:
        rows = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
        scores = scores.masked_fill(torch.arange(len(k), device=q.device) > rows, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flashinfer_prefill(backend: str) -> float:
    import flashinfer

    held, new, page = 512, 96, 16
    pages = torch.randperm(held // page, device=DEVICE, dtype=torch.int32)
    pool = [torch.randn(held // page, page, 8, 128, dtype=BF16, device=DEVICE) for _ in "kv"]
    q = torch.randn(new, 32, 128, dtype=BF16, device=DEVICE)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
    ints = {"dtype": torch.int32, "device": DEVICE}
    wrapper.plan(
        torch.tensor([0, new], **ints),
        torch.tensor([0, len(pages)], **ints),
        pages,
        torch.tensor([page], **ints),
        32,
        8,
        128,
        page,
        causal=True,
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    k, v = (x[pages.long()].reshape(held, 8, 128) for x in pool)
    return error_of(wrapper.run(q, tuple(pool)), attention_reference(q, k, v, True))


def flashinfer_decode() -> float:
    import flashinfer

    held, page = 512, 1
    slots = torch.randperm(held, device=DEVICE, dtype=torch.int32)
    pool = [torch.randn(held, page, 8, 128, dtype=BF16, device=DEVICE) for _ in "kv"]
    q = torch.randn(1, 32, 128, dtype=BF16, device=DEVICE)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True, backend="fa2"
    )
    ints = {"dtype": torch.int32, "device": DEVICE}
    wrapper.plan(
        torch.tensor([0, held], **ints),
        slots,
        torch.tensor([1], **ints),
        32,
        8,
        128,
        page,
        q_data_type=BF16,
        data_type=BF16,
    )
    k, v = (x[slots.long()].reshape(held, 8, 128) for x in pool)
    return error_of(wrapper.run(q, tuple(pool)), attention_reference(q, k, v, False))


def flashinfer_merge() -> float:
    from flashinfer.cascade import merge_state

    q = torch.randn(7, 8, 128, dtype=BF16, device=DEVICE)
    k, v = (torch.randn(64, 8, 128, dtype=BF16, device=DEVICE) for _ in "kv")

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("qhd,khd->hqk", q.double(), k[keys].double()) / 128**0.5
        lse = scores.logsumexp(-1).T / math.log(2)  # to base 2, as FlashInfer counts
        return attention_reference(q, k[keys], v[keys], False).to(BF16), lse.float().contiguous()

    (a, s_a), (b, s_b) = part(slice(0, 40)), part(slice(40, 64))
    merged, _ = merge_state(a, s_a, b, s_b)
    return error_of(merged, attention_reference(q, k, v, False))


def stand_in_norm() -> float:
    import sgl_kernel

    x, residual = (torch.randn(33, 4096, dtype=BF16, device=DEVICE) for _ in "xr")
    w = torch.randn(4096, dtype=BF16, device=DEVICE)
    total = x.double() + residual.double()
    want = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    sgl_kernel.fused_add_rmsnorm(x, residual, w, 1e-5)
    return max(error_of(x, want), error_of(residual, total))


def sglang_rope() -> float:
    from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace

    q, k = (torch.randn(9, heads, 128, dtype=BF16, device=DEVICE) for heads in (32, 8))
    positions = torch.arange(9, device=DEVICE)
    angles = torch.outer(torch.arange(64.0, device=DEVICE), 1e4 ** -torch.linspace(0, 1, 64, device=DEVICE))
    table = torch.cat([angles.cos(), angles.sin()], -1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.double().chunk(2, -1)
        cos, sin = (t[:9, None].double() for t in table.chunk(2, -1))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    want = turned(q), turned(k)
    apply_rope_with_cos_sin_cache_inplace(q, k, table, positions, is_neox=True)
    return max(error_of(q, want[0]), error_of(k, want[1]))


def sglang_activation() -> float:
    from sglang.kernels.ops.activation.activation import silu_and_mul

    x = torch.randn(9, 2 * 14336, dtype=BF16, device=DEVICE)
    a, b = x.double().chunk(2, -1)
    out = torch.full((9, 14336), float("nan"), dtype=BF16, device=DEVICE)
    silu_and_mul(x, out)
    return error_of(out, torch.nn.functional.silu(a) * b)


def sglang_store() -> float:
    from sglang.kernels.ops.kvcache.kvcache import store_cache

    k, v = (torch.randn(9, 1024, dtype=BF16, device=DEVICE) for _ in "kv")
    pools = [torch.zeros(64, 1024, dtype=BF16, device=DEVICE) for _ in "kv"]
    at = torch.randperm(63, device=DEVICE)[:9] + 1
    store_cache(k, v, *pools, at)
    return max(error_of(pools[0][at], k), error_of(pools[1][at], v))


def flashinfer_mla() -> float:
    import flashinfer

    held = 256
    pool = torch.randn(held, 1, 576, dtype=BF16, device=DEVICE) * 0.3
    q = torch.randn(1, 16, 576, dtype=BF16, device=DEVICE) * 0.3
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    ints = {"dtype": torch.int32, "device": DEVICE}
    scale = 1 / 192**0.5
    wrapper.plan(
        torch.tensor([0, 1], **ints),
        torch.tensor([0, held], **ints),
        torch.arange(held, **ints),
        torch.tensor([held], **ints),
        16,
        512,
        64,
        1,
        False,
        scale,
        BF16,
        BF16,
    )
    out = wrapper.run(q[..., :512].contiguous(), q[..., 512:].contiguous(), pool[..., :512], pool[..., 512:])
    weights = (torch.einsum("qhd,kxd->qhk", q.double(), pool.double()) * scale).softmax(-1)
    return error_of(out, torch.einsum("qhk,kxd->qhd", weights, pool[..., :512].double()))


KERNELS: dict[str, tuple[Callable[[], float], float]] = {
    "FlashInfer paged prefill, fa2": (lambda: flashinfer_prefill("fa2"), 1e-2),
    "FlashInfer paged prefill, fa3": (lambda: flashinfer_prefill("fa3"), 1e-2),
    "FlashInfer decode": (flashinfer_decode, 1e-2),
    "FlashInfer merge": (flashinfer_merge, 1e-2),
    "stand-in: add and norm": (stand_in_norm, 1e-2),
    "SGLang rope": (sglang_rope, 1e-2),
    "SGLang activation": (sglang_activation, 1e-2),
    "SGLang store": (sglang_store, 0.0),
    "FlashInfer MLA": (flashinfer_mla, 1e-2),
}


def check(out: Path) -> bool:
    results: dict[str, Any] = {}
    for name, (run, limit) in KERNELS.items():
        begin_s = time.monotonic()
        try:
            error = run()
            results[name] = {"error": error, "good": error <= limit}
        except Exception as problem:
            traceback.print_exc()
            results[name] = {"problem": f"{type(problem).__name__}: {problem}"[:800], "good": False}
        results[name]["seconds"] = round(time.monotonic() - begin_s, 2)
        print(name, results[name], flush=True)
        out.write_text(json.dumps(results, indent=1))
    return all(entry["good"] for entry in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    return 0 if check(parser.parse_args().json) else 1


if __name__ == "__main__":
    sys.exit(main())
