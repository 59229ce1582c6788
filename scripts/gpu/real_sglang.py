"""Real SGLang on this machine, without and with FlexKV: are the answers the same, and how soon do they begin?

    python real_sglang.py --model DIR --json FILE [--sizes 8192,32768] [--deadline 200]

Two servers with the same model run side by side: stock SGLang and SGLang with --enable-flexkv. The device
pool holds one long prompt and little more, the CPU tier a few, the SSD tier all. Every prompt is asked

* recompute: of the stock server, which has not seen it;         then at once: the stock server's device hit;
* cold:      of the FlexKV server, which has not seen it either; then at once: its device hit;
* cpu:       after another prompt took its place on the device;
* ssd:       after other prompts took its place in the CPU tier too.

A model that computes in bf16 rounds differently when it computes another number of tokens at once, with or
without a cache. So what comes from a lower tier is compared with what the stock server answers from its own
device cache (the same tokens computed over the same cached prefix), and what is computed with what is
computed. Both must be equal, token by token; top log-probabilities are compared too.

At the end first prompts of one chunk, and of a chunk and seven tokens, are asked of both servers: only the
second kind is computed while something of it is being stored.

Where the model cannot be started as asked, simpler settings are tried in turn; the JSON says which held.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

PAGE = 16
NEW_TOKENS = 24
GIB = 1 << 30
FIRST_TOKEN_ID = 300  # below it are special tokens and single bytes
_BEYOND = 7  # tokens of a prompt behind its last page
_PAIRS = 3  # of first prompts, one for each server

# What is given up, in this order, where a server does not start.
LADDER: list[dict[str, Any]] = [
    {},
    {"disable-prefill-cuda-graph": True},
    {"disable-cuda-graph": True},
    {"disable-cuda-graph": True, "attention-backend": "triton"},
]


def server_class(root: Path) -> Any:
    """The project's own server helper, from its tests."""
    path = root / "tests" / "support" / "server.py"
    spec = importlib.util.spec_from_file_location("sglang_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.SGLangServer


def token_bytes(model: Path, itemsize: int) -> int:
    """Bytes of KV of one token."""
    fields = json.loads((model / "config.json").read_text())
    layers = fields["num_hidden_layers"]
    if "kv_lora_rank" in fields:
        return int(layers * (fields["kv_lora_rank"] + fields["qk_rope_head_dim"]) * itemsize)
    return int(layers * 2 * fields["num_key_value_heads"] * fields["head_dim"] * itemsize)


class Run:
    """The two servers, the prompts, and what was found out."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch = options, scratch
        self.sizes = [int(size) for size in options.sizes.split(",")]
        self.deadline = time.monotonic() + options.deadline
        self.rng = np.random.default_rng(options.seed)
        self.client = httpx.Client(trust_env=False, timeout=120.0)
        self.fields = json.loads((options.model / "config.json").read_text())
        self.chunk_tokens = min(8192, max(self.sizes))
        # One of the longest prompts, its answer, and little more.
        self.pool_tokens = max(self.sizes) + max(self.sizes) // 8 + 16 * PAGE
        # Takes all of the device pool when it is asked.
        self.filler_tokens = self.pool_tokens - 8 * PAGE
        # The longest only once: what they write to disk is most of the time it takes.
        once = len(self.sizes) > 1
        self.plan = [
            size
            for size in self.sizes
            for _ in range(1 if once and size == max(self.sizes) else options.repeats)
        ]
        self.prompt_bytes = token_bytes(options.model, 4 if options.dtype == "float32" else 2)
        self.results: dict[str, Any] = {
            "model": options.model.name,
            "parameters": {key: self.fields.get(key) for key in ("hidden_size", "num_hidden_layers")},
            "kv_bytes_per_token": self.prompt_bytes,
            "sizes": self.sizes,
            "pool_tokens": self.pool_tokens,
            "rows": [],
            "checks": {},
            "problems": [],
        }
        self.rows: list[dict[str, Any]] = self.results["rows"]

    # Servers.

    def flags(self, extra: dict[str, Any]) -> dict[str, Any]:
        flags: dict[str, Any] = {
            "page-size": PAGE,
            "dtype": self.options.dtype,
            "load-format": self.options.load_format,
            "max-total-tokens": self.pool_tokens,
            "context-length": self.pool_tokens,
            "chunked-prefill-size": self.chunk_tokens,
            "max-running-requests": 4,
            "attention-backend": self.options.attention,
            "random-seed": 1,
            "enable-metrics": True,
            "skip-server-warmup": True,
            "log-level": "info",
        }
        if self.options.device == "cuda":
            # Two servers share the memory, and each takes its share of what is free when it looks.
            flags |= {"mem-fraction-static": 0.85, "cuda-graph-bs-decode": [1, 2, 4]}
            flags |= {"cuda-graph-bs-prefill": [32, 64, 128]}
            if "kv_lora_rank" in self.fields:
                # Prefills read the latent, too. Else they need a kernel for heads of 192: none travels.
                flags["flashinfer-mla-disable-ragged"] = True
        merged = {**flags, **extra}
        if merged.get("disable-prefill-cuda-graph") or merged.get("disable-cuda-graph"):
            merged.pop("cuda-graph-bs-prefill", None)
        if merged.get("disable-cuda-graph"):
            merged.pop("cuda-graph-bs-decode", None)
        return merged

    def start(self) -> Any:
        """Both servers, with the first settings of the ladder that work."""
        make = server_class(self.options.root)
        ssd_bytes = self.ssd_tier_tokens() * self.prompt_bytes
        environment = {
            "FLEXKV_CPU_CACHE_GB": f"{self.cpu_tier_tokens() * self.prompt_bytes / GIB:.4f}",
            "FLEXKV_LOAD_POLICY": self.options.load_policy,
            # Which prompt is where must be known.
            "FLEXKV_CPU_EVICTION_POLICY": "lru",
            "FLEXKV_SSD_EVICTION_POLICY": "lru",
        }
        free = shutil.disk_usage(self.scratch).free
        self.with_ssd = ssd_bytes < 0.85 * free
        if self.with_ssd:
            environment["FLEXKV_SSD_CACHE_GB"] = f"{ssd_bytes / GIB:.4f}"
            environment["FLEXKV_SSD_CACHE_DIR"] = str(self.scratch)
        else:
            problem = f"no SSD tier: {ssd_bytes / GIB:.0f} GiB wanted, {free / GIB:.0f} free"
            self.results["problems"].append(problem)
        # Not the folder we are in first: the project's own has no compiled core.
        safe = {"PYTHONSAFEPATH": "1"}
        ladder = LADDER if self.options.device == "cuda" else LADDER[:1]
        for step, extra in enumerate(ladder):
            end = f"{self.options.model.name}-{step}.log"
            logs = [self.options.logs / f"{name}-{end}" for name in ("stock", "flexkv")]
            for log in logs:
                log.unlink(missing_ok=True)
            flags = self.flags(extra)
            left = max(20.0, min(150.0, self.deadline - time.monotonic() - 20))
            stock = make(
                self.options.model, flags, env=safe, log_path=logs[0], start_timeout_s=left, stop_grace_s=0
            )
            flexkv = make(
                self.options.model,
                {**flags, "enable-flexkv": True},
                env={**environment, **safe},
                log_path=logs[1],
                start_timeout_s=left,
                stop_grace_s=0,
            )
            begin = time.monotonic()
            try:
                with ThreadPoolExecutor(2) as pool:
                    started = [pool.submit(server.start) for server in (stock, flexkv)]
                    [one.result() for one in started]
            except Exception as error:
                for server in (stock, flexkv):
                    server.stop(0)
                self.results["problems"].append({"flags": extra, "error": str(error)[-2500:]})
                print(f"not with {extra}: {str(error)[-1200:]}", flush=True)
                # Simpler settings do not bring a missing package.
                if time.monotonic() > self.deadline - 30 or "ModuleNotFoundError" in str(error):
                    raise
                continue
            self.results["start_s"] = time.monotonic() - begin
            self.results["flags"] = {name: value for name, value in flags.items() if name != "model-path"}
            self.results["given_up"] = extra
            took = f"{self.results['start_s']:.0f} s"
            print(f"both servers up after {took}, given up: {extra or 'nothing'}", flush=True)
            return stock, flexkv
        raise RuntimeError("no settings of the ladder work; see the problems")

    def cpu_tier_tokens(self) -> int:
        """All prompts and one filler."""
        return sum(self.plan) + self.filler_tokens + 4096

    def fillers(self) -> int:
        """How many new ones take all of the CPU tier."""
        return -(-self.cpu_tier_tokens() // self.filler_tokens)

    def ssd_tier_tokens(self) -> int:
        """Everything that is asked until the prompts have come back from there."""
        return sum(self.plan) + (self.fillers() + 1) * self.filler_tokens + self.sizes[0] + 8192

    # Requests.

    def prompt(self, tokens: int) -> list[int]:
        # Not a whole number of pages, as in life.
        return self.rng.integers(FIRST_TOKEN_ID, self.fields["vocab_size"], tokens + _BEYOND).tolist()

    def ask(self, server: Any, prompt: list[int], new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True},
            "stream": True,
            "return_logprob": True,
            "logprob_start_len": -1,
        }
        ttft, last = 0.0, ""
        begin = time.perf_counter()
        with self.client.stream("POST", f"{server.url}/generate", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    ttft = ttft or time.perf_counter() - begin
                    last = line.removeprefix("data: ")
        answer = json.loads(last)
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        return {
            "ttft_ms": 1000 * ttft,
            "ids": tuple(answer["output_ids"]),
            "logprobs": [entry[0] for entry in meta.get("output_token_logprobs", [])],
            "prompt": meta["prompt_tokens"],
            "cached": meta["cached_tokens"],
            "source": {name: int(details.get(name) or 0) for name in ("device", "host", "storage")},
        }

    def note(self, kind: str, size: int, answer: dict[str, Any], reference: dict[str, Any] | None) -> None:
        row = {
            "kind": kind,
            "size": size,
            "ttft_ms": round(answer["ttft_ms"], 2),
            "cached": answer["cached"],
            **answer["source"],
        }
        if reference is not None:
            row["same_ids"] = answer["ids"] == reference["ids"]
            pairs = list(zip(answer["logprobs"], reference["logprobs"], strict=False))
            row["logprob_difference"] = max((abs(a - b) for a, b in pairs), default=None)
            row["same_cached"] = answer["cached"] == reference["cached"]
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def check(self, what: str, good: bool) -> None:
        entry = self.results["checks"].setdefault(what, {"count": 0, "failed": 0})
        entry["count"] += 1
        entry["failed"] += not good

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wait_until_written(self, server: Any, limit_s: float = 25.0) -> None:
        """Until the server has written nothing to disk for half a second."""
        tree = [psutil.Process(server.pid)]
        tree += tree[0].children(recursive=True)
        end, before, since = time.monotonic() + min(limit_s, max(1.0, self.left() - 10)), -1, time.monotonic()
        while time.monotonic() < end:
            written = 0
            for process in tree:
                with contextlib.suppress(psutil.Error):
                    written += process.io_counters().write_bytes
            if written != before:
                before, since = written, time.monotonic()
            elif time.monotonic() - since > 0.5:
                return
            time.sleep(0.05)
        self.results["problems"].append("the SSD tier was still being written when the next step began")

    # The measurement.

    def hit(self, kind: str, flexkv: Any, size: int, prompt: list[int], device: dict[str, Any]) -> None:
        source = {"cpu": "host", "ssd": "storage"}[kind]
        answer = self.ask(flexkv, prompt)
        self.note(kind, size, answer, device)
        self.check(f"{kind}: came from there", answer["source"][source] >= 0.8 * len(prompt))
        self.check(f"{kind}: same tokens as the stock server's device hit", answer["ids"] == device["ids"])

    def measure(self, stock: Any, flexkv: Any) -> None:
        for server in (stock, flexkv):  # kernels are compiled and graphs warmed up here
            for size in (64, 1024, self.sizes[0]):
                prompt = self.prompt(size)
                self.ask(server, prompt, 4)
                self.ask(server, prompt, 4)
        known: list[tuple[int, list[int], dict[str, Any]]] = []
        for size in self.plan:
            prompt = self.prompt(size)
            recomputed = self.ask(stock, prompt)
            self.note("recompute", size, recomputed, None)
            device = self.ask(stock, prompt)
            self.note("device of stock", size, device, recomputed)
            cold = self.ask(flexkv, prompt)
            self.note("cold", size, cold, recomputed)
            self.check("cold: same tokens as stock computes", cold["ids"] == recomputed["ids"])
            warm = self.ask(flexkv, prompt)
            self.note("device", size, warm, device)
            self.check("device: same tokens as the stock server's device hit", warm["ids"] == device["ids"])
            known.append((size, prompt, device))
        filler = self.prompt(self.filler_tokens - 7)
        for _ in range(2):
            if self.left() > 20:
                self.ask(flexkv, filler, 1)
                for size, prompt, device in known:
                    self.hit("cpu", flexkv, size, prompt, device)
        if self.with_ssd:
            self.from_ssd(flexkv, known)
        self.together(flexkv, filler)
        self.first_prompts(stock, flexkv)
        for server in (stock, flexkv):
            self.client.get(f"{server.url}/health").raise_for_status()

    def from_ssd(self, flexkv: Any, known: list[tuple[int, list[int], dict[str, Any]]]) -> None:
        for _ in range(self.fillers()):
            if self.left() > 15:
                self.ask(flexkv, self.prompt(self.filler_tokens - 7), 1)
                self.wait_until_written(flexkv)
        for size, prompt, device in known:
            if self.left() < 8:
                self.results["problems"].append("time is up: not every prompt was asked from SSD")
                return
            self.hit("ssd", flexkv, size, prompt, device)

    def together(self, flexkv: Any, filler: list[int]) -> None:
        """Four prompts at once that come from the CPU tier; answers are reported, not judged: with bf16 the
        composition of a batch decides about rounding, with or without a cache."""
        if self.left() < 15:
            return
        size = min(self.sizes) // 4
        prompts = [self.prompt(size) for _ in range(8)]
        alone = [self.ask(flexkv, prompt) for prompt in prompts]
        self.ask(flexkv, filler, 1)
        with ThreadPoolExecutor(4) as pool:
            again = list(pool.map(lambda prompt: self.ask(flexkv, prompt), prompts))
        same = sum(a["ids"] == b["ids"] for a, b in zip(alone, again, strict=True))
        hits = sum(b["source"]["host"] >= 0.8 * size for b in again)
        self.results["four_at_once"] = {"prompts": len(prompts), "from_cpu": hits, "same_as_alone": same}

    def first_prompts(self, stock: Any, flexkv: Any) -> None:
        """What storing costs the first token of a prompt that is new, while nothing else is written."""
        sizes = {"one chunk": self.chunk_tokens - _BEYOND - 1, "a chunk and 7 tokens": self.chunk_tokens}
        took: dict[str, list[tuple[float, float]]] = {what: [] for what in sizes}
        for _ in range(_PAIRS):
            for what, size in sizes.items():
                if self.left() < 20:
                    return
                self.wait_until_written(flexkv, 5.0)
                prompt = self.prompt(size)
                pair = [self.ask(server, prompt, 4)["ttft_ms"] for server in (stock, flexkv)]
                took[what].append((pair[0], pair[1]))
        self.results["first_prompts"] = {
            what: {
                "tokens": sizes[what] + _BEYOND,
                "stock_ms": round(statistics.median(stocks for stocks, _ in pairs), 2),
                "ratio": round(statistics.median(ours / stocks for stocks, ours in pairs), 3),
            }
            for what, pairs in took.items()
        }

    def summarise(self) -> None:
        summary: dict[str, Any] = {}
        for size in self.sizes:
            typical = {
                kind: statistics.median(values)
                for kind in ("recompute", "device of stock", "cold", "device", "cpu", "ssd")
                if (values := [r["ttft_ms"] for r in self.rows if r["kind"] == kind and r["size"] == size])
            }
            entry: dict[str, Any] = {"ttft_ms": {kind: round(value, 2) for kind, value in typical.items()}}
            for kind in ("cpu", "ssd"):
                if kind in typical and "device" in typical and "recompute" in typical:
                    entry[f"{kind}_over_device"] = round(typical[kind] / typical["device"], 3)
                    entry[f"recompute_over_{kind}"] = round(typical["recompute"] / typical[kind], 2)
            summary[str(size)] = entry
        self.results["summary"] = summary
        failed = [what for what, entry in self.results["checks"].items() if entry["failed"]]
        self.results["verdict"] = "met" if self.results["checks"] and not failed else "missed"
        self.results["failed"] = failed
        shown = ("summary", "first_prompts", "checks", "verdict", "problems")
        print(json.dumps({key: self.results.get(key) for key in shown}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the project's folder")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("logs"))
    parser.add_argument("--scratch", type=Path, default=None, help="on the disk for the SSD tier")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--load-policy", default="load")
    parser.add_argument("--attention", default="flashinfer")
    parser.add_argument("--sizes", default="8192,32768")
    parser.add_argument("--repeats", type=int, default=2, help="prompts of a size; one of the longest")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--deadline", type=float, default=200.0, help="seconds for everything")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flexkv-kit-", dir=options.scratch) as directory:
        run = Run(options, Path(directory))
        servers: tuple[Any, ...] = ()
        try:
            servers = run.start()
            run.measure(*servers)
        except BaseException as error:  # what was measured until then is worth having
            run.results["problems"].append(f"{type(error).__name__}: {error}"[-2000:])
            run.results["ended_early"] = True
            if not isinstance(error, Exception):
                raise
        finally:
            for server in servers:
                server.stop(0)
            run.summarise()
            options.json.write_text(json.dumps(run.results, indent=1, default=str) + "\n")
    return 0 if run.results["verdict"] == "met" and not run.results.get("ended_early") else 1


if __name__ == "__main__":
    os.environ.setdefault("NO_PROXY", "*")
    sys.exit(main())
