"""Throughput of a server with FlexKV over one without, under SGLang's own ``sglang.bench_serving``.

    python benchmarks/bench_throughput.py [--smoke] [--hits] [--json FILE|-]

Without ``--hits`` every prompt is new, so the cache can only cost: all KV is copied to the CPU tier and
nothing is ever used. That nothing was used is checked in the servers' own counters. With ``--hits``,
conversations of several turns come back after the device had to forget them.

Both servers are alive and alike but for the flag. They are loaded in turn with the same requests, the one
that is not is stopped, and who goes first changes from round to round. Ratios are of neighbours in time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from common import (
    GIB,
    JsonOption,
    Machine,
    Report,
    SmokeOption,
    console,
    disk_directory,
    median,
    median_ratio,
    print_table,
    spread,
)
from serving import both_servers, ensure_model, kv_bytes_per_token, running

_SERVE_TIMEOUT_S = 900.0


def new_prompts(num_prompts: int, input_tokens: int, output_tokens: int) -> list[str]:
    """Options of bench_serving for prompts that share nothing, made of random token ids: no download."""
    return [
        "--dataset-name=random-ids",
        "--tokenize-prompt",
        f"--num-prompts={num_prompts}",
        f"--random-input-len={input_tokens}",
        f"--random-output-len={output_tokens}",
        "--random-range-ratio=1.0",
    ]


def conversations(num_conversations: int, input_tokens: int, output_tokens: int) -> list[str]:
    """Options for conversations of four turns, each with a long beginning of its own."""
    return [
        "--dataset-name=generated-shared-prefix",
        "--gsp-num-turns=4",
        f"--gsp-num-groups={num_conversations}",
        "--gsp-prompts-per-group=1",
        f"--gsp-system-prompt-len={input_tokens}",
        "--gsp-question-len=32",
        f"--gsp-output-len={output_tokens}",
        f"--num-prompts={num_conversations}",
    ]


def serve(
    server: Any, model: Path, load: list[str], *, concurrency: int, seed: int, scratch: Path
) -> dict[str, Any]:
    """One run of bench_serving against a server that is running. Returns what it reports."""
    output = scratch / "bench_serving.jsonl"
    output.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "sglang.bench_serving"),
        "--backend=sglang",
        f"--base-url={server.url}",
        f"--model={model}",
        f"--tokenizer={model}",
        f"--max-concurrency={concurrency}",
        f"--seed={seed}",
        f"--output-file={output}",
        "--flush-cache",
        "--warmup-requests=1",
        "--disable-tqdm",
        *load,
    ]
    # It keeps generated data sets in the home directory.
    environment = {**os.environ, "HOME": str(scratch)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_SERVE_TIMEOUT_S, check=False
    )
    if done.returncode or not output.exists():
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    result: dict[str, Any] = json.loads(output.read_text().splitlines()[-1])
    return result


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    hits: Annotated[bool, typer.Option("--hits", help="Conversations that come back instead.")] = False,
    prompts: Annotated[int, typer.Option(help="Prompts (conversations with --hits) in a run.")] = 8,
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
) -> None:
    """Throughput with and without FlexKV."""
    name = "small-gqa"
    if smoke:
        name, prompts, input_tokens, output_tokens, rounds = "tiny-gqa", 4, 128, 4, 1
    model = ensure_model(name)
    load = (conversations if hits else new_prompts)(prompts, input_tokens, output_tokens)
    # The device holds what runs at a time and a little more: what has ended has to go.
    flags = {"max-total-tokens": 2 * concurrency * (input_tokens + output_tokens)}
    if hits:
        flags["max-total-tokens"] = (concurrency + 2) * (input_tokens + 4 * (output_tokens + 64))
    with disk_directory(None, "bench-throughput") as scratch:
        report = Report("throughput", smoke, Machine.here(scratch), {"model": name, "load": load, **flags})
        report.settings.update({"concurrency": concurrency, "rounds": rounds, "hits": hits})
        # Room for all of a run.
        cpu_bytes = 6 * prompts * (input_tokens + output_tokens) * kv_bytes_per_token(model)
        environment = {"FLEXKV_CPU_CACHE_GB": f"{max(cpu_bytes / GIB, 0.05):.4f}"}
        console.print(f"starting two servers with {name} ...")
        with both_servers(model, flags, environment) as (stock, flexkv):
            runs: dict[str, list[dict[str, Any]]] = {"stock": [], "flexkv": []}
            cached: dict[str, list[float]] = {"stock": [], "flexkv": []}
            for round_number in range(rounds if smoke else rounds + 1):
                order = [("stock", stock), ("flexkv", flexkv)]
                for kind, server in order if round_number % 2 else reversed(order):
                    with running(server):
                        before = server.metric("sglang:cached_tokens_total")
                        run = serve(
                            server, model, load, concurrency=concurrency, seed=round_number, scratch=scratch
                        )
                        cached_tokens = server.metric("sglang:cached_tokens_total") - before
                    report.check("requests completed", run["completed"] >= prompts, run["completed"])
                    if not hits:
                        report.check("runs without a single hit", cached_tokens == 0)
                    if smoke or round_number:  # the first round warms up
                        runs[kind].append(run)
                        cached[kind].append(cached_tokens)
                    console.print(
                        f"round {round_number}: {kind}: {run['total_throughput']:.0f} tokens/s, "
                        f"{cached_tokens:.0f} cached",
                        highlight=False,
                    )
            if hits:
                report.check("FlexKV runs with hits", min(cached["flexkv"]) > 0, len(cached["flexkv"]))
    fields = ("total_throughput", "request_throughput", "median_ttft_ms", "median_e2e_latency_ms")
    for kind, taken in runs.items():
        row = {"server": kind, **{field: median([float(run[field]) for run in taken]) for field in fields}}
        row["throughput_spread"] = spread([run["total_throughput"] for run in taken])
        report.rows.append({**row, "cached_tokens": median(cached[kind])})
    print_table("medians of bench_serving", report.rows, list(report.rows[0]))

    def ratio(field: str) -> float:
        return median_ratio(*([run[field] for run in runs[kind]] for kind in ("flexkv", "stock")))

    tag = "hits" if hits else "no_hit"
    report.results[f"throughput_ratio_{tag}"] = ratio("request_throughput")
    report.results[f"ttft_ratio_{tag}"] = ratio("median_ttft_ms")
    report.settings["pair_ratios"] = [
        f["request_throughput"] / s["request_throughput"]
        for f, s in zip(runs["flexkv"], runs["stock"], strict=True)
    ]
    console.print("ratios of the rounds:", " ".join(f"{r:.3f}" for r in report.settings["pair_ratios"]))
    report.goals["throughput_ratio_no_hit"] = "≥ 0.98"
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
