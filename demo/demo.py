"""The main job, shown: prompts leave the device pool of a real SGLang server and come back.

    make demo

One server runs with a device pool that holds only some of the prompts, a CPU tier that holds all of them but
not the ones that come after, and an SSD tier. The same prompts are sent when nothing is cached, when they
are still on the device, when they were evicted to the CPU tier, when they were pushed on to SSD, and after
the server was started anew; then, when it is gone, to another one that shares its remote store and has
nothing else; then to a server without any cache. The table says where each token came from and what that
saved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from answers import ASK, EXACT, difference  # noqa: E402
from server import DTYPE, SGLangServer  # noqa: E402
from workload import some_tokens  # noqa: E402

from sglang_flexkv.replay.planner import KvShape  # noqa: E402

MODEL = ROOT / "models" / "small-gqa"
NEW_TOKENS = 8
PAGE = 16
CPU_TIER_PROMPTS = 5  # prompts that fit into the CPU tier
DEVICE_PROMPTS = 2.5  # prompts that fit on the device

console = Console()


@dataclass
class Answer:
    """One request: when its first token came, what SGLang answered, and where the prompt's KV came from."""

    ttft_s: float
    whole: dict[str, Any]
    device: int
    cpu: int
    ssd: int


@dataclass
class Phase:
    name: str
    answers: list[Answer] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return statistics.median(a.ttft_s for a in self.answers)

    def tokens(self, source: str) -> int:
        return sum(getattr(a, source) for a in self.answers)


def ask(server: SGLangServer, prompt: list[int]) -> Answer:
    """Sends one prompt and times its first token."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": NEW_TOKENS},
        "stream": True,
        **ASK,
    }
    begin, ttft_s, last = time.perf_counter(), 0.0, {}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=300, trust_env=False) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            ttft_s = ttft_s or time.perf_counter() - begin
            last = json.loads(line[5:])
    details = last["meta_info"].get("cached_tokens_details") or {}
    return Answer(
        ttft_s,
        last,
        details.get("device", 0),
        details.get("host", 0),
        details.get("storage", 0),
    )


def run_one(phase: Phase, server: SGLangServer, prompt: list[int]) -> None:
    answer = ask(server, prompt)
    phase.answers.append(answer)
    console.print(
        f"  {phase.name:<20} prompt {len(phase.answers)}: {len(prompt)} tokens, "
        f"[dim]device[/] {answer.device} [dim]CPU[/] {answer.cpu} [dim]SSD, store[/] {answer.ssd}, "
        f"first token after {answer.ttft_s * 1000:.0f} ms",
        soft_wrap=True,
    )


def run(phase: Phase, server: SGLangServer, prompts: list[list[int]]) -> Phase:
    for prompt in prompts:
        run_one(phase, server, prompt)
    return phase


def step(text: str, action: Callable[[], object]) -> None:
    with console.status(text):
        begin = time.perf_counter()
        action()
    console.print(f"[bold]{text}[/] ({time.perf_counter() - begin:.0f} s)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="how many prompts come back (default 4)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a prompt (default 2048)")
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="model directory (default models/small-gqa)"
    )
    options = parser.parse_args()

    token_bytes = KvShape.of_model(options.model, dtype=DTYPE).block_bytes(PAGE) // PAGE
    rng = random.Random(2024)
    # A length that is no multiple of the block size, as in life: the end of a prompt is always computed.
    prompts = [some_tokens(rng, options.tokens + 7) for _ in range(options.prompts)]
    others = [some_tokens(rng, options.tokens) for _ in range(CPU_TIER_PROMPTS + 1)]

    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="demo-", dir=ROOT / "build") as scratch:
        ssd, store = Path(scratch) / "ssd", Path(scratch) / "store"
        ssd.mkdir()
        store.mkdir()
        settings, of_another = Path(scratch) / "flexkv.yaml", Path(scratch) / "another.yaml"
        per_prompt_gb = (options.tokens + 64) * token_bytes / 2**30
        settings.write_text(
            f"cpu_cache_gb: {CPU_TIER_PROMPTS * per_prompt_gb:.4f}\n"
            f"ssd_cache_gb: {4 * CPU_TIER_PROMPTS * per_prompt_gb:.4f}\n"
            f"ssd_cache_dir: {ssd}\n"
            f"remote: file://{store}?max_gb=8\n"
        )
        of_another.write_text(
            f"cpu_cache_gb: {CPU_TIER_PROMPTS * per_prompt_gb:.4f}\nremote: file://{store}?max_gb=8\n"
        )
        console.print(f"[bold]sglang-flexkv[/], settings:\n[dim]{settings.read_text()}[/]", end="")
        flags = {"max-total-tokens": int(DEVICE_PROMPTS * options.tokens), "page-size": PAGE}
        with_cache = SGLangServer(
            options.model,
            {**flags, "enable-flexkv": True, "flexkv-config-file": str(settings)},
            log_path=ROOT / "logs" / "demo-flexkv.log",
        )
        phases = []
        try:
            step("SGLang with --enable-flexkv is up", with_cache.start)
            ask(with_cache, others[-1][:64])  # first-request costs belong to nobody
            cold, device = Phase("cold"), Phase("device hit")
            for prompt in prompts:
                run_one(cold, with_cache, prompt)
                run_one(device, with_cache, prompt)
            phases += [cold, device]
            phases.append(run(Phase("evicted, CPU hit"), with_cache, prompts))
            step(
                f"{CPU_TIER_PROMPTS} other prompts push them out of the CPU tier",
                lambda: [ask(with_cache, other) for other in others[:CPU_TIER_PROMPTS]],
            )
            phases.append(run(Phase("evicted, SSD hit"), with_cache, prompts))
            step("the server is stopped", with_cache.stop)
            step("and started again", with_cache.start)
            ask(with_cache, others[-1][:64])
            phases.append(run(Phase("restarted, SSD hit"), with_cache, prompts))
        finally:
            with_cache.stop()
        another = SGLangServer(
            options.model,
            {**flags, "enable-flexkv": True, "flexkv-config-file": str(of_another)},
            log_path=ROOT / "logs" / "demo-another.log",
        )
        try:
            step("it is gone; another server that shares its store is up", another.start)
            ask(another, others[-1][:64])
            phases.append(run(Phase("other server, store"), another, prompts))
        finally:
            another.stop()
        without = SGLangServer(
            options.model,
            {**flags, "disable-radix-cache": True},
            log_path=ROOT / "logs" / "demo-plain.log",
            stop_grace_s=0,
        )
        try:
            step("SGLang without any cache is up", without.start)
            ask(without, others[-1][:64])
            phases.append(run(Phase("server without cache"), without, prompts))
        finally:
            without.stop()

    plain = phases[-1]
    total = sum(map(len, prompts))
    table = Table(title=f"{options.prompts} prompts of {len(prompts[0])} tokens, {options.model.name}")
    for column in ("", "device", "CPU", "SSD, store", "computed", "TTFT", "saved"):
        table.add_column(column, justify="left" if not column else "right")
    for phase in phases:
        found = [phase.tokens(source) for source in ("device", "cpu", "ssd")]
        saved = 1 - phase.ttft_s / plain.ttft_s
        table.add_row(
            phase.name,
            *(f"{n:,}" for n in (*found, total - sum(found))),
            f"{phase.ttft_s * 1000:,.0f} ms",
            f"{saved:.0%}" if phase is not plain and sum(found) else "",
        )
    console.print(table)
    console.print(
        f"[dim]TTFT: median time to the first token. saved: of the TTFT of the server without cache.\n"
        f"{os.cpu_count()} CPUs ({platform.machine()}), {platform.platform()}; random weights.[/]",
        soft_wrap=True,
    )
    answers = [(a, plain.answers[i]) for p in phases[:-1] for i, a in enumerate(p.answers)]
    same = sum(difference(a.whole, b.whole) is None for a, b in answers)
    judged = "identical" if EXACT else "identical, but for rounding"
    console.print(f"outputs {judged}: [bold]{same}/{len(answers)}[/]")

    # A demo that shows nothing must not look like one that does.
    expected = {1: "device", 2: "cpu", 3: "ssd", 4: "ssd", 5: "ssd"}
    empty = [phases[i].name for i, source in expected.items() if phases[i].tokens(source) < total // 2]
    if empty:
        console.print(f"[red]too few tokens came from where they should: {', '.join(empty)}[/]")
    return 0 if same == len(answers) and not empty else 1


if __name__ == "__main__":
    sys.exit(main())
