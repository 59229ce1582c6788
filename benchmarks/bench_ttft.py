"""Time to first token of a prompt that comes back, by where its KV is.

    python benchmarks/bench_ttft.py [--smoke] [--json FILE|-]

Two real SGLang servers: stock, and with FlexKV over a device pool that holds little more than one prompt. New
prompts push old ones out, so that one and the same prompt is asked

* recompute: of the stock server, which has never seen it;
* cold: of the FlexKV server, which has never seen it either (and stores it);
* cpu: after the next prompt took its place on the device;
* ssd: after later prompts took its place in the CPU tier too, and everything that waits for SSD is there;
* device: right after each hit in a lower tier, when it is on the device again.

Where the tokens came from is taken from SGLang's own report (``cached_tokens_details``), and all of them
must give the same output. The server that is not asked is stopped. Ratios are of neighbours in time.
"""

from __future__ import annotations

from typing import Annotated, Any

import httpx
import numpy as np
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
from serving import (
    PAGE_SIZE,
    Answer,
    ask,
    both_servers,
    ensure_model,
    kv_bytes_per_token,
    model_fields,
    running,
    wait_until_written,
)

# The source that must have delivered a hit of each kind, in SGLang's words.
_SOURCES = {"device": "device", "cpu": "host", "ssd": "storage"}
# Prompts that the CPU tier holds: the one that comes back from it, its predecessor and its successor. What is
# over is less than what a hit may lack.
_CPU_TIER_PROMPTS = 3.1
# A hit may be a little smaller than the prompt: its last page is always computed, and what little the device
# had left of the prompt comes from there.
_SHARE_MIN = 0.85


def check_source(report: Report, kind: str, answer: Answer) -> None:
    if kind in _SOURCES:
        delivered = answer.source[_SOURCES[kind]]
        good = delivered >= _SHARE_MIN * answer.prompt_tokens
        report.check(f"{kind} hits came from there", good)
    else:
        good = answer.cached_tokens == 0
        report.check(f"{kind} found nothing cached", good)
    if not good:
        console.print(
            f"[red]{kind}: of {answer.prompt_tokens} tokens these were cached: {answer.source}[/red]"
        )


def main(
    smoke: SmokeOption = False,
    json_to: JsonOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts measured.")] = 7,
) -> None:
    """Time to first token: cold, and as a hit in each tier."""
    name = "small-gqa"
    if smoke:
        name, tokens, repeats = "tiny-gqa", 512, 3
    model = ensure_model(name)
    prompt_bytes = tokens * kv_bytes_per_token(model)
    vocabulary = model_fields(model)["vocab_size"]
    # Room for one prompt and its output, and not for a second one.
    pool_tokens = tokens + max(PAGE_SIZE * 8, tokens // 8)
    flags = {"max-total-tokens": pool_tokens, "context-length": pool_tokens}
    rng = np.random.default_rng(3)
    times: dict[str, list[float]] = {kind: [] for kind in ("recompute", "cold", *_SOURCES)}
    pairs: dict[str, list[tuple[float, float]]] = {kind: [] for kind in ("cpu", "ssd")}
    with disk_directory(None, "bench-ttft") as scratch, httpx.Client(trust_env=False) as client:
        report = Report("ttft", smoke, Machine.here(scratch), {"model": name, "tokens": tokens})
        report.settings.update({"repeats": repeats, "prompt_kv_mib": prompt_bytes / 2**20, **flags})
        environment = {
            "FLEXKV_CPU_CACHE_GB": f"{_CPU_TIER_PROMPTS * prompt_bytes / GIB:.6f}",
            "FLEXKV_SSD_CACHE_GB": f"{(repeats + 5) * prompt_bytes / GIB:.6f}",
            "FLEXKV_SSD_CACHE_DIR": str(scratch),
        }
        console.print(f"starting two servers with {name} ...")
        with both_servers(model, flags, environment) as (stock, flexkv):
            prompts: list[list[int]] = []
            answers: list[Answer] = []

            def measure(kind: str, server: Any, index: int) -> float:
                answer = ask(client, server, prompts[index], 4)
                check_source(report, kind, answer)
                if kind == "recompute":
                    answers.append(answer)
                report.check("outputs equal those of stock SGLang", answer.same_as(answers[index]))
                if index >= 1:  # the first prompt warms up
                    times[kind].append(answer.ttft_s)
                return answer.ttft_s

            def measure_hit(kind: str, index: int) -> None:
                wait_until_written(flexkv)
                hit_s = measure(kind, flexkv, index)
                device_s = measure("device", flexkv, index)
                if index >= 1:
                    pairs[kind].append((hit_s, device_s))
                console.print(f"prompt {index}: {kind} {hit_s:.3f} s, device {device_s:.3f} s")

            for index in range(repeats + 2):
                prompts.append(rng.integers(3, vocabulary, tokens).tolist())
                with running(stock):
                    recompute_s = measure("recompute", stock, index)
                with running(flexkv):
                    cold_s = measure("cold", flexkv, index)
                    console.print(f"prompt {index}: recompute {recompute_s:.3f} s, cold {cold_s:.3f} s")
                    if index >= 1:
                        measure_hit("cpu", index - 1)
            with running(flexkv):
                # The last three are in the CPU tier, the others only on SSD.
                for index in range(repeats - 1):
                    measure_hit("ssd", index)
    report.rows = [
        {
            "source": kind,
            "ttft_ms": 1000 * median(seconds),
            "min_ms": 1000 * min(seconds),
            "spread": spread(seconds),
            "repeats": len(seconds),
        }
        for kind, seconds in times.items()
    ]
    print_table(f"time to first token, {tokens} tokens", report.rows, list(report.rows[0]))
    typical = {kind: median(seconds) for kind, seconds in times.items()}
    report.results = {f"{kind}_ttft_ms": 1000 * seconds for kind, seconds in typical.items()}
    for kind, taken in pairs.items():
        report.results[f"{kind}_hit_over_device_hit"] = median_ratio(
            [hit for hit, _ in taken], [device for _, device in taken]
        )
        report.results[f"cold_over_{kind}_hit"] = typical["cold"] / typical[kind]
        report.results[f"recompute_over_{kind}_hit"] = typical["recompute"] / typical[kind]
    report.results["cold_over_recompute"] = median_ratio(times["cold"], times["recompute"])
    report.goals["cpu_hit_over_device_hit"] = "≤ 1.3"
    report.finish(json_to)


if __name__ == "__main__":
    typer.run(main)
