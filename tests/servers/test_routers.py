"""A router that believes a real server's KV events knows where each page of a prompt will come from.

Before each request it says how many tokens will be found on the device, in the CPU tier and on SSD. The
server says in its answer where they came from.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import zmq
from forked_server import ForkedServer
from router import PLACES, Router, names_of
from server import SGLangServer
from workload import conversations

from sglang_flexkv.replay.planner import KvShape

MODEL = Path(__file__).parents[2] / "models" / "tiny-gqa"
PAGE = 16
PATIENCE_S = 60.0
# Together several times what the device and the CPU tier hold.
TURNS = conversations(7, 3, seed=21, first_max=300, turn_max=200)
SOURCES = dict(zip(PLACES, ("device", "host", "storage"), strict=True))


class Subscriber:
    """A router at a server's events."""

    def __init__(self, endpoint: str) -> None:
        self.router = Router(PAGE)
        context = zmq.Context.instance()
        self._live, self._past = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        self._live.subscribe(b"")
        self._live.connect(endpoint)
        self._past.connect(f"{endpoint}.past")
        self._next = 0

    def listen_until(self, condition: Callable[[Router], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition(self.router):
            assert time.monotonic() < deadline_s, f"the events never said that {what}"
            if self._live.poll(50):
                _, number, batch = self._live.recv_multipart()
                if int.from_bytes(number, "big") > self._next:
                    self._ask_for_past()
                self._take(number, batch)

    def _take(self, number: bytes, batch: bytes) -> None:
        if int.from_bytes(number, "big") == self._next:
            self._next += 1
            self.router.take(msgspec.msgpack.decode(batch)[1])

    def _ask_for_past(self) -> None:
        """What was told before this socket was connected."""
        self._past.send_multipart([b"", self._next.to_bytes(8, "big")])
        while True:
            assert self._past.poll(1000 * PATIENCE_S), "past events do not come"
            *_, number, batch = self._past.recv_multipart()
            if not batch:
                return
            self._take(number, batch)

    def close(self) -> None:
        self._live.close(linger=0)
        self._past.close(linger=0)


@contextmanager
def told(base: Path, name: str) -> Iterator[tuple[SGLangServer, Subscriber]]:
    config = base / "flexkv.yaml"
    token = KvShape.of_model(MODEL, 1, "float32").block_bytes(PAGE) / PAGE
    config.write_text(
        f"cpu_cache_gb: {2_000 * token / 2**30:.5f}\nssd_cache_gb: 0.5\nssd_cache_dir: {base / 'ssd'}\n"
        "load_policy: load\n"
    )
    endpoint = f"ipc://{base / name}.events"
    flags = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "page-size": PAGE,
        "max-total-tokens": 2048,
        "kv-events-config": json.dumps(
            {"publisher": "zmq", "endpoint": endpoint, "replay_endpoint": f"{endpoint}.past"}
        ),
        "sleep-on-idle": None,  # it would not tell what reached the disk before the next request
        "log-level": "info",
    }
    server = ForkedServer(MODEL, flags, log_path=base / f"{name}.log")
    subscriber = Subscriber(endpoint)
    try:
        with server:
            yield server, subscriber
    finally:
        subscriber.close()
    assert "sglang-flexkv closed: nothing left held" in server.log(), server.log_tail()


def expected(router: Router, prompt: tuple[int, ...]) -> Counter[str]:
    """Tokens by where they will come from: the longest prefix that is anywhere, without the last token."""
    found: Counter[str] = Counter()
    for place in router.places(names_of(prompt[:-1], PAGE)):
        if place is None:
            break
        found[SOURCES[place]] += PAGE
    return found


def sources(server: SGLangServer, prompt: tuple[int, ...]) -> Counter[str]:
    details = server.generate(prompt, 1)["meta_info"]["cached_tokens_details"] or {}
    return +Counter({source: int(details.get(source, 0)) for source in SOURCES.values()})


def has_settled(names: list[int]) -> Callable[[Router], bool]:
    """Whether a prompt is everywhere, and what is in memory on SSD, too: nothing is under way then."""

    def settled(router: Router) -> bool:
        pages = router.pages
        return all(pages[place].issuperset(names) for place in PLACES) and (
            pages["CPU_PINNED"] <= pages["DISK"]
        )

    return settled


def test_a_router_knows_where_each_page_of_a_prompt_comes_from(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    total: Counter[str] = Counter()
    with told(tmp_path, "first") as (server, subscriber):
        router = subscriber.router
        for turn in TURNS:
            prompt = turn.tokens
            foreseen = expected(router, prompt)
            assert sources(server, prompt) == foreseen, f"turn {turn.number} of {turn.conversation}"
            total += foreseen
            names = names_of(prompt, PAGE)
            subscriber.listen_until(has_settled(names), "a prompt is stored")
            pages = len(names) * PAGE
            assert router.tokens_up_to(names[-1]) == list(prompt[:pages])
        assert set(total) == set(SOURCES.values()), total

    # What outlived the server is told of when a request has used it.
    with told(tmp_path, "second") as (server, subscriber):
        router = subscriber.router
        prompt = TURNS[-1].tokens
        names = names_of(prompt, PAGE)
        assert not expected(router, prompt)
        assert sources(server, prompt)["storage"] > 0
        subscriber.listen_until(has_settled(names), "a prompt is stored")

        cleared = router.num_cleared
        server.flush_cache()
        subscriber.listen_until(lambda router: router.num_cleared > cleared, "all is cleared")
        assert not any(router.pages.values())
        assert not sources(server, prompt)
        subscriber.listen_until(has_settled(names), "a prompt is stored again")
