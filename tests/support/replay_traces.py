"""Small traces for tests of ``replay``: made here, so that no recorded one has to be in the repository."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_flexkv.replay.trace import Request, Trace, keys_from_ids

TOKENS = 16

Path_ = tuple[int, ...]  # what is in each block of a prompt


def trace_of(prompts: Sequence[Sequence[int]], missing_tokens: int = 0) -> Trace:
    """Prompts by their contents, which need not be chained: equal leading contents get equal ids.

    Args:
        missing_tokens: by how much the last block of each prompt is incomplete.
    """
    ids: dict[Path_, int] = {}
    requests = []
    for number, prompt in enumerate(prompts):
        path = [ids.setdefault(tuple(prompt[: end + 1]), len(ids)) for end in range(len(prompt))]
        requests.append(Request(float(number), len(path) * TOKENS - missing_tokens, keys_from_ids(path)))
    return Trace(requests, TOKENS)


def random_prompts(seed: int, requests: int, length_max: int, branches: int = 3) -> list[Path_]:
    """Prompts that have prefixes of every length in common, the shorter the more often."""
    rng = random.Random(seed)
    return [
        tuple(rng.randrange(branches) for _ in range(rng.randint(1, length_max))) for _ in range(requests)
    ]


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
