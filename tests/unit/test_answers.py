"""Judging answers in bfloat16 (tests/support/answers.py): rounding may differ, and ties go either way; wrong
KV is noticed."""

from __future__ import annotations

import random
from typing import Any

import answers
import pytest

pytestmark = pytest.mark.usefixtures("inexact")


@pytest.fixture
def inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "EXACT", False)


def answer(*positions: tuple[int, list[float]]) -> dict[str, Any]:
    """Of each position the token, and the log-probabilities of those that are compared."""
    return {
        "output_ids": [token for token, _ in positions],
        "meta_info": {
            "output_token_ids_logprobs": [
                [[logprob, token, None] for token, logprob in enumerate(logprobs)]
                for _, logprobs in positions
            ]
        },
    }


def moved(logprobs: list[float], by: float, seed: int = 1) -> list[float]:
    rng = random.Random(seed)
    return [logprob + rng.choice((-by, by)) for logprob in logprobs]


RNG = random.Random(2)
FIRST, SECOND = ([-8 + RNG.gauss(0, 1) for _ in range(200)] for _ in range(2))
WANT = answer((7, FIRST), (3, SECOND))
SAME = [
    WANT,
    answer((7, moved(FIRST, 0.05)), (3, moved(SECOND, 0.05))),
    answer((7, moved(FIRST, 0.05)), (4, moved(SECOND, 0.05))),  # a tie
    answer((8, moved(FIRST, 0.05)), (9, moved(SECOND, 3.0))),  # a tie; then it is another text
]
OTHERS = [
    answer((7, moved(FIRST, 0.3)), (3, SECOND)),  # the same tokens, from something else
    answer((7, FIRST), (3, moved(SECOND, 0.3))),
    answer((8, moved(FIRST, 3.0)), (3, SECOND)),
    answer((7, FIRST)),
]


@pytest.mark.parametrize("got", SAME)
def test_answers_that_are_the_same(got: dict[str, Any]) -> None:
    assert answers.difference(got, WANT) is None


@pytest.mark.parametrize("got", OTHERS)
def test_answers_that_are_not(got: dict[str, Any]) -> None:
    assert answers.difference(got, WANT)
    assert list(answers.differing([WANT, got], [WANT, WANT])) == [1]


def test_how_far_apart_they_may_be_is_measured() -> None:
    again = answer((7, moved(FIRST, 0.02)), (3, moved(SECOND, 0.01)))
    allowed = answers.allowance([WANT, WANT], [WANT, again])
    assert allowed == pytest.approx(0.03)
    assert answers.difference(answer((7, moved(FIRST, 0.029)), (3, SECOND)), WANT, allowed) is None
    assert answers.difference(answer((7, moved(FIRST, 0.031)), (3, SECOND)), WANT, allowed)


def test_in_float32_every_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "EXACT", True)
    assert answers.allowance([WANT], [OTHERS[0]]) == 0.0
    assert answers.difference(WANT, WANT) is None
    assert answers.difference(SAME[2], WANT)
