"""Attention on ranks of their own (`--enable-dp-attention`): each has its requests, its KV and its cache, and
all of them run every forward together. A rank that waited for others where they do not, or that left out a
forward, would stop the server."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import slot_files
from answers import ASK, differing, rounding
from forked_server import ForkedServer
from server import KV_ITEM_BYTES, SGLangServer
from workload import some_tokens

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-mla"
TOKEN_BYTES = 1728 * KV_ITEM_BYTES  # of the model; a rank has all of it
PAGE = 16
NEW_TOKENS = 2
ANSWER_S = 60.0  # a server that stands still does not answer
RNG = random.Random(7)
# The device holds two of them, the CPU tier of a rank three or four.
PROMPTS = [some_tokens(RNG, length) for length in (105, 95, 107, 99, 111, 101)]
IN_TURN = [index % 2 for index in range(len(PROMPTS))]


def start(tmp_path: Path, log: str, settings: str, tp_size: int) -> SGLangServer:
    config = tmp_path / "flexkv.yaml"
    cpu_gb = tp_size * 24 * PAGE * TOKEN_BYTES / 2**30
    config.write_text(f"cpu_cache_gb: {cpu_gb}\ncpu_eviction_policy: lru\nload_policy: load\n{settings}")
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "tp-size": tp_size,
        "dp-size": 2,
        "enable-dp-attention": True,
        "max-total-tokens": 256,
        "chunked-prefill-size": 128,  # of which each rank has a half
        "log-level": "info",
    }
    return ForkedServer(MODEL, flags, log_path=tmp_path / log)


def answers(
    server: SGLangServer,
    ranks: Sequence[int],
    prompts: Sequence[Sequence[int]] = PROMPTS,
    concurrency: int = 4,
) -> list[dict[str, Any]]:
    """Of prompts that go to these ranks."""
    return server.generate_many(
        [{"prompt": prompt, "routed_dp_rank": rank} for prompt, rank in zip(prompts, ranks, strict=True)],
        NEW_TOKENS,
        concurrency=concurrency,
        timeout_s=ANSWER_S,
        **ASK,
    )


def cached(got: Sequence[dict[str, Any]]) -> list[int]:
    return [answer["meta_info"]["cached_tokens"] for answer in got]


def whole_pages(prompts: Sequence[Sequence[int]]) -> list[int]:
    """All of a prompt's pages but what is behind its last token but one."""
    return [(len(prompt) - 1) // PAGE * PAGE for prompt in prompts]


def check_log(text: str) -> None:
    assert "hit an exception" not in text
    assert len(re.findall("sglang-flexkv closed: nothing left held", text)) == 2


@pytest.mark.parametrize("tp_size", [2])
def test_ranks_with_requests_of_their_own(tmp_path: Path, tp_size: int) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    apart = rounding(MODEL, tp_size)
    with ForkedServer(MODEL, {"disable-radix-cache": True}, stop_grace_s=0) as without:
        expected = without.generate_many(PROMPTS, NEW_TOKENS, **ASK)
    with start(tmp_path, "server.log", f"ssd_cache_gb: 0.1\nssd_cache_dir: {directory}\n", tp_size) as server:
        files = ["flexkv-dp0-tp0.slots", "flexkv-dp1-tp1.slots"]
        assert sorted(path.name for path in directory.glob("*.slots")) == files

        def loaded(rank: int, tier: str) -> float:
            return server.metric("flexkv_loaded_tokens_total", dp_rank=str(rank), tier=tier)

        # Both compute, then both load at the same time.
        for _ in range(2):
            got = answers(server, IN_TURN)
            assert not differing(got, expected, apart)
        assert [answer["meta_info"]["dp_rank"] for answer in got] == IN_TURN
        assert sum(cached(got)) > 0.5 * sum(whole_pages(PROMPTS))
        # One has all the work. It has never seen the prompts of the other, and does not find them there.
        before = loaded(1, "cpu") + loaded(1, "ssd")
        got = answers(server, [0] * len(PROMPTS), concurrency=1)
        assert not differing(got, expected, apart)
        assert cached(got[::2]) == whole_pages(PROMPTS[::2])
        assert not any(cached(got[1::2]))
        assert loaded(0, "ssd") > 0
        assert loaded(1, "cpu") + loaded(1, "ssd") == before
        # What cannot be loaded on one is computed there, and the other does not run it again.
        slot_files.damage(directory / files[1], every=8)
        got = answers(server, [1] * len(PROMPTS), concurrency=1)
        assert not differing(got, expected, apart)
        assert server.metric("flexkv_failed_loads_total", dp_rank="1") > 0
        assert server.metric("flexkv_failed_loads_total", dp_rank="0") == 0
        server.flush_cache()
        got = answers(server, IN_TURN[:2], PROMPTS[:2])
        assert not differing(got, expected[:2], apart)
        assert not any(cached(got))
    check_log(server.log())
    assert "runs again: its cached KV could not be loaded" in server.log()


@pytest.mark.parametrize("tp_size", [2])
def test_ranks_find_each_others_blocks_in_a_store(tmp_path: Path, tp_size: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    prompts = PROMPTS[:2]
    # Of the last token of an answer nobody has computed KV.
    num_blocks = sum((len(prompt) + NEW_TOKENS - 1) // PAGE for prompt in prompts)
    apart = rounding(MODEL, tp_size)
    with start(tmp_path, "server.log", f"remote: file://{store}\n", tp_size) as server:
        expected = answers(server, [0] * len(prompts), prompts)
        deadline_s = time.monotonic() + ANSWER_S
        while len(list(store.rglob("*-*"))) < num_blocks:
            assert time.monotonic() < deadline_s, "not all is stored"
            time.sleep(0.05)
        got = answers(server, [1] * len(prompts), prompts)
        assert not differing(got, expected, apart)
        assert cached(got) == whole_pages(prompts)
    check_log(server.log())
