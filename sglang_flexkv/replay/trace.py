"""Request traces: what was asked, in which order, and which blocks the prompts have in common.

Two formats, told apart by their first line; one JSON object a line, plain or gzip:

- Mooncake's: ``timestamp`` (ms), ``input_length`` (tokens), ``output_length``, ``hash_ids``: one id per block
  of ``tokens_per_block`` tokens, the incomplete block at the end included. Ids are chained: equal ids mean
  equal prefixes.
- Token ids: ``token_ids``, and optionally ``timestamp`` (ms) and ``output_length``. Blocks are cut and named
  as by the library (``SequenceMeta``), so the incomplete block at the end is no block.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_flexkv.common.block import BlockKeys, SequenceMeta, make_namespace
from sglang_flexkv.common.errors import FlexKVError

MOONCAKE_TOKENS_PER_BLOCK = 512

_GZIP_MAGIC = b"\x1f\x8b"
_NAMESPACE = make_namespace({"what": "replayed traces"})
# Ids are mixed into both halves of a key, each with a constant of its own: no id gives the all-zero key,
# which means "none" to the index.
_SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))


class TraceError(FlexKVError, ValueError):
    """A trace cannot be read. Names the file, the line, what is wrong and what to do."""


class Request(NamedTuple):
    """One prompt."""

    timestamp_s: float
    input_tokens: int
    keys: BlockKeys  # uint64 [blocks, 2]


class BlockGraph(NamedTuple):
    """The blocks of a trace under small numbers, for what computes on all of it at once."""

    paths: list[list[int]]  # of each request the numbers of its blocks
    num_blocks: int  # different ones


@dataclass(frozen=True)
class Trace:
    """A trace in memory: 16 bytes per block of every request."""

    requests: list[Request]
    tokens_per_block: int

    @property
    def input_tokens(self) -> int:
        return sum(request.input_tokens for request in self.requests)

    @cached_property
    def blocks(self) -> BlockGraph:
        keys = np.concatenate([request.keys for request in self.requests])
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        first = np.ones(len(keys), np.bool_)  # of its kind, in this order
        first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
        numbers = np.empty(len(keys), np.int64)
        numbers[order] = np.cumsum(first) - 1
        ends = np.cumsum([len(request.keys) for request in self.requests])
        paths = [part.tolist() for part in np.split(numbers, ends[:-1])]
        return BlockGraph(paths, int(first.sum()))


def load_trace(
    path: Path, tokens_per_block: int = MOONCAKE_TOKENS_PER_BLOCK, requests_max: int | None = None
) -> Trace:
    """Reads a trace, or its first requests, into memory. Raises TraceError, also if no request has a
    block."""
    requests = list(islice(read_trace(path, tokens_per_block), requests_max))
    if not any(len(request.keys) for request in requests):
        raise TraceError(
            f"{path}: no request fills a block of {tokens_per_block} tokens; "
            "give another trace, or a smaller --tokens-per-block"
        )
    return Trace(requests, tokens_per_block)


def read_trace(path: Path, tokens_per_block: int = MOONCAKE_TOKENS_PER_BLOCK) -> Iterator[Request]:
    """The requests of a trace in the order of the file, read as they are asked for.

    Args:
        tokens_per_block: what a block of Mooncake's trace stands for, or how long token ids are cut.

    Raises:
        TraceError: while reading.
    """
    parse: Callable[[dict[str, Any]], Request] | None = None
    number = 0
    try:
        with _open(path) as lines:
            for line in lines:
                number += 1
                if not line.strip():
                    continue
                record = _record(line)
                if parse is None:
                    parse = _parser_for(record, tokens_per_block)
                yield parse(record)
    except _LineError as error:
        raise TraceError(f"{path}, line {number}: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(
            f"{path}, after line {number}: the gzip stream is damaged ({error}); copy the file again"
        ) from None
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror or error}; name a readable trace file"
        ) from None
    if parse is None:
        raise TraceError(f"{path} holds no request; a trace has one JSON object a line")


class _LineError(Exception):
    """What is wrong with a line, and what to do."""


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    """By content and not by name: a trace that was downloaded may have lost its suffix."""
    file = path.open("rb")
    if file.peek(len(_GZIP_MAGIC))[: len(_GZIP_MAGIC)] != _GZIP_MAGIC:
        return file
    file.close()
    return gzip.open(path, "rb")


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # of JSON, or of UTF-8
        raise _LineError(f"is not JSON ({error}); write one JSON object a line") from None
    if not isinstance(record, dict):
        raise _LineError(f"is a JSON {type(record).__name__}; write one JSON object a line")
    return record


def _parser_for(record: dict[str, Any], tokens_per_block: int) -> Callable[[dict[str, Any]], Request]:
    if "hash_ids" in record:
        return _MooncakeParser(tokens_per_block)
    if "token_ids" in record:
        return lambda other: _parse_tokens(other, tokens_per_block)
    raise _LineError(
        f"has neither hash_ids (Mooncake's format) nor token_ids, but {', '.join(record) or 'nothing'}; "
        "docs/replay.md describes both formats"
    )


class _MooncakeParser:
    """Also sees to it that ids are chained: without that they are no prefixes, and every figure would be
    wrong."""

    def __init__(self, tokens_per_block: int) -> None:
        self._tokens_per_block = tokens_per_block
        self._parents: dict[int, int] = {}

    def __call__(self, record: dict[str, Any]) -> Request:
        ids = _integers(record, "hash_ids")
        tokens = _number(record, "input_length")
        if tokens != int(tokens):
            raise _LineError(f"input_length is {tokens}; write a whole number of tokens")
        expected = -(-int(tokens) // self._tokens_per_block)
        # Some traces leave the incomplete block out.
        if len(ids) not in (expected, int(tokens) // self._tokens_per_block):
            raise _LineError(
                f"has {len(ids)} hash_ids for an input_length of {int(tokens)}, but blocks of "
                f"{self._tokens_per_block} tokens would be {expected}; correct the line, or give the "
                "--tokens-per-block that the trace was made with"
            )
        if len(set(ids)) != len(ids):
            raise _LineError("names a block twice in hash_ids; give every block of a prompt an id of its own")
        parent = -1
        for block in ids:
            if self._parents.setdefault(block, parent) != parent:
                raise _LineError(
                    f"has hash id {block} after another block than before; give ids that stand for the whole "
                    "prefix up to the end of their block"
                )
            parent = block
        return Request(_number(record, "timestamp") / 1000, int(tokens), keys_from_ids(ids))


def _parse_tokens(record: dict[str, Any], tokens_per_block: int) -> Request:
    ids = _integers(record, "token_ids")
    try:
        sequence = SequenceMeta(np.array(ids, np.int64), tokens_per_block, _NAMESPACE)
        keys = sequence.block_keys
    except ValueError as error:
        raise _LineError(f"token_ids: {error}; write what the tokenizer gives") from None
    return Request(_number(record, "timestamp", 0) / 1000, len(ids), keys)


def keys_from_ids(ids: list[int]) -> BlockKeys:
    """Keys of blocks that are known by a chained id, uint64 [blocks, 2]: the same in every process."""
    numbers = np.array(ids, np.uint64)
    return np.stack([_mixed(numbers + salt) for salt in _SALTS], axis=1)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: a bijection, so different ids give different keys."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _integers(record: dict[str, Any], name: str) -> list[int]:
    if name not in record:
        raise _LineError(f"has no {name}, unlike the first line; keep to one format in a file")
    values = record[name]
    # type() and not isinstance: true is an int to Python.
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise _LineError(f"{name} is no list of integers; write one")
    if values and not (min(values) >= 0 and max(values) < 2**63):
        raise _LineError(f"{name} has values below 0 or above 2^63 - 1; write ids within that")
    return values


def _number(record: dict[str, Any], name: str, default: float | None = None) -> float:
    value = record.get(name, default)
    if value is None:
        raise _LineError(f"has no {name}; add it")
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise _LineError(f"{name} is {value!r}; write a number of 0 or more")
    return float(value)
