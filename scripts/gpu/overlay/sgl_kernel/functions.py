"""The functions of `sgl_kernel` that a dense bf16 model reaches, with Triton and torch.

They follow the documented contracts of the real ones: the same arguments, outputs written in place, sums in
fp32. On CPU tensors the same is computed with torch alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = [
    "apply_token_bitmask_inplace_cuda",
    "concat_mla_absorb_q",
    "concat_mla_k",
    "fused_add_rmsnorm",
    "gelu_and_mul",
    "gelu_tanh_and_mul",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "merge_state_v2",
    "moe_align_block_size",
    "moe_sum_reduce",
    "rmsnorm",
    "silu_and_mul",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "topk_softmax",
    "weak_ref_tensor",
]

# For tests: run the Triton kernels on CPU tensors, in Triton's interpreter.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _on_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or _INTERPRETED


# Norms.


@triton.jit
def _rms_kernel(
    source,
    residual,
    weight,
    target,
    source_stride,
    residual_stride,
    target_stride,
    size,
    eps,
    ADD: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(source + row * source_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual + row * residual_stride + columns
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, x.to(residual.dtype.element_ty), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if ONE_PLUS:
        w += 1.0
    tl.store(target + row * target_stride + columns, (x * scale * w).to(target.dtype.element_ty), mask=inside)


def _rms(
    source: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    target: torch.Tensor,
    eps: float,
    one_plus: bool,
) -> None:
    if source.dim() != 2 or source.stride(-1) != 1 or target.stride(-1) != 1:
        raise ValueError(f"rmsnorm wants rows that lie together, not {source.shape} by {source.stride()}")
    rows, size = source.shape
    if rows == 0:
        return
    if not _on_triton(source):
        x = source.float()
        if residual is not None:
            x = x + residual.float()
            residual.copy_(x)
        w = weight.float() + 1.0 if one_plus else weight.float()
        target.copy_(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w)
        return
    block = triton.next_power_of_2(size)
    _rms_kernel[(rows,)](
        source,
        source if residual is None else residual,
        weight,
        target,
        source.stride(0),
        0 if residual is None else residual.stride(0),
        target.stride(0),
        size,
        eps,
        ADD=residual is not None,
        ONE_PLUS=one_plus,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    out = torch.empty_like(input) if out is None else out
    _rms(input, None, weight, out, eps, one_plus=False)
    return out


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    out = torch.empty_like(input) if out is None else out
    _rms(input, None, weight, out, eps, one_plus=True)
    return out


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """``residual += input``, then ``input = norm(residual)``."""
    _rms(input, residual, weight, input, eps, one_plus=False)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    _rms(input, residual, weight, input, eps, one_plus=True)


# Gated activations: the first half goes through the function, the second half multiplies.


def _gated(input: torch.Tensor, out: torch.Tensor | None, kind: str) -> torch.Tensor:
    gate, value = input.float().chunk(2, dim=-1)
    if kind == "silu":
        result = torch.nn.functional.silu(gate) * value
    else:
        result = torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * value
    return result.to(input.dtype) if out is None else out.copy_(result)


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _gated(input, out, "silu")


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _gated(input, out, "gelu")


def gelu_tanh_and_mul(input: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return _gated(input, out, "gelu_tanh")


# Attention.


def merge_state_v2(
    v_a: torch.Tensor,
    s_a: torch.Tensor,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    v_merged: torch.Tensor | None = None,
    s_merged: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from the results over each; ``s`` are log-sum-exps, [token, head]."""
    a, b = s_a.float(), s_b.float()
    # What attended to nothing has -inf (or, from some kernels, +inf) and weighs nothing.
    a = torch.where(a == float("inf"), float("-inf"), a)
    b = torch.where(b == float("inf"), float("-inf"), b)
    both = torch.logaddexp(a, b)
    weight_a = torch.where(both == float("-inf"), 0.0, torch.exp(a - both)).unsqueeze(-1)
    weight_b = torch.where(both == float("-inf"), 0.0, torch.exp(b - both)).unsqueeze(-1)
    merged = v_a.float() * weight_a + v_b.float() * weight_b
    v_merged = merged.to(v_a.dtype) if v_merged is None else v_merged.copy_(merged)
    s_merged = both if s_merged is None else s_merged.copy_(both)
    return v_merged, s_merged


def concat_mla_k(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> None:
    """``k[..., :nope] = k_nope``, and ``k_rope`` ([token, 1, rope]) behind it for every head."""
    nope = k_nope.shape[-1]
    k[..., :nope] = k_nope
    k[..., nope:] = k_rope


def concat_mla_absorb_q(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, b], dim=-1)


# Sampling.


def top_k_renorm_probs(probs: torch.Tensor, top_k: torch.Tensor | int) -> torch.Tensor:
    """Keeps the ``top_k`` largest of each row (and what equals the smallest of them); rows sum to 1."""
    probs = probs.float()
    ordered = probs.sort(dim=-1, descending=True).values
    if not isinstance(top_k, torch.Tensor):
        top_k = torch.full((len(probs),), int(top_k), device=probs.device)
    last = (top_k.long().clamp(1, probs.shape[-1]) - 1).unsqueeze(-1)
    kept = torch.where(probs >= ordered.gather(-1, last), probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm_probs(probs: torch.Tensor, top_p: torch.Tensor | float) -> torch.Tensor:
    """Keeps the smallest set of the largest of each row that reaches ``top_p``; rows sum to 1."""
    probs = probs.float()
    ordered, order = probs.sort(dim=-1, descending=True)
    limit = top_p.float().unsqueeze(-1) if isinstance(top_p, torch.Tensor) else top_p
    keep = (ordered.cumsum(-1) - ordered) < limit
    keep[..., 0] = True
    kept = torch.zeros_like(probs).scatter_(-1, order, torch.where(keep, ordered, 0.0))
    return kept / kept.sum(-1, keepdim=True)


top_k_renorm_prob = top_k_renorm_probs
top_p_renorm_prob = top_p_renorm_probs


def apply_token_bitmask_inplace_cuda(
    logits: torch.Tensor, bitmask: torch.Tensor, indices: Sequence[int] | torch.Tensor | None = None
) -> None:
    """Tokens whose bit is 0 get -inf. ``bitmask``: [row, 32-bit words]; ``indices``: only these rows."""
    vocabulary = logits.shape[-1]
    bits = torch.arange(32, device=bitmask.device, dtype=torch.int32)
    allowed = ((bitmask.unsqueeze(-1) >> bits) & 1).flatten(-2)[..., :vocabulary].bool()
    if indices is None:
        logits.masked_fill_(~allowed.to(logits.device), float("-inf"))
        return
    rows = torch.as_tensor(indices, device=logits.device, dtype=torch.long)
    masked = logits[rows].masked_fill(~allowed.to(logits.device)[rows], float("-inf"))
    logits.index_copy_(0, rows, masked)


# Experts.


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool = False,
    moe_softcapping: float = 0.0,
    correction_bias: torch.Tensor | None = None,
) -> None:
    logits = gating_output.float()
    if moe_softcapping:
        logits = torch.tanh(logits / moe_softcapping) * moe_softcapping
    weights = torch.softmax(logits, dim=-1)
    chosen = weights if correction_bias is None else weights + correction_bias.float()
    ids = chosen.topk(topk_ids.shape[-1], dim=-1).indices
    picked = weights.gather(-1, ids)
    if renormalize:
        picked = picked / picked.sum(-1, keepdim=True)
    topk_weights.copy_(picked)
    topk_ids.copy_(ids)


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor,
    pad_sorted_token_ids: bool = False,
) -> None:
    """Places of the products' rows: those of each expert side by side, each expert's a multiple of a block.

    ``num_experts`` is one more than there are: the first is none (-1), which has rows that nobody computes.
    """
    experts = topk_ids.flatten().long() + 1
    counts = torch.bincount(experts, minlength=num_experts)
    ends = ((counts + block_size - 1) // block_size * block_size).cumsum(0)
    order = experts.argsort(stable=True)
    sorted_experts = experts[order]
    of_expert = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sorted_experts]
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    sorted_token_ids.fill_(len(order))  # no row
    sorted_token_ids[begins[sorted_experts] + of_expert] = order.to(sorted_token_ids.dtype)
    blocks = torch.arange(len(expert_ids), device=order.device) * block_size
    expert_ids.copy_((torch.searchsorted(ends, blocks, right=True) - 1).clamp(max=num_experts - 2))
    num_tokens_post_pad.fill_(ends[-1])


def moe_sum_reduce(
    input_tensor: torch.Tensor, output_tensor: torch.Tensor, routed_scaling_factor: float = 0
) -> None:
    """Sum over the experts of a token, [token, expert, hidden]."""
    output_tensor.copy_(input_tensor.float().sum(dim=1) * routed_scaling_factor)


# CUDA graphs.


def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The real one lets the graph pool reuse the memory of what a graph returns. This one keeps it: more
    memory, the same values."""
    return tensor
