"""Request traces: what was asked, in which order, and which blocks the prompts have in common.

Two formats, told apart by their first line; one JSON object a line, plain or gzip:

- Hash ids (Mooncake's, Qwen-Bailian's): ``input_length`` (tokens) and ``hash_ids``: one id per block of
  ``tokens_per_block`` tokens, the incomplete block at the end included or left out. An id may stand for the
  whole prefix up to the end of its block (Mooncake's do) or for the block alone (Qwen-Bailian's do): blocks
  are the same here if their ids and those of all blocks before them are.
- Token ids: ``token_ids``. Blocks are cut as by the library (``SequenceMeta``), so the incomplete block at
  the end is no block.

``timestamp`` may be left out; requests are taken in the order of the file. Other fields are not looked at.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import reprlib
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from sglang_flexkv.common.block import BlockKeys, SequenceMeta, make_namespace
from sglang_flexkv.common.errors import FlexKVError

DEFAULT_TOKENS_PER_BLOCK = 512  # Mooncake's
TOKENS_PER_BLOCK_MAX = 2**20

_STDIN = Path("-")
_GZIP_MAGIC = b"\x1f\x8b"
# A file without line breaks is no trace, and would not fit into memory.
_LINE_BYTES_MAX = 64 << 20
_ENTRIES_MAX = 2**31 - 1
# Entries that there is room for at first, and that room is made for. From so much memory on malloc moves
# pages instead of bytes when it grows, and gives them back when it is freed.
_GROW_FIRST, _GROW = 4 << 20, 1 << 20
# Entries that are looked at together, where all at once would take more memory than the trace.
_CHUNK = 1 << 20
_NAMESPACE = make_namespace({"what": "replayed traces"})
# Numbers are mixed into both halves of a key, each with a constant of its own: no number gives the all-zero
# key, which means "none" to the index.
_SALTS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))


class TraceError(FlexKVError, ValueError):
    """A trace cannot be read. Names the file, the line, what is wrong and what to do."""


class Request(NamedTuple):
    """One prompt."""

    input_tokens: int
    keys: BlockKeys  # uint64 [blocks, 2]


@dataclass(frozen=True)
class Trace:
    """A trace in memory: four bytes per block of every request.

    Blocks have numbers from 0, in the order in which they first appear.
    """

    blocks: npt.NDArray[np.int32]  # of every request, one after the other
    starts: npt.NDArray[np.int64]  # [requests + 1]: where in ``blocks`` each begins, and the end
    input_lengths: npt.NDArray[np.int64]  # [requests]: tokens
    tokens_per_block: int
    num_blocks: int  # different ones
    num_unchained_ids: int = 0  # ids of the file that stood for a block and not for its prefix
    num_late_requests: int = 0  # earlier by their timestamps than the request before

    @property
    def num_requests(self) -> int:
        return len(self.input_lengths)

    @property
    def input_tokens(self) -> int:
        return int(self.input_lengths.sum())

    def paths(self) -> Iterator[npt.NDArray[np.int32]]:
        """Of each request the numbers of its blocks."""
        for begin, end in self._bounds():
            yield self.blocks[begin:end]

    def requests(self) -> Iterator[Request]:
        keys, first = np.zeros((0, 2), np.uint64), 0  # of many requests at once; the first entry of them
        for (begin, end), tokens in zip(self._bounds(), self.input_lengths.tolist(), strict=True):
            if end > first + len(keys):
                keys, first = keys_from_numbers(self.blocks[begin : max(end, begin + _CHUNK // 64)]), begin
            yield Request(tokens, keys[begin - first : end - first])

    def _bounds(self) -> Iterator[tuple[int, int]]:
        # Not all as Python's numbers: a trace may have millions of requests.
        for at in range(0, self.num_requests, _CHUNK // 64):
            bounds = self.starts[at : at + _CHUNK // 64 + 1].tolist()
            yield from itertools.pairwise(bounds)


def load_trace(
    path: Path, tokens_per_block: int = DEFAULT_TOKENS_PER_BLOCK, requests_max: int | None = None
) -> Trace:
    """Reads a trace, or its first requests, into memory.

    Args:
        path: ``-`` is the standard input.
        tokens_per_block: what a hash id stands for, or how token ids are cut.

    Raises:
        TraceError: also if no request has a block.
    """
    reader = _Reader(tokens_per_block)
    number = 0
    try:
        with _open(path) as file:
            for line in _lines(file):
                number += 1
                if line.strip():
                    reader.add(line)
                    if len(reader.lengths) == requests_max:
                        break
    except _LineError as error:
        raise TraceError(f"{path}, line {number + error.after}: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TraceError(
            f"{path}, after line {number}: the gzip stream is damaged ({error}); copy the file again"
        ) from None
    except OSError as error:
        raise TraceError(
            f"{path} cannot be read: {error.strerror or error}; name a readable trace file"
        ) from None
    if not reader.lengths:
        raise TraceError(f"{path} holds no request; a trace has one JSON object a line")
    if not reader.num_entries:
        raise TraceError(
            f"{path}: no request fills a block of {tokens_per_block} tokens; "
            "give another trace, or a smaller --tokens-per-block"
        )
    return reader.trace()


def make_trace(prompts: Iterable[tuple[int, Iterable[int]]], tokens_per_block: int) -> Trace:
    """A trace from the lengths of prompts in tokens and the ids of their blocks, chained or not."""
    reader = _Reader(tokens_per_block)
    for tokens, ids in prompts:
        reader.append(tokens, array("q", ids))
    return reader.trace()


def keys_from_numbers(numbers: npt.NDArray[np.int32]) -> BlockKeys:
    """Keys of numbered blocks, uint64 [blocks, 2]: the same in every process."""
    wide = numbers.astype(np.uint64)
    return np.stack([_mixed(wide + salt) for salt in _SALTS], axis=1)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: a bijection, so different numbers give different keys."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- numbers of blocks ----


def _first_entries(
    ids: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Finds equal blocks by their whole prefixes: two entries are the same block if their ids are equal and
    the entries before them are the same block, or both have none before them.

    Args:
        ids: of the blocks of all requests.
        starts: int64 [requests + 1], where in it each request begins, and the end.

    Returns:
        Of each entry the first one of its block, int32 [entries], and whether it is that itself.
    """
    # Most prompts soon go ways of their own, so only those are followed, depth by depth, that so far are like
    # another one.
    first = np.arange(len(ids), dtype=np.int32)
    is_first = np.ones(len(ids), np.bool_)
    requests = np.flatnonzero(starts[1:] > starts[:-1])
    depth = 0
    while len(requests):
        entries = starts[requests] + depth
        above = first[entries - 1] if depth else np.zeros(len(entries), np.int32)
        order = np.lexsort((ids[entries], above))  # stable: the first of equal ones stays the first
        entries, above = entries[order], above[order]
        new = np.ones(len(entries), np.bool_)
        new[1:] = (ids[entries[1:]] != ids[entries[:-1]]) | (above[1:] != above[:-1])
        group = np.cumsum(new) - 1
        first[entries] = entries[new][group]
        is_first[entries[~new]] = False
        requests = np.sort(requests[order[np.bincount(group)[group] > 1]])
        depth += 1
        requests = requests[starts[requests] + depth < starts[requests + 1]]
    return first, is_first


def _number(first: npt.NDArray[np.int32], is_first: npt.NDArray[np.bool_]) -> int:
    """Turns what ``_first_entries`` gives into numbers of blocks from 0, in place. Returns how many there
    are."""
    numbers = np.cumsum(is_first, dtype=np.int32)
    numbers -= 1
    for part in _chunks(len(first)):
        first[part] = numbers[first[part]]
    return int(numbers[-1]) + 1 if len(numbers) else 0


def _count_repeated(ids: npt.NDArray[np.int64], chosen: npt.NDArray[np.bool_]) -> int:
    """How many values are more than once among the chosen ones. Overwrites ``ids``."""
    count = 0
    for part in _chunks(len(ids)):
        kept = ids[part][chosen[part]]
        ids[count : count + len(kept)] = kept
        count += len(kept)
    ids = ids[:count]
    ids.sort()
    repeated = 0
    for part in _chunks(count):
        # With the two before it: the second of a run counts, so what comes before the first is wanted, too.
        near = ids[max(part.start - 2, 0) : part.stop]
        same = near[1:] == near[:-1]
        repeated += int(np.count_nonzero(same[1:] & ~same[:-1])) + (part.start == 0 and bool(same[:1].any()))
    return repeated


def _chunks(count: int) -> Iterator[slice]:
    for begin in range(0, count, _CHUNK):
        yield slice(begin, begin + _CHUNK)


# ---- reading ----


class _LineError(Exception):
    """What is wrong with a line, and what to do."""

    after = 0  # lines from the last whole one to it


class _TooLongError(_LineError):
    after = 1


def _open(path: Path) -> IO[bytes]:
    """By content and not by name: a trace that was downloaded may have lost its suffix. What is a pipe can be
    opened once only."""
    file = os.fdopen(0, "rb", closefd=False) if path == _STDIN else path.open("rb")
    if file.peek(len(_GZIP_MAGIC))[: len(_GZIP_MAGIC)] != _GZIP_MAGIC:
        return file
    return cast(IO[bytes], gzip.GzipFile(fileobj=file))


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(_LINE_BYTES_MAX + 1):
        if len(line) > _LINE_BYTES_MAX:
            raise _TooLongError(
                f"is longer than {_LINE_BYTES_MAX >> 20} MiB, so this is hardly a trace; "
                "write one JSON object a line"
            )
        yield line


class _Reader:
    """Collects requests in flat arrays: as Python's objects they would take ten times the memory."""

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self._ids = np.empty(_GROW_FIRST, np.int64)  # the first num_entries count
        self.starts = array("q", [0])
        self.lengths = array("q")  # tokens
        self._parse: Callable[[dict[str, Any]], None] | None = None
        self._timestamp = 0.0
        self._num_late = 0

    @property
    def num_entries(self) -> int:
        """Blocks of all requests."""
        return self.starts[-1]

    def add(self, line: bytes) -> None:
        record = _record(line)
        if self._parse is None:
            self._parse = self._parser_for(record)
        self._parse(record)
        if (timestamp := _timestamp(record)) is not None:
            self._num_late += timestamp < self._timestamp
            self._timestamp = timestamp

    def append(self, tokens: int, ids: array[int]) -> None:
        begin, end = self.num_entries, self.num_entries + len(ids)
        if end > _ENTRIES_MAX:
            raise _LineError(
                f"brings the trace to {end:,} blocks, too many; read less of it, with --requests"
            )
        if end > len(self._ids):
            self._ids.resize(end + _GROW, refcheck=False)  # nobody else has it yet
        self._ids[begin:end] = ids
        self.starts.append(end)
        self.lengths.append(tokens)

    def trace(self) -> Trace:
        """What was read. Called once: it gives the memory of the ids back."""
        starts = np.array(self.starts, np.int64)
        lengths = np.array(self.lengths, np.int64)
        blocks, is_first = _first_entries(self._ids[: self.num_entries], starts)
        unchained = _count_repeated(self._ids[: self.num_entries], is_first)
        self._ids = np.empty(0, np.int64)
        num_blocks = _number(blocks, is_first)
        return Trace(blocks, starts, lengths, self.tokens_per_block, num_blocks, unchained, self._num_late)

    def _parser_for(self, record: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
        if "hash_ids" in record:
            return self._parse_hash_ids
        if "token_ids" in record:
            return self._parse_token_ids
        raise _LineError(
            f"has neither hash_ids nor token_ids, but {_shown(list(record))}; write one of them "
            "(docs/replay.md has both formats)"
        )

    def _parse_hash_ids(self, record: dict[str, Any]) -> None:
        ids = _integers(record, "hash_ids")
        tokens = record.get("input_length")
        if tokens is None:
            raise _LineError("has no input_length; write the number of tokens of the prompt")
        if isinstance(tokens, float) and tokens.is_integer():
            tokens = int(tokens)
        if type(tokens) is not int or tokens < 0:
            raise _LineError(f"input_length is {_shown(tokens)}; write a whole number of tokens, 0 or more")
        if not _fits(len(ids), tokens, self.tokens_per_block):
            fitting = [1 << bit for bit in range(21) if _fits(len(ids), tokens, 1 << bit)]
            remedy = f"give --tokens-per-block {fitting[-1]}, which fits, if" if fitting else "check whether"
            raise _LineError(
                f"has {len(ids)} hash_ids for an input_length of {_shown(tokens)}, but blocks of "
                f"{self.tokens_per_block} tokens would be {_shown(-(-tokens // self.tokens_per_block))}; "
                f"{remedy} the trace was made with it, or correct the line"
            )
        self.append(tokens, ids)

    def _parse_token_ids(self, record: dict[str, Any]) -> None:
        ids = _integers(record, "token_ids")
        try:
            sequence = SequenceMeta(np.frombuffer(ids, np.int64), self.tokens_per_block, _NAMESPACE)
            keys = sequence.block_keys
        except ValueError as error:
            raise _LineError(f"token_ids: {error}; write what the tokenizer gives") from None
        self.append(len(ids), array("q", np.ascontiguousarray(keys[:, 0]).tobytes()))


def _fits(blocks: int, tokens: int, tokens_per_block: int) -> bool:
    """Some traces leave the incomplete block at the end out."""
    return blocks in (tokens // tokens_per_block, -(-tokens // tokens_per_block))


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except RecursionError:
        raise _LineError("has brackets nested too deeply; write one flat JSON object a line") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _LineError(f"is not JSON ({error}); write one JSON object a line") from None
    except ValueError:  # what Python says of it is for programmers
        raise _LineError("has a number of thousands of digits; correct it") from None
    if not isinstance(record, dict):
        raise _LineError(f"is a JSON {type(record).__name__}; write one JSON object a line")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _LineError(f"has {_shown(twice)} twice in one object; write it once")
    return record


def _integers(record: dict[str, Any], name: str) -> array[int]:
    if name not in record:
        raise _LineError(f"has no {name}, unlike the first line; keep to one format in a file")
    values = record[name]
    # type() and not isinstance: true is an int to Python.
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise _LineError(f"{name} is no list of integers; write one")
    if values and not (min(values) >= 0 and max(values) < 2**63):
        raise _LineError(f"{name} has values below 0 or above 2^63 - 1; write ids within that")
    return array("q", values)


def _timestamp(record: dict[str, Any]) -> float | None:
    value = record.get("timestamp")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
        raise _LineError(f"timestamp is {_shown(value)}; write a number of 0 or more, or leave it out")
    return float(value)


def _shown(value: object) -> str:
    """What somebody wrote, cut where it gets long."""
    return reprlib.repr(value)
