"""A recorded trace, cut down to what a small machine serves in some seconds.

A trace is a list of prompts with the ids of their blocks; equal ids are equal prefixes. What matters to a
cache is which prompts share a beginning. So whole families are drawn, all prompts that go on alike after the
first block (which often all have in common), and their order is kept. Lengths shrink alike: a block of the
trace becomes a page.
"""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from pathlib import Path

from serving import PAGE_SIZE

from sglang_flexkv.replay.synthetic import TraceKind, generate, write_trace
from sglang_flexkv.replay.trace import Trace, load_trace

_SYNTHETIC_REQUESTS = 2000


def load(path: Path) -> tuple[Trace, str]:
    """A trace, and what to call it: a generated one of chats where there is no such file."""
    if path.is_file():
        return load_trace(path), path.name
    with tempfile.TemporaryDirectory(prefix="compare-trace-") as directory:
        made = Path(directory) / "trace.jsonl"
        write_trace(made, generate(TraceKind.CHAT, _SYNTHETIC_REQUESTS, seed=1))
        return load_trace(made), f"generated ({TraceKind.CHAT.value}), there is no {path.name}"


def sample(trace: Trace, seed: int, tokens: int, prompt_tokens_max: int, vocabulary: int) -> list[list[int]]:
    """Prompts as token ids, in the trace's order.

    Args:
        seed: of what is drawn, and of the token ids: another seed shares no block with this one.
        tokens: how many they have together, at most.
        prompt_tokens_max: longer ones, and the families they are of, are left out.
    """
    rng = random.Random(seed)
    paths = [path.tolist() for path in trace.paths()]
    families: dict[int, list[int]] = defaultdict(list)
    for at, path in enumerate(paths):
        families[path[1] if len(path) > 1 else -1 - at].append(at)
    lengths = [max(1, n * PAGE_SIZE // trace.tokens_per_block) for n in trace.input_lengths.tolist()]
    drawn: list[int] = []
    left = tokens
    for family in rng.sample(list(families.values()), len(families)):
        wanted = sum(lengths[at] for at in family)
        if wanted <= left and max(lengths[at] for at in family) <= prompt_tokens_max:
            drawn += family
            left -= wanted
        if left < tokens // 50:
            break
    contents: dict[int, list[int]] = {}
    prompts = []
    for at in sorted(drawn):
        prompt: list[int] = []
        for block in paths[at]:
            if block not in contents:
                contents[block] = [rng.randrange(3, vocabulary) for _ in range(PAGE_SIZE)]
            prompt += contents[block]
        prompts.append(prompt[: lengths[at]])
    return prompts
