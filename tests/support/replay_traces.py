"""Small traces for tests of ``replay``: made here, so that no recorded one has to be in the repository."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_flexkv.replay.trace import Trace, make_trace

TOKENS = 16

Path_ = tuple[int, ...]  # what is in each block of a prompt


def trace_of(prompts: Sequence[Sequence[int]], missing_tokens: int = 0) -> Trace:
    """Prompts by the contents of their blocks.

    Args:
        missing_tokens: by how much the last block of each prompt is incomplete.
    """
    return make_trace(((len(prompt) * TOKENS - missing_tokens, prompt) for prompt in prompts), TOKENS)


def random_prompts(seed: int, requests: int, length_max: int, branches: int = 3) -> list[Path_]:
    """Prompts that have prefixes of every length in common, the shorter the more often."""
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(branches) for _ in range(rng.randint(1, length_max))) for _ in range(requests)
    ]


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
