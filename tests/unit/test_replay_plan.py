"""The planner, and the commands replay, plan and generate-trace."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from replay_traces import TOKENS, trace_of, write_lines
from rich.console import Console
from typer.testing import CliRunner

from sglang_flexkv import cli, cli_replay
from sglang_flexkv.common.config import GIB, CacheConfig, EvictionPolicy, FlexKVConfig
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.replay.planner import (
    CHUNKS,
    OTHER_WINDOWS,
    WINDOWS_BY_LAYER,
    Candidate,
    Hardware,
    KvShape,
    Plan,
    PlanError,
    make_plan,
)
from sglang_flexkv.replay.simulator import TierSetup, simulate
from sglang_flexkv.replay.trace import Trace

# A block is 1 MiB.
SHAPE = KvShape(2**20 // TOKENS)
MACHINE = Hardware(gpu_kv_gib=0, cpu_gib=1, ssd_gib=0, pcie_gb_s=25, ssd_read_gb_s=5, prefill_tokens_s=10_000)


def machine(**changes: float) -> Hardware:
    return Hardware(**{**MACHINE.__dict__, **changes})


def loop(documents: int = 10, rounds: int = 12) -> Trace:
    """The same documents of four blocks again and again: LRU needs all of them or hits nothing."""
    return trace_of([(document,) * 4 for _ in range(rounds) for document in range(documents)])


def chosen_by(plan: Plan) -> Candidate:
    assert plan.recommended is not None
    return plan.recommended


def cpu_blocks(candidate: Candidate) -> float:
    return candidate.cpu_gib * 1024


def test_memory_for_all_is_enough() -> None:
    plan = make_plan(loop(), SHAPE, MACHINE)
    assert cpu_blocks(chosen_by(plan)) == 40, "1 GiB is there, and 40 blocks are all there are"
    assert chosen_by(plan).ssd_gib == 0
    assert chosen_by(plan).cpu_hit_rate == pytest.approx(11 / 12)
    # 64 tokens are computed in 6.4 ms and loaded in 4 MiB / 25 GB/s; the first round has no hit.
    saving_s = 64 / 10_000 - 4 * 2**20 / 25e9
    assert chosen_by(plan).mean_saving_s == pytest.approx(11 / 12 * saving_s)
    assert chosen_by(plan).p50_saving_s == pytest.approx(saving_s)
    assert plan.mean_prefill_s == pytest.approx(64 / 10_000)
    assert plan.settings() == {
        "cpu_cache_gb": 0.04,
        "cpu_eviction_policy": CacheConfig().cpu_eviction_policy.value,
        "write_policy": "write_through",
    }


def test_no_more_than_saves_something() -> None:
    """Two documents are used all the time, hundreds once: room for them is room for nothing."""
    prompts = [(hot,) * 4 for number in range(400) for hot in (1, 2, 10 + number)]
    plan = make_plan(trace_of(prompts), SHAPE, machine(cpu_gib=4))
    assert plan.best.mean_saving_s > 0
    assert cpu_blocks(chosen_by(plan)) < 100
    assert chosen_by(plan).mean_saving_s >= 0.98 * plan.best.mean_saving_s


def test_ssd_where_memory_is_short() -> None:
    plan = make_plan(loop(), SHAPE, machine(cpu_gib=8 / 1024, ssd_gib=1))
    assert cpu_blocks(chosen_by(plan)) <= 8
    assert chosen_by(plan).ssd_gib * 1024 == 40
    assert chosen_by(plan).ssd_hit_rate > 0.5
    settings = plan.settings([Path("/nvme0"), Path("/nvme1")])
    assert settings["ssd_cache_dir"] == ["/nvme0", "/nvme1"]
    with pytest.raises(ConfigError, match="ssd_cache_dir"):
        plan.settings()


def test_no_ssd_that_is_slower_than_computing() -> None:
    slow = machine(cpu_gib=30 / 1024, ssd_gib=1, ssd_read_gb_s=0.1)
    plan = make_plan(loop(), SHAPE, slow)
    assert chosen_by(plan).ssd_gib == 0


@pytest.mark.parametrize(
    ("trace", "changes", "why"),
    [
        (loop(), {"pcie_gb_s": 0.1}, "a token takes longer to load from the CPU tier than to compute"),
        (loop(), {"gpu_kv_gib": 1}, "whatever comes again is still in the GPUs' own cache"),
        (trace_of([(n,) for n in range(9)]), {}, "no prompt begins with a whole block that an earlier one"),
        (loop(2, 2), {"pcie_gb_s": 0.655995}, "even with room for everything it would save less than 0.1%"),
        (loop(10, 2), {"cpu_gib": 1 / 1024}, "within the given limits it would save less than 0.1%"),
    ],
)
def test_nothing_is_recommended_that_saves_nothing(
    trace: Trace, changes: dict[str, float], why: str, tmp_path: Path
) -> None:
    plan = make_plan(trace, SHAPE, machine(**changes))
    assert plan.recommended is None
    assert why in plan.why_nothing()
    assert plan.as_dict()["why_nothing"] == plan.why_nothing()
    with pytest.raises(PlanError, match="no configuration to write: "):
        plan.write(tmp_path / "flexkv.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_costs_something_is_named() -> None:
    assert make_plan(loop(), SHAPE, MACHINE).caps == ()
    saving_s = chosen_by(make_plan(loop(), SHAPE, MACHINE)).mean_saving_s
    (cap,) = make_plan(loop(), SHAPE, machine(cpu_gib=20 / 1024)).caps
    assert (cap.option, cap.enough_gib * 1024) == ("--cpu-gib", 40)
    assert cap.mean_saving_s == pytest.approx(saving_s)
    # Also where nothing is recommended.
    (cap,) = make_plan(loop(), SHAPE, machine(cpu_gib=1 / 1024)).caps
    assert cap.mean_saving_s == pytest.approx(saving_s)
    small = machine(cpu_gib=8 / 1024, ssd_gib=20 / 1024)
    assert [cap.option for cap in make_plan(loop(), SHAPE, small).caps] == ["--cpu-gib", "--ssd-gib"]
    # As much as there is to save, from SSD: more memory would save time, more SSD would not.
    plan = make_plan(loop(), SHAPE, machine(cpu_gib=8 / 1024, ssd_gib=1))
    assert [cap.option for cap in plan.caps] == ["--cpu-gib"]


def test_where_another_policy_is_needed_it_is_found() -> None:
    """At the sizes that were given the default hits nothing of a loop, nor does lru."""
    plan = make_plan(loop(), SHAPE, machine(cpu_gib=30 / 1024))
    best = max(simulate(loop(), TierSetup(30, cpu_policy=p)).hit_rate() for p in EvictionPolicy)
    assert chosen_by(plan).cpu_hit_rate >= 0.98 * best > 0


@pytest.mark.parametrize(
    ("ssd_read_gb_s", "pcie_gb_s", "reason"),
    [
        (0.7, 25, "more of the hits are on SSD, where each saves less than in memory"),
        (0.5, 25, "hits on SSD cost time: loading a token from there takes longer than computing it"),
        (5, 0.5, "every hit costs time: loading a token takes longer than computing it"),
    ],
)
def test_rows_that_hit_more_and_save_less(ssd_read_gb_s: float, pcie_gb_s: float, reason: str) -> None:
    hardware = machine(cpu_gib=20 / 1024, ssd_gib=1, ssd_read_gb_s=ssd_read_gb_s, pcie_gb_s=pcie_gb_s)
    prompts = [(content,) * 4 for n in range(200) for content in (n % 2, n % 2, 100 + n % 7)]
    plan = make_plan(trace_of(prompts), SHAPE, hardware)
    told = [one for one in plan.grid if plan.why_less(one) is not None]
    assert told
    assert len(told) < len(plan.grid)
    for one in plan.grid:
        margin = max(
            min(one.tier_hit_rate - other.tier_hit_rate, 10 * (other.mean_saving_s - one.mean_saving_s))
            for other in plan.grid
        )
        if margin > 0.001:  # also when rounded as the table shows it
            assert plan.why_less(one) == reason
        elif margin <= 0:
            assert plan.why_less(one) is None
        else:
            assert plan.why_less(one) in (reason, None)


def test_a_policy_is_recommended_that_is_worth_it() -> None:
    """Less memory than the loop: whatever is recommended is no worse than the default at that size."""
    plan = make_plan(loop(), SHAPE, machine(cpu_gib=30 / 1024))
    chosen = chosen_by(plan)
    blocks = round(cpu_blocks(chosen))
    rates = {p.value: simulate(loop(), TierSetup(blocks, cpu_policy=p)).hit_rate() for p in EvictionPolicy}
    assert chosen.cpu_hit_rate == rates[chosen.cpu_policy]
    assert rates[chosen.cpu_policy] >= 0.98 * max(rates.values())


def test_of_equally_good_policies_the_default_is_recommended() -> None:
    """Nothing is ever evicted, so every policy hits the same."""
    plan = make_plan(loop(), SHAPE, machine(ssd_gib=1))
    assert chosen_by(plan).cpu_policy == CacheConfig().cpu_eviction_policy.value


def test_writes_that_save_nothing_are_left_out() -> None:
    """Every other prompt never comes again; what does come again does so often that its first return from SSD
    does not matter."""
    prompts = [prompt for n in range(500) for prompt in ((n % 3,) * 4, (100 + n,) * 4)]
    plan = make_plan(trace_of(prompts), SHAPE, machine(cpu_gib=8 / 1024, ssd_gib=0.25))
    assert chosen_by(plan).ssd_gib > 0
    assert chosen_by(plan).ssd_hit_rate > 0.1
    assert chosen_by(plan).ssd_admission == "reuse"
    assert chosen_by(plan).ssd_written_gib < 0.1


def test_memory_without_room_for_a_block() -> None:
    with pytest.raises(PlanError, match=r"hold no block of 1,048,576 bytes; raise --cpu-gib"):
        make_plan(loop(), SHAPE, machine(cpu_gib=0.5 / 1024))


def test_a_plan_is_a_configuration(tmp_path: Path) -> None:
    plan = make_plan(loop(), SHAPE, machine(cpu_gib=8 / 1024, ssd_gib=1))
    file = tmp_path / "flexkv.yaml"
    plan.write(file, [tmp_path])
    config = FlexKVConfig.load(str(file))
    assert config.ssd_cache_dir == (tmp_path,)
    assert config.cpu_cache_gb is not None
    # Rounding must not lose a block.
    assert config.cpu_cache_gb * GIB >= chosen_by(plan).cpu_gib * GIB
    assert config.cpu_eviction_policy.value == chosen_by(plan).cpu_policy
    with pytest.raises(PlanError, match="cannot be written: No such file"):
        plan.write(tmp_path / "missing" / "file", [tmp_path])


# ---- the size of a model's KV ----

GQA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 512,
    "torch_dtype": "bfloat16",
}
MLA = {**GQA, "num_hidden_layers": 3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "tp", "dtype", "bytes_per_token"),
    [
        (GQA, 1, None, 2 * 4 * 64 * 2 * 2),
        (GQA, 2, None, 2 * 2 * 64 * 2 * 2),
        (GQA, 8, None, 2 * 1 * 64 * 2 * 2),  # heads are copied
        (GQA, 1, "fp8_e4m3", 2 * 4 * 64 * 2),
        ({**GQA, "head_dim": 128}, 1, None, 2 * 4 * 128 * 2 * 2),
        ({**GQA, "num_key_value_heads": None}, 1, None, 2 * 8 * 64 * 2 * 2),
        ({"text_config": GQA}, 1, None, 2 * 4 * 64 * 2 * 2),
        (MLA, 4, None, 3 * 576 * 2),
        ({**MLA, "index_topk": 2048, "index_head_dim": 128}, 1, None, 3 * (576 * 2 + 132)),
    ],
)
def test_kv_of_a_model(
    tmp_path: Path, config: dict[str, Any], tp: int, dtype: str | None, bytes_per_token: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    is_latent = "kv_lora_rank" in config
    shape = KvShape.of_model(tmp_path, tp, dtype)
    assert shape == KvShape(bytes_per_token, tp, is_latent=is_latent)
    assert shape == KvShape.of_model(tmp_path / "config.json", tp, dtype)
    assert shape.device_block_bytes(16) == 16 * bytes_per_token * tp
    # A latent is the same on all ranks, and the tiers have it once.
    assert shape.block_bytes(16) == 16 * bytes_per_token * (1 if is_latent else tp)


WINDOWS = {
    **GQA,
    "num_hidden_layers": 6,
    "architectures": ["GptOssForCausalLM"],
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
OF_LAYER = 2 * 4 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "windowed", "window_tokens"),
    [
        ({}, 4, 128),
        ({"architectures": ["Gemma3ForCausalLM"]}, 0, 0),  # SGLang keeps all of it
        ({"sliding_window": None}, 0, 0),
        (
            {
                "architectures": ["Llama4ForConditionalGeneration"],
                "num_hidden_layers": 10,
                "attention_chunk_size": 8192,
            },
            8,
            8192,
        ),
    ],
)
def test_layers_with_a_sliding_window_count_as_what_they_keep(
    tmp_path: Path, changes: dict[str, Any], windowed: int, window_tokens: int
) -> None:
    config = {**WINDOWS, **changes}
    nested = {"text_config": config, "architectures": config.pop("architectures")}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    shape = KvShape.of_model(tmp_path)
    full = config["num_hidden_layers"] - windowed
    assert shape == KvShape(full * OF_LAYER, 1, windowed * OF_LAYER, window_tokens)
    # 128 tokens and a block of 16 for each 512; of 8,192 all of them.
    share = {0: 0, 128: 144 / 512, 8192: 1}[window_tokens]
    assert shape.block_bytes(16) == 16 * OF_LAYER * (full + share * windowed)
    assert shape.device_block_bytes(16) == math.ceil(16 * OF_LAYER * (full + 0.8 * windowed))


@pytest.mark.parametrize("name", sorted(OTHER_WINDOWS))
def test_windows_that_are_not_counted_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**WINDOWS, "architectures": [name]}))
    with pytest.raises(PlanError, match="give --kv-bytes-per-token"):
        KvShape.of_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["sliding_attention"]},
        {"layer_types": None},
        {"sliding_window": "many"},
        {"architectures": ["Other"], "layer_types": ["linear_attention", "full_attention"] * 3},
        {"architectures": ["Other"], "layer_types": None, "hybrid_layer_pattern": [1, 0]},
    ],
)
def test_windows_that_are_not_told_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**WINDOWS, **changes}))
    with pytest.raises(PlanError, match="give --kv-bytes-per-token"):
        KvShape.of_model(tmp_path)


def test_index_keys_are_as_large_as_in_sglangs_pool() -> None:
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    assert DSATokenToKVPool.quant_block_size == 128


def test_windows_are_those_that_sglang_has_a_pool_for() -> None:
    from sglang.srt.configs import model_config

    with_windows = model_config.is_hybrid_swa_model
    named = {*model_config.SWA_SINK_ARCHS, *model_config.MIMO_V2_MODEL_ARCHS}
    for constant in with_windows.__code__.co_consts:
        named.update(constant if isinstance(constant, frozenset | tuple) else {constant})
    config = SimpleNamespace(layer_types=["sliding_attention"], sliding_window=128)
    models = {
        name
        for name in named
        if isinstance(name, str) and name.isidentifier() and with_windows([name], config)
    }
    drafts = {name for name in models if re.search("MTP|NextN|DSpark", name)}
    assert models - drafts == {*WINDOWS_BY_LAYER, *OTHER_WINDOWS, CHUNKS}
    config.num_hidden_layers = 6
    config.layer_types = WINDOWS["layer_types"]
    for name in WINDOWS_BY_LAYER:
        assert model_config.get_hybrid_layer_ids([name], config)[0] == [0, 1, 3, 4]
    assert model_config.get_hybrid_layer_ids([CHUNKS], config)[0] == [0, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "dtype of the KV is unknown"),
        (json.dumps({**GQA, "torch_dtype": "int4"}), "give --kv-dtype"),
        (json.dumps({**GQA, "num_hidden_layers": None}), "no usable num_hidden_layers"),
        (json.dumps({**GQA, "num_attention_heads": "many"}), "give --kv-bytes-per-token"),
    ],
)
def test_models_that_do_not_tell(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        KvShape.of_model(tmp_path)
    with pytest.raises(PlanError, match="cannot be read"):
        KvShape.of_model(tmp_path / "missing")


# ---- the commands ----


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "chat.jsonl"
    code, output = run("generate-trace", "chat", path, "--requests", 300, "--seed", 5)
    assert (code, output) == (0, f"wrote {path}: 300 requests\n")
    return path


def test_replay_shows_every_policy_and_size(chat: Path, tmp_path: Path) -> None:
    picture, file = tmp_path / "p.png", tmp_path / "r.json"
    options = ("--policy", "all", "--block-kib", 64, "--plot", picture, "--json", file)
    code, output = run("replay", chat, "--cpu-blocks", "200,50", "--ssd-blocks", 400, *options)
    assert code == 0, output
    assert "300 requests" in output
    assert "DISK2H" in output
    assert "…" not in output, "it fits a terminal of 80 columns"
    results = json.loads(file.read_text())["results"]
    assert [(r["cpu_blocks"], r["policy"]) for r in results] == [
        (size, policy.value) for size in (50, 200) for policy in EvictionPolicy
    ]
    for result in results:
        assert result["policy"] in output
        assert f"{result['hit_rate']:.2%}" in output
        assert f"{result['optimum_hit_rate']:.2%}" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {picture}" in output


def test_replay_by_default(chat: Path) -> None:
    code, output = run("replay", chat, "--requests", 100, "--no-optimum", "--json", "-")
    assert code == 0
    results = json.loads(output)["results"]
    assert {r["policy"] for r in results} == {"lru", CacheConfig().cpu_eviction_policy.value}
    assert len({r["cpu_blocks"] for r in results}) == 3
    assert all(r["optimum_hit_rate"] is None and r["moved_bytes"] is None for r in results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "lru,mru"), "no eviction policy 'mru'"),
        (("--ssd-policy", "x"), "known: "),
        (("--cpu-blocks", "10,0"), "numbers from 1"),
        (("--cpu-blocks", "10,5000000000"), "numbers from 1"),
        (("--cpu-blocks", "ten"), "numbers from 1"),
        (("--ssd-blocks", "5000000000"), "--ssd-blocks"),
        (("--tokens-per-block", "100"), "give --tokens-per-block 512, which fits"),
    ],
)
def test_replay_says_what_is_wrong(chat: Path, options: tuple[str, ...], message: str) -> None:
    code, output = run("replay", chat, *options)
    assert code != 0
    assert message in " ".join(output.replace("│", " ").split())


def test_replay_without_matplotlib(chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, output = run("replay", chat, "--plot", tmp_path / "p.png")
    assert code == 1
    assert "pip install 'sglang-flexkv[replay]'" in output
    assert "requests" not in output, "said before the work"


def test_files_that_cannot_be_written(chat: Path, tmp_path: Path) -> None:
    for option in ("--plot", "--json"):
        code, output = run("replay", chat, "--requests", 50, option, tmp_path / "missing" / "file")
        assert code != 0
        assert "cannot be written" in " ".join(output.split())


def test_plan_prints_and_writes(tmp_path: Path) -> None:
    prompts = [(document,) * 4 for _ in range(6) for document in range(10)]
    trace = write_lines(
        tmp_path / "t.jsonl", [{"token_ids": [n for n in prompt for _ in range(16)]} for prompt in prompts]
    )
    common = ("plan", trace, "--tokens-per-block", 16, "--prefill-tokens-s", 10_000, "--cpu-gib", 1)
    file, data = tmp_path / "flexkv.yaml", tmp_path / "plan.json"
    shape = ("--kv-bytes-per-token", 65536)
    code, output = run(*common, *shape, "--write", file, "--json", data)
    assert code == 0, output
    assert "recommended" in output
    assert "ms less on average" in output
    for column in ("CPU GiB", "device", "CPU", "mean ms", "p50 ms"):
        assert output.count(column) >= 2, "every column is explained"
    assert "…" not in output
    assert yaml.safe_load(file.read_text())["cpu_cache_gb"] == 0.04
    assert FlexKVConfig.load(str(file)).cpu_cache_gb == 0.04
    plan = json.loads(data.read_text())
    assert plan["recommended"]["cpu_gib"] == pytest.approx(40 / 1024)
    assert plan["caps"] == []

    (tmp_path / "config.json").write_text(json.dumps(GQA))
    code, output = run(*common, "--model", tmp_path, "--json", "-")
    assert code == 0
    assert json.loads(output)["recommended"]["cpu_gib"] == pytest.approx(40 * 16 * 2048 / GIB)

    code, output = run(*common, *shape, "--ssd-gib", 1, "--write", file)
    assert (code, output) == (1, "--write needs to know where the SSD tier goes; give --ssd-dir\n")
    code, output = run(*common)
    assert code == 2
    assert "give either --model or" in " ".join(output.split())
    code, output = run(*common, *shape, "--pcie-gb-s", 0.01)
    assert code == 0
    assert "No tier is recommended: a token takes longer to load" in output
    assert "cpu_cache_gb" not in output
    file.unlink()
    code, output = run(*common, *shape, "--pcie-gb-s", 0.01, "--write", file)
    assert code == 1
    assert "there is no configuration to write: a token takes longer to load" in output
    assert not file.exists()
    code, output = run(*common[:-1], 0.02, *shape)
    assert "Capped by --cpu-gib 0.02: with room for every block of this trace (0.0391 GiB)" in output


def test_progress_on_a_terminal(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_replay, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True))
    result = CliRunner().invoke(cli.app, ["replay", str(chat), "--json", "-"])
    assert "replaying" in result.stderr
    json.loads(result.stdout)


def test_the_command_line_loads_without_the_compiled_core() -> None:
    """Only so can `sglang-flexkv status` say that it does not load."""
    code = "import sys, sglang_flexkv.cli; sys.exit('sglang_flexkv._core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_plan_is_json() -> None:
    plan = make_plan(loop(3, 3), SHAPE, MACHINE)
    assert isinstance(plan, Plan)
    json.dumps(plan.as_dict())
