"""A server that embeds: its forwards wait for what they load, too."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from answers import EXACT
from forked_server import ForkedServer
from workload import some_tokens

ROOT = Path(__file__).parents[2]
PROMPTS = 3
PROMPT_TOKENS = 1900
POOL_TOKENS = 2304  # one prompt, so each pushes the one before off the device


def test_embeddings_of_what_is_loaded_are_those_of_what_is_computed(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    config = tmp_path / "flexkv.yaml"
    # A CPU tier of about one prompt, too: what comes back comes from SSD, later than a forward would read it.
    config.write_text(
        f"cpu_cache_gb: 0.02\nssd_cache_gb: 0.5\nssd_cache_dir: {tmp_path / 'ssd'}\nload_policy: load\n"
    )
    flags = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "is-embedding": True,
        "max-total-tokens": POOL_TOKENS,
        "chunked-prefill-size": 2048,
    }
    rng = random.Random(3)
    prompts = [some_tokens(rng, PROMPT_TOKENS) for _ in range(PROMPTS)]
    with ForkedServer(ROOT / "models" / "small-gqa", flags, log_path=tmp_path / "server.log") as server:

        def embed(prompt: list[int]) -> list[float]:
            answer = server.request("POST", "/encode", json={"input_ids": prompt}).json()
            return [float(number) for number in answer["embedding"]]

        # Twice each: first computed, then over what the device holds, which is what is loaded later. That has
        # the shapes of a load, and one shape is rounded one way. A load may be shorter on a slow machine:
        # SSD has not all of a prompt then.
        expected = [[embed(prompt) for _ in range(2)][1] for prompt in prompts]
        loaded = [embed(prompt) for prompt in prompts]
        assert server.metric("flexkv_loaded_tokens_total", tier="ssd") > PROMPT_TOKENS
        # Layers that are not there differ by a tenth.
        for got, want in zip(loaded, expected, strict=True):
            assert got == pytest.approx(want, abs=1e-5 if EXACT else 1e-2)
    assert "sglang-flexkv closed: nothing left held" in server.log(), server.log_tail()
