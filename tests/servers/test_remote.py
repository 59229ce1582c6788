"""Two real servers that share a store: what the first computed the second does not compute, also when the
first is gone; and nobody notices when the store goes. ``--all-stores`` has every kind of store, not two."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, differing, rounding
from forked_server import ForkedServer
from remote_services import KINDS, SERVER_ENVIRONMENT
from server import DTYPE, SGLangServer
from workload import conversations

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 6
MODEL = ROOT / "models" / "tiny-gqa"
WITH_WINDOWS, WITH_STATES = ROOT / "models" / "tiny-swa", ROOT / "models" / "tiny-gdn"
WITH_LATENT = ROOT / "models" / "tiny-mla"
PAGE = 16
PROMPTS = [turn.tokens for turn in conversations(6, 2, seed=3)][-6:]
OTHERS = [turn.tokens for turn in conversations(6, 2, seed=4)][-6:]
PATIENCE_S = 120.0


def answers(server: SGLangServer, prompts: list[list[int]] = PROMPTS) -> list[dict[str, Any]]:
    return [server.generate(prompt, NEW_TOKENS, **ASK) for prompt in prompts]


def from_storage(answer: dict[str, Any]) -> int:
    return (answer["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)


def figure(server: SGLangServer, name: str) -> float:
    return sum(sample.value for sample in server.metrics() if sample.name == f"flexkv_remote_{name}")


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.fixture
def store(kind_of_store: str, tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "store").mkdir()
    made = KINDS[kind_of_store](tmp_path / "store")
    yield made
    made.stop()


def start(
    store: Any, log: Path, compression: str = "none", model: Path = MODEL, **more_flags: object
) -> SGLangServer:
    flags = {"enable-flexkv": True, "enable-metrics": True, "max-total-tokens": 4096, "log-level": "info"}
    env = {"FLEXKV_REMOTE": store.url, "FLEXKV_CPU_CACHE_GB": "0.1", **SERVER_ENVIRONMENT}
    env["FLEXKV_REMOTE_COMPRESSION"] = compression
    if model == WITH_STATES:
        env["SGLANG_MAMBA_CONV_DTYPE"] = DTYPE  # see test_states.py
    return ForkedServer(model, flags | more_flags, env=env, log_path=log)


def test_a_second_server_finds_what_the_first_computed(store: Any, tmp_path: Path) -> None:
    apart = rounding(MODEL)
    # Who reads needs not have the setting.
    compression = "none" if store.url.startswith("hicache:") else "always"
    # The other one has the model elsewhere, and since today. Copied now: files that are as young as a server
    # may have changed since it loaded them.
    model = tmp_path / "another machine's" / "model"
    shutil.copytree(MODEL, model, copy_function=shutil.copyfile)
    with start(store, tmp_path / "first.log", compression) as first:
        expected = answers(first)
        until(lambda: figure(first, "stored_bytes_total") > 0, "nothing is stored")
        compressed_to = figure(first, "compressed_to_bytes_total")
        assert (compressed_to > 0) == (compression == "always")
        assert compressed_to <= figure(first, "compressed_bytes_total")
        first_log = first.log()
    # It is gone, and what it had in memory with it. Its stop has let what waited be stored.
    with start(store, tmp_path / "second.log", model=model) as second:
        got = answers(second)
        assert from_storage(got[0]) >= len(PROMPTS[0]) - 16, got[0]["meta_info"]
        name = f"FlexKV: {store.url.partition(':')[0]}"
        assert got[0]["meta_info"]["cached_tokens_details"]["storage_backend"] == name
        assert sum(map(from_storage, got)) > 0.5 * sum(map(len, PROMPTS))
        assert not differing(got, expected, apart)
        assert figure(second, "online") == 1
        shared = [re.findall("blocks are shared as ([0-9a-f]{12})", log) for log in (first_log, second.log())]
        assert len(shared[0]) == 1
        assert shared[0] == shared[1]
        if compression == "always":  # figures are told once a second
            until(lambda: figure(second, "expanded_bytes_total") > 0, "nothing was expanded")
        if hasattr(store, "send"):
            check_that_nobody_notices_when_it_goes(second, store, expected, apart)


@pytest.mark.parametrize(
    ("model", "kind_of_store", "flags"),
    [
        (WITH_WINDOWS, "directory", {}),
        (
            WITH_STATES,
            "redis",
            {
                "mamba-radix-cache-strategy": "extra_buffer",
                "mamba-track-interval": 64,
                "max-mamba-cache-size": 20,
                "max-running-requests": 4,
                "chunked-prefill-size": 256,
            },
        ),
    ],
    ids=["windows", "states"],
)
def test_a_second_server_finds_windows_and_states(
    store: Any, model: Path, flags: dict[str, object], tmp_path: Path
) -> None:
    """A prefix is of use to it only with them."""
    prompts = PROMPTS[:4]
    # Each of them goes on behind what the first server has seen.
    longer = [(*prompt, *other[:40]) for prompt, other in zip(prompts, OTHERS, strict=False)]
    apart = rounding(model)
    with start(store, tmp_path / "first.log", model=model, **flags) as first:
        answers(first, prompts)
        until(lambda: figure(first, "stored_bytes_total") > 0, "nothing is stored")
    with start(store, tmp_path / "second.log", model=model, **flags) as second:
        got = answers(second, longer)
        # A state is kept every 64 tokens, a window where a prompt ends.
        assert sum(map(from_storage, got)) > 0.5 * sum(map(len, prompts)), [a["meta_info"] for a in got]
        assert figure(second, "online") == 1
        assert second.metric("flexkv_failed_loads_total") == 0
        second.flush_cache()
        again = answers(second, longer)  # computed
        assert sum(map(from_storage, again)) == 0
        assert not differing(got, again, apart)
    for log in ("first.log", "second.log"):
        text = (tmp_path / log).read_text()
        assert "hit an exception" not in text
        assert text.count("sglang-flexkv closed: nothing left held") == 1


@pytest.mark.parametrize("kind_of_store", ["directory"])
@pytest.mark.parametrize("tp_size", [2])
@pytest.mark.parametrize(
    ("model", "copies"), [(WITH_LATENT, 1), (MODEL, 2)], ids=["the_same_on_all_ranks", "heads_of_each_rank"]
)
def test_what_is_the_same_on_all_ranks_is_stored_once(
    store: Any, model: Path, copies: int, tp_size: int, tmp_path: Path
) -> None:
    apart = rounding(model, tp_size)
    with start(store, tmp_path / "first.log", model=model, **{"tp-size": tp_size}) as first:
        expected = answers(first)
    # Its stop has let what waited be stored. Of the last token of an answer nobody has computed KV.
    texts = [(*p, *a["output_ids"][:-1]) for p, a in zip(PROMPTS, expected, strict=True)]
    blocks = {text[:end] for text in texts for end in range(PAGE, len(text) + 1, PAGE)}
    values = [path for path in (tmp_path / "store").rglob("*-*") if path.is_file()]
    assert len(values) == copies * len(blocks)
    with start(store, tmp_path / "second.log", model=model, **{"tp-size": tp_size}) as second:
        got = answers(second)
        assert sum(map(from_storage, got)) > 0.5 * sum(map(len, PROMPTS)), [a["meta_info"] for a in got]
        assert not differing(got, expected, apart)
        assert second.metric("flexkv_failed_loads_total") == 0
        # Flushed it is for both ranks, and both go on with what is stored since.
        second.flush_cache()
        again = answers(second)
        assert sum(map(from_storage, again)) == 0
        assert not differing(again, expected, apart)
        until(lambda: len(list((tmp_path / "store").rglob("*-*"))) >= 2 * len(values), "nothing is stored")
        assert figure(second, "outages_total") == 0
    for log in ("first.log", "second.log"):
        text = (tmp_path / log).read_text()
        of_all = ", one copy for 2 ranks\n", "one copy for 2 ranks of this machine, kept by TP rank 0\n"
        assert [text.count(line) for line in of_all] == [tp_size if copies == 1 else 0] * 2
        assert text.count("sglang-flexkv closed: nothing left held") == tp_size


def check_that_nobody_notices_when_it_goes(
    server: SGLangServer, store: Any, expected: list[dict[str, Any]], apart: Any
) -> None:
    """It stands still, goes on, is killed, and comes back empty. Every request is answered as before."""
    store.send(signal.SIGSTOP)
    answers(server, OTHERS)
    assert not differing(answers(server), expected, apart)
    until(lambda: figure(server, "online") == 0, "a store that stands still is still asked")
    assert not differing(answers(server), expected, apart)
    store.send(signal.SIGCONT)
    until(lambda: figure(server, "online") == 1, "the store does not come back")
    store.stop()
    new = (rng.sample(OTHERS[0], 80) for rng in map(random.Random, itertools.count()))
    until(
        lambda: server.generate(next(new), 1) and figure(server, "online") == 0,
        "a dead store is still asked",
    )
    assert not differing(answers(server), expected, apart)
    store.start()
    until(lambda: figure(server, "online") == 1, "the store does not come back")
    assert not differing(answers(server), expected, apart)
