"""A real SGLang server over CPU and SSD tiers answers exactly as one without any cache.

The device pool is several times smaller than the prompts, so nearly everything that comes back comes from a
lower tier; requests run four at a time with chunked prefill, some are aborted in mid-flight, the cache is
flushed in between, and tenants that must not share send the same prompts.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, EXACT, allowance, computed_in_chunks, difference, differing
from forked_server import ForkedServer
from server import DTYPE, ServerError, SGLangServer
from slot_files import store_on_ssd
from workload import Turn, conversations

from sglang_flexkv.replay.planner import KvShape

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6
POOL_TOKENS = 2048
TURNS = conversations(10, 5, seed=11, first_max=500, turn_max=260)
BEFORE_A_FLUSH = 20  # of them

References = dict[tuple[str, str], list[dict[str, Any]]]


@dataclass(frozen=True)
class Scenario:
    model: str
    kv_dtype: str
    page_size: int
    policy: str
    tp_size: int = 1
    # Neither the device nor the CPU tier holds all conversations, which are about 200 tokens a prompt.
    cpu_tokens: int = 3_000
    prompts: int = len(TURNS)  # of TURNS, the first
    server: type[SGLangServer] = ForkedServer

    def __str__(self) -> str:
        tp = f"-tp{self.tp_size}" if self.tp_size > 1 else ""
        return f"{self.model}-{self.kv_dtype}-page{self.page_size}-{self.policy}{tp}"


# With kv_dtype auto KV is what the model computes in: fp32 on a CPU, see answers.py.
SCENARIOS = [
    Scenario("tiny-gqa", "auto", 16, "write_through", server=SGLangServer),
    Scenario("tiny-mha", "bfloat16", 48, "write_back", prompts=30),  # pages need not be a power of two
    Scenario("tiny-gqa", "bfloat16", 1, "write_through_selective", cpu_tokens=1_800, prompts=30),
    Scenario("tiny-gqa", "auto", 16, "write_back", tp_size=2, prompts=30),
    # Attention over the latent takes a CPU ten times as long.
    Scenario("tiny-mla", "auto", 16, "write_through", tp_size=2, prompts=20),
    # KV in two pools, one of which keeps sliding windows.
    Scenario("tiny-swa", "auto", 16, "write_through", tp_size=2, prompts=20),
]


def token_bytes(scenario: Scenario) -> int:
    """Bytes of a token in the CPU tier, in all copies."""
    dtype = DTYPE if scenario.kv_dtype == "auto" else scenario.kv_dtype
    rank = KvShape.of_model(ROOT / "models" / scenario.model, scenario.tp_size, dtype)
    slot = -(-rank.block_bytes(scenario.page_size) // rank.tier_copies // 4096) * 4096
    return slot // scenario.page_size * rank.tier_copies


@pytest.fixture(scope="module")
def references() -> References:
    return {}


def reference(
    references: References, model: str, kv_dtype: str, prompts: int = len(TURNS)
) -> list[dict[str, Any]]:
    """What the same model answers without any cache, computed once per model and dtype of the KV."""
    if (model, kv_dtype) not in references:
        flags = {"disable-radix-cache": True, "kv-cache-dtype": kv_dtype, "max-total-tokens": 4 * POOL_TOKENS}
        with ForkedServer(ROOT / "models" / model, flags, stop_grace_s=0) as server:
            answers = server.generate_many([t.tokens for t in TURNS[:prompts]], NEW_TOKENS, **ASK)
        references[model, kv_dtype] = answers
    return references[model, kv_dtype]


def allowed(expected: list[dict[str, Any]], scenario: Scenario) -> float:
    """How far from these answers rounding alone may take a server as the scenario's: where it may, measured
    with every second prompt."""
    if EXACT:
        return 0.0
    prompts = [turn.tokens for turn in TURNS[: scenario.prompts : 2]]
    flags = {"kv-cache-dtype": scenario.kv_dtype, "max-total-tokens": 4 * POOL_TOKENS}
    model = ROOT / "models" / scenario.model
    again = computed_in_chunks(model, prompts, NEW_TOKENS, flags, scenario.tp_size)
    return allowance(expected[::2], again)


@contextlib.contextmanager
def flexkv_server(scenario: Scenario, tmp_path: Path) -> Iterator[SGLangServer]:
    config = tmp_path / "flexkv.yaml"
    directories = [tmp_path / "ssd0", tmp_path / "ssd1"]
    for directory in directories:
        directory.mkdir()
    config.write_text(
        f"cpu_cache_gb: {scenario.cpu_tokens * token_bytes(scenario) / 2**30}\n"
        "ssd_cache_gb: 0.5\n"
        f"ssd_cache_dir: {directories[0]};{directories[1]}\n"
        f"write_policy: {scenario.policy}\n"
    )
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "kv-cache-dtype": scenario.kv_dtype,
        "page-size": scenario.page_size,
        "max-total-tokens": POOL_TOKENS,
        "chunked-prefill-size": 512 // scenario.page_size * scenario.page_size,
        "log-level": "info",
    }
    if scenario.tp_size > 1:
        flags["tp-size"] = scenario.tp_size
    model, log = ROOT / "models" / scenario.model, tmp_path / "server.log"
    with scenario.server(model, flags, log_path=log) as server:
        yield server


def abort_some(server: SGLangServer, turns: list[Turn], stop: threading.Event) -> None:
    """Sends long requests over prompts the others use too, and aborts them at some point of their life."""
    rng = random.Random(5)
    number = 0
    while not stop.is_set():
        number += 1
        rid = f"victim-{number}"
        turn = rng.choice(turns)

        def victim(rid: str = rid, tokens: tuple[int, ...] = turn.tokens) -> None:
            with contextlib.suppress(ServerError):
                server.generate(tokens, 50, rid=rid)

        thread = threading.Thread(target=victim)
        thread.start()
        time.sleep(rng.choice([0.0, 0.02, 0.1, 0.4]))
        server.abort(rid)
        thread.join()


def sources(answers: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens by where they came from, over all answers."""
    total = {"device": 0, "host": 0, "storage": 0}
    for answer in answers:
        details = answer["meta_info"].get("cached_tokens_details") or {}
        for name in total:
            total[name] += details.get(name, 0)
    return total


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_answers_are_those_of_a_server_without_cache(
    scenario: Scenario, tmp_path: Path, references: References
) -> None:
    expected = reference(references, scenario.model, scenario.kv_dtype, scenario.prompts)
    apart = allowed(expected, scenario)
    turns = TURNS[: scenario.prompts]
    total = {"device": 0, "host": 0, "storage": 0}
    with flexkv_server(scenario, tmp_path) as server:

        def send(order: list[int]) -> None:
            answers = server.generate_many([turns[i].tokens for i in order], NEW_TOKENS, **ASK)
            wrong = differing(answers, [expected[i] for i in order], apart)
            assert not wrong, f"{len(wrong)} of {len(order)} answers differ: {wrong}"
            for name, tokens in sources(answers).items():
                total[name] += tokens

        send(list(range(BEFORE_A_FLUSH)))
        server.flush_cache()
        # Flushed means flushed, in every tier: the weights may have changed.
        first = server.generate(turns[BEFORE_A_FLUSH - 1].tokens, NEW_TOKENS, **ASK)
        assert first["meta_info"]["cached_tokens"] == 0
        assert difference(first, expected[BEFORE_A_FLUSH - 1], apart) is None
        order = list(range(len(turns)))
        stop = threading.Event()
        aborter = threading.Thread(target=abort_some, args=(server, turns, stop))
        aborter.start()
        try:
            for seed in (1, 2):
                random.Random(seed).shuffle(order)
                send(order)
                stop.set()  # with the first of them
        finally:
            stop.set()
            aborter.join()
        assert total["host"] > 20 * len(turns), total
        assert total["storage"] > 2 * len(turns), total
    if scenario.model == "tiny-mla":  # one copy for all ranks
        assert [path.name for path in (tmp_path / "ssd0").glob("*.slots")] == ["flexkv-dp0-tp0.slots"]
    log = server.log()
    assert "Traceback" not in log.split("sglang-flexkv closed")[0].split("The server is fired up")[-1]
    closed = re.findall(r"sglang-flexkv closed: (.*)", log)
    assert len(closed) == scenario.tp_size, server.log_tail()
    assert all(line.startswith("nothing left held") for line in closed), closed


def test_tenants_and_adapters_never_share(tmp_path: Path, references: References) -> None:
    expected = reference(references, "tiny-gqa", "auto")
    apart = allowed(expected, SCENARIOS[0])
    long = [i for i, turn in enumerate(TURNS) if turn.number == 4][:6]
    names: list[dict[str, str]] = [
        {},
        {"cache_salt": "alice"},
        {"cache_salt": "bob"},
        {"extra_key": "adapter"},
        {"extra_key": "adapter", "cache_salt": "alice"},
    ]
    with flexkv_server(replace(SCENARIOS[0], server=ForkedServer), tmp_path) as server:
        for name in names:  # all of it, so that every tier holds somebody's copy
            for i in long:
                answer = store_on_ssd(server, TURNS[i].tokens, NEW_TOKENS, **name, **ASK)
                assert difference(answer, expected[i], apart) is None
                shared = answer["meta_info"]["cached_tokens"]
                alike = [j for j in long if j < i and j % 3 == i % 3]  # same system prompt, same tenant
                assert shared == 0 or alike, f"{name} was served {shared} tokens of somebody else"
        for name in names:
            for i in long:
                answer = server.generate(TURNS[i].tokens, NEW_TOKENS, **name, **ASK)
                assert difference(answer, expected[i], apart) is None
                assert answer["meta_info"]["cached_tokens"] > len(TURNS[i].tokens) - 17
