"""The traffic: what every contender gets in every round, in this order.

cold        prompts that nobody has seen, one at a time
soon        the same again, after they had to leave the device for each other
sessions    conversations, two at a time: a turn comes when all others have had theirs
prefix      SGLang's own bench_serving, `generated-shared-prefix`
trace       a sample of a recorded trace, two at a time
new         prompts that nobody has seen and nobody will: a cache can only cost
burst       many requests at once that begin with one prompt, which has left the device
late        the prompts of `cold` once more, after all of this. For who reads files in two halves: with the
            files in the page cache (`late_warm`), and without (`late_dropped`)
late_burst  `burst` on a prompt that has not been seen since before `cold`

A round has token ids of its own, and they are the same for every contender.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import httpx
from serving import Answer, ask

from comparison import traces
from comparison.contenders import Running
from sglang_flexkv.replay.trace import Trace

_AT_ONCE = 2  # requests in `sessions`, `trace` and `new`
SOURCES = ("device", "host", "storage")


@dataclass(frozen=True)
class Sizes:
    """How much of everything, in tokens if nothing else is said."""

    device: int = 2048
    disk: int = 98304
    answer: int = 4
    prompts: int = 4  # number, of `cold`; together more than the device holds
    prompt: int = 576
    sessions: int = 5  # number; together more than the device holds
    turns: int = 3  # number
    first_turn: int = 448
    next_turn: int = 64
    groups: int = 4  # number, of `prefix`
    group_prompts: int = 3  # number
    system: int = 512
    question: int = 32
    trace: int = 2048
    trace_prompt_max: int = 768
    new_prompts: int = 5  # number
    new_prompt: int = 448
    burst: int = 16  # number
    burst_prefix: int = 768
    burst_rest: int = 16

    def scaled(self, by: int) -> Sizes:
        """With as many requests, all of them longer, and room for that."""
        numbers = {
            "answer",
            "prompts",
            "sessions",
            "turns",
            "groups",
            "group_prompts",
            "new_prompts",
            "burst",
        }
        changed = {f.name: getattr(self, f.name) * by for f in fields(self) if f.name not in numbers}
        return replace(self, **changed)


@dataclass
class Part:
    """What one kind of traffic gave.

    Attributes:
        texts: what bench_serving had for answers, where it asked.
        seconds: of all its requests together.
    """

    ttfts: list[float]
    cached: dict[str, int]
    seconds: float
    answers: list[Answer]
    texts: list[str]
    prompt_tokens: int

    @property
    def requests_per_s(self) -> float:
        return len(self.ttfts) / self.seconds


class Traffic:
    """One round of it.

    Args:
        round_number: decides the token ids.
        trace: from which `trace` is drawn.
        scratch: where bench_serving may write.
    """

    def __init__(
        self, model: Path, vocabulary: int, sizes: Sizes, round_number: int, trace: Trace, scratch: Path
    ) -> None:
        self._model, self._vocabulary, self._sizes = model, vocabulary, sizes
        self._round, self._trace, self._scratch = round_number, trace, scratch

    def run(self, running: Running) -> dict[str, Part]:
        """All parts by name.

        Raises:
            httpx.HTTPError, RuntimeError: a request failed.
        """
        z = self._sizes
        with running.awake() as server, httpx.Client(trust_env=False, limits=_NO_LIMITS) as client:

            def serve(prompts: Sequence[Sequence[int]], at_once: int) -> Part:
                begin_s = time.perf_counter()
                with ThreadPoolExecutor(at_once) as pool:
                    answers = list(pool.map(lambda prompt: ask(client, server, prompt, z.answer), prompts))
                return _part(answers, time.perf_counter() - begin_s)

            def burst(beginning: list[int], name: str) -> Part:
                rests = [self._tokens(f"{name} {i}", z.burst_rest) for i in range(z.burst)]
                return serve([beginning + rest for rest in rests], z.burst)

            early = self._tokens("late_burst", z.burst_prefix)
            serve([early], 1)
            cold = [self._tokens(f"cold {i}", z.prompt) for i in range(z.prompts)]
            parts = {"cold": serve(cold, 1), "soon": serve(cold, 1)}
            parts["sessions"] = self._sessions(serve)
            parts["prefix"] = self._bench_serving(server)
            seed = self._round
            drawn = traces.sample(self._trace, seed, z.trace, z.trace_prompt_max, self._vocabulary)
            parts["trace"] = serve(drawn, _AT_ONCE)
            beginning = self._tokens("burst", z.burst_prefix)
            serve([beginning], 1)
            new = [self._tokens(f"new {i}", z.new_prompt) for i in range(z.new_prompts)]
            parts["new"] = serve(new, _AT_ONCE)
            parts["burst"] = burst(beginning, "burst")
            if running.contender.reads_disk:
                half = len(cold) // 2
                parts["late_warm"] = serve(cold[:half], 1)
                drop_page_cache(running.place.directory)
                parts["late_dropped"] = serve(cold[half:], 1)
            else:
                parts["late"] = serve(cold, 1)
            parts["late_burst"] = burst(early, "late_burst")
            return parts

    def _tokens(self, what: str, count: int) -> list[int]:
        rng = random.Random(f"{self._round} {what}")
        return [rng.randrange(3, self._vocabulary) for _ in range(count)]

    def _sessions(self, serve: Callable[[Sequence[Sequence[int]], int], Part]) -> Part:
        """Of all turns but the first, which is new to all; the time is that of all."""
        z = self._sizes
        history = [self._tokens(f"session {s}", z.first_turn) for s in range(z.sessions)]
        turns: list[Part] = []
        for turn in range(z.turns):
            if turn:
                for s, answer in enumerate(turns[-1].answers):
                    history[s] += [*answer.output_ids, *self._tokens(f"session {s} {turn}", z.next_turn)]
            turns.append(serve(history, _AT_ONCE))
        later = _part([answer for turn in turns[1:] for answer in turn.answers], 0.0)
        later.seconds = sum(turn.seconds for turn in turns[1:])
        later.answers = [answer for turn in turns for answer in turn.answers]
        return later

    def _bench_serving(self, server: Any) -> Part:
        """In this process, because its imports take seconds. It counts on being alone in one."""
        from sglang.benchmark import serving as bench

        z, output = self._sizes, self._scratch / "bench_serving.jsonl"
        output.unlink(missing_ok=True)
        arguments = [
            "bench_serving",
            "--backend=sglang",
            f"--base-url={server.url}",
            f"--model={self._model}",
            f"--tokenizer={self._model}",
            "--dataset-name=generated-shared-prefix",
            "--tokenize-prompt",
            f"--gsp-num-groups={z.groups}",
            f"--gsp-prompts-per-group={z.group_prompts}",
            f"--gsp-system-prompt-len={z.system}",
            f"--gsp-question-len={z.question}",
            f"--gsp-output-len={z.answer}",
            f"--num-prompts={z.groups * z.group_prompts}",
            "--max-concurrency=4",
            f"--seed={1000 + self._round}",
            "--warmup-requests=0",
            "--disable-tqdm",
            "--cache-report",
            "--output-details",
            f"--output-file={output}",
        ]
        said = io.StringIO()
        try:
            with _like_a_program(arguments, self._scratch), contextlib.redirect_stdout(said):
                bench.cli_main()
            result = json.loads(output.read_text().splitlines()[-1])
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code == 128 + signal.SIGTERM:  # ours to obey
                raise
            raise RuntimeError(f"bench_serving failed: {error!r}\n{said.getvalue()[-2000:]}") from error
        failed = [error for error in result["errors"] if error]
        if failed:
            raise RuntimeError(f"bench_serving: {failed[0]}")
        cached = {source: int(result["cache_report"][f"{source}_cached_tokens"] or 0) for source in SOURCES}
        return Part(
            result["ttfts"],
            cached,
            result["duration"],
            [],
            result["generated_texts"],
            sum(result["input_lens"]),
        )


_NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def _part(answers: list[Answer], seconds: float) -> Part:
    cached = {source: sum(answer.source[source] for answer in answers) for source in SOURCES}
    prompt_tokens = sum(answer.prompt_tokens for answer in answers)
    return Part([answer.ttft_s for answer in answers], cached, seconds, answers, [], prompt_tokens)


@contextmanager
def _like_a_program(arguments: list[str], home: Path) -> Iterator[None]:
    """bench_serving takes its options from the command line, and keeps what it generates at home."""
    argv, before = sys.argv, os.environ.get("HOME")
    sys.argv, os.environ["HOME"] = arguments, str(home)
    try:
        yield
    finally:
        sys.argv = argv
        if before is None:
            del os.environ["HOME"]
        else:
            os.environ["HOME"] = before


def drop_page_cache(directory: Path) -> None:
    """Has the kernel write and forget the files of a directory."""
    for path in directory.rglob("*"):
        if not path.is_file():
            continue
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same_outputs(part: Part, of_stock: Part, exact: bool) -> int:
    """How many outputs of a part are those of stock SGLang.

    Args:
        exact: texts can be compared, too: rounding does not decide between tokens.
    """
    same = sum(a.same_as(b) for a, b in zip(part.answers, of_stock.answers, strict=True))
    if exact:
        same += sum(a == b for a, b in zip(part.texts, of_stock.texts, strict=True))
    return same
