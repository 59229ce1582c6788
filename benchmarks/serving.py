"""What the benchmarks of whole servers share: a model, two servers, and quiet for the one measured."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import ROOT

sys.path.append(str(ROOT / "tests" / "support"))
_server: Any = importlib.import_module("server")
_answers: Any = importlib.import_module("answers")
SGLangServer: Any = _server.SGLangServer

ON_CPU: bool = _server.ON_CPU
EXACT: bool = _answers.EXACT
free_port: Any = _server.free_port

PAGE_SIZE = 16
_REQUEST_TIMEOUT_S = 300.0
_QUIET_TIMEOUT_S = 60.0
_LAST_WORDS = "The server is fired up"


def ensure_model(name: str) -> Path:
    """Directory of a small random-weight model, made if it is not there."""
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_models.py"), name],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return ROOT / "models" / name


def model_fields(model: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((model / "config.json").read_text())
    return fields


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of KV per token, in what the servers here compute in."""
    fields = model_fields(model)
    items = fields["num_hidden_layers"] * 2 * fields["num_key_value_heads"] * fields["head_dim"]
    return int(items * _server.KV_ITEM_BYTES)


def start(server: Any) -> None:
    """Starts a server, and has it freeze what Python's garbage collector looks at.

    SGLang does that last, in a thread, when the server answers already. It may come too early for its own
    HTTP server, or be stopped in the middle (``running``): then one server collects what another does not.
    """
    server.start()
    deadline = time.monotonic() + _QUIET_TIMEOUT_S
    while _LAST_WORDS not in server.log():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server never said {_LAST_WORDS!r}:\n{server.log_tail()}")
        time.sleep(0.05)
    server.request("POST", "/freeze_gc")


@contextmanager
def both_servers(model: Path, flags: dict[str, Any], flexkv_env: dict[str, str]) -> Iterator[tuple[Any, Any]]:
    """A stock server and one with FlexKV, alike but for that. Both are stopped at the end."""
    flags = {"page-size": PAGE_SIZE, **flags}
    stock = SGLangServer(model, flags, stop_grace_s=0)
    flexkv = SGLangServer(model, {**flags, "enable-flexkv": True}, env=flexkv_env, stop_grace_s=0)
    servers = (stock, flexkv)
    try:
        with ThreadPoolExecutor(len(servers)) as pool:  # a start is 20 s of imports
            list(pool.map(start, servers))
        for server in servers:
            _signal(server, signal.SIGSTOP)
        yield stock, flexkv
    finally:
        for server in servers:
            server.stop()  # SIGKILL, which a stopped process obeys too


def _tree(server: Any) -> list[psutil.Process]:
    if server.pid is None:
        return []
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]


def signal_trees(pids: Sequence[int], number: signal.Signals) -> None:
    """Signals processes and all that they have started."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


def _signal(server: Any, number: signal.Signals) -> None:
    if server.pid is not None:
        signal_trees([server.pid], number)


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """Lets a stopped server run. An idle scheduler of SGLang polls without pause and takes a core, so the
    server that is not being measured has to be stopped, not just left alone."""
    _signal(server, signal.SIGCONT)
    try:
        yield server
    finally:
        _signal(server, signal.SIGSTOP)


def wait_until_written(server: Any, quiet_s: float = 0.3) -> int:
    """Waits until the server has stopped writing to disk: what was to be spilled is spilled.

    Returns the bytes written so far.
    """
    deadline = time.monotonic() + _QUIET_TIMEOUT_S
    before, since = -1, time.monotonic()
    while time.monotonic() < deadline:
        written = sum(process.io_counters().write_bytes for process in _tree(server))
        if written != before:
            before, since = written, time.monotonic()
        elif time.monotonic() - since >= quiet_s:
            return before
        time.sleep(0.05)
    raise RuntimeError(f"the server has been writing for more than {_QUIET_TIMEOUT_S:.0f} s")


@dataclass(frozen=True)
class Answer:
    """One streamed completion.

    Attributes:
        ttft_s: from sending the request to the first token.
        source: cached tokens by where they came from: device, host, storage.
        whole: as SGLang gave it.
    """

    ttft_s: float
    output_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    source: dict[str, int]
    whole: dict[str, Any]

    def same_as(self, other: Answer) -> bool:
        """As far as what the servers compute in lets one tell."""
        return _answers.difference(self.whole, other.whole) is None


def ask(client: httpx.Client, server: Any, prompt: Sequence[int], max_new_tokens: int) -> Answer:
    """Sends one prompt and reads the stream to its end."""
    body = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": True},
        "stream": True,
        **_answers.ASK,
    }
    ttft_s, last = 0.0, ""
    begin_s = time.perf_counter()
    with client.stream("POST", f"{server.url}/generate", json=body, timeout=_REQUEST_TIMEOUT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                ttft_s = ttft_s or time.perf_counter() - begin_s
                last = line.removeprefix("data: ")
    answer = json.loads(last)
    meta = answer["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    return Answer(
        ttft_s,
        tuple(answer["output_ids"]),
        meta["prompt_tokens"],
        meta["cached_tokens"],
        {name: int(details.get(name) or 0) for name in ("device", "host", "storage")},
        answer,
    )
