"""``sglang-flexkv replay | plan | generate-trace``: what a cache would have done for a trace of requests.

Prints only; what is computed is in ``replay``, and imported when a command runs: ``sglang-flexkv status`` has
to work where the compiled core does not.
"""

from __future__ import annotations

import json
import math
import os
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

from sglang_flexkv.cli_output import errors, say, show
from sglang_flexkv.common.errors import FlexKVError
from sglang_flexkv.common.paths import reason, why_not_writable
from sglang_flexkv.replay.synthetic import TraceKind

if TYPE_CHECKING:
    from sglang_flexkv.common.config import EvictionPolicy
    from sglang_flexkv.replay.comparison import Result
    from sglang_flexkv.replay.planner import Candidate, Hardware, KvShape, Plan
    from sglang_flexkv.replay.trace import Trace

# What the index takes, and what is beyond every machine: larger is a slip, or overflows somewhere.
_BLOCKS_MAX = 2**30
_GIB_MAX = 1e6
_GB_S_MAX = 1e6
_TOKENS_S_MAX = 1e9
_BLOCK_KIB_MAX = 1e9
_TOKEN_BYTES_MAX = 10**9
_TOKENS_PER_BLOCK_MAX = 2**20
_RANKS_MAX = 1024
_REQUESTS_MAX = 10**9
_COPIES = {
    "H2D": "copied from the CPU tier to the GPU",
    "D2H": "copied from the GPU to the CPU tier",
    "DISK2H": "read from SSD",
    "H2DISK": "written to SSD",
}
# Sizes that are tried if none are given, as parts of the trace's blocks.
_DEFAULT_SIZES = (64, 16, 4)


def _no_nan(value: float | None) -> float | None:
    """Refuses what some versions of click find in every range."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number.")
    return value


_TraceFile = Annotated[
    Path,
    typer.Argument(
        metavar="TRACE",
        help="JSONL with hash_ids (Mooncake, Qwen-Bailian) or token_ids, may be gzip; - is stdin.",
        readable=False,
    ),
]
_TokensPerBlock = Annotated[
    int,
    typer.Option(
        min=1,
        max=_TOKENS_PER_BLOCK_MAX,
        help="What a hash id of the trace stands for, or how token ids are cut.",
    ),
]
_Requests = Annotated[
    int | None, typer.Option(min=1, max=_REQUESTS_MAX, help="Only the first so many requests.")
]
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
        float | None,
        typer.Option(
            callback=_no_nan,
            min=0.001,
            max=_BLOCK_KIB_MAX,
            help="KiB of a block over all ranks: adds the bytes moved.",
        ),
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
        on_ssd = fields["ssd_eviction_policy"].default if ssd_policy is None else _one_policy(ssd_policy)
        sizes = _sizes(cpu_blocks) if cpu_blocks is not None else None
        if plot is not None:
            check_can_plot()
        _check_outputs(trace_file, {"--plot": plot, "--json": json_to})
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
            _print_results(results, trace)
            if plot is not None:
                say(f"wrote {escape(str(plot))}")
        content = {**_about(trace_file, trace), "results": [asdict(result) for result in results]}
        _write_json(json_to, content)


def plan(
    trace_file: _TraceFile,
    cpu_gib: Annotated[
        float, typer.Option(callback=_no_nan, min=0, max=_GIB_MAX, help="Memory available to the CPU tier.")
    ],
    prefill_tokens_s: Annotated[
        float,
        typer.Option(
            callback=_no_nan,
            min=1,
            max=_TOKENS_S_MAX,
            help="Tokens per second that the model prefills, all GPUs together.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="The model's directory, or its config.json.", readable=False),
    ] = None,
    kv_bytes_per_token: Annotated[
        int | None,
        typer.Option(min=1, max=_TOKEN_BYTES_MAX, help="Instead of --model: KV of a token over all ranks."),
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the KV, if it is not the model's.")] = None,
    tp: Annotated[int, typer.Option(min=1, max=_RANKS_MAX, help="Tensor-parallel ranks.")] = 1,
    gpu_kv_gib: Annotated[
        float,
        typer.Option(
            callback=_no_nan,
            min=0,
            max=_GIB_MAX,
            help="KV pools of all GPUs; 0: the tiers see every request.",
        ),
    ] = 0.0,
    ssd_gib: Annotated[
        float,
        typer.Option(callback=_no_nan, min=0, max=_GIB_MAX, help="SSD space available; 0: no SSD tier."),
    ] = 0.0,
    ssd_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of the SSD tier, for --write; may be repeated.", readable=False),
    ] = None,
    pcie_gb_s: Annotated[
        float,
        typer.Option(callback=_no_nan, min=0.001, max=_GB_S_MAX, help="10^9 bytes/s from memory to one GPU."),
    ] = 25.0,
    ssd_read_gb_s: Annotated[
        float, typer.Option(callback=_no_nan, min=0.001, max=_GB_S_MAX, help="10^9 bytes/s from all SSDs.")
    ] = 3.0,
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
        from sglang_flexkv.common.config import FlexKVConfig
        from sglang_flexkv.replay.planner import Hardware, PlanError, make_plan
        from sglang_flexkv.replay.trace import load_trace

        if write is not None and ssd_gib and not ssd_dir:
            raise PlanError("--write needs to know where the SSD tier goes; give --ssd-dir")
        if ssd_dir:
            FlexKVConfig(
                ssd_cache_gb=1, ssd_cache_dir=tuple(ssd_dir)
            )  # says now what is wrong with a directory
        _check_outputs(trace_file, {"--write": write, "--json": json_to})
        shape = _shape(model, kv_bytes_per_token, tp, kv_dtype)
        hardware = Hardware(gpu_kv_gib, cpu_gib, ssd_gib, pcie_gb_s, ssd_read_gb_s, prefill_tokens_s)
        trace = load_trace(trace_file, tokens_per_block, requests)
        with _progress(None) as bar:
            result = make_plan(trace, shape, hardware, bar.describe)
        if json_to != "-":
            _print_trace(trace_file, trace)
            _print_plan(result, hardware)
        _write_json(json_to, {**_about(trace_file, trace), **result.as_dict()})
        if write is not None:
            result.write(write, ssd_dir or ())
            if json_to != "-":
                say(f"wrote {escape(str(write))}")


def generate_trace(
    kind: Annotated[TraceKind, typer.Argument(help="How the cache is used.")],
    file: Annotated[Path, typer.Argument(metavar="OUT.jsonl", readable=False)],
    requests: Annotated[int, typer.Option(min=1, max=_REQUESTS_MAX)] = 4000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.")] = 0,
) -> None:
    """Write a synthetic trace in Mooncake's format."""
    with errors():
        from sglang_flexkv.replay.synthetic import generate, write_trace

        _check_outputs(None, {"OUT.jsonl": file})
        count = write_trace(file, generate(kind, requests, seed))
        say(f"wrote {escape(str(file))}: {count:,} requests")


def _policies(text: str | None) -> list[EvictionPolicy]:
    from sglang_flexkv.common.config import CacheConfig, EvictionPolicy

    if text is None:
        default: EvictionPolicy = CacheConfig.model_fields["cpu_eviction_policy"].default
        return list(dict.fromkeys((default, EvictionPolicy.LRU)))
    if text == "all":
        return list(EvictionPolicy)
    return list(dict.fromkeys(_policy(name.strip()) for name in text.split(",")))


def _policy(name: str) -> EvictionPolicy:
    from sglang_flexkv.common.config import EvictionPolicy

    known = [policy.value for policy in EvictionPolicy]
    if name not in known:
        raise typer.BadParameter(f"there is no eviction policy {name!r}; known: {', '.join(known)}")
    return EvictionPolicy(name)


def _one_policy(name: str) -> EvictionPolicy:
    if name == "all" or "," in name:
        raise typer.BadParameter(f"--ssd-policy {name!r}: give one name; only --policy takes several")
    return _policy(name)


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


def _about(file: Path, trace: Trace) -> dict[str, Any]:
    return {
        "trace": str(file),
        "requests": trace.num_requests,
        "input_tokens": trace.input_tokens,
        "blocks": trace.num_blocks,
        "unchained_hash_ids": trace.num_unchained_ids,
        "late_requests": trace.num_late_requests,
    }


def _print_trace(file: Path, trace: Trace) -> None:
    say(
        f"{escape(str(file))}: {trace.num_requests:,} requests, {trace.input_tokens:,} input tokens, "
        f"{trace.num_blocks:,} different blocks of {trace.tokens_per_block} tokens"
    )
    if trace.num_unchained_ids:
        say(
            f"[yellow]{trace.num_unchained_ids:,} of its hash ids come after different blocks, so they stand "
            "for a block alone and not for the prompt up to there. Here two blocks are the same only if all "
            "before them are, as in the server.[/yellow]"
        )
    if trace.num_late_requests:
        say(
            f"[yellow]{trace.num_late_requests:,} requests have an earlier timestamp than the one before "
            "them. They were replayed in the order of the file; sort it if they came in another one.[/yellow]"
        )


def _table(columns: Sequence[str]) -> Table:
    """Narrow enough for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    return table


def _explain(columns: dict[str, str]) -> None:
    """What the columns of the table above are."""
    width = max(map(len, columns))
    for name, meaning in columns.items():
        say(f"  [dim]{name:<{width}}  {meaning}[/dim]")


def _print_results(results: Sequence[Result], trace: Trace) -> None:
    with_ssd = any(result.ssd_blocks for result in results)
    with_optimum = any(result.optimum_hit_rate is not None for result in results)
    columns = {"hit": "share of all input tokens that the cache held, so that nobody had to compute them"}
    if with_ssd:
        columns |= {"CPU": "that came from memory", "SSD": "that came from SSD"}
    if with_optimum:
        columns |= {
            "optimum": "what a cache of the same size would hit that knows the future; none can hit more",
            "below it": "how many percentage points that is more",
        }
    columns |= {"warm": "like hit, of the second half of the requests: the cache is empty at first"}
    table = _table(["CPU blocks", "policy", *columns])
    for result in results:
        cells = [f"{result.cpu_blocks:,}", result.policy, f"{result.hit_rate:.2%}"]
        if with_ssd:
            cells += [f"{result.cpu_hit_rate:.2%}", f"{result.ssd_hit_rate:.2%}"]
        if result.optimum_hit_rate is not None:
            below = 100 * (result.optimum_hit_rate - result.hit_rate)
            cells += [f"{result.optimum_hit_rate:.2%}", f"{below:.2f}"]
        table.add_row(*cells, f"{result.warm_hit_rate:.2%}")
    say("[bold]what was hit[/bold]")
    show(table)
    _explain(columns)
    if results[-1].cpu_blocks > trace.num_blocks or results[-1].ssd_blocks > trace.num_blocks:
        say(f"  The trace has {trace.num_blocks:,} different blocks: room for more changes nothing.")

    with_refused = any(result.refused_puts for result in results)
    kinds = {name: _COPIES[name] for name in results[0].moved_bytes or ()}
    columns = {
        "evicted": "blocks that left the CPU tier to make room",
        **(
            {"refused": "requests of which nothing was stored: refused by the policy, or no room"}
            if with_refused
            else {}
        ),
        **{f"{name} GiB": meaning for name, meaning in kinds.items()},
        "µs, µs p99": "time that deciding took per request on this machine: median, and 99th percentile",
    }
    headings = [
        "evicted",
        *(("refused",) if with_refused else ()),
        *(f"{name}\nGiB" for name in kinds),
        "µs",
        "µs p99",
    ]
    table = _table(["CPU blocks", "policy", *headings])
    for result in results:
        table.add_row(
            f"{result.cpu_blocks:,}",
            result.policy,
            f"{result.cpu_evicted:,}",
            *((f"{result.refused_puts:,}",) if with_refused else ()),
            *(f"{size / 2**30:,.1f}" for size in (result.moved_bytes or {}).values()),
            f"{result.control_us_median:.0f}",
            f"{result.control_us_p99:.0f}",
        )
    say("[bold]what it took[/bold]")
    show(table)
    _explain(columns)


def _plot(file: Path, title: str, results: Sequence[Result]) -> None:
    from sglang_flexkv.replay.plot import plot_hit_rates

    curves: dict[str, list[tuple[int, float]]] = {}
    bound: dict[int, float] = {}
    for result in results:
        curves.setdefault(result.policy, []).append((result.cpu_blocks, result.hit_rate))
        if result.optimum_hit_rate is not None:
            bound[result.cpu_blocks] = result.optimum_hit_rate
    plot_hit_rates(file, curves, sorted(bound.items()), title)


def _print_plan(result: Plan, hardware: Hardware) -> None:
    chosen, with_ssd = result.recommended, hardware.ssd_gib > 0
    # The policies of a tier are those of all rows that have it.
    largest = max(result.grid, key=lambda candidate: candidate.ssd_gib)
    policies = f"cpu_eviction_policy {largest.cpu_policy}"
    if with_ssd:
        policies += f", ssd_eviction_policy {largest.ssd_policy}"
    say(f"[bold]sizes that were tried, cheapest first, with {policies}[/bold]")
    columns = ["CPU GiB", "SSD GiB", "device", "CPU", "SSD", "mean ms", "p50 ms", ""]
    table = _table([name for name in columns if with_ssd or "SSD" not in name])
    reasons: list[str] = []
    for candidate in result.grid:
        mark = "[green]recommended[/green]" if candidate == chosen else ""
        if (reason := result.why_less(candidate)) is not None:
            if reason not in reasons:
                reasons.append(reason)
            mark = f"{mark} ({reasons.index(reason) + 1})".strip()
        on_ssd = [_gib(candidate.ssd_gib) if candidate.ssd_gib else "-", f"{candidate.ssd_hit_rate:.1%}"]
        table.add_row(
            _gib(candidate.cpu_gib),
            *on_ssd[: int(with_ssd)],
            f"{candidate.device_hit_rate:.1%}",
            f"{candidate.cpu_hit_rate:.1%}",
            *(on_ssd[1:] if with_ssd else ()),
            f"{1000 * candidate.mean_saving_s:.1f}",
            f"{1000 * candidate.p50_saving_s:.1f}",
            mark,
        )
    show(table)
    _explain(
        {
            "CPU GiB, SSD GiB" if with_ssd else "CPU GiB": "size of the tier, for all ranks together",
            "device": "share of all input tokens that the GPUs' own cache holds (--gpu-kv-gib)",
            "CPU, SSD" if with_ssd else "CPU": "share of them that is loaded from the tier, not computed",
            "mean ms, p50 ms": "how much sooner the first token comes: on average, and at the median request"
            " (0: at least half of them find nothing in the tiers)",
        }
    )
    if chosen is not None and chosen.ssd_admission != result.grid[0].ssd_admission:
        say(
            f"  The recommended row is with ssd_admission {chosen.ssd_admission}, the others with "
            f"{result.grid[0].ssd_admission}."
        )
    for number, reason in enumerate(reasons, 1):
        say(f"  ({number}) hits more than another row and saves less: {reason}")
    say(
        f"A token takes {1e6 * result.compute_s:.1f} µs to compute (--prefill-tokens-s), "
        f"{1e6 * result.cpu_load_s:.1f} µs to load from the CPU tier (--pcie-gb-s)"
        + (f", {1e6 * result.ssd_load_s:.1f} µs from SSD (--ssd-read-gb-s)." if with_ssd else ".")
    )
    if not hardware.gpu_kv_gib:
        say(
            "[yellow]Without --gpu-kv-gib the GPUs' own cache counts as empty: what it would have held "
            "counts as saved by the tiers.[/yellow]"
        )
    if chosen is None:
        say(f"[yellow][bold]No tier is recommended[/bold]: {escape(result.why_nothing())}.[/yellow]")
    else:
        _print_recommendation(chosen, result)
    for cap in result.caps:
        given = hardware.cpu_gib if cap.option == "--cpu-gib" else hardware.ssd_gib
        say(
            f"[yellow]Capped by {cap.option} {given:g}: with room for every block of this trace "
            f"({_gib(cap.enough_gib)} GiB) the first token would come {1000 * cap.mean_saving_s:.1f} ms "
            "sooner on average.[/yellow]"
        )


def _print_recommendation(chosen: Candidate, result: Plan) -> None:
    say("[bold]recommended[/bold]")
    say(f"  cpu_cache_gb         {chosen.cpu_gib:.3f}, cpu_eviction_policy {chosen.cpu_policy}")
    if chosen.ssd_gib:
        say(
            f"  ssd_cache_gb         {chosen.ssd_gib:.3f}, ssd_eviction_policy {chosen.ssd_policy}, "
            f"ssd_admission {chosen.ssd_admission} (the trace writes {_gib(chosen.ssd_written_gib)} GiB)"
        )
    say("  write_policy         write_through")
    say(
        f"  hits                 device {chosen.device_hit_rate:.1%}, CPU {chosen.cpu_hit_rate:.1%}, "
        f"SSD {chosen.ssd_hit_rate:.1%} of the input tokens"
    )
    say(
        f"  time to first token  {1000 * chosen.mean_saving_s:.1f} ms less on average "
        f"({chosen.mean_saving_s / result.mean_prefill_s:.1%} of the prefill), "
        f"{1000 * chosen.p50_saving_s:.1f} ms at the median request"
    )
    more = result.best.mean_saving_s / chosen.mean_saving_s - 1
    if result.best.price > chosen.price and more >= 0.001:
        say(
            f"  for more             {_sizes_of(result.best)} would save {more:.1%} more: hardly worth the "
            "price"
        )


def _sizes_of(candidate: Candidate) -> str:
    cpu = f"{_gib(candidate.cpu_gib)} GiB of memory"
    return f"{cpu} and {_gib(candidate.ssd_gib)} GiB of SSD" if candidate.ssd_gib else cpu


def _gib(size: float) -> str:
    """With three digits that say something."""
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _check_outputs(trace_file: Path | None, targets: dict[str, str | Path | None]) -> None:
    """Before the work whose result is to be written there."""
    names = {os.path.realpath(trace_file): "the trace"} if trace_file is not None else {}
    for option, target in targets.items():
        if target is None or target == "-":
            continue
        if why := why_not_writable(Path(target)):
            raise FlexKVError(f"{target} {why}")
        # Not of a device: whoever names /dev/null twice means it.
        path = os.path.realpath(target)
        if path in names and (os.path.isfile(path) or not os.path.exists(path)):
            raise FlexKVError(f"{option} {target} is also {names[path]}; name another file")
        names[path] = option


def _write_json(target: str | None, content: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FlexKVError(f"{target} cannot be written: {reason(error)}") from None
