"""When are two answers of servers the same?

In float32 when every token of one is that of the other: how much of a prompt is computed at once makes no
difference that shows. In bfloat16, which attention on a GPU wants, it does: a model rounds differently when
it computes another number of tokens at once, with or without a cache, and of two tokens that are about
equally likely the other one may win. There two answers are the same if their tokens are about equally likely
up to the first that differs, and that one is about as likely as the one it replaces. What comes from wrong KV
is neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server import DTYPE

Answer = Mapping[str, Any]  # SGLang's, of a request with the fields of ASK

EXACT = DTYPE == "float32"
# What a request has to ask for so that its answer can be compared.
ASK: dict[str, Any] = {} if EXACT else {"return_logprob": True, "top_logprobs_num": 8}
# How far apart log-probabilities may be that rounding alone tells apart: bfloat16 has 8 bits.
TOLERANCE = 0.1


def difference(got: Answer, want: Answer) -> str | None:
    """Why an answer is not the one it should be; None if it is the same."""
    tokens, expected = list(got["output_ids"]), list(want["output_ids"])
    if tokens == expected and EXACT:
        return None
    if EXACT or len(tokens) != len(expected):
        return f"{tokens} instead of {expected}"
    chosen, of_expected = _logprobs(got), _logprobs(want)
    for at, (token, other) in enumerate(zip(tokens, expected, strict=True)):
        if token == other:
            if abs(chosen[at] - of_expected[at]) > TOLERANCE:
                return f"token {at} with log-probability {chosen[at]:.3f} instead of {of_expected[at]:.3f}"
            continue
        # From here on they continue different texts. Was it a tie?
        likely = {entry[1]: entry[0] for entry in want["meta_info"]["output_top_logprobs"][at]}
        if of_expected[at] - likely.get(token, float("-inf")) > TOLERANCE:
            return f"{tokens} instead of {expected}: token {at} is not as likely as the one it replaced"
        return None
    return None


def differing(got: Sequence[Answer], want: Sequence[Answer]) -> dict[int, str]:
    """Those that are not the same, by their place."""
    pairs = enumerate(zip(got, want, strict=True))
    return {at: why for at, (one, other) in pairs if (why := difference(one, other)) is not None}


def _logprobs(answer: Answer) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
