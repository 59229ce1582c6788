"""Prompts that come back: conversations that grow, share prefixes, and together far exceed a device pool."""

from __future__ import annotations

import random
from dataclasses import dataclass

VOCABULARY = range(300, 4000)  # plain tokens of the generated models' tokenizers


@dataclass(frozen=True)
class Turn:
    """One request of a conversation."""

    conversation: int
    number: int
    tokens: tuple[int, ...]


def some_tokens(rng: random.Random, length: int) -> list[int]:
    """A prompt that nobody else has."""
    return [rng.choice(VOCABULARY) for _ in range(length)]


def conversations(
    count: int, turns: int, *, seed: int, first_max: int = 700, turn_max: int = 450, system_prompts: int = 3
) -> list[Turn]:
    """``count`` conversations of ``turns`` requests, turn by turn, each repeating all that came before it.

    Lengths are mixed, odd ones included, from a few dozen to a few thousand tokens; groups of conversations
    share a system prompt.
    """
    rng = random.Random(seed)
    systems = [some_tokens(rng, rng.randint(50, 400)) for _ in range(system_prompts)]
    so_far = [list(systems[i % system_prompts]) for i in range(count)]
    out = []
    for number in range(turns):
        for i in range(count):
            so_far[i] += some_tokens(rng, rng.randint(7, first_max if number == 0 else turn_max))
            out.append(Turn(i, number, tuple(so_far[i])))
    return out
