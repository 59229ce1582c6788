"""This cache, SGLang's own ones and LMCache under the same traffic: times to the first token, rates, hits.

    python benchmarks/compare.py [--smoke] [--long] [--only NAME] [--json FILE|-] [--out DIRECTORY]

Real SGLang servers, alike but for the cache, get the same requests (``comparison/traffic.py``), one contender
after the other in every round, in an order that turns round; those that are not measured are stopped.
Contenders (``comparison/contenders.py``) whose pools are of one kind are up together:

* memory: no cache, SGLang's radix cache alone, this cache with a CPU tier (twice: how far they are apart is
  the noise), HiCache, LMCache with chunks of 256 and of 64 tokens;
* disk: with a smaller pool in memory, and below it this cache's SSD tier, its store in a directory, HiCache's
  ``file`` backend, LMCache's ``fs`` adapter.

What is reported are ratios of neighbours in time. The run fails, and its figures are worthless, unless every
output is that of stock SGLang, every contender served hits from each place it has, and none logged an error.

LMCache is installed in an environment of its own below ``build/peers``. Without a GPU HiCache's copy kernels
are stand-ins (``peers/hicache_cpu``); docs/comparison.md says what that leaves to be shown.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import (
    ROOT,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    disk_directory,
    median,
)
from comparison import figures, plots, traces
from comparison.contenders import (
    CONTENDERS,
    CannotRunError,
    Place,
    Running,
    environment_of_all,
    started,
)
from comparison.traffic import Part, Sizes, Traffic, same_outputs
from serving import EXACT, ON_CPU, ensure_model, kv_bytes_per_token, model_fields

from sglang_flexkv.replay.trace import Trace

_STOCK = "radix"  # whose outputs are the right ones, and so is always there
_MEMORY = ("nocache", _STOCK, "ours", "ours-again", "hicache", "lmcache-256", "lmcache-64", "flexkv")
_DISK = ("ours-ssd", "ours-remote", "hicache-file", "lmcache-fs")
_SMOKE = ("ours-ssd", "hicache-file")
_TRACE = ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl"
# What is asked of the ratios, by the other one: of the base over it.
_GOALS = {
    "radix": {("cold", "ttft_p50"): "≤ 1.02", ("new", "requests_per_s"): "≥ 0.99"},
    "hicache": {
        ("cold", "ttft_p50"): "≤ 1",
        ("soon", "ttft_p50"): "≤ 1.03",
        ("sessions", "ttft_p50"): "≤ 1.03",
        ("prefix", "ttft_p50"): "≤ 1",
        ("prefix", "ttft_p99"): "≤ 1",
        ("prefix", "requests_per_s"): "≥ 1",
        ("burst", "ttft_p50"): "≤ 1",
        ("burst", "ttft_p99"): "≤ 1",
    },
    "lmcache-256": {("sessions", "requests_per_s"): "≥ 1.5"},
    "lmcache-64": {("sessions", "requests_per_s"): "≥ 1.5"},
    "hicache-file": {
        ("late_warm", "ttft_p50"): "≤ 1",
        ("late_dropped", "ttft_p50"): "≤ 1",
        ("late_burst", "ttft_p50"): "≤ 1",
        ("late_burst", "ttft_p99"): "≤ 1",
    },
    "lmcache-fs": {("late_warm", "ttft_p50"): "≤ 1", ("late_dropped", "ttft_p50"): "≤ 1"},
}


@dataclass(frozen=True)
class Group:
    """Contenders that are up at the same time.

    Attributes:
        base: with which the others are compared.
        host_tokens: room in the pools in host memory.
    """

    name: str
    base: str
    contenders: tuple[str, ...]
    host_tokens: int


def groups(only: Sequence[str], long: bool, smoke: bool, scale: int) -> list[Group]:
    """What to start. Pools have room for 8k tokens at least: HiCache prefetches into a part of its own."""
    chosen = only or (_SMOKE if smoke else [*_MEMORY, *_DISK])
    memory = [name for name in _MEMORY if name in chosen]
    disk = [name for name in _DISK if name in chosen]
    if _STOCK not in memory:
        (memory or disk).insert(0, _STOCK)
    pools = [("memory", 16384), ("disk", 8192)]
    if smoke:
        pools = [("memory", 2048), ("disk", 1536)]
    elif long:
        pools += [("memory", 8192), ("disk", 16384)]
        if "ours-ssd" in disk:
            disk.insert(1, "ours-ssd-again")
    made = []
    for kind, host in pools:
        names, base = (memory, "ours") if kind == "memory" else (disk, "ours-ssd")
        if names:
            made.append(Group(f"{kind}, {host * scale} host tokens", base, tuple(names), host * scale))
    return made


# Short, but for the prompts that come back: HiCache prefetches 256 tokens or more.
SMOKE_SIZES = Sizes(
    device=640,
    disk=8192,
    answer=2,
    prompt=320,
    sessions=3,
    turns=2,
    first_turn=224,
    next_turn=32,
    groups=3,
    group_prompts=2,
    system=224,
    question=16,
    trace=320,
    trace_prompt_max=256,
    new_prompts=3,
    new_prompt=224,
    burst=4,
    burst_prefix=224,
)


class Comparison:
    """A run: what was measured so far, and what was checked."""

    def __init__(
        self,
        report: Report,
        json_to: str | None,
        model: Path,
        sizes: Sizes,
        trace: Trace,
        scratch: Path,
    ) -> None:
        self.report, self.rows = report, list[figures.Row]()
        self._json_to = None if json_to == "-" else json_to
        self._model, self._sizes, self._trace, self._scratch = model, sizes, trace, scratch
        self._vocabulary = int(model_fields(model)["vocab_size"])
        self._stock: dict[int, dict[str, Part]] = {}  # by round
        self._unchecked: list[tuple[str, int, dict[str, Part]]] = []
        self._logs = ROOT / "logs" / "compare" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"

    def run(self, group: Group, rounds: int, nocache_rounds: int) -> None:
        with contextlib.ExitStack() as stack:
            up = self._start(group, stack)
            for round_number in range(0 if self.report.smoke else -1, rounds):  # -1 warms up
                order = up if round_number % 2 == 0 else up[::-1]
                for running in order:
                    if running.name == "nocache" and round_number >= nocache_rounds:
                        continue
                    self._round(group, running, round_number)
                    self.report.write(self._json_to)  # what there is, whatever becomes of the rest
                self.check_outputs()
            for running in up:
                self._check_contender(group, running)

    def _start(self, group: Group, stack: contextlib.ExitStack) -> list[Running]:
        logs = self._logs / group.name.replace(", ", "-").replace(" ", "-")
        logs.mkdir(parents=True, exist_ok=True)

        def start(name: str, own: contextlib.ExitStack) -> Running | str:
            place = Place(
                self._scratch / f"{name}-{group.host_tokens}",
                kv_bytes_per_token(self._model),
                self._sizes.device,
                group.host_tokens,
                self._sizes.disk,
            )
            try:
                return own.enter_context(started(name, self._model, place, logs))
            except CannotRunError as error:
                return str(error)

        begin_s = time.monotonic()
        console.print(f"{group.name}: starting {', '.join(group.contenders)} ...")
        up = []
        # HiCache wants 10 GB to be free beside its pool when it starts, and so comes before the others.
        names = sorted(group.contenders, key=lambda name: not name.startswith("hicache"))
        owns = {name: stack.enter_context(contextlib.ExitStack()) for name in names}
        with ThreadPoolExecutor(2) as pool:
            try:
                for name, running in zip(owns, pool.map(start, owns, owns.values()), strict=True):
                    if isinstance(running, str):
                        self.report.settings.setdefault("not_run", {})[name] = running
                        console.print(f"[yellow]{name} is not compared: {running}[/yellow]")
                    else:
                        up.append(running)
            except BaseException:  # one does not start, SIGTERM: no other is begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        up.sort(key=lambda running: group.contenders.index(running.name))
        console.print(f"{len(up)} servers after {time.monotonic() - begin_s:.0f} s")
        return up

    def _round(self, group: Group, running: Running, round_number: int) -> None:
        begin_s, load = time.monotonic(), os.getloadavg()[0]
        sizes = self._sizes
        if round_number < 0:
            sizes = replace(
                sizes, sessions=1, turns=1, groups=1, new_prompts=1, burst=2, trace=sizes.trace // 8
            )
        traffic = Traffic(self._model, self._vocabulary, sizes, round_number, self._trace, self._scratch)
        parts = traffic.run(running)
        if round_number < 0:
            return
        if running.name == _STOCK:
            self._stock.setdefault(round_number, parts)
        self._unchecked.append((running.name, round_number, parts))
        row = figures.row_of(group.name, running.name, round_number, parts)
        self.rows.append(row)
        self.report.rows.append({**row.as_json(), "load_before": round(load, 2)})
        console.print(
            f"round {round_number}: {running.name}: {time.monotonic() - begin_s:.0f} s, load {load:.1f}",
            highlight=False,
        )

    def check_outputs(self) -> None:
        """Of all rounds since the last time, in which stock SGLang may have come last."""
        for contender, round_number, parts in self._unchecked:
            for name, part in parts.items():
                self._check_outputs(contender, name, part, self._stock[round_number])
        self._unchecked.clear()

    def _check_outputs(self, contender: str, name: str, part: Part, stock: dict[str, Part]) -> None:
        of_stock = stock.get(name)
        if of_stock is None:  # the halves of `late`
            whole = stock["late"]
            half = len(whole.answers) // 2
            answers = whole.answers[:half] if name == "late_warm" else whole.answers[half:]
            of_stock = replace(whole, answers=answers)
        wanted = len(part.answers) + (len(part.texts) if EXACT else 0)
        same = same_outputs(part, of_stock, EXACT)
        self.report.check(f"outputs of {contender} are those of stock SGLang", same == wanted, wanted)
        if same != wanted:
            console.print(f"[red]{contender}, {name}: {same} of {wanted} outputs are those of stock[/red]")

    def _check_contender(self, group: Group, running: Running) -> None:
        of = figures.of_contender(self.rows, group.name, running.name)
        for source in running.contender.served:
            tokens = sum(cached[source] for row in of for cached in row.cached.values())
            self.report.check(f"tokens that {running.name} served from {source}", tokens > 0, tokens)
        with running.awake():
            tokens = running.tokens_from_disk()
        if tokens is not None:
            self.report.check(f"tokens that {running.name} served from disk", tokens > 0, tokens)
        errors = running.errors()
        self.report.check("logs without an error", not errors)
        for line in errors[:5]:
            console.print(f"[red]{running.name}: {line[:300]}[/red]", markup=True, highlight=False)

    def summarise(self, group: Group) -> None:
        for other in group.contenders:
            goals = _GOALS.get(other, {}) if other != "ours-again" else {}
            of_base = figures.ratios(self.rows, group.name, group.base, other) if other != group.base else {}
            for (part, name), goal in goals.items():
                if values := of_base.get((part, name)):
                    result = f"{part}_{name}_{group.base}_over_{other}_{group.host_tokens}"
                    self.report.results[result] = median(values)
                    self.report.goals[result] = goal
            if not CONTENDERS[other].served:
                continue
            for part in ("burst", "late_burst"):
                loads = [
                    (row.cached[part]["host"] + row.cached[part]["storage"]) / self._sizes.burst_prefix
                    for row in figures.of_contender(self.rows, group.name, other)
                ]
                if loads:
                    self.report.results[f"{part}_prefix_loads_{other}_{group.host_tokens}"] = median(loads)


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    out: Annotated[
        Path | None, typer.Option(help="A directory for the tables (Markdown) and pictures (PNG).")
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Both kinds with both host pools, seven rounds: about two hours.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="A contender, beside stock SGLang; may be given more than once.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; default 3, or 7 with --long.")] = None,
    model_path: Annotated[
        Path | None, typer.Option("--model", help="A model directory instead of small-gqa.")
    ] = None,
    scale: Annotated[
        int, typer.Option(min=1, help="Prompts and pools that are so many times as long: for a GPU.")
    ] = 1,
    trace_file: Annotated[
        Path, typer.Option("--trace", help="A recorded trace, in a format of `sglang-flexkv replay`.")
    ] = _TRACE,
) -> None:
    """This cache, stock SGLang, HiCache and LMCache under the same traffic."""
    unknown = [name for name in only or [] if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
    rounds = rounds or (1 if smoke else 7 if long else 3)
    model = model_path or ensure_model("tiny-gqa" if smoke else "small-gqa")
    sizes = SMOKE_SIZES if smoke else Sizes().scaled(scale)
    trace, trace_name = traces.load(trace_file)
    begin_s = time.monotonic()
    with disk_directory(None, "compare") as scratch, tempfile.TemporaryDirectory() as common:
        report = Report("compare", smoke, Machine.here(scratch))
        report.settings = {
            "model": model.name,
            "device": "cpu" if ON_CPU else torch.cuda.get_device_name(),
            "rounds": rounds,
            "trace": trace_name,
            "sizes": asdict(sizes),
            "versions": versions(),
        }
        environment_of_all(Path(common))
        comparison = Comparison(report, json_to, model, sizes, trace, scratch)
        run = groups(only or [], long, smoke, scale)
        for group in run:
            comparison.run(group, rounds, nocache_rounds=rounds if long else 1)
    texts = []
    for group in run:
        comparison.summarise(group)
        texts.append(figures.tables(comparison.rows, group.name, group.base, group.contenders))
        console.print("\n" + texts[-1], markup=False, highlight=False, soft_wrap=True)
    report.settings["seconds"] = round(time.monotonic() - begin_s)
    if out:
        head = f"{report.machine}\n\n`{report.command}`, {report.settings['seconds']} s\n\n"
        (out / "compare.md").write_text(head + "\n\n".join(texts) + "\n", encoding="utf-8")
        for group in run:
            plots.write(comparison.rows, group.name, group.base, group.contenders, out)
    report.finish(json_to)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    from comparison import lmcache_peer

    installed = {name: version(name) for name in ("sglang", "torch", "sglang-flexkv")}
    return {**installed, "lmcache": lmcache_peer.VERSION}


if __name__ == "__main__":
    typer.run(main)
