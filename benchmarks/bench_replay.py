"""Replay: hit rates of every eviction policy, on a recorded trace and on synthetic ones, next to the optimum.

    python benchmarks/bench_replay.py [--smoke] [--json FILE|-] [--trace FILE]

Nothing is timed here but the control plane, and hit rates do not depend on the machine: two runs give the
same ones. Checked: with room for everything each policy hits exactly what the trace repeats, counted here
from its ids; nothing exceeds the optimum; a second run gives the same hits. The recorded trace is not part of
the repository: without --trace it is looked for beside it, and a run that does not find it there says so at
its end and in its report.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import ROOT, JsonOption, Machine, Report, SmokeOption, console, print_table
from rich.progress import track

from sglang_flexkv.common.config import EvictionPolicy
from sglang_flexkv.replay.comparison import Result, compare
from sglang_flexkv.replay.simulator import TierSetup, simulate
from sglang_flexkv.replay.synthetic import TraceKind, generate, write_trace
from sglang_flexkv.replay.trace import Trace, load_trace

_RECORDED = ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl"
_SIZES = (1024, 4096, 8192, 32768)
# Of the synthetic traces, in parts of their blocks: what is scarce differs from kind to kind.
_PARTS = (64, 16, 4, 2)
_POLICIES = list(EvictionPolicy)
# The optimum is one of blocks; incomplete ones at the end of prompts can make it less than that of tokens.
_TOKEN_SLACK = 0.001


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    trace_file: Annotated[
        Path | None,
        typer.Option("--trace", help="The recorded trace, in a format of `sglang-flexkv replay`."),
    ] = None,
    requests: Annotated[int, typer.Option(min=10, help="Requests of a synthetic trace.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the synthetic traces.")] = 1,
) -> None:
    """Hit rates of the eviction policies."""
    if smoke:
        requests = min(requests, 200)
    recorded = trace_file or _RECORDED
    found = recorded.is_file()
    if trace_file is not None and not found:
        raise typer.BadParameter(f"--trace {trace_file} is not a file; name one, or leave it out")
    settings = {"requests": requests, "seed": seed, "sizes": _SIZES}
    settings |= {"trace": recorded.name} if found else {"trace_not_found": str(recorded)}
    report = Report("replay", smoke, Machine.here(), settings)
    if found:
        trace = load_trace(recorded, requests_max=requests if smoke else None)
        _measure(report, recorded.stem, trace, _SIZES[:1] if smoke else _SIZES)
    for kind in track(TraceKind, "synthetic traces", console=console, transient=True):
        trace = _synthetic(kind, requests, seed)
        sizes = [max(8, trace.num_blocks // part) for part in _PARTS]
        _measure(report, kind.value, trace, sizes)
    _summarise(report, recorded.stem if found else None)
    for name in dict.fromkeys(row["trace"] for row in report.rows):
        rows = [row for row in report.rows if row["trace"] == name]
        columns = ["cpu_blocks", "policy", "hit_rate", "warm_hit_rate", "optimum_hit_rate"]
        print_table(name, rows, [*columns, "optimum_warm_hit_rate", "to_lru_percent", "control_us_median"])
    if not found:
        console.print(
            f"[bold yellow]NOT measured: {recorded} is not there; give it with --trace[/bold yellow]"
        )
    report.finish(json_to)


def _synthetic(kind: TraceKind, requests: int, seed: int) -> Trace:
    with tempfile.TemporaryDirectory(prefix="bench-replay-") as directory:
        path = Path(directory) / "trace.jsonl"
        write_trace(path, generate(kind, requests, seed))
        return load_trace(path)


def _measure(report: Report, name: str, trace: Trace, sizes: list[int] | tuple[int, ...]) -> None:
    _check_unlimited(report, trace)
    results = compare(trace, TierSetup(sizes[0]), sizes, _POLICIES)
    lru = {r.cpu_blocks: r.hit_rate for r in results if r.policy == EvictionPolicy.LRU.value}
    for result in results:
        assert result.optimum_hit_rate is not None
        within = result.hit_rate <= result.optimum_hit_rate + _TOKEN_SLACK
        report.check("hit rates not above the optimum", within)
        report.rows.append({"trace": name, **asdict(result), "to_lru_percent": _percent(result, lru)})


def _percent(result: Result, lru: dict[int, float]) -> float:
    """How much more is hit than with lru, in percent of that; 0 if neither hits anything."""
    base = lru[result.cpu_blocks]
    return 100 * (result.hit_rate / base - 1) if base else 0.0


def _check_unlimited(report: Report, trace: Trace) -> None:
    seen: set[int] = set()
    expected = []
    for tokens, path in zip(trace.input_lengths.tolist(), trace.paths(), strict=True):
        repeated = sum(block in seen for block in path.tolist())
        expected.append(min(repeated * trace.tokens_per_block, tokens))
        seen.update(path.tolist())
    for policy in _POLICIES:
        setup = TierSetup(trace.num_blocks, cpu_policy=policy)
        hits = simulate(trace, setup).hit_tokens
        report.check("hits of a tier with room for all", bool(np.array_equal(hits, expected)), len(hits))
    small = TierSetup(max(8, trace.num_blocks // 16))
    first, second = (simulate(trace, small).hit_tokens for _ in range(2))
    report.check("hits of a second run", bool(np.array_equal(first, second)), len(first))


def _summarise(report: Report, recorded: str | None) -> None:
    """Of each policy its hit rates on the recorded trace, and its best and worst case against lru."""
    synthetic: list[dict[str, Any]] = []
    for row in report.rows:
        if row["trace"] == recorded:
            name = f"{row['policy']}_{row['cpu_blocks']}"
            report.results[f"hit_rate_{name}"] = row["hit_rate"]
            report.results[f"warm_hit_rate_{name}"] = row["warm_hit_rate"]
        else:
            synthetic.append(row)
    for policy in _POLICIES:
        changes = [row["to_lru_percent"] for row in synthetic if row["policy"] == policy.value]
        report.results[f"worst_over_lru_{policy.value}"] = 1 + min(changes) / 100
        report.results[f"mean_over_lru_{policy.value}"] = 1 + sum(changes) / len(changes) / 100


if __name__ == "__main__":
    typer.run(main)
