"""Models whose KV is not a K and a V for every layer: what SSD keeps of it outlives the server, and damage
costs hits alone. That they answer as a server without any cache is in test_end_to_end.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, differing, rounding
from forked_server import ForkedServer
from server import SGLangServer
from slot_files import damage
from workload import conversations

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6
PROMPTS = [turn.tokens for turn in conversations(6, 2, seed=3)][-6:]
# A CPU takes ten times as long to attend to a latent. No two of these begin alike.
SHORT = [turn.tokens for turn in conversations(4, 1, seed=4, first_max=150, system_prompts=4)]


@pytest.mark.parametrize(
    ("model", "prompts", "files"),
    [
        # KV in two pools, one of which keeps sliding windows.
        ("tiny-swa", PROMPTS, ["flexkv-dp0-tp0-swa.slots", "flexkv-dp0-tp0.slots"]),
        ("tiny-mla", SHORT, ["flexkv-dp0-tp0.slots"]),
    ],
    ids=["swa", "mla"],
)
def test_pools_outlive_a_restart_and_damage_costs_hits_alone(
    model: str, prompts: list[tuple[int, ...]], files: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    # Nothing is waited for in the queue: what is damaged turns out under the forward.
    config.write_text(
        f"cpu_cache_gb: 0.1\nssd_cache_gb: 0.5\nssd_cache_dir: {directory}\nload_policy: load\n"
    )
    flags = {"enable-flexkv": True, "flexkv-config-file": str(config), "max-total-tokens": 4096}

    def server(log: str) -> SGLangServer:
        return ForkedServer(ROOT / "models" / model, {**flags, "log-level": "info"}, log_path=tmp_path / log)

    def answers(server: SGLangServer, some: list[tuple[int, ...]]) -> list[dict[str, Any]]:
        return [server.generate(prompt, NEW_TOKENS, **ASK) for prompt in some]

    def from_ssd(answer: dict[str, Any]) -> int:
        return (answer["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)

    apart = rounding(ROOT / "models" / model)
    half = len(prompts) // 2
    with server("first.log") as first:
        expected = answers(first, prompts)
    assert sorted(path.name for path in directory.glob("*.slots")) == files
    with server("second.log") as second:
        got = answers(second, prompts[:half])
        assert from_ssd(got[0]) >= len(prompts[0]) - 16, got[0]["meta_info"]
        assert sum(map(from_ssd, got)) > 0.5 * sum(map(len, prompts[:half]))
        assert not differing(got, expected[:half], apart)
        assert second.metric("flexkv_failed_loads_total") == 0
        for name in files:
            damage(directory / name, every=8)
        got = answers(second, prompts[half:])  # which are on SSD alone, as far as they begin like no other
        assert second.metric("flexkv_failed_loads_total") > 0
        assert not differing(got, expected[half:], apart)
        assert not differing(answers(second, prompts), expected, apart)
    for log in ("first.log", "second.log"):
        text = (tmp_path / log).read_text()
        assert "hit an exception" not in text
        assert len(re.findall(r"sglang-flexkv closed: nothing left held", text)) == 1, log
