"""The comparison with other caches: its stand-in for HiCache's kernels, its traffic, and when it fails."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import compare
import pytest
import torch
from comparison import contenders, figures, traces
from comparison.contenders import CONTENDERS, Running
from comparison.traffic import Part, Sizes

from sglang_flexkv.replay.trace import make_trace

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HEADS, WIDTH, PAGE = 3, 2, 8, 16
HOST_SLOTS, DEVICE_SLOTS = 40 * PAGE, 24 * PAGE


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    path = ROOT / "benchmarks" / "peers" / "hicache_cpu" / "hicache_cpu_kernels.py"
    spec = importlib.util.spec_from_file_location("hicache_cpu_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def slots_of(pages: Sequence[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


SLOTS = {
    "consecutive": (slots_of(range(3, 19)), slots_of(range(5, 21))),
    "scattered pages": (slots_of([7, 2, 39, 11]), slots_of([0, 20, 3, 21])),
    "scattered tokens": (torch.tensor([5, 600, 17, 1]), torch.tensor([300, 2, 3, 4])),
    "none": (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", SLOTS)
def test_the_stand_in_copies_these_tokens_and_no_others(
    kernels: ModuleType, which: str, dtype: torch.dtype
) -> None:
    """Both ways, by what HiCache's kernels are defined to do; that it calls them so, real servers show."""
    host_slots, device_slots = SLOTS[which]
    generator = torch.Generator().manual_seed(1)

    def pool(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    device = {kv: [pool(DEVICE_SLOTS, HEADS, WIDTH) for _ in range(LAYERS)] for kv in "kv"}
    host = {kv: pool(HOST_SLOTS, LAYERS, HEADS, WIDTH) for kv in "kv"}
    wanted = {kv: host[kv].clone() for kv in "kv"}
    for kv in "kv":
        for layer in range(LAYERS):
            wanted[kv][host_slots, layer] = device[kv][layer][device_slots]
    addresses = {kv: torch.tensor([one.data_ptr() for one in device[kv]], dtype=torch.uint64) for kv in "kv"}
    kernels.transfer_kv_all_layer_lf_pf(
        src_k_layers=addresses["k"],
        dst_k=host["k"],
        src_v_layers=addresses["v"],
        dst_v=host["v"],
        src_indices=device_slots,
        dst_indices=host_slots,
        item_size=HEADS * WIDTH * dtype.itemsize,
        dst_layout_dim=LAYERS * HEADS * WIDTH * dtype.itemsize,
        num_layers=LAYERS,
    )
    assert all(torch.equal(host[kv], wanted[kv]) for kv in "kv")

    back = device_slots.flip(0)  # to other places than they came from
    for layer in range(LAYERS):
        expected = {kv: device[kv][layer].clone() for kv in "kv"}
        for kv in "kv":
            expected[kv][back] = host[kv][host_slots, layer]
        kernels.transfer_kv_per_layer_pf_lf(
            src_k=host["k"],
            dst_k=device["k"][layer],
            src_v=host["v"],
            dst_v=device["v"][layer],
            src_indices=host_slots,
            dst_indices=back,
            layer_id=layer,
            item_size=HEADS * WIDTH * dtype.itemsize,
            src_layout_dim=LAYERS * HEADS * WIDTH * dtype.itemsize,
        )
        assert all(torch.equal(device[kv][layer], expected[kv]) for kv in "kv")


def test_slots_that_change_in_place_are_looked_at_again(kernels: ModuleType) -> None:
    """What is consecutive is kept from layer to layer; a list that was written to is another list."""
    source, target = torch.arange(512.0)[:, None].contiguous(), torch.zeros(512, 1)
    slots, onto = torch.arange(256), torch.arange(256)
    kernels._copy(source, target, slots, onto)
    slots += 256
    kernels._copy(source, target, slots, onto)
    assert torch.equal(target[:256], source[256:])


# In a family all prompts go on alike after the first block, which all have in common.
TRACE = make_trace(
    [(2048, [0, 1, 2, 3]), (1024, [0, 9]), (2560, [0, 1, 2, 3, 4]), (700, [0, 7]), (9999999, [0, 8])], 512
)


def test_a_sample_of_a_trace_keeps_what_prompts_share() -> None:
    prompts = traces.sample(TRACE, seed=3, tokens=10_000, prompt_tokens_max=500, vocabulary=4000)
    # In order, and without the one that is too long.
    assert [len(prompt) for prompt in prompts] == [64, 32, 80, 21]
    first, second, third, fourth = prompts
    assert third[:64] == first
    assert first[:16] == second[:16] == fourth[:16]
    assert first[16:32] != second[16:32]


def test_a_sample_of_a_trace_takes_whole_families_as_far_as_there_is_room() -> None:
    for seed in range(10):
        prompts = traces.sample(TRACE, seed, tokens=100, prompt_tokens_max=500, vocabulary=4000)
        assert sorted(len(prompt) for prompt in prompts) == [21, 32]  # the other family wants 144


def test_another_round_shares_no_block() -> None:
    rounds = [traces.sample(TRACE, seed, 10_000, 500, 4000) for seed in (1, 2)]
    blocks = [
        {tuple(prompt[at : at + 16]) for prompt in prompts for at in range(0, len(prompt), 16)}
        for prompts in rounds
    ]
    assert not blocks[0] & blocks[1]


def test_there_is_a_trace_where_none_was_recorded(tmp_path: Path) -> None:
    trace, name = traces.load(tmp_path / "missing.jsonl")
    assert "missing.jsonl" in name
    assert traces.sample(trace, 1, 3072, 768, 4000)


def test_stock_sglang_is_always_there() -> None:
    for only in ([], ["hicache"], ["hicache-file"], ["radix"]):
        made = compare.groups(only, long=False, smoke=False, scale=1)
        assert sum("radix" in group.contenders for group in made) == 1
        assert "radix" in made[0].contenders  # whose outputs the others are compared with
        assert all(group.host_tokens >= 8192 for group in made)
    long = compare.groups([], long=True, smoke=False, scale=2)
    assert {group.host_tokens for group in long} == {16384, 32768}


def row(contender: str, round_number: int, ttft_ms: float) -> figures.Row:
    part = Part([ttft_ms / 1000], {"device": 0, "host": 16, "storage": 0}, 1.0, [], [], 32)
    return figures.row_of("g", contender, round_number, {"cold": part})


def test_ratios_are_of_the_same_round() -> None:
    rows = [row("a", 0, 10), row("a", 1, 100), row("b", 1, 50), row("b", 0, 20), row("b", 2, 1)]
    assert figures.ratios(rows, "g", "a", "b")["cold", "ttft_p50"] == pytest.approx([0.5, 2.0])
    text = figures.tables(rows, "g", "a", ["a", "b"])
    assert "| cold TTFT p50, ms | 1.25 (0.50 to 2.00) |" in text
    assert "| cold | 0 + 50 + 0 | 0 + 50 + 0 |" in text


def finished(tmp_path: Path, name: str, served: dict[str, int], log: str) -> compare.Comparison:
    """A comparison that has measured one contender, which served this and logged that."""
    (tmp_path / "server.log").write_text(log)
    comparison: Any = object.__new__(compare.Comparison)
    comparison.report = compare.Report("compare", True, compare.Machine.here())
    part = Part([0.1], {"device": 0, "host": 0, "storage": 0, **served}, 1.0, [], [], 32)
    group = compare.Group("g", name, (name,), 8192)
    comparison.rows = [figures.row_of("g", name, 0, {"cold": part})]
    server: Any = SimpleNamespace(pid=None, log_path=tmp_path / "server.log")
    place: Any = None
    comparison._check_contender(group, Running(name, server, place, contenders.Launch()))
    assert isinstance(comparison, compare.Comparison)
    return comparison


GOOD_LOG = "INFO 2026 sglang: no ERROR here\nWARNING 2026 sglang: what\nTraceback (most recent call last):\n"


def test_a_run_counts_whose_contenders_served_from_all_they_have(tmp_path: Path) -> None:
    served = {"host": 16, "storage": 16}
    assert finished(tmp_path, "hicache-file", served, GOOD_LOG).report.verified


@pytest.mark.parametrize("name", [name for name, one in CONTENDERS.items() if one.served])
def test_a_tier_that_served_nothing_fails_the_run(tmp_path: Path, name: str) -> None:
    for missing in CONTENDERS[name].served:
        served = {source: 16 for source in CONTENDERS[name].served if source != missing}
        assert not finished(tmp_path, name, served, GOOD_LOG).report.verified


@pytest.mark.parametrize(
    "line",
    [
        "ERROR 2026-11-27 sglang.srt: prefetch failed",
        "[2026-11-27 02:55] ERROR:    Exception in ASGI application",
        "\x1b[31;20m[2026-11-27] LMCache ERROR:\x1b[0m store failed",
        "Exception in thread prefetch:",
    ],
)
def test_an_error_in_a_log_fails_the_run(tmp_path: Path, line: str) -> None:
    assert not finished(tmp_path, "ours", {"host": 16}, f"{GOOD_LOG}{line}\n").report.verified


@pytest.mark.skipif(not compare.EXACT, reason="texts are compared where rounding does not change them")
@pytest.mark.parametrize("text", ["as stock has it", "otherwise"])
def test_an_output_that_differs_fails_the_run(text: str) -> None:
    """Whoever comes first in a round: stock SGLang is the last one every other time."""
    comparison: Any = object.__new__(compare.Comparison)
    comparison.report = compare.Report("compare", True, compare.Machine.here())
    stock = Part([0.1], {}, 1.0, [], ["as stock has it"], 32)
    ours = Part([0.1], {}, 1.0, [], [text], 32)
    comparison._unchecked = [("ours", 1, {"prefix": ours}), ("radix", 1, {"prefix": stock})]
    comparison._stock = {1: {"prefix": stock}}
    comparison.check_outputs()
    assert comparison.report.verified == (text == "as stock has it")
    assert sum(check.count for check in comparison.report.checks) == 2


def test_working_sets_leave_the_device() -> None:
    """Or nothing would come back from anywhere below it."""
    for sizes in (Sizes(), Sizes().scaled(16), compare.SMOKE_SIZES):
        assert sizes.prompts * sizes.prompt > sizes.device
        assert sizes.sessions * sizes.first_turn > sizes.device
        assert sizes.groups * sizes.system + sizes.question > sizes.device * 0.9
        assert sizes.new_prompts * sizes.new_prompt > sizes.device
        assert sizes.burst_prefix + sizes.burst * (sizes.burst_rest + 32) < sizes.device
