"""Reading traces, and making them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_traces import random_prompts, trace_of, write_lines

from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.replay import trace as trace_module
from sglang_flexkv.replay.synthetic import GeneratorError, TraceKind, generate, write_trace
from sglang_flexkv.replay.trace import Trace, TraceError, keys_from_numbers, load_trace, make_trace

GOOD = {"timestamp": 1500, "input_length": 1200, "output_length": 3, "hash_ids": [0, 7, 8]}


def paths_of(trace: Trace) -> list[list[int]]:
    return [path.tolist() for path in trace.paths()]


def test_hash_ids(tmp_path: Path) -> None:
    other = {**GOOD, "timestamp": 2000, "hash_ids": [0, 7, 2**63 - 1]}
    trace = load_trace(write_lines(tmp_path / "t.jsonl", [GOOD, other]))
    assert (trace.num_requests, trace.input_tokens, trace.num_blocks) == (2, 2400, 4)
    assert paths_of(trace) == [[0, 1, 2], [0, 1, 3]]
    first, second = trace.requests()
    assert first.input_tokens == 1200
    assert first.keys.dtype == np.uint64
    assert first.keys.shape == (3, 2)
    assert (first.keys == second.keys).all(axis=1).tolist() == [True, True, False]


def test_without_the_incomplete_block(tmp_path: Path) -> None:
    trace = load_trace(write_lines(tmp_path / "t.jsonl", [{**GOOD, "hash_ids": [0, 7]}]))
    assert paths_of(trace) == [[0, 1]]


def test_numbers_give_the_same_keys_everywhere() -> None:
    """Pinned: results of different machines can be compared."""
    assert keys_from_numbers(np.zeros(1, np.int32)).tolist() == [[0xE220A8397B1DCDAF, 0x8209B480FAED1B10]]
    keys = keys_from_numbers(np.arange(10_000, dtype=np.int32))
    assert len(np.unique(keys[:, 0])) == len(np.unique(keys[:, 1])) == 10_000


def test_keys_of_requests_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are made for many requests at once: none gets those of another one."""
    monkeypatch.setattr(trace_module, "_CHUNK", 64 * 8)
    trace = trace_of([(), *random_prompts(4, requests=100, length_max=20), (), ()])
    for request, path in zip(trace.requests(), trace.paths(), strict=True):
        np.testing.assert_array_equal(request.keys, keys_from_numbers(path))


def test_token_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 50_000, 70).tolist()
    prompts = [tokens, tokens[:40], [*tokens[:20], 1, *tokens[21:]], []]
    trace = load_trace(write_lines(tmp_path / "t.jsonl", [{"token_ids": prompt} for prompt in prompts]), 16)
    assert trace.input_lengths.tolist() == [70, 40, 70, 0]
    assert paths_of(trace) == [[0, 1, 2, 3], [0, 1], [0, 4, 5, 6], []]
    assert trace.num_unchained_ids == 0


def test_a_timestamp_may_be_missing(tmp_path: Path) -> None:
    times: list[dict[str, Any]] = [
        {},
        {"timestamp": None},
        {"timestamp": 61.114},
        {"timestamp": 7},
        {},
        {"timestamp": 7},
    ]
    lines = [{"input_length": 512, "hash_ids": [n], **time} for n, time in enumerate(times)]
    trace = load_trace(write_lines(tmp_path / "t.jsonl", lines))
    assert (trace.num_requests, trace.num_late_requests) == (6, 1)


# As Qwen-Bailian publishes: an id stands for the tokens of one block, wherever it is.
BAILIAN = [
    {"chat_id": n, "parent_chat_id": -1, "timestamp": 61.114 * n, "type": "text", "turn": 1}
    | {"input_length": tokens, "hash_ids": ids}
    for n, (tokens, ids) in enumerate([(40, [5, 6, 5]), (60, [5, 6, 7, 6]), (48, [6, 5, 7])])
]


def test_ids_of_blocks_become_prefixes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", BAILIAN)
    trace = load_trace(path, 16)
    assert paths_of(trace) == [[0, 1, 2], [0, 1, 3, 4], [5, 6, 7]]
    assert trace.num_unchained_ids == 3
    with pytest.raises(TraceError, match=r"line 1: has 3 hash_ids .* give --tokens-per-block 16, which fits"):
        load_trace(path)


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_numbers_of_blocks(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "_CHUNK", chunk * 64)
    prompts = [(), *random_prompts(seed, requests=80, length_max=7, branches=2), (1,) * 40, (1,) * 39, ()]
    numbers: dict[tuple[int, ...], int] = {}
    paths = [[numbers.setdefault(p[: end + 1], len(numbers)) for end in range(len(p))] for p in prompts]
    trace = trace_of(prompts)
    assert paths_of(trace) == paths
    assert trace.num_blocks == len(numbers)
    assert trace.num_unchained_ids == sum(
        len({prefix for prefix in numbers if prefix[-1] == content}) > 1 for content in range(2)
    )
    # Its own numbers are chained, and stay what they are.
    again = make_trace(((len(path) * 16, path) for path in paths), 16)
    assert (paths_of(again), again.num_unchained_ids) == (paths, 0)


def test_gzip_by_content(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "t.jsonl", [GOOD] * 3)
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert paths_of(load_trace(packed)) == paths_of(load_trace(plain))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe(tmp_path: Path, pack: Any) -> None:
    """It can be read once only."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    content = pack((json.dumps(GOOD) + "\n").encode() * 2)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert load_trace(pipe).num_requests == 2
    writer.join()


def test_only_the_first_requests(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\nnot JSON\n")
    assert load_trace(path, requests_max=1).num_requests == 1


MEMORY = """
import resource, sys
from pathlib import Path
from sglang_flexkv.replay.trace import load_trace
from sglang_flexkv.replay.simulator import simulate, TierSetup
from sglang_flexkv.replay.optimum import optimum

def rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = rss()
trace = load_trace(Path(sys.argv[1]), 16)
optimum(trace, 100)
simulate(trace, TierSetup(100))
print(len(trace.blocks), rss() - before)
"""


def test_a_trace_takes_little_memory(tmp_path: Path) -> None:
    """While it is read and replayed, no more than 16 bytes an entry beside what does not grow with it."""
    path = tmp_path / "t.jsonl"
    shared = list(range(1500))
    with path.open("w") as file:
        for n in range(1000):
            ids = [*shared, *range((n + 1) * 10_000, (n + 1) * 10_000 + 500)]
            file.write(json.dumps({"input_length": len(ids) * 16, "hash_ids": ids}) + "\n")
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, timeout=200, check=True
    ).stdout
    entries, grown = map(int, out.split())
    assert entries == 2_000_000
    assert grown < entries * 16 + (24 << 20)


def with_(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    ("lines", "line", "what", "remedy"),
    [
        (["{"], 1, "is not JSON", "write one JSON object a line"),
        ([b"\xff"], 1, "is not JSON", "write one JSON object a line"),
        ([b"\0" * 100], 1, "is not JSON", "write one JSON object a line"),
        (["[1]"], 1, "is a JSON list", "write one JSON object a line"),
        ([with_(), with_().replace("[", f"[{'9' * 5000}, ", 1)], 2, "thousands of digits", "correct it"),
        (["[" * 200_000], 1, "nested too deeply", "one flat JSON object"),
        ([with_(), '{"a":' * 200_000], 2, "nested too deeply", "one flat JSON object"),
        (['{"prompt": "hi"}'], 1, "neither hash_ids nor token_ids, but ['prompt']", "docs/replay.md"),
        (["{}"], 1, "neither hash_ids nor token_ids, but []", "docs/replay.md"),
        (['{"hash_ids": [1], "hash_ids": [2]}'], 1, "has 'hash_ids' twice", "write it once"),
        ([with_(), with_(timestamp="soon")], 2, "timestamp is 'soon'", "or leave it out"),
        ([with_(timestamp=True)], 1, "timestamp is True", "write a number"),
        ([with_(timestamp=-1)], 1, "timestamp is -1", "write a number"),
        ([with_(timestamp=float("nan"))], 1, "timestamp is nan", "write a number"),
        ([with_(timestamp=10**400)], 1, "timestamp is 1000", "write a number"),
        ([with_(), "", with_(input_length=None)], 3, "has no input_length", "the number of tokens"),
        ([with_(input_length=1199.5)], 1, "input_length is 1199.5", "whole number"),
        ([with_(input_length=-3)], 1, "input_length is -3", "whole number"),
        ([with_(input_length="1200")], 1, "input_length is '1200'", "whole number"),
        ([with_(input_length=True)], 1, "input_length is True", "whole number"),
        ([with_(input_length=float("inf"))], 1, "input_length is inf", "whole number"),
        ([with_(input_length=10**400)], 1, "3 hash_ids for an input_length of 1000", "check whether"),
        ([with_(input_length=["x" * 10**6])], 1, "input_length is ['xxxxxxxx", "whole number"),
        ([with_(input_length=5000)], 1, "3 hash_ids for an input_length of 5000", "--tokens-per-block 2048"),
        ([with_(input_length=0)], 1, "3 hash_ids for an input_length of 0", "correct the line"),
        ([with_(hash_ids=None)], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, 7, "x"])], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, True, 2])], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, 1.0, 2])], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, -1, 2])], 1, "below 0", "write ids within that"),
        ([with_(hash_ids=[0, 2**63, 2])], 1, "above 2^63 - 1", "write ids within that"),
        ([with_(), '{"token_ids": [1, 2]}'], 2, "has no hash_ids", "one format in a file"),
        ([json.dumps({"token_ids": [2**40] * 512})], 1, "token_ids: ", "what the tokenizer gives"),
    ],
)
def test_what_is_wrong_and_where(
    tmp_path: Path, lines: list[str | bytes], line: int, what: str, remedy: str
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in lines))
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert len(message) < 500
    assert what in message
    assert remedy in message


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing cannot be read: No such file"):
        load_trace(tmp_path / "missing")
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        load_trace(tmp_path)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(TraceError, match="holds no request"):
        load_trace(empty)
    short = write_lines(tmp_path / "short", [{"token_ids": [1, 2, 3]}])
    with pytest.raises(TraceError, match="no request fills a block of 512 tokens"):
        load_trace(short)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 100)[:-20])
    with pytest.raises(TraceError, match="the gzip stream is damaged"):
        load_trace(cut)


def test_a_file_without_line_breaks(tmp_path: Path) -> None:
    """It would not fit into memory. Text, or a stream of something else."""
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    with path.open("r+b") as file:
        file.seek(1 << 40)  # a hole
        file.write(b"x")
    with pytest.raises(TraceError, match="line 2: is longer than 64 MiB, so this is hardly a trace"):
        load_trace(path)


# ---- synthetic traces ----


@pytest.mark.parametrize("kind", TraceKind)
def test_a_kind_and_a_seed_make_one_trace(kind: TraceKind) -> None:
    assert list(generate(kind, 60, 3)) == list(generate(kind, 60, 3))
    assert list(generate(kind, 60, 3)) != list(generate(kind, 60, 4))


@pytest.mark.parametrize("kind", TraceKind)
def test_synthetic_traces_are_valid(kind: TraceKind, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert write_trace(path, generate(kind, 400, 1)) == 400
    trace = load_trace(path)
    assert (trace.num_requests, trace.num_unchained_ids, trace.num_late_requests) == (400, 0, 0)
    assert trace.num_blocks < len(trace.blocks), "nothing comes again"


def test_phases_share_nothing() -> None:
    records = list(generate(TraceKind.PHASES, 100, 1))
    seen = [{block for record in records[at : at + 10] for block in record["hash_ids"]} for at in (0, 10)]
    assert not seen[0] & seen[1]


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="cannot be written: No such file"):
        write_trace(tmp_path / "missing" / "t.jsonl", generate(TraceKind.CHAT, 1))
    assert issubclass(GeneratorError, FlexKVError)
