"""A model with sliding windows: what SSD keeps of both its pools outlives the server, and damage in either
costs hits alone. That it answers as a server without any cache is in test_end_to_end.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from answers import ASK, differing, rounding
from forked_server import ForkedServer
from server import SGLangServer
from slot_files import damage
from workload import conversations

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-swa"
NEW_TOKENS = 6
PROMPTS = [turn.tokens for turn in conversations(6, 2, seed=3)][-6:]


def test_windows_outlive_a_restart_and_damage_costs_hits_alone(tmp_path: Path) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    # Nothing is waited for in the queue: what is damaged turns out under the forward.
    config.write_text(
        f"cpu_cache_gb: 0.1\nssd_cache_gb: 0.5\nssd_cache_dir: {directory}\nload_policy: load\n"
    )
    flags = {"enable-flexkv": True, "flexkv-config-file": str(config), "max-total-tokens": 4096}

    def server(log: str) -> SGLangServer:
        return ForkedServer(MODEL, {**flags, "log-level": "info"}, log_path=tmp_path / log)

    def answers(server: SGLangServer) -> list[dict[str, Any]]:
        return [server.generate(prompt, NEW_TOKENS, **ASK) for prompt in PROMPTS]

    def from_ssd(answer: dict[str, Any]) -> int:
        return (answer["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)

    apart = rounding(MODEL)
    with server("first.log") as first:
        expected = answers(first)
    names = sorted(path.name for path in directory.glob("*.slots"))
    assert names == ["flexkv-dp0-tp0-swa.slots", "flexkv-dp0-tp0.slots"]
    with server("second.log") as second:
        got = answers(second)
        assert from_ssd(got[0]) >= len(PROMPTS[0]) - 16, got[0]["meta_info"]
        assert sum(map(from_ssd, got)) > 0.5 * sum(map(len, PROMPTS))
        assert not differing(got, expected, apart)
    for name in names:
        damage(directory / name, every=24)
    with server("third.log") as third:
        got = answers(third)
        assert third.metric("flexkv_failed_loads_total") > 0
        assert not differing(got, expected, apart)
        assert not differing(answers(third), expected, apart)
    for log in ("first.log", "second.log", "third.log"):
        text = (tmp_path / log).read_text()
        assert "hit an exception" not in text
        assert len(re.findall(r"sglang-flexkv closed: nothing left held", text)) == 1, log
