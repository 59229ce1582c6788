"""Traces made by a rule, in Mooncake's format, for what a recorded trace cannot show: one way of using a
cache at a time, and as many requests as asked for. The same kind, number and seed give the same trace
everywhere.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, TypedDict

from sglang_flexkv.common.errors import FlexKVError

TOKENS_PER_BLOCK = 512


class TraceKind(Enum):
    """Ways of using a cache."""

    CHAT = "chat"  # conversations of a few turns under shared system prompts
    AGENTS = "agents"  # long tool prompts, many short steps soon after each other, now and then a pause
    RAG = "rag"  # popular documents with a question each
    SCAN = "scan"  # chat, and long prompts that never come again in between
    STACK = "stack"  # what was used lately is used again: made for LRU
    PHASES = "phases"  # a hot set that is replaced altogether ten times: old counts mislead


class Record(TypedDict):
    """One line of Mooncake's format."""

    timestamp: int  # ms
    input_length: int  # tokens
    output_length: int  # tokens
    hash_ids: list[int]


class GeneratorError(FlexKVError):
    """A trace could not be written."""


class _Prompt(NamedTuple):
    time_s: float
    contents: list[Hashable]  # what is in each block; equal leading contents are equal prefixes
    tokens: int


@dataclass(frozen=True)
class _Sessions:
    """Conversations: each turn repeats what was there and adds to it."""

    arrivals_per_s: float
    prefixes: int  # system or tool prompts, the popular ones more often (Zipf)
    prefix_blocks: tuple[int, int]  # shortest and longest
    turns: Callable[[random.Random], int]
    first_tokens: float  # of the user; median
    added_tokens: float  # per turn, with the answer before it; median
    pause_s: float  # between turns; median
    long_pause_s: float = 0.0  # median of the pauses of someone who went away
    long_pause_share: float = 0.0


_CHAT = _Sessions(
    arrivals_per_s=1.0,
    prefixes=20,
    prefix_blocks=(1, 8),
    turns=lambda rng: 1 + int(rng.expovariate(1 / 3.5)),
    first_tokens=3000,
    added_tokens=750,
    pause_s=60,
)
_AGENTS = _Sessions(
    arrivals_per_s=0.3,
    prefixes=8,
    prefix_blocks=(12, 40),
    turns=lambda rng: rng.randint(5, 40),
    first_tokens=1500,
    added_tokens=950,
    pause_s=4,
    long_pause_s=120,
    long_pause_share=0.08,
)
_RAG_DOCUMENTS = 2000
_STACK_DEPTH_MEAN = 120
_STACK_NEW_SHARE = 0.15
_PHASES = 10
_PHASE_DOCUMENTS = 300


def generate(kind: TraceKind, requests: int, seed: int = 0) -> Iterator[Record]:
    """The lines of a trace, in order of time. Ids are given in the order in which blocks appear."""
    rng = random.Random(f"{kind.value} {seed}")
    prompts = {
        TraceKind.CHAT: lambda: _sessions(rng, _CHAT),
        TraceKind.AGENTS: lambda: _sessions(rng, _AGENTS),
        TraceKind.RAG: lambda: _rag(rng),
        TraceKind.SCAN: lambda: _scan(rng),
        TraceKind.STACK: lambda: _stack(rng),
        TraceKind.PHASES: lambda: _phases(rng, max(1, requests // _PHASES)),
    }[kind]()
    ids: dict[tuple[int, Hashable], int] = {}
    for prompt in itertools.islice(prompts, requests):
        path: list[int] = []
        parent = -1
        for content in prompt.contents:
            parent = ids.setdefault((parent, content), len(ids))
            path.append(parent)
        yield {
            "timestamp": int(prompt.time_s * 1000),
            "input_length": prompt.tokens,
            "output_length": 1 + int(_around(rng, 200)),
            "hash_ids": path,
        }


def write_trace(path: Path, records: Iterator[Record]) -> int:
    """Writes one line per record and returns how many. Raises GeneratorError."""
    count = 0
    try:
        with path.open("w", encoding="utf-8") as file:
            for record in records:
                count += 1
                file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise GeneratorError(f"{path} cannot be written: {error.strerror}; name another file") from None
    return count


def _around(rng: random.Random, median: float) -> float:
    """Log-normal, as lengths and pauses of real requests roughly are."""
    return median * rng.lognormvariate(0, 0.8)


def _zipf(rng: random.Random, count: int, exponent: float) -> Callable[[], int]:
    """Draws numbers below ``count``, the small ones more often."""
    weights = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(count)))
    return lambda: rng.choices(range(count), cum_weights=weights)[0]


def _arrivals(rng: random.Random, per_s: float) -> Iterator[float]:
    """Poisson."""
    time_s = 0.0
    while True:
        time_s += rng.expovariate(per_s)
        yield time_s


def _sessions(rng: random.Random, shape: _Sessions) -> Iterator[_Prompt]:
    popular = _zipf(rng, shape.prefixes, 1.0)
    lengths = [rng.randint(*shape.prefix_blocks) for _ in range(shape.prefixes)]
    arrivals = _arrivals(rng, shape.arrivals_per_s)
    # Turns that are going to come: time, session, its prefix, tokens after it, turns left.
    coming: list[tuple[float, int, int, float, int]] = []
    next_start_s = next(arrivals)
    sessions = itertools.count()
    while True:
        while not coming or next_start_s <= coming[0][0]:
            turn = (
                next_start_s,
                next(sessions),
                popular(),
                _around(rng, shape.first_tokens),
                shape.turns(rng),
            )
            heapq.heappush(coming, turn)
            next_start_s = next(arrivals)
        time_s, session, prefix, tokens, turns = heapq.heappop(coming)
        own, rest = divmod(int(tokens), TOKENS_PER_BLOCK)
        contents: list[Hashable] = [("prefix", prefix, i) for i in range(lengths[prefix])]
        contents += [("session", session, i) for i in range(own)]
        if rest:  # the next turn fills this block up, and it is another one then
            contents.append(("rest", session, turns))
        yield _Prompt(time_s, contents, lengths[prefix] * TOKENS_PER_BLOCK + own * TOKENS_PER_BLOCK + rest)
        if turns > 1:
            away = rng.random() < shape.long_pause_share
            pause_s = _around(rng, shape.long_pause_s if away else shape.pause_s)
            grown = tokens + _around(rng, shape.added_tokens)
            heapq.heappush(coming, (time_s + pause_s, session, prefix, grown, turns - 1))


def _rag(rng: random.Random) -> Iterator[_Prompt]:
    popular = _zipf(rng, _RAG_DOCUMENTS, 0.9)
    lengths = [rng.randint(4, 40) for _ in range(_RAG_DOCUMENTS)]
    for number, time_s in enumerate(_arrivals(rng, 3.0)):
        document = popular()
        contents: list[Hashable] = [("instructions", 0), ("instructions", 1)]
        contents += [("document", document, i) for i in range(lengths[document])]
        question = 1 + min(TOKENS_PER_BLOCK - 1, int(_around(rng, 60)))
        yield _Prompt(time_s, [*contents, ("question", number)], len(contents) * TOKENS_PER_BLOCK + question)


def _scan(rng: random.Random) -> Iterator[_Prompt]:
    """Three long prompts that never come again to five of chat."""
    chat = _sessions(rng, _CHAT)
    # Four turns a conversation, so this is about the rate that makes it three to five.
    scans = enumerate(_arrivals(rng, _CHAT.arrivals_per_s * 4 * 3 / 5))
    once = (
        _whole_blocks(time_s, [("scan", number, i) for i in range(rng.randint(10, 60))])
        for number, time_s in scans
    )
    return heapq.merge(chat, once, key=lambda prompt: prompt.time_s)


def _stack(rng: random.Random) -> Iterator[_Prompt]:
    stack: list[int] = []  # documents, the one used last at the end
    documents = itertools.count()
    for time_s in _arrivals(rng, 3.0):
        depth = math.floor(rng.expovariate(1 / _STACK_DEPTH_MEAN))
        new = rng.random() < _STACK_NEW_SHARE or depth >= len(stack)
        document = next(documents) if new else stack.pop(-1 - depth)
        stack.append(document)
        yield _whole_blocks(time_s, [("document", document, i) for i in range(8)])


def _phases(rng: random.Random, phase_requests: int) -> Iterator[_Prompt]:
    popular = _zipf(rng, _PHASE_DOCUMENTS, 0.7)
    for number, time_s in enumerate(_arrivals(rng, 3.0)):
        document = (number // phase_requests, popular())
        yield _whole_blocks(time_s, [(document, i) for i in range(8)])


def _whole_blocks(time_s: float, contents: list[Hashable]) -> _Prompt:
    return _Prompt(time_s, contents, len(contents) * TOKENS_PER_BLOCK)
