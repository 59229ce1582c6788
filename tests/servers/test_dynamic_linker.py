"""A real server whose own tree drives our linker, with none of our patches in force."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, differing, rounding
from forked_server import ForkedServer
from server import DTYPE
from workload import conversations

from sglang_flexkv.integration.compat.version import is_0_5_22
from sglang_flexkv.replay.planner import KvShape

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gqa"
NEW_TOKENS = 6
PROMPTS = [turn.tokens for turn in conversations(8, 2, seed=3)][-8:]


@pytest.mark.skipif(is_0_5_22(), reason="0.5.22 takes no linker from outside")
def test_what_comes_back_is_what_was_computed(tmp_path: Path) -> None:
    directory, config, log = tmp_path / "ssd", tmp_path / "flexkv.yaml", tmp_path / "server.log"
    directory.mkdir()
    token_bytes = KvShape.of_model(MODEL, 1, DTYPE).bytes_per_token
    # The CPU tier holds about half of the prompts, the device less.
    config.write_text(
        f"cpu_cache_gb: {sum(map(len, PROMPTS)) // 2 * token_bytes / 2**30}\n"
        f"ssd_cache_gb: 0.2\nssd_cache_dir: {directory}\n"
    )
    linker = {
        "linker": "DynamicLinker",
        "linker_module_path": "sglang_flexkv.integration.dynamic_linker",
        "linker_extra_config": {"flexkv_config_file": str(config)},
    }
    flags: dict[str, Any] = {
        "enable-unified-cache-external-linker": True,
        "unified-cache-external-linker-backend": "dynamic",
        "unified-cache-external-linker-config": json.dumps(linker),
        "page-size": 16,
        "max-total-tokens": 2048,
        "chunked-prefill-size": 512,
        "log-level": "info",
    }
    with ForkedServer(MODEL, flags, env={"SGLANG_PLUGINS": "none"}, log_path=log) as server:

        def ask() -> list[dict[str, Any]]:
            return [server.generate(prompt, NEW_TOKENS, **ASK) for prompt in PROMPTS]

        expected = ask()
        found = {"device": 0, "host": 0}
        # Four at a time, again and again: what lies on SSD comes back for those that wait or come later.
        rounds = [
            ask(),
            server.generate_many([*PROMPTS, *PROMPTS[::-1]], NEW_TOKENS, **ASK)[: len(PROMPTS)],
            ask(),
        ]
        for got in rounds:
            assert not differing(got, expected, rounding(MODEL))
            for answer in got:
                details = answer["meta_info"].get("cached_tokens_details") or {}
                for tier in found:
                    found[tier] += details.get(tier, 0)
        assert found["host"] > 500, found
    text = server.log()
    assert text.count("sglang-flexkv 0.1.0 as a dynamic linker, without patches: CPU tier") == 1
    (closed,) = re.findall(r"sglang-flexkv closed: (.*)", text)
    assert closed.startswith("nothing left held"), closed
    assert float(re.search(r"DISK2H ([\d.]+) GiB", closed)[1]) > 0, closed  # type: ignore[index]
    assert "Traceback" not in text.split("sglang-flexkv closed")[0].split("The server is fired up")[-1]
