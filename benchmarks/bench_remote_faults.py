"""What a remote store that is of no use costs the time to the first token.

    python benchmarks/bench_remote_faults.py [--smoke] [--json FILE|-] [--only STORE ...] [--fault FAULT ...]

For each kind of store a real server over a real store, beside one without any: both are alive, and all
prompts go to both, some to the one and then the same to the other, in turn. Most prompts are new, others
were stored long ago and have left this server's memory: what the store gives for them is loaded, whatever
that takes. The store has none of what is asked (everything is stored), is slow, gives back what nobody
stored, has no room, stands still (SIGSTOP), goes on, is killed, and comes back. Every answer is compared
with that of the server without a store. What a request may be held up at most is configured:
``remote_timeout_s`` for a look-up, and ``prefetch_timeout_s`` for what is to come.

The stores are on disks of their own (files with ext4), those of files behind a FUSE mount, which can be
stopped and killed. Mounts take root; without it a store on a disk is not filled.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import store_faults
import typer
from common import MIB, JsonOption, Machine, Report, SmokeOption, disk_directory, median, print_table
from serving import PAGE_SIZE, Answer, ask, ensure_model, start

_forked: Any = importlib.import_module("forked_server")

_MODEL = "tiny-gqa"
_PROMPT_TOKENS, _NEW_TOKENS = 1024, 2
_AT_A_TIME = 4  # new prompts of one server, after which what it has computed has time to be stored
_OLD_AT_A_TIME = 2
_FORGOTTEN = 12  # so many prompts later neither device nor CPU tier has one
_PAUSE_S, _SMOKE_PAUSE_S = 1.0, 0.2
_TIMEOUT_S, _PREFETCH_TIMEOUT_S = 1.0, 3.0  # the defaults
_PATIENCE_S = 150.0  # a store that is away is tried once a minute
# Lines of a server's log that say that something is wrong with a store, or right again.
_REMARK = re.compile(r"REMOTE tier|count as misses|there is room|has no room")
_FLAGS = {"page-size": PAGE_SIZE, "enable-flexkv": True, "max-total-tokens": 4096, "sleep-on-idle": True}
_ENVIRONMENT = {
    "FLEXKV_CPU_CACHE_GB": "0.012",
    "FLEXKV_REMOTE_TIMEOUT_S": str(_TIMEOUT_S),
    "FLEXKV_PREFETCH_TIMEOUT_S": str(_PREFETCH_TIMEOUT_S),
    "FLEXKV_LOAD_POLICY": "load",
}


class _Pair:
    """A server without a store and one with, and what they were asked."""

    def __init__(self, report: Report, without: Any, over: Any, seed: int) -> None:
        self._report, self._servers = report, {"none": without, "over": over}
        self._pause_s = _SMOKE_PAUSE_S if report.smoke else _PAUSE_S
        self._random = random.Random(seed)
        self._client = httpx.Client()
        self._asked: list[list[int]] = []

    def ask_all(self, prompts: list[list[int]], turn: int) -> dict[str, list[Answer]]:
        """Both servers, in an order that changes with the turn."""
        answers: dict[str, list[Answer]] = {}
        for name in ("none", "over") if turn % 2 else ("over", "none"):
            answers[name] = []
            for prompt in prompts:
                try:
                    answers[name].append(ask(self._client, self._servers[name], prompt, _NEW_TOKENS))
                except httpx.HTTPError:
                    self._report.check("requests that were answered", False)
                    raise
            time.sleep(self._pause_s)
        for one, other in zip(answers["none"], answers["over"], strict=True):
            self._report.check("answers as without a store", one.same_as(other))
        return answers

    def prompts(self) -> tuple[list[list[int]], list[list[int]]]:
        """New ones, and some that were asked long ago."""
        forgotten = self._asked[:-_FORGOTTEN]
        old = self._random.sample(forgotten, min(_OLD_AT_A_TIME, len(forgotten)))
        new = [self._random.choices(range(5, 500), k=_PROMPT_TOKENS) for _ in range(_AT_A_TIME)]
        self._asked += new
        return new, old

    def run(self, turns: int) -> dict[str, Any]:
        """What all that costs, with a store and without."""
        new_s: dict[str, list[float]] = {"none": [], "over": []}
        old_s: dict[str, list[float]] = {"none": [], "over": []}
        from_store = 0
        before = self._memory()
        for turn in range(turns):
            new, old = self.prompts()
            for name, answers in self.ask_all(new + old, turn).items():
                new_s[name] += [answer.ttft_s for answer in answers[: len(new)]]
                old_s[name] += [answer.ttft_s for answer in answers[len(new) :]]
                from_store += sum(answer.source["storage"] for answer in answers if name == "over")
        after = self._memory()
        p50 = {name: median(times) for name, times in new_s.items()}
        return {
            "none_p50_ms": 1e3 * p50["none"],
            "p50_ratio": p50["over"] / p50["none"],
            "none_max_added_ms": 1e3 * (max(new_s["none"] + old_s["none"]) - p50["none"]),
            "max_added_ms": 1e3 * (max(new_s["over"] + old_s["over"]) - p50["none"]),
            "from_store": from_store,
            "memory_mib": after["over"],
            "grown_mib": after["over"] - before["over"],
            "none_grown_mib": after["none"] - before["none"],
        }

    def _memory(self) -> dict[str, float]:
        """What each server's processes have for themselves."""
        used = {}
        for name, server in self._servers.items():
            root = psutil.Process(server.pid)
            processes = [root, *root.children(recursive=True)]
            used[name] = sum(each.memory_full_info().uss for each in processes) / MIB
        return used

    def remarks(self) -> int:
        return len(re.findall(_REMARK, self._servers["over"].log()))

    def is_of_use(self) -> bool:
        """Whether it comes to it that a store gives back what was computed meanwhile."""
        deadline = time.monotonic() + _PATIENCE_S
        first = len(self._asked)
        while time.monotonic() < deadline:
            self.ask_all(self.prompts()[0], 0)
            forgotten = self._asked[first:-_FORGOTTEN]
            if forgotten:
                answers = self.ask_all(self._random.sample(forgotten, 1), 0)
                if answers["over"][0].source["storage"]:
                    return True
        return False


def _faults(kind: str, service: Any, report: Report) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What becomes of a store, one after the other."""

    def spoilt() -> AbstractContextManager[None]:
        report.check("stores with values that were damaged", store_faults.spoil(kind, service, 1) > 0)
        return contextlib.nullcontext()

    faults: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "empty": contextlib.nullcontext,
        "slow": lambda: store_faults.slow(service),
        "garbage": spoilt,
        "full": lambda: store_faults.full(kind, service),
        "stands still": lambda: store_faults.standing_still(service),
        "goes on": contextlib.nullcontext,
        "killed": lambda: store_faults.killed(service),
        "is back": contextlib.nullcontext,
    }
    if not service.is_bounded and kind not in ("redis", "mooncake"):
        del faults["full"]
    return faults


def _start(servers: list[Any]) -> None:
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(start, servers))


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    requests: Annotated[int, typer.Option(min=8, help="New prompts for each state of each store.")] = 40,
    only: Annotated[list[str] | None, typer.Option(help="These stores.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="These faults.")] = None,
) -> None:
    """What each fault of each store adds to the time to the first token."""
    available = store_faults.available()
    if missing := [kind for kind in only or [] if kind not in available]:
        raise typer.BadParameter(
            f"--only: {', '.join(missing)} is not here; there are {', '.join(available)}"
        )
    model = ensure_model(_MODEL)
    turns = 1 if smoke else 2 * (requests // (2 * _AT_A_TIME))
    settings = {"requests": turns * _AT_A_TIME, "prompt_tokens": _PROMPT_TOKENS, **_ENVIRONMENT}
    with disk_directory(None, "bench-faults") as scratch, contextlib.ExitStack() as stack:
        report = Report("remote faults", smoke, Machine.here(scratch), settings)
        os.environ.update(store_faults.SERVER_ENVIRONMENT)

        def server(name: str, **env: str) -> Any:
            env = {**_ENVIRONMENT, **store_faults.SERVER_ENVIRONMENT, **env}
            made = _forked.ForkedServer(
                model, _FLAGS, env=env, log_path=scratch / f"{name}.log", stop_grace_s=0
            )
            stack.callback(made.stop)
            return made

        for kind in only or available:
            _run_store(kind, scratch, server, report, turns, fault)
    print_table("added time to the first token", report.rows, list(report.rows[0]))
    for row in report.rows:
        report.check("within the budget", row["max_added_ms"] <= row["budget_ms"])
    report.results["max_added_ms"] = max(row["max_added_ms"] for row in report.rows)
    report.results["p50_ratio"] = max(row["p50_ratio"] for row in report.rows)
    stores = {row["store"]: [r for r in report.rows if r["store"] == row["store"]] for row in report.rows}
    report.results["grown_mib"] = max(
        rows[-1]["memory_mib"] - rows[0]["memory_mib"] for rows in stores.values()
    )
    report.goals.update(max_added_ms=f"≤ {1e3 * (_TIMEOUT_S + _PREFETCH_TIMEOUT_S):.0f}", p50_ratio="≤ 1.02")
    report.finish(json_to)


def _run_store(
    kind: str,
    scratch: Path,
    server: Callable[..., Any],
    report: Report,
    turns: int,
    wanted: list[str] | None,
) -> None:
    """Adds a row for each fault of a store."""
    directory = scratch / kind
    directory.mkdir()
    with store_faults.running(kind, directory) as service:
        without, over = server("none"), server(kind, FLEXKV_REMOTE=service.url)
        _start([without, over])
        pair = _Pair(report, without, over, seed=len(report.rows))
        report.check("stores that give back what was computed", pair.is_of_use())
        for fault, begin in _faults(kind, service, report).items():
            if fault not in (wanted or [fault]):
                continue
            remarks = pair.remarks()
            with begin():
                row = pair.run(turns)
            row["log_lines"] = pair.remarks() - remarks
            budget = {"budget_ms": 1e3 * (_TIMEOUT_S + _PREFETCH_TIMEOUT_S)}
            report.rows.append({"store": kind, "fault": fault, **row, **budget})
        report.check("stores that do so when all is over", pair.is_of_use())
        over.stop()
        without.stop()


if __name__ == "__main__":
    typer.run(main)
