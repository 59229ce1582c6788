"""Reading traces, and making them."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_traces import random_prompts, trace_of, write_lines

from sglang_flexkv.common.block import SequenceMeta
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.replay import trace as trace_module
from sglang_flexkv.replay.synthetic import GeneratorError, TraceKind, generate, write_trace
from sglang_flexkv.replay.trace import TraceError, keys_from_ids, load_trace, read_trace

GOOD = {"timestamp": 1500, "input_length": 1200, "output_length": 3, "hash_ids": [0, 7, 8]}


def keys_of(path: Path, tokens_per_block: int = 512) -> list[list[tuple[int, int]]]:
    return [[tuple(key) for key in request.keys.tolist()] for request in read_trace(path, tokens_per_block)]


def test_mooncakes_format(tmp_path: Path) -> None:
    other = {**GOOD, "timestamp": 2000, "hash_ids": [0, 7, 9]}
    path = write_lines(tmp_path / "t.jsonl", [GOOD, other])
    first, second = read_trace(path)
    assert (first.timestamp_s, first.input_tokens) == (1.5, 1200)
    assert first.keys.dtype == np.uint64
    assert first.keys.shape == (3, 2)
    assert (first.keys == second.keys).all(axis=1).tolist() == [True, True, False]


def test_without_the_incomplete_block(tmp_path: Path) -> None:
    (request,) = read_trace(write_lines(tmp_path / "t.jsonl", [{**GOOD, "hash_ids": [0, 7]}]))
    assert len(request.keys) == 2


def test_ids_give_the_same_keys_everywhere() -> None:
    """Pinned: results of different machines can be compared."""
    assert keys_from_ids([0]).tolist() == [[0xE220A8397B1DCDAF, 0x8209B480FAED1B10]]
    keys = keys_from_ids(list(range(10_000)))
    assert len(np.unique(keys[:, 0])) == len(np.unique(keys[:, 1])) == 10_000


def test_token_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 50_000, 70)
    records = [{"token_ids": tokens.tolist()}, {"token_ids": tokens[:40].tolist(), "timestamp": 2500}]
    whole, part = read_trace(write_lines(tmp_path / "t.jsonl", records), 16)
    assert (whole.timestamp_s, whole.input_tokens, len(whole.keys)) == (0.0, 70, 4)
    assert (part.timestamp_s, part.input_tokens, len(part.keys)) == (2.5, 40, 2)
    np.testing.assert_array_equal(part.keys, whole.keys[:2])
    named = SequenceMeta(tokens, 16, trace_module._NAMESPACE).block_keys
    np.testing.assert_array_equal(whole.keys, named)


def test_gzip_by_content(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "t.jsonl", [GOOD])
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert keys_of(packed) == keys_of(plain)


def test_only_the_first_requests(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\nnot JSON\n")
    assert len(load_trace(path, requests_max=1).requests) == 1


def with_(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


@pytest.mark.parametrize(
    ("lines", "line", "what", "remedy"),
    [
        (["{"], 1, "is not JSON", "write one JSON object a line"),
        ([b"\xff"], 1, "is not JSON", "write one JSON object a line"),
        (["[1]"], 1, "is a JSON list", "write one JSON object a line"),
        (['{"prompt": "hi"}'], 1, "neither hash_ids", "docs/replay.md"),
        ([with_(), "", with_(timestamp=None)], 3, "has no timestamp", "add it"),
        ([with_(), with_(timestamp="soon")], 2, "timestamp is 'soon'", "write a number"),
        ([with_(timestamp=True)], 1, "timestamp is True", "write a number"),
        ([with_(input_length=1199.5)], 1, "input_length is 1199.5", "whole number"),
        ([with_(input_length=5000)], 1, "3 hash_ids for an input_length of 5000", "--tokens-per-block"),
        ([with_(hash_ids=[0, 7, 7])], 1, "names a block twice", "an id of its own"),
        ([with_(hash_ids=[0, 7, "x"])], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, True, 2])], 1, "hash_ids is no list of integers", "write one"),
        ([with_(hash_ids=[0, -1, 2])], 1, "below 0", "write ids within that"),
        ([with_(hash_ids=[0, 2**63, 2])], 1, "above 2^63 - 1", "write ids within that"),
        ([with_(), with_(hash_ids=[7, 0, 8])], 2, "hash id 7 after another block", "the whole prefix"),
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
        list(read_trace(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
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


def test_numbers_of_blocks() -> None:
    prompts = random_prompts(3, requests=50, length_max=5)
    paths, num_blocks = trace_of(prompts).blocks
    numbers: dict[tuple[int, ...], int] = {}
    for prompt, path in zip(prompts, paths, strict=True):
        for end, number in enumerate(path):
            assert numbers.setdefault(prompt[: end + 1], number) == number
    assert sorted(numbers.values()) == list(range(num_blocks))


# ---- synthetic traces ----


@pytest.mark.parametrize("kind", TraceKind)
def test_a_kind_and_a_seed_make_one_trace(kind: TraceKind) -> None:
    assert list(generate(kind, 60, 3)) == list(generate(kind, 60, 3))
    assert list(generate(kind, 60, 3)) != list(generate(kind, 60, 4))


@pytest.mark.parametrize("kind", TraceKind)
def test_synthetic_traces_are_valid(kind: TraceKind, tmp_path: Path) -> None:
    """The reader checks that ids are chained and fit their lengths."""
    path = tmp_path / "t.jsonl"
    assert write_trace(path, generate(kind, 400, 1)) == 400
    trace = load_trace(path)
    assert len(trace.requests) == 400
    times = [request.timestamp_s for request in trace.requests]
    assert all(a <= b for a, b in pairwise(times))
    assert times[-1] > 0
    blocks = sum(len(request.keys) for request in trace.requests)
    assert trace.blocks.num_blocks < blocks, "nothing comes again"


def test_phases_share_nothing() -> None:
    records = list(generate(TraceKind.PHASES, 100, 1))
    seen = [{block for record in records[at : at + 10] for block in record["hash_ids"]} for at in (0, 10)]
    assert not seen[0] & seen[1]


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="cannot be written: No such file"):
        write_trace(tmp_path / "missing" / "t.jsonl", generate(TraceKind.CHAT, 1))
    assert issubclass(GeneratorError, FlexKVError)
