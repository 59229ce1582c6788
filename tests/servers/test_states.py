"""A model with recurrent state (a small Qwen3-Next): real servers answer as one without any cache, while
states and KV leave the device and the CPU tier, after a restart, and when SSD has lost what it held."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, EXACT, allowance, computed_in_chunks, differing
from forked_server import ForkedServer
from server import DTYPE, SGLangServer
from slot_files import damage
from workload import conversations

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gdn"
NEW_TOKENS = 6
COUNT = 5  # conversations
PROMPTS = [turn.tokens for turn in conversations(COUNT, 3, seed=11, first_max=300, turn_max=150)]
# SGLang keeps the inputs of convolutions in bfloat16 whatever the model computes in. Rounded where a state is
# kept, and nowhere else, they would give another answer with a cache than without.
ENV = {"SGLANG_MAMBA_CONV_DTYPE": DTYPE}
# At most four requests at a time, and for each as many states as SGLang asks for.
FLAGS: dict[str, Any] = {"max-total-tokens": 2048, "max-running-requests": 4, "chunked-prefill-size": 256}
# Where SGLang keeps states: at the ends of prompts, and on their way as well.
AT_ENDS = {
    "mamba-radix-cache-strategy": "no_buffer",
    "disable-overlap-schedule": True,
    "max-mamba-cache-size": 12,
}
ON_THE_WAY = {
    "mamba-radix-cache-strategy": "extra_buffer",
    "mamba-track-interval": 64,
    "max-mamba-cache-size": 20,
    "tp-size": 2,
}


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    flags = {**FLAGS, "disable-radix-cache": True, "max-total-tokens": 8192, "max-mamba-cache-size": 12}
    with ForkedServer(MODEL, flags, env=ENV, stop_grace_s=0) as server:
        return server.generate_many(PROMPTS, NEW_TOKENS, **ASK)


@pytest.fixture(scope="module")
def apart(expected: list[dict[str, Any]]) -> float:
    if EXACT:
        return 0.0
    flags = {"max-mamba-cache-size": 12, "max-running-requests": 4}
    return allowance(expected, computed_in_chunks(MODEL, PROMPTS, NEW_TOKENS, flags))


def cached_from(place: str, answers: Sequence[dict[str, Any]]) -> int:
    """Tokens."""
    details = [answer["meta_info"].get("cached_tokens_details") or {} for answer in answers]
    return sum(of_one.get(place, 0) for of_one in details)


def assert_ended_well(log: Path) -> None:
    text = log.read_text()
    assert "hit an exception" not in text
    assert len(re.findall(r"sglang-flexkv closed: nothing left held", text)) >= 1, log


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "page_size", "tokens_behind"),
    [(AT_ENDS, 1, 1, 0), (ON_THE_WAY, 2, 16, 64 + 16)],
    ids=["at_ends", "on_the_way"],
)
def test_states_outlive_the_device_a_restart_and_damage(
    expected: list[dict[str, Any]],
    apart: float,
    tmp_path: Path,
    strategy: dict[str, Any],
    num_ranks: int,
    page_size: int,
    tokens_behind: int,
) -> None:
    """``tokens_behind`` the last state of a prompt there may be at its end."""
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    # A tier for less than all of it. Nothing is waited for in the queue: what is damaged turns out under the
    # forward.
    config.write_text(
        f"cpu_cache_gb: 0.016\nssd_cache_gb: 0.2\nssd_cache_dir: {directory}\nload_policy: load\n"
        "prefetch_policy: best_effort\n"
    )
    flags = {"enable-flexkv": True, "flexkv-config-file": str(config), **FLAGS, **strategy}

    def server(log: str) -> SGLangServer:
        return ForkedServer(MODEL, {**flags, "log-level": "info"}, env=ENV, log_path=tmp_path / log)

    with server("first.log") as first:
        for _ in range(2):
            got = first.generate_many(PROMPTS, NEW_TOKENS, **ASK)
            assert not differing(got, expected, apart)
        assert cached_from("host", got) > 0
    ranks = [f"flexkv-dp0-tp{rank}" for rank in range(num_ranks)]
    names = [f"{rank}{group}.slots" for rank in ranks for group in ("-mamba", "")]
    assert sorted(path.name for path in directory.glob("*.slots")) == sorted(names)
    # The last turns go on where the ones before them have ended.
    before, last = PROMPTS[-2 * COUNT : -COUNT], PROMPTS[-COUNT:]
    there = sum(len(prompt) - tokens_behind for prompt in before)
    with server("second.log") as second:
        got = [second.generate(prompt, NEW_TOKENS, **ASK) for prompt in last]
        assert not differing(got, expected[-COUNT:], apart)
        # All of it was on SSD; what a prompt before has brought is in memory as well.
        from_ssd, from_memory = cached_from("storage", got), cached_from("host", got)
        assert from_ssd > 0.4 * there
        assert from_ssd + from_memory >= there
    damage(directory / f"{ranks[-1]}-mamba.slots", every=4)  # every state of a rank; KV is as it was
    with server("third.log") as third:
        for _ in range(2):
            got = [third.generate(prompt, NEW_TOKENS, **ASK) for prompt in last]
            assert not differing(got, expected[-COUNT:], apart)
        assert third.metric("flexkv_failed_loads_total") >= COUNT
    text = (tmp_path / "first.log").read_text()
    assert re.search(r"with their part of mamba \([\d.]+ KiB\)", text)
    assert f"block {page_size} tokens" in text
    for log in ("first.log", "second.log", "third.log"):
        assert_ended_well(tmp_path / log)
