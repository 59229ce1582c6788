"""SGLang's sessions over our tiers: streaming ones, which keep their KV out of the tree, those whose turns
SGLang joins, and those that only hold their part of the tree.

What is expected is what the server answers to the same tokens under a salt that nobody else has, uncached.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from answers import ASK, difference, differing, rounding
from forked_server import ForkedServer
from server import SGLangServer
from slot_files import store_on_ssd
from test_damaged_blocks import damage
from workload import some_tokens

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gqa"
POOL_TOKENS = 2048
NEW_TOKENS = 6
TURNS = 5

# By their tree core: the Rust core is SGLang's default; session radix needs the Python core.
SERVERS: dict[str, dict[str, Any]] = {
    "rust": {},
    "python": {"enable-session-radix-cache": True},
}
MODES = {"rust": ("streaming", "joined"), "python": ("streaming", "joined", "radix")}


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SGLangServer]:
    rounding(MODEL)  # measured before, and not beside it
    base = tmp_path_factory.mktemp(request.param)
    (base / "ssd").mkdir()
    config = base / "flexkv.yaml"
    # A CPU tier of 1,300 tokens: most of what comes back comes from SSD.
    config.write_text(
        f"cpu_cache_gb: 0.005\nssd_cache_gb: 0.5\nssd_cache_dir: {base / 'ssd'}\nload_policy: load\n"
    )
    flags: dict[str, Any] = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "page-size": 16,
        "enable-streaming-session": True,
        "max-total-tokens": POOL_TOKENS,
        "chunked-prefill-size": 256,
        "log-level": "info",
        **SERVERS[request.param],
    }
    with ForkedServer(MODEL, flags, log_path=base / "server.log") as server:
        yield server
    log = server.log()
    assert "hit an exception" not in log
    assert "sglang-flexkv closed: nothing left held" in log, server.log_tail()


def uncached(server: SGLangServer, tokens: list[int], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    answer = server.generate(tokens, new_tokens, cache_salt=uuid.uuid4().hex, **ASK)
    assert answer["meta_info"]["cached_tokens"] == 0
    return answer


def drive_out(server: SGLangServer, rng: random.Random) -> None:
    """Fills the device and the CPU tier with something else."""
    server.generate_many([some_tokens(rng, POOL_TOKENS - 700) for _ in range(2)], 1, concurrency=1)


@dataclass
class Session:
    """A client's side of a session, one of three modes."""

    server: SGLangServer
    mode: str
    id: str = ""
    tokens: list[int] = field(default_factory=list)  # all so far
    last_rid: str | None = None
    asked: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)  # prompts, and their answers

    def __post_init__(self) -> None:
        body = {"capacity_of_str_len": 100000, "streaming": self.mode == "streaming"}
        self.id = self.server.request("POST", "/open_session", json=body).json()

    def ask(self, tokens: list[int], **fields: Any) -> dict[str, Any]:
        """The next turn; returns SGLang's ``meta_info``."""
        prompt = self.tokens + tokens
        if self.mode == "radix":
            answer = self.server.generate(prompt, NEW_TOKENS, session_id=self.id, **ASK, **fields)
        else:
            params: dict[str, Any] = {"id": self.id}
            if self.mode == "joined" and self.last_rid:
                params["rid"] = self.last_rid
            answer = self.server.generate(tokens, NEW_TOKENS, session_params=params, **ASK, **fields)
        meta: dict[str, Any] = answer["meta_info"]
        assert meta["prompt_tokens"] == len(prompt)
        assert meta["finish_reason"]["type"] == "length"
        self.last_rid = meta["id"]
        self.asked.append((prompt, answer))
        self.tokens = prompt + answer["output_ids"]
        return meta

    def close(self) -> None:
        self.server.request("POST", "/close_session", json={"session_id": self.id})

    def check(self) -> None:
        """That every turn was answered as if nothing were cached."""
        with ThreadPoolExecutor(4) as pool:
            expected = list(pool.map(lambda asked: uncached(self.server, asked[0]), self.asked))
        assert not differing([answer for _, answer in self.asked], expected, rounding(MODEL))


def modes(server: SGLangServer) -> tuple[str, ...]:
    return MODES["python" if "enable-session-radix-cache" in server.flags else "rust"]


def test_sessions_answer_as_if_nothing_were_cached(server: SGLangServer) -> None:
    """Several at once, five turns each, beside others that push everything off the device."""
    rng = random.Random(1)
    for mode in modes(server):
        prompts = [some_tokens(rng, 150), some_tokens(rng, 170)]
        for prompt in prompts:
            store_on_ssd(server, prompt)
        drive_out(server, rng)

        def converse(
            number: int, mode: str = mode, prompts: list[list[int]] = prompts
        ) -> tuple[Session, int]:
            own, session = random.Random(number), Session(server, mode)
            loaded = 0
            for turn in range(TURNS):
                meta = session.ask(
                    prompts[number % 2] if turn == 0 else some_tokens(own, own.randint(20, 50))
                )
                details = meta["cached_tokens_details"] or {}
                loaded += details.get("host", 0) + details.get("storage", 0)
                if mode == "streaming" and turn > 0:
                    # All but what is new, and the last token of the answer before, which nobody has read.
                    assert meta["cached_tokens"] >= len(session.asked[-2][0]) + NEW_TOKENS - 1
            return session, loaded

        with ThreadPoolExecutor(8) as pool:
            conversations = [pool.submit(converse, number) for number in range(4)]
            others = [pool.submit(server.generate, some_tokens(rng, 400), 4) for _ in range(4)]
            sessions = [each.result()[0] for each in conversations]
            assert sum(each.result()[1] for each in conversations) > 0
            for each in others:
                each.result()
        for session in sessions:
            session.check()
            session.close()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_turn_whose_blocks_are_damaged_is_computed(server: SGLangServer, streaming: bool) -> None:
    rng = random.Random(2 + streaming)
    prompt = some_tokens(rng, 400)
    store_on_ssd(server, prompt)
    drive_out(server, rng)
    config = Path(str(server.flags["flexkv-config-file"]))
    before = server.metric("flexkv_failed_loads_total")
    assert damage(config.parent / "ssd", "tp0", every=8) > 10
    session = Session(server, "streaming" if streaming else "joined")
    session.ask(prompt)
    assert server.metric("flexkv_failed_loads_total") > before, server.log_tail()
    session.ask(some_tokens(rng, 50))
    session.check()
    session.close()


def begin(server: SGLangServer, body: dict[str, Any], then: Callable[[], None]) -> dict[str, Any]:
    """Streams an answer, and calls ``then`` when its first piece has come. Returns the last piece."""
    pieces = []
    with httpx.stream(
        "POST", f"{server.url}/generate", json={**body, "stream": True}, timeout=120
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            pieces.append(json.loads(line.removeprefix("data: ")))
            if len(pieces) == 1:
                then()
    assert len(pieces) > 1  # it had begun, and had not ended
    return dict(pieces[-1])


def turn(session: Session, tokens: list[int], max_new_tokens: int, rid: str | None = None) -> dict[str, Any]:
    return {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": max_new_tokens},
        "session_params": {"id": session.id},
        "rid": rid or uuid.uuid4().hex,
        **ASK,
    }


def test_a_flush_between_two_turns_and_while_one_waits(server: SGLangServer) -> None:
    rng = random.Random(4)
    session = Session(server, "streaming")
    session.ask(some_tokens(rng, 200))
    server.flush_cache()
    session.ask(some_tokens(rng, 40))
    tokens = some_tokens(rng, 40)

    def pause_and_flush() -> None:
        # The turn goes back into the queue, and waits there.
        server.request("POST", "/pause_generation", json={"mode": "retract"})
        server.flush_cache(timeout_s=0)  # with a timeout SGLang waits for the queue to empty
        server.request("POST", "/continue_generation", json={})

    answer = begin(server, turn(session, tokens, 300), pause_and_flush)
    assert answer["meta_info"]["completion_tokens"] == 300
    alone = uncached(server, session.tokens + tokens, 300)
    assert difference(answer, alone, rounding(MODEL)) is None
    session.tokens += tokens + answer["output_ids"]
    session.ask(some_tokens(rng, 40))
    session.check()
    session.close()


def test_a_session_goes_on_after_a_turn_that_was_given_up(server: SGLangServer) -> None:
    rng = random.Random(5)
    session = Session(server, "streaming")
    session.ask(some_tokens(rng, 200))
    for number in range(2):
        rid = f"given-up-{number}"
        answer = begin(
            server, turn(session, some_tokens(rng, 100), 1000, rid), lambda rid=rid: server.abort(rid)
        )
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        drive_out(server, rng)
        session.ask(some_tokens(rng, 40))
    session.check()
    session.close()
