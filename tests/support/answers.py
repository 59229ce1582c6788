"""When are two answers of servers the same?

In float32 when every token of one is that of the other: how much of a prompt is computed at once makes no
difference that shows. In bfloat16, which attention on a GPU wants, it does: a model rounds differently when
it computes another number of tokens at once, with or without a cache, and of two tokens that are about
equally likely the other one may win. Tokens tell nothing there. What tells is how likely a few hundred
tokens are that are the same for all answers: rounding moves each of them a little, wrong KV moves them by
several times as much.

How much rounding moves them depends on model, kernels and ranks, so it is measured: two servers without any
cache answer the same prompts, one of them in small chunks, and what comes from a cache may be as far away as
they are from each other at most, and half as far again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forked_server import ForkedServer
from server import DTYPE
from workload import conversations

Answer = Mapping[str, Any]  # SGLang's, of a request with the fields of ASK

EXACT = DTYPE == "float32"
# The tokens whose log-probabilities are compared: ordinary ones, all over the vocabulary.
_TOKENS = range(8, 4000, 16)
# What a request has to ask for so that its answer can be compared.
ASK: dict[str, Any] = {} if EXACT else {"return_logprob": True, "token_ids_logprob": list(_TOKENS)}
# Of the distance that rounding alone was seen to make. On a CPU 60 answers from a cache were at most 1.2
# times as far away. With a block of zeros in each of nine loads half of 20 answers were beyond 1.5 times,
# and a quarter beyond 5 times.
_MARGIN = 1.5
# Where nothing was measured: what rounding makes with these models, on a CPU, and as much again.
_USUAL = 0.25

_CHUNK_TOKENS = 128


def distance(one: Answer, other: Answer) -> float:
    """How far apart two answers to one prompt are: the root mean square of what log-probabilities differ by,
    at the position where that is most. Behind the first token that differs they continue different texts."""
    worst = 0.0
    positions = zip(one["output_ids"], other["output_ids"], _logprobs(one), _logprobs(other), strict=False)
    for token, of_other, logprobs, others in positions:
        squares = [(a - b) ** 2 for a, b in zip(logprobs, others, strict=True)]
        worst = max(worst, math.sqrt(sum(squares) / len(squares)))
        if token != of_other:
            break
    return worst


def allowance(answers: Sequence[Answer], again: Sequence[Answer]) -> float:
    """How far apart answers may be, given what servers without any cache answer that compute differently."""
    if EXACT:
        return 0.0
    return _MARGIN * max(distance(one, other) for one, other in zip(answers, again, strict=True))


def difference(got: Answer, want: Answer, allowed: float = _USUAL) -> str | None:
    """Why an answer is not the one it should be; None if it is the same.

    Args:
        allowed: what ``allowance`` says; nothing is allowed where models compute in float32.
    """
    tokens, expected = list(got["output_ids"]), list(want["output_ids"])
    if tokens == expected and EXACT:
        return None
    if EXACT or len(tokens) != len(expected):
        return f"{tokens} instead of {expected}"
    apart = distance(got, want)
    if apart > allowed:
        return f"{tokens} instead of {expected}: log-probabilities are {apart:.3f} apart, not {allowed:.3f}"
    return None


def differing(got: Sequence[Answer], want: Sequence[Answer], allowed: float = _USUAL) -> dict[int, str]:
    """Those that are not the same, by their place."""
    pairs = enumerate(zip(got, want, strict=True))
    return {at: why for at, (one, other) in pairs if (why := difference(one, other, allowed)) is not None}


def computed_in_chunks(
    model: Path, prompts: Sequence[Sequence[int]], new_tokens: int, flags: Mapping[str, Any], tp_size: int = 1
) -> list[dict[str, Any]]:
    """What a server without any cache answers that computes a few tokens at once, as one does that finds all
    but the end of a prompt in a cache.

    Args:
        flags: of the server, beside those that make it so.
    """
    with ForkedServer(
        model,
        {"disable-radix-cache": True, "chunked-prefill-size": _CHUNK_TOKENS, "tp-size": tp_size, **flags},
        stop_grace_s=0,
    ) as server:
        return server.generate_many(prompts, new_tokens, **ASK)


@functools.cache
def rounding(model: Path, tp_size: int = 1) -> float:
    """How far apart answers of a model may be, measured once: with two servers where it is not exact."""
    if EXACT:
        return 0.0
    prompts = [turn.tokens for turn in conversations(12, 3, seed=5)]
    with ForkedServer(model, {"disable-radix-cache": True}, stop_grace_s=0) as server:
        whole = server.generate_many(prompts, 4, **ASK)
    return allowance(whole, computed_in_chunks(model, prompts, 4, {}, tp_size))


def _logprobs(answer: Answer) -> list[list[float]]:
    """Of each output token those of _TOKENS."""
    return [[entry[0] for entry in of_token] for of_token in answer["meta_info"]["output_token_ids_logprobs"]]
