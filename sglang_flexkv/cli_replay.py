"""``sglang-flexkv replay | plan | generate-trace``: what a cache would have done for a trace of requests.

Prints only; what is computed is in ``replay``, and imported when a command runs: ``sglang-flexkv status`` has
to work where the compiled core does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from sglang_flexkv.cli_output import console, errors, say
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.paths import reason, why_not_writable
from sglang_flexkv.replay.synthetic import TraceKind

if TYPE_CHECKING:
    from sglang_flexkv.common.config import EvictionPolicy
    from sglang_flexkv.replay.comparison import Result
    from sglang_flexkv.replay.planner import Candidate, KvShape, Plan
    from sglang_flexkv.replay.trace import Trace

# The index numbers its slots with 32 bits, signed.
_BLOCKS_MAX = 2**31 - 1
# Sizes that are tried if none are given, as parts of the trace's blocks.
_DEFAULT_SIZES = (64, 16, 4)

_TraceFile = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE", help="JSONL, may be gzip: Mooncake's format, or token_ids.", readable=False
    ),
]
_TokensPerBlock = Annotated[
    int, typer.Option(min=1, help="What a hash id of the trace stands for, or how token ids are cut.")
]
_Requests = Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")]
_Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is stdout.")
]


def replay(
    trace_file: _TraceFile,
    cpu_blocks: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Sizes of the CPU tier; default: 1/64, 1/16, 1/4 of the trace."
        ),
    ] = None,
    ssd_blocks: Annotated[
        int, typer.Option(min=0, max=_BLOCKS_MAX, help="Size of the SSD tier; 0: none.")
    ] = 0,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="Eviction policies of the CPU tier, or 'all'; default: that of the server, and lru.",
        ),
    ] = None,
    ssd_policy: Annotated[str | None, typer.Option(metavar="NAME", help="That of the SSD tier.")] = None,
    tokens_per_block: _TokensPerBlock = 512,
    block_kib: Annotated[
        float | None, typer.Option(min=0, help="KiB of a block over all ranks: adds the bytes moved.")
    ] = None,
    optimum: Annotated[bool, typer.Option(help="Compare with the offline optimum (Belady).")] = True,
    requests: _Requests = None,
    json_to: _Json = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the hit rates over the size.", readable=False),
    ] = None,
) -> None:
    """Run a trace through the cache's control plane and show what would have been hit."""
    with errors():
        from sglang_flexkv.common.config import CacheConfig
        from sglang_flexkv.replay.comparison import compare
        from sglang_flexkv.replay.plot import check_can_plot
        from sglang_flexkv.replay.simulator import TierSetup
        from sglang_flexkv.replay.trace import load_trace

        policies = _policies(policy)
        fields = CacheConfig.model_fields
        on_ssd = _policies(ssd_policy)[0] if ssd_policy else fields["ssd_eviction_policy"].default
        sizes = _sizes(cpu_blocks) if cpu_blocks else None
        if plot is not None:
            check_can_plot()
        _check_outputs(plot, json_to)
        trace = load_trace(trace_file, tokens_per_block, requests)
        num_blocks = trace.num_blocks
        sizes = sizes or sorted({max(1, num_blocks // part) for part in _DEFAULT_SIZES})
        with _progress(trace.num_requests * len(sizes) * len(policies)) as bar:
            results = compare(
                trace,
                TierSetup(sizes[0], ssd_blocks, ssd_policy=on_ssd),
                sizes,
                policies,
                with_optimum=optimum,
                block_bytes=None if block_kib is None else round(block_kib * 1024),
                progress=bar.advance,
            )
        if plot is not None:
            _plot(plot, trace_file.name, results)
        if json_to != "-":
            _print_trace(trace_file, trace)
            _print_results(results)
            if plot is not None:
                say(f"wrote {escape(str(plot))}")
        _write_json(json_to, {"trace": str(trace_file), "results": [asdict(result) for result in results]})


def plan(
    trace_file: _TraceFile,
    cpu_gib: Annotated[float, typer.Option(min=0, help="Memory available to the CPU tier.")],
    prefill_tokens_s: Annotated[
        float, typer.Option(min=1, help="Tokens per second that the model prefills, all GPUs together.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The model's directory, or its config.json.", readable=False),
    ] = None,
    kv_bytes_per_token: Annotated[
        int | None, typer.Option(min=1, help="Instead of --model: KV of a token over all ranks.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the KV, if it is not the model's.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    gpu_kv_gib: Annotated[
        float, typer.Option(min=0, help="KV pools of all GPUs; 0: the tiers see every request.")
    ] = 0.0,
    ssd_gib: Annotated[float, typer.Option(min=0, help="SSD space available; 0: no SSD tier.")] = 0.0,
    ssd_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of the SSD tier, for --write; may be repeated.", readable=False),
    ] = None,
    pcie_gb_s: Annotated[float, typer.Option(min=0.001, help="10^9 bytes/s from memory to one GPU.")] = 25.0,
    ssd_read_gb_s: Annotated[float, typer.Option(min=0.001, help="10^9 bytes/s from all SSDs.")] = 3.0,
    tokens_per_block: _TokensPerBlock = 512,
    requests: _Requests = None,
    json_to: _Json = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Write the configuration for the server.", readable=False),
    ] = None,
) -> None:
    """Recommend sizes and policies for a trace on a machine, and say what they save."""
    with errors():
        from sglang_flexkv.replay.planner import Hardware, PlanError, make_plan
        from sglang_flexkv.replay.trace import load_trace

        if write is not None and ssd_gib and not ssd_dir:
            raise PlanError("--write needs to know where the SSD tier goes; give --ssd-dir")
        _check_outputs(write, json_to)
        shape = _shape(model, kv_bytes_per_token, tp, kv_dtype)
        hardware = Hardware(gpu_kv_gib, cpu_gib, ssd_gib, pcie_gb_s, ssd_read_gb_s, prefill_tokens_s)
        trace = load_trace(trace_file, tokens_per_block, requests)
        with _progress(None) as bar:
            result = make_plan(trace, shape, hardware, bar.describe)
        if write is not None:
            result.write(write, ssd_dir or ())
        if json_to != "-":
            _print_trace(trace_file, trace)
            _print_plan(result)
            if write is not None:
                say(f"wrote {escape(str(write))}")
        _write_json(json_to, {"trace": str(trace_file), **result.as_dict()})


def generate_trace(
    kind: Annotated[TraceKind, typer.Argument(help="How the cache is used.")],
    file: Annotated[Path, typer.Argument(metavar="OUT.jsonl", readable=False)],
    requests: Annotated[int, typer.Option(min=1)] = 4000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 0,
) -> None:
    """Write a synthetic trace in Mooncake's format."""
    with errors():
        from sglang_flexkv.replay.synthetic import generate, write_trace

        _check_outputs(file)
        count = write_trace(file, generate(kind, requests, seed))
        say(f"wrote {escape(str(file))}: {count:,} requests")


def _policies(text: str | None) -> list[EvictionPolicy]:
    from sglang_flexkv.common.config import CacheConfig, EvictionPolicy

    if text is None:
        default: EvictionPolicy = CacheConfig.model_fields["cpu_eviction_policy"].default
        return list(dict.fromkeys((default, EvictionPolicy.LRU)))
    if text == "all":
        return list(EvictionPolicy)
    known = {policy.value: policy for policy in EvictionPolicy}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no eviction policy {name!r}; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or not 0 < sizes[0] <= sizes[-1] <= _BLOCKS_MAX:
        raise typer.BadParameter(
            f"--cpu-blocks {text!r}: give numbers from 1 to {_BLOCKS_MAX:,} with commas between them"
        )
    return sizes


def _shape(model: Path | None, kv_bytes_per_token: int | None, tp: int, dtype: str | None) -> KvShape:
    from sglang_flexkv.replay.planner import KvShape

    if (model is None) == (kv_bytes_per_token is None):
        raise typer.BadParameter("give either --model or --kv-bytes-per-token")
    if model is not None:
        return KvShape.of_model(model, tp, dtype)
    assert kv_bytes_per_token is not None
    return KvShape.of_total(kv_bytes_per_token, tp)


@contextmanager
def _progress(total: int | None) -> Iterator[_Bar]:
    """On stderr, where that is a terminal, and gone when it is done."""
    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        yield _Bar(progress, total)


class _Bar:
    """The one task of a progress bar."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("replaying", total=total)

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=text)


def _print_trace(file: Path, trace: Trace) -> None:
    tokens = trace.input_tokens
    say(
        f"{escape(str(file))}: {trace.num_requests:,} requests, {tokens:,} input tokens, "
        f"{trace.num_blocks:,} different blocks of {trace.tokens_per_block} tokens"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    return table


def _print_results(results: Sequence[Result]) -> None:
    with_ssd = any(result.ssd_blocks for result in results)
    with_optimum = any(result.optimum_hit_rate is not None for result in results)
    columns = ["CPU blocks", "policy", "hit", *(("CPU", "SSD") if with_ssd else ())]
    columns += [*(("optimum", "below it") if with_optimum else ()), "warm"]
    table = _table("input tokens that were hit", columns)
    for result in results:
        cells = [f"{result.cpu_blocks:,}", result.policy, f"{result.hit_rate:.2%}"]
        if with_ssd:
            cells += [f"{result.cpu_hit_rate:.2%}", f"{result.ssd_hit_rate:.2%}"]
        if result.optimum_hit_rate is not None:
            below = 100 * (result.optimum_hit_rate - result.hit_rate)
            cells += [f"{result.optimum_hit_rate:.2%}", f"{below:.2f}"]
        table.add_row(*cells, f"{result.warm_hit_rate:.2%}")
    console.print(table)

    kinds = list(results[0].moved_bytes or ())
    columns = ["CPU blocks", "policy", "evicted", *(f"{kind}\nGiB" for kind in kinds), "µs", "µs p99"]
    table = _table("what it took: blocks, bytes moved, time of the control plane per request", columns)
    for result in results:
        table.add_row(
            f"{result.cpu_blocks:,}",
            result.policy,
            f"{result.cpu_evicted:,}",
            *(f"{size / 2**30:.1f}" for size in (result.moved_bytes or {}).values()),
            f"{result.control_us_median:.0f}",
            f"{result.control_us_p99:.0f}",
        )
    console.print(table)
    if refused := sum(result.refused_puts for result in results):
        say(f"{refused:,} times nothing of a request was stored: the policy refused it, or it had no room")


def _plot(file: Path, title: str, results: Sequence[Result]) -> None:
    from sglang_flexkv.replay.plot import plot_hit_rates

    curves: dict[str, list[tuple[int, float]]] = {}
    bound: dict[int, float] = {}
    for result in results:
        curves.setdefault(result.policy, []).append((result.cpu_blocks, result.hit_rate))
        if result.optimum_hit_rate is not None:
            bound[result.cpu_blocks] = result.optimum_hit_rate
    plot_hit_rates(file, curves, sorted(bound.items()), title)


def _print_plan(result: Plan) -> None:
    table = _table(
        "sizes with these policies, cheapest first; hits by tier, time to first token saved",
        ["CPU GiB", "SSD GiB", "device", "CPU", "SSD", "mean ms", "p50 ms", ""],
    )
    chosen = result.recommended
    for candidate in result.grid:
        recommended = (candidate.cpu_gib, candidate.ssd_gib) == (chosen.cpu_gib, chosen.ssd_gib)
        table.add_row(
            f"{candidate.cpu_gib:.2f}",
            f"{candidate.ssd_gib:.2f}" if candidate.ssd_gib else "-",
            f"{candidate.device_hit_rate:.1%}",
            f"{candidate.cpu_hit_rate:.1%}",
            f"{candidate.ssd_hit_rate:.1%}",
            f"{1000 * candidate.mean_saving_s:.1f}",
            f"{1000 * candidate.p50_saving_s:.1f}",
            "[green]recommended[/green]" if recommended else "",
        )
    console.print(table)
    if not result.worthwhile:
        say("[yellow]The tiers save nothing here: what comes back is computed as fast as loaded.[/yellow]")
    _print_recommendation(chosen, result)


def _print_recommendation(chosen: Candidate, result: Plan) -> None:
    say("[bold]recommended[/bold]")
    say(f"  cpu_cache_gb         {chosen.cpu_gib:.3f}, cpu_eviction_policy {chosen.cpu_policy}")
    if chosen.ssd_gib:
        say(
            f"  ssd_cache_gb         {chosen.ssd_gib:.3f}, ssd_eviction_policy {chosen.ssd_policy}, "
            f"ssd_admission {chosen.ssd_admission} ({chosen.ssd_written_gib:.2f} GiB written)"
        )
    say("  write_policy         write_through")
    say(
        f"  hits                 device {chosen.device_hit_rate:.1%}, CPU {chosen.cpu_hit_rate:.1%}, "
        f"SSD {chosen.ssd_hit_rate:.1%} of the input tokens"
    )
    share = chosen.mean_saving_s / result.mean_prefill_s if result.mean_prefill_s else 0.0
    say(
        f"  time to first token  {1000 * chosen.mean_saving_s:.1f} ms less on average ({share:.1%} of the "
        f"prefill), {1000 * chosen.p50_saving_s:.1f} ms at the median request"
    )


def _check_outputs(*targets: str | Path | None) -> None:
    """Before the work whose result is to be written there."""
    for target in targets:
        if target not in (None, "-") and (why := why_not_writable(Path(target))):
            raise FlexKVError(f"{target} {why}")


def _write_json(target: str | None, content: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FlexKVError(f"{target} cannot be written: {reason(error)}") from None
