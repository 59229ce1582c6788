"""Judging answers in bfloat16 (tests/support/answers.py): a tie may go either way, nothing else may."""

from __future__ import annotations

from typing import Any

import answers
import pytest

pytestmark = pytest.mark.usefixtures("inexact")


@pytest.fixture
def inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "EXACT", False)


def answer(*positions: dict[int, float]) -> dict[str, Any]:
    """Of each position the likely tokens with their log-probabilities, the chosen one first."""
    entries = [[(logprob, token, None) for token, logprob in each.items()] for each in positions]
    return {
        "output_ids": [each[0][1] for each in entries],
        "meta_info": {
            "output_token_logprobs": [each[0] for each in entries],
            "output_top_logprobs": entries,
        },
    }


WANT = answer({7: -0.5, 8: -1.5}, {3: -0.70, 4: -0.75}, {9: -0.1})
SAME = [
    WANT,
    answer({7: -0.52}, {3: -0.72}, {9: -0.12}),
    answer({7: -0.5}, {4: -0.72, 3: -0.73}, {1: -5.0}),  # a tie; then it is another text
]
OTHERS = [
    answer({8: -0.5}, {3: -0.7}, {9: -0.1}),  # not as likely
    answer({7: -0.5}, {5: -0.7}, {9: -0.1}),  # not likely at all
    answer({7: -0.5}, {3: -0.9}, {9: -0.1}),  # the same tokens, from something else
    answer({7: -0.5}, {3: -0.7}),
]


@pytest.mark.parametrize("got", SAME)
def test_answers_that_are_the_same(got: dict[str, Any]) -> None:
    assert answers.difference(got, WANT) is None


@pytest.mark.parametrize("got", OTHERS)
def test_answers_that_are_not(got: dict[str, Any]) -> None:
    assert answers.difference(got, WANT)
    assert list(answers.differing([WANT, got], [WANT, WANT])) == [1]


def test_in_float32_every_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "EXACT", True)
    assert answers.difference(WANT, WANT) is None
    assert answers.difference(SAME[2], WANT)
