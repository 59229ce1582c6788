"""What a remote store that is of no use costs the time to the first token.

    python benchmarks/bench_remote_faults.py [--smoke] [--json FILE|-] [--only STORE ...]

For each kind of store a real server over a real store, beside one without any: both are alive, each prompt is
new and goes to both, some to the one and then the same to the other, in turn. The store is empty (everything
is stored), has no room (Redis), stands still (SIGSTOP), goes on, is killed, and comes back. Every answer is
compared with that of the server without a store. What a request may be held up at most is configured:
``remote_timeout_s`` for a look-up, and ``prefetch_timeout_s`` for what is to come.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import ROOT, JsonOption, Machine, Report, SmokeOption, disk_directory, median, print_table
from serving import PAGE_SIZE, ask, ensure_model, start

sys.path.append(str(ROOT / "tests" / "support"))
_forked: Any = importlib.import_module("forked_server")
_services: Any = importlib.import_module("remote_services")

_MODEL = "tiny-gqa"
_PROMPT_TOKENS, _NEW_TOKENS = 1024, 2
_AT_A_TIME = 4  # requests of one server, after which what it has computed has time to be stored
_PAUSE_S = 1.0
_TIMEOUT_S, _PREFETCH_TIMEOUT_S = 1.0, 3.0  # the defaults


def _kinds() -> list[str]:
    programs = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    needs = {
        "redis": ("redis-server", "redis"),
        "mooncake": ("mooncake_client", "mooncake"),
        "s3": ("weed", "obstore"),
    }
    return ["directory"] + [
        kind
        for kind, (program, module) in needs.items()
        if shutil.which(program, path=programs) and importlib.util.find_spec(module)
    ]


@contextmanager
def _full(service: Any) -> Iterator[None]:
    with importlib.import_module("redis").Redis(port=service.port) as client:
        client.config_set("maxmemory", 1)
        yield
        client.config_set("maxmemory", 0)


@contextmanager
def _standing_still(service: Any) -> Iterator[None]:
    service.send(signal.SIGSTOP)
    try:
        yield
    finally:
        service.send(signal.SIGCONT)


@contextmanager
def _killed(service: Any) -> Iterator[None]:
    service.stop()
    yield
    service.start()


def _states(
    kind: str, service: Any
) -> Iterator[tuple[str, Callable[[], contextlib.AbstractContextManager[None]]]]:
    """What becomes of a store, one after the other."""
    yield "empty", contextlib.nullcontext
    if kind == "redis":
        yield "full", lambda: _full(service)
    if hasattr(service, "send"):
        yield "stands still", lambda: _standing_still(service)
        yield "goes on", contextlib.nullcontext
        yield "killed", lambda: _killed(service)
        yield "is back", contextlib.nullcontext


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    requests: Annotated[int, typer.Option(min=4, help="For each state of each store.")] = 40,
    only: Annotated[list[str] | None, typer.Option(help="These stores.")] = None,
) -> None:
    """What each fault of each store adds to the time to the first token."""
    if smoke:
        requests = _AT_A_TIME
    model = ensure_model(_MODEL)
    numbers = itertools.count()
    settings = {"requests": requests, "prompt_tokens": _PROMPT_TOKENS}
    with disk_directory(None, "bench-faults") as scratch, contextlib.ExitStack() as stack:
        report = Report("remote faults", smoke, Machine.here(scratch), settings)
        os.environ.update(_services.SERVER_ENVIRONMENT)
        kinds = [kind for kind in _kinds() if kind in (only or [kind])]
        flags = {
            "page-size": PAGE_SIZE,
            "enable-flexkv": True,
            "max-total-tokens": 8192,
            "sleep-on-idle": True,
        }

        def server(name: str, **env: str) -> Any:
            env = {"FLEXKV_CPU_CACHE_GB": "0.1", **_services.SERVER_ENVIRONMENT, **env}
            made = _forked.ForkedServer(
                model, flags, env=env, log_path=scratch / f"{name}.log", stop_grace_s=0
            )
            stack.callback(made.stop)
            start(made)
            return made

        client = stack.enter_context(httpx.Client())
        without = server("none")
        for kind in kinds:
            (scratch / kind).mkdir()
            service = _services.KINDS[kind](scratch / kind)
            stack.callback(service.stop)
            over = server(kind, FLEXKV_REMOTE=service.url, FLEXKV_REMOTE_TIMEOUT_S=str(_TIMEOUT_S))
            for state, begin in [("warm up", contextlib.nullcontext), *_states(kind, service)]:
                seconds: dict[str, list[float]] = {"none": [], "over": []}
                pair = [("none", without), ("over", over)]
                with begin():
                    for turn in range(requests // _AT_A_TIME):
                        prompts = [
                            random.Random(next(numbers)).choices(range(5, 500), k=_PROMPT_TOKENS)
                            for _ in range(_AT_A_TIME)
                        ]
                        answers = {}
                        for name, each in pair if turn % 2 else reversed(pair):
                            answers[name] = [ask(client, each, prompt, _NEW_TOKENS) for prompt in prompts]
                            seconds[name] += [answer.ttft_s for answer in answers[name]]
                            time.sleep(_PAUSE_S)
                        for one, other in zip(answers["none"], answers["over"], strict=True):
                            report.check("answers as without a store", one.same_as(other))
                if state == "warm up":
                    continue
                p50 = {name: median(times) for name, times in seconds.items()}
                report.rows.append(
                    {
                        "store": kind,
                        "state": state,
                        "none_p50_ms": 1e3 * p50["none"],
                        "p50_ratio": p50["over"] / p50["none"],
                        "none_max_added_ms": 1e3 * (max(seconds["none"]) - p50["none"]),
                        "max_added_ms": 1e3 * (max(seconds["over"]) - p50["none"]),
                        "budget_ms": 1e3 * (_TIMEOUT_S + _PREFETCH_TIMEOUT_S),
                    }
                )
            over.stop()
            service.stop()
    print_table("added time to the first token", report.rows, list(report.rows[0]))
    for row in report.rows:
        report.check("within the budget", row["max_added_ms"] <= row["budget_ms"])
    report.results["max_added_ms"] = max(row["max_added_ms"] for row in report.rows)
    report.results["p50_ratio"] = max(row["p50_ratio"] for row in report.rows)
    report.goals.update(max_added_ms=f"≤ {1e3 * (_TIMEOUT_S + _PREFETCH_TIMEOUT_S):.0f}", p50_ratio="≤ 1.02")
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
