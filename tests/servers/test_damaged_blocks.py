"""KV that turns out to be damaged after its request was admitted: the request computes it, on every rank, and
its client never learns."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import slot_files
from answers import ASK, EXACT, difference, differing, rounding
from forked_server import ForkedServer
from server import KV_ITEM_BYTES, SGLangServer
from workload import conversations, some_tokens

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gqa"
NEW_TOKENS = 6
TOKEN_BYTES = 1024 * KV_ITEM_BYTES  # of the model, over all ranks
# Each does not fit beside the others in the pool, nor all in the CPU tier: they come back from SSD.
PROMPTS = [turn.tokens for turn in conversations(8, 3, seed=5, turn_max=300)][-8:]


def damage(directory: Path, rank: str, every: int) -> int:
    """Flips a byte in every so many-th page of this rank's slots, under the running server."""
    (path,) = directory.glob(f"*{rank}*.slots")
    return slot_files.damage(path, every)


def server_over(directory: Path, tmp_path: Path, tp_size: int, settings: str) -> SGLangServer:
    """A server whose SSD tier is in this directory, with a small device pool."""
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    config.write_text(f"ssd_cache_gb: 0.5\nssd_cache_dir: {directory}\nload_policy: load\n{settings}")
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "max-total-tokens": 2560,
        "chunked-prefill-size": 256,
        "log-level": "info",
    }
    if tp_size > 1:
        flags["tp-size"] = tp_size
    return ForkedServer(MODEL, flags, log_path=tmp_path / "server.log")


def check_log(server: SGLangServer, tp_size: int) -> None:
    """That a request ran again, and nothing went wrong beside it."""
    log = server.log()
    assert "runs again: its cached KV could not be loaded" in log
    assert "hit an exception" not in log
    assert len(re.findall(r"sglang-flexkv closed: nothing left held", log)) == tp_size, server.log_tail()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_damaged_blocks_are_computed_again(tmp_path: Path, tp_size: int) -> None:
    directory = tmp_path / "ssd"
    apart = rounding(MODEL, tp_size)
    with server_over(directory, tmp_path, tp_size, "cpu_cache_gb: 0.01\n") as server:
        ask = {**ASK, "return_logprob": True}
        expected = [server.generate(prompt, NEW_TOKENS, **ask) for prompt in PROMPTS]
        assert server.metric("flexkv_failed_loads_total") == 0
        for one_at_a_time in (True, False):
            before = server.metric("flexkv_failed_loads_total")
            # Of one rank alone: the others must do as it does.
            assert damage(directory, f"tp{tp_size - 1}", every=64 if one_at_a_time else 48) > 10
            if one_at_a_time:
                got = [server.generate(prompt, NEW_TOKENS, **ask) for prompt in PROMPTS]
            else:
                got = server.generate_many(PROMPTS, NEW_TOKENS, concurrency=4, **ask)
            # Of several at a time some are prefetched, which finds the damage before they are admitted.
            if one_at_a_time:
                assert server.metric("flexkv_failed_loads_total") > before, server.log_tail()
            for want, have in zip(expected, got, strict=True):
                assert difference(have, want, apart) is None
                assert have["meta_info"]["finish_reason"]["type"] == "length"
                assert have["meta_info"]["cached_tokens"] <= have["meta_info"]["prompt_tokens"]
                assert have["meta_info"]["completion_tokens"] == NEW_TOKENS
                logprobs = have["meta_info"]["output_token_logprobs"]
                assert len(logprobs) == NEW_TOKENS
                if EXACT:
                    for a, b in zip(logprobs, want["meta_info"]["output_token_logprobs"], strict=True):
                        assert a[0] == pytest.approx(b[0], abs=1e-3)
        again = [server.generate(prompt, NEW_TOKENS, **ask) for prompt in PROMPTS]
        assert not differing(again, expected, apart)
        assert server.metric("flexkv_loaded_tokens_total", tier="ssd") > 0
    check_log(server, tp_size)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_of_a_batch_only_the_request_whose_blocks_are_damaged_runs_again(
    tmp_path: Path, tp_size: int
) -> None:
    """The others load beside it, in the same forward, and go on with what they have loaded."""
    rng = random.Random(8)
    damaged, *others = prompts = [some_tokens(rng, length) for length in (600, 300, 310)]
    cpu_tokens = 4000
    directory = tmp_path / "ssd"
    settings = f"cpu_cache_gb: {cpu_tokens * TOKEN_BYTES / 2**30}\ncpu_eviction_policy: lru\n"
    apart = rounding(MODEL, tp_size)
    with server_over(directory, tmp_path, tp_size, settings) as server:
        expected = [slot_files.store_on_ssd(server, damaged, NEW_TOKENS, **ASK)]
        for _ in range(2):  # it leaves the CPU tier: SSD alone has it
            slot_files.store_on_ssd(server, some_tokens(rng, cpu_tokens // 2))
        expected += [server.generate(other, NEW_TOKENS, **ASK) for other in others]
        server.generate(some_tokens(rng, 2500), NEW_TOKENS)  # they leave the device
        assert damage(directory, f"tp{tp_size - 1}", every=8) > 10
        failed = server.metric("flexkv_failed_loads_total", tp_rank="0")
        loaded = server.metric("flexkv_loaded_tokens_total", tier="cpu", tp_rank="0")
        got = server.request(
            "POST",
            "/generate",
            json={
                "input_ids": prompts,
                "sampling_params": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS},
                **ASK,
            },
        ).json()
        assert not differing(got, expected, apart)
        assert server.metric("flexkv_failed_loads_total", tp_rank="0") - failed == 1, server.log_tail()
        cached = [answer["meta_info"]["cached_tokens"] for answer in got]
        assert cached[0] == 0
        assert min(cached[1:]) > 200
        of_others = server.metric("flexkv_loaded_tokens_total", tier="cpu", tp_rank="0") - loaded
        assert 400 < of_others <= sum(cached[1:])
        again = [server.generate(each, NEW_TOKENS, **ASK) for each in prompts]
        assert not differing(again, expected, apart)
    assert "Prefill batch, #new-seq: 3" in server.log()
    check_log(server, tp_size)
