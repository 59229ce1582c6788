"""Speculative decoding on a real server: what is guessed is accepted after a hit as it was before.

NGRAM guesses from what it has seen, so a prompt that comes again has its answer guessed, and the model checks
several tokens at a time: with KV that is not what was computed it would say something else, and reject them.
EAGLE's draft model, and the layer of NEXTN (MTP), guess from KV of their own, which has to come back with the
target's.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from answers import ASK, difference, rounding
from drafts import make_draft, make_model_that_guesses
from forked_server import ForkedServer
from server import DTYPE, KV_ITEM_BYTES, SGLangServer
from workload import some_tokens

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32
RNG = random.Random(17)
PROMPTS = [some_tokens(RNG, length) for length in (250, 301, 280, 333, 260, 317)]


@dataclass(frozen=True)
class Case:
    """A model, and how its tokens are guessed.

    Attributes:
        token_bytes: of KV and what else a CPU tier keeps for a token.
    """

    model: str
    algorithm: str
    token_bytes: int
    flags: dict[str, Any] = field(default_factory=dict)


NGRAM = {"speculative-num-draft-tokens": 6}
ONE_TOKEN = {
    "speculative-num-draft-tokens": 2,
    "speculative-num-steps": 1,
    "speculative-eagle-topk": 1,
}
STATES = {
    "max-mamba-cache-size": 20,
    "mamba-radix-cache-strategy": "extra_buffer",
    "mamba-track-interval": 64,
}
CASES = {
    "ngram": Case("tiny-gqa", "NGRAM", 1024 * KV_ITEM_BYTES, NGRAM),
    "eagle": Case("tiny-gqa", "EAGLE", 2 * 1024 * KV_ITEM_BYTES, ONE_TOKEN),
    "ngram_windows": Case("tiny-swa", "NGRAM", 1024 * KV_ITEM_BYTES, NGRAM),
    "ngram_states": Case("tiny-gdn", "NGRAM", 4096, {**NGRAM, **STATES}),
    "nextn_states": Case("tiny-gdn", "NEXTN", 4096, {**ONE_TOKEN, **STATES}),
}


def steps(answer: dict[str, Any]) -> int:
    """Forwards that it took to generate an answer, less than one a token where guesses were accepted."""
    return int(answer["meta_info"]["spec_verify_ct"])


def with_drafts(case: Case, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The model of a case, and what makes it guess."""
    model = ROOT / "models" / case.model
    flags = {"speculative-algorithm": case.algorithm, **case.flags}
    if case.algorithm == "EAGLE":
        flags["speculative-draft-model-path"] = str(make_draft(directory, model))
    if case.algorithm == "NEXTN":
        model = make_model_that_guesses(directory, model)
    return model, flags


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_guessed_is_accepted_after_a_hit_as_before(case: Case, tmp_path: Path) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    config, log = tmp_path / "flexkv.yaml", tmp_path / "server.log"
    model, flags = with_drafts(case, tmp_path / "draft")
    flags |= {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "max-running-requests": 4,
        "max-total-tokens": 1024,
        "log-level": "info",
    }
    # The device holds three of the prompts, the CPU tier four or five.
    config.write_text(
        f"cpu_cache_gb: {1500 * case.token_bytes / 2**30}\ncpu_eviction_policy: lru\n"
        f"ssd_cache_gb: 0.2\nssd_cache_dir: {directory}\nload_policy: load\n"
    )
    apart = rounding(model)

    def ask(server: SGLangServer, number: int) -> dict[str, Any]:
        return server.generate(PROMPTS[number], NEW_TOKENS, **ASK)

    found = {"host": 0, "storage": 0}
    with ForkedServer(model, flags, env={"SGLANG_MAMBA_CONV_DTYPE": DTYPE}, log_path=log) as server:
        cold, warm = [], []
        for number in range(len(PROMPTS)):
            cold.append(ask(server, number))
            warm.append(ask(server, number))  # from the device
            assert cold[-1]["meta_info"]["cached_tokens"] == 0
            assert warm[-1]["meta_info"]["cached_tokens_details"]["device"] >= 192
            assert difference(warm[-1], cold[-1], apart) is None
        # Several tokens at a time, or the test would show nothing.
        assert sum(map(steps, warm)) < 0.75 * NEW_TOKENS * len(PROMPTS)
        numbers = range(len(PROMPTS))
        for number in (*reversed(numbers), *numbers):  # what was used last first: from all tiers
            answer = ask(server, number)
            assert difference(answer, cold[number], apart) is None
            assert steps(answer) <= steps(warm[number])
            for where in found:
                found[where] += answer["meta_info"]["cached_tokens_details"][where]
        assert min(found.values()) > 200, found
    text = log.read_text()
    assert "hit an exception" not in text
    assert len(re.findall(r"sglang-flexkv closed: nothing left held", text)) == 1
