"""The kit's stand-in for SGLang's compiled kernels against plain references, on a CPU: the Triton kernels in
Triton's interpreter, and their torch twins."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

OVERLAY = Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "overlay"
# The interpreter cuts bf16 off where a GPU rounds it.
LIMIT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(scope="module")
def sgl_kernel() -> ModuleType:
    """The functions alone: this environment has a package of the same name."""
    spec = importlib.util.spec_from_file_location("kit_functions", OVERLAY / "sgl_kernel" / "functions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where Triton looks for the source
    spec.loader.exec_module(module)
    return module


def reference_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    x, w = x.double(), w.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w


def near(got: torch.Tensor, want: torch.Tensor, limit: float) -> bool:
    got, want = got.double(), want.double()
    return bool((got - want).norm() <= limit * want.norm()) and not bool(got.isnan().any())


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize(("rows", "size"), [(1, 128), (5, 4096), (3, 2048), (7, 512), (2, 200)])
@pytest.mark.parametrize("one_plus", [False, True])
def test_norms(sgl_kernel: ModuleType, dtype: torch.dtype, rows: int, size: int, one_plus: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    wide = torch.randn(rows, size + 16, generator=generator).to(dtype)
    x, residual = wide[:, :size], torch.randn(rows, size, generator=generator).to(dtype)
    w = torch.randn(size, generator=generator).to(dtype)
    norm = sgl_kernel.gemma_rmsnorm if one_plus else sgl_kernel.rmsnorm
    add = sgl_kernel.gemma_fused_add_rmsnorm if one_plus else sgl_kernel.fused_add_rmsnorm
    effective = w.double() + 1 if one_plus else w
    out = torch.full((rows, size), float("nan"), dtype=dtype)
    assert norm(x, w, 1e-5, out) is out
    assert near(out, reference_norm(x, effective, 1e-5), LIMIT[dtype])
    assert near(norm(x, w, 1e-5), out, 0.0)
    target, total = x.clone(), residual.clone()
    add(target, total, w, 1e-5)
    summed = x.float() + residual.float()
    assert near(total, summed, LIMIT[dtype])
    assert near(target, reference_norm(summed, effective, 1e-5), LIMIT[dtype])


def test_norms_by_triton() -> None:
    """In an interpreter of its own: Triton asks how it is to run when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_norms and not triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "30 passed" in done.stdout


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_gated_activations(sgl_kernel: ModuleType, name: str) -> None:
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    a, b = x.double().chunk(2, -1)
    gelu = torch.nn.functional.gelu
    want = {
        "silu_and_mul": lambda: a / (1 + (-a).exp()) * b,
        "gelu_and_mul": lambda: gelu(a) * b,
        "gelu_tanh_and_mul": lambda: gelu(a, approximate="tanh") * b,
    }[name]()
    out = torch.full((5, 32), float("nan"), dtype=torch.bfloat16)
    getattr(sgl_kernel, name)(x, out)
    assert near(out, want, 6e-3)


def test_merge_state_is_attention_over_both_parts(sgl_kernel: ModuleType) -> None:
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64) for n in (3, 10, 10))

    def attend(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.einsum("qhd,khd->qhk", q, k[keys])
        return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v[keys]), scores.logsumexp(-1)

    whole, whole_s = attend(slice(0, 10))
    (a, s_a), (b, s_b) = attend(slice(0, 6)), attend(slice(6, 10))
    merged, s = sgl_kernel.merge_state_v2(a.float(), s_a.float(), b.float(), s_b.float())
    assert near(merged, whole, 1e-6)
    assert near(s, whole_s, 1e-6)
    empty = torch.full_like(s_a, float("-inf")).float()
    only, _ = sgl_kernel.merge_state_v2(a.float(), s_a.float(), b.float(), empty)
    assert torch.equal(only, a.float())


def test_concatenations_of_mla(sgl_kernel: ModuleType) -> None:
    nope, rope = torch.randn(3, 4, 128), torch.randn(3, 1, 64)
    k = torch.full((3, 4, 192), float("nan"))
    sgl_kernel.concat_mla_k(k, nope, rope)
    assert torch.equal(k, torch.cat([nope, rope.expand(3, 4, 64)], -1))
    assert torch.equal(sgl_kernel.concat_mla_absorb_q(nope, k), torch.cat([nope, k], -1))


def test_renormalised_probabilities(sgl_kernel: ModuleType) -> None:
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert near(sgl_kernel.top_k_renorm_prob(probs, 2)[0], torch.tensor([2 / 3, 1 / 3, 0, 0]), 1e-6)
    by_row = sgl_kernel.top_k_renorm_prob(probs, torch.tensor([1, 3]))
    assert near(by_row, torch.tensor([[1.0, 0, 0, 0], [0, 2 / 9, 3 / 9, 4 / 9]]), 1e-6)
    assert near(sgl_kernel.top_p_renorm_prob(probs, 0.6)[0], torch.tensor([2 / 3, 1 / 3, 0, 0]), 1e-6)
    by_row = sgl_kernel.top_p_renorm_prob(probs, torch.tensor([0.4, 0.65]))
    assert near(by_row, torch.tensor([[1.0, 0, 0, 0], [0, 0, 3 / 7, 4 / 7]]), 1e-6)


def test_token_bitmask(sgl_kernel: ModuleType) -> None:
    logits = torch.zeros(3, 40)
    mask = torch.full((3, 2), -1, dtype=torch.int32)
    mask[1, 0] = ~(1 << 5)
    mask[1, 1] = ~(1 << 3)
    sgl_kernel.apply_token_bitmask_inplace_cuda(logits, mask, [1])
    banned = [tuple(at) for at in torch.isinf(logits).nonzero().tolist()]
    assert banned == [(1, 5), (1, 35)]


def test_experts(sgl_kernel: ModuleType) -> None:
    gate = torch.randn(6, 8)
    weights, ids = torch.empty(6, 2), torch.empty(6, 2, dtype=torch.int32)
    sgl_kernel.topk_softmax(weights, ids, gate, renormalize=True)
    want, at = gate.softmax(-1).topk(2, -1)
    assert torch.equal(ids.long(), at)
    assert near(weights, want / want.sum(-1, keepdim=True), 1e-6)
    parts, out = torch.randn(6, 2, 16), torch.empty(6, 16)
    sgl_kernel.moe_sum_reduce(parts, out, 2.0)
    assert near(out, parts.sum(1) * 2, 1e-6)


def test_everything_else_says_that_it_is_missing() -> None:
    """As SGLang meets it, in an interpreter of its own: submodules too."""
    code = """
import sgl_kernel
from sgl_kernel.elementwise import rmsnorm
from sgl_kernel.kvcacheio import transfer_kv_all_layer
from sgl_kernel.scalar_type import scalar_types
assert rmsnorm is sgl_kernel.rmsnorm
assert sgl_kernel.__version__ and repr(scalar_types.uint4) == "ScalarType(uint4)"
for call in (sgl_kernel.fp8_scaled_mm, transfer_kv_all_layer):
    try:
        call(1)
    except RuntimeError as error:
        print(str(error).partition(",")[0])
try:
    import sgl_kernel.no_such_module
except ImportError:
    print("no such module")
"""
    environment = {**os.environ, "PYTHONPATH": str(OVERLAY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "sgl_kernel.fp8_scaled_mm was called",
        "sgl_kernel.kvcacheio.transfer_kv_all_layer was called",
        "no such module",
    ], done.stderr


@pytest.mark.parametrize(("tokens", "chosen", "block"), [(1, 2, 16), (37, 2, 16), (5, 1, 64), (64, 4, 8)])
def test_rows_of_experts(sgl_kernel: ModuleType, tokens: int, chosen: int, block: int) -> None:
    experts = 5
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, chosen), generator=generator, dtype=torch.int32)
    room = ids.numel() + (experts + 1) * (block - 1)
    rows = torch.full((-(-room // block) * block,), -7, dtype=torch.int32)
    of_block = torch.full((len(rows) // block,), -7, dtype=torch.int32)
    count = torch.zeros(1, dtype=torch.int32)
    scratch = torch.zeros(experts + 2, dtype=torch.int32)
    sgl_kernel.moe_align_block_size(ids, experts + 1, block, rows, of_block, count, scratch, True)
    used, flat = int(count), ids.flatten()
    assert used % block == 0
    assert bool((rows[used:] == ids.numel()).all())
    assert of_block.min() >= -1
    assert of_block.max() < experts
    placed = rows[:used].view(-1, block)
    for number, expert in enumerate(of_block[: len(placed)].tolist()):
        here = placed[number][placed[number] < ids.numel()]
        assert bool((flat[here.long()] == expert).all())
    assert sorted(placed[placed < ids.numel()].tolist()) == list(range(ids.numel()))
