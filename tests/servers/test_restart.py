"""What a real SGLang server stored on SSD is found by the next one, after a stop and after a kill."""

from __future__ import annotations

import contextlib
import random
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import ASK, difference, differing, rounding
from forked_server import ForkedServer
from server import ServerError, ServerStartError, SGLangServer
from workload import conversations

from sglang_flexkv.storage import ssd_tools

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6
MODEL = ROOT / "models" / "tiny-gqa"
PROMPTS = [turn.tokens for turn in conversations(6, 2, seed=3)][-6:]

# About operation: a pod that has another address, or where SGLang can compile nothing, is the same server.
OPERATION = {
    "SGLANG_ZMQ_SOURCE_IP": "127.0.0.1",
    "TORCH_EXTENSIONS_DIR": "/proc/none",
}


def answers(server: SGLangServer) -> list[dict[str, Any]]:
    return [server.generate(prompt, NEW_TOKENS, **ASK) for prompt in PROMPTS]


def from_ssd(answer: dict[str, Any]) -> int:
    return (answer["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)


def end_under_load(server: SGLangServer) -> None:
    """Sends SIGTERM to every process of a server at once, while requests load and store."""
    rng = random.Random(6)
    new = [rng.sample(prompt, len(prompt)) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(server.generate, prompt, NEW_TOKENS) for prompt in [*PROMPTS, *new] * 10]
        requests[len(PROMPTS)].result()
        assert not server.signal_group(signal.SIGTERM)
        for request in requests:
            with contextlib.suppress(ServerError, httpx.TransportError):
                request.result()


def counters(server: SGLangServer) -> dict[tuple[str, str, str], float]:
    """Our metrics: the value by name, tier and rank."""
    return {
        (sample.name, sample.labels.get("tier", ""), sample.labels["tp_rank"]): sample.value
        for sample in server.metrics()
        if sample.name.startswith("flexkv_")
    }


def stored_blocks(directory: Path) -> list[int]:
    """What a server would find that starts now, rank by rank."""
    return [ssd_tools.inspect(files).live_blocks for files in ssd_tools.find([directory])]


def test_the_first_request_after_a_restart_hits_ssd(tmp_path: Path) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    config.write_text(f"cpu_cache_gb: 0.1\nssd_cache_gb: 0.5\nssd_cache_dir: {directory}\n")

    def server(env: dict[str, str] | None = None, log: str = "server.log", **changes: Any) -> SGLangServer:
        flags = {"enable-flexkv": True, "flexkv-config-file": str(config), "max-total-tokens": 4096}
        return ForkedServer(
            MODEL,
            {**flags, "log-level": "info", **changes},
            env=env,
            log_path=tmp_path / log,
        )

    apart = rounding(MODEL)
    with server() as first:
        expected = answers(first)

    def check_warm(server: SGLangServer, how: str) -> None:
        got = answers(server)
        # The first of all, before anything else can have brought it into memory.
        assert from_ssd(got[0]) >= len(PROMPTS[0]) - 16, (how, got[0]["meta_info"])
        assert sum(map(from_ssd, got)) > 0.5 * sum(map(len, PROMPTS)), how
        assert not differing(got, expected, apart), how

    for how, env in (("stopped", {}), ("killed", OPERATION)):
        again = server(env).start()
        try:
            check_warm(again, how)
            if how == "killed":
                end_under_load(again)
        finally:
            again.stop(grace_s=0)  # SIGKILL: the next start comes after a crash
    # Another setting is told with what differs before the model is loaded, and takes nothing away.
    with pytest.raises(ServerStartError, match="exited with status 1"):
        server({"SGLANG_ROPE_CACHE_FP32": "1"}, "refused.log", dtype="float16").start()
    log = (tmp_path / "refused.log").read_text()
    (message,) = (line for line in log.splitlines() if "sglang-flexkv cannot start: " in line)
    assert f"{directory}/flexkv-dp0-tp0.slots holds the cache of another model or setting (" in message
    assert re.search(r"--dtype: (float32|bfloat16) there, float16 now", message)
    assert "SGLANG_ROPE_CACHE_FP32: not set there, true now" in message
    assert message.count(" there, ") == 2, "only what differs"
    assert "Traceback" not in log
    assert "Init torch distributed" not in log
    # Clearing and flushing are for good: what they emptied does not come back with the next server.
    with server() as last:
        check_warm(last, "all told to end")
        last.flush_cache()
    with server() as after:
        answer = after.generate(PROMPTS[0], NEW_TOKENS, **ASK)
        assert answer["meta_info"]["cached_tokens"] == 0
        assert difference(answer, expected[0], apart) is None


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_burst_after_a_restart_computes_nothing_that_ssd_holds(tmp_path: Path, tp_size: int) -> None:
    """Requests with one long prompt and different ends, all at once: one reads, nobody computes."""
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    config.write_text(f"cpu_cache_gb: 0.1\nssd_cache_gb: 0.5\nssd_cache_dir: {directory}\n")
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "max-total-tokens": 8192,
        "log-level": "info",
    }
    if tp_size > 1:
        flags["tp-size"] = tp_size

    def server() -> SGLangServer:
        log = tmp_path / "server.log"
        return ForkedServer(MODEL, flags, log_path=log)

    bursts = [[[*prompt, *range(10 * n, 10 * n + 10)] for n in range(4)] for prompt in PROMPTS]
    apart = rounding(MODEL, tp_size)
    with server() as first:
        # Nothing has been counted yet, and everything is there.
        assert counters(first) == {
            (name, tier, str(rank)): 0.0
            for rank in range(tp_size)
            for name, tier in (
                ("flexkv_loaded_tokens_total", "cpu"),
                ("flexkv_loaded_tokens_total", "ssd"),
                ("flexkv_shared_tokens_total", ""),
                ("flexkv_recomputed_tokens_total", ""),
                ("flexkv_failed_loads_total", ""),
                ("flexkv_puts_without_room_total", ""),
                ("flexkv_spill_dropped_blocks_total", ""),
            )
        }
        expected = [[first.generate(prompt, NEW_TOKENS, **ASK) for prompt in burst] for burst in bursts]
    with server() as again:
        for prompt, burst, wanted in zip(PROMPTS, bursts, expected, strict=True):
            body = {
                "input_ids": burst,
                "sampling_params": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS},
                **ASK,
            }
            got = again.request("POST", "/generate", json=body).json()
            cached = [answer["meta_info"]["cached_tokens"] for answer in got]
            assert min(cached) >= len(prompt) - 16, (cached, len(prompt))
            assert not differing(got, wanted, apart)
        # What is on its way to SSD goes, too, and the next server finds nothing of it.
        assert min(stored_blocks(directory)) > 0
        for number, prompt in enumerate(PROMPTS):
            again.generate([number, *prompt], NEW_TOKENS)
        assert again.request("POST", "/hicache/storage-backend/clear").status_code == 200
    assert stored_blocks(directory) == [0] * tp_size
    log = (tmp_path / "server.log").read_text()
    assert log.count("sglang-flexkv closed: nothing left held") == 2 * tp_size, again.log_tail()
