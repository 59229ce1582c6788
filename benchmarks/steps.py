"""Steps of a check in child processes: each has a time limit, and each line is printed when it is there.

A step that hangs is killed with all it started and costs its own lines only; where it hung is in its output.
What a child has to say it prints as JSON behind ``_MARK``; everything else it prints is passed on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from typing import Annotated

import typer
from common import Check, Report, console

TotalOption = Annotated[
    float, typer.Option("--total", metavar="SECONDS", help="For all steps; what comes later is not run.")
]

_MARK = "@step "
_LIMIT = "STEP_LIMIT_S"  # in a child's environment
_STACKS_BEFORE_END_S = 1.0
_LOOK_S = 0.2
_STEP_S_MIN = 3.0
_AT_ONCE = 4
_report_lock = threading.Lock()
_alive: set[subprocess.Popen[bytes]] = set()
_COLOURS = {"met": "green", "missed": "red", "not run": "yellow"}


@dataclass
class Line:
    """One property and whether it holds.

    Attributes:
        results: the named numbers behind ``value``.
    """

    what: str
    verdict: str  # met, missed, not run, or measured: a number without a goal
    value: str = ""
    goal: str = ""
    note: str = ""
    results: dict[str, float] = field(default_factory=dict)

    @classmethod
    def judged(cls, what: str, good: bool, value: str = "", goal: str = "", note: str = "") -> Line:
        return cls(what, "met" if good else "missed", value, goal, note)


def show(line: Line) -> None:
    colour = _COLOURS.get(line.verdict)
    verdict = f"[{colour}]{line.verdict:<8}[/]" if colour else f"{line.verdict:<8}"
    text = f"{verdict} {line.what}: [bold]{line.value}[/]" if line.value else f"{verdict} {line.what}"
    if line.goal:
        text += f" (goal {line.goal})"
    if line.note:
        text += f"; {line.note}"
    console.print(text, soft_wrap=True, highlight=False)


# In the child.


def tell(lines: Iterable[Line], report: Report) -> None:
    """Runs a step and says each of its lines as soon as it is known, and at the end what was checked.

    Raises:
        Exception: what the step raised; the lines until then have been said.
    """
    # Shortly before the end: where everybody is, for whoever reads about a step that was killed.
    limit_s = float(os.environ.get(_LIMIT, "inf"))
    if limit_s < float("inf"):
        faulthandler.dump_traceback_later(max(0.5, limit_s - _STACKS_BEFORE_END_S))
    try:
        for line in lines:
            _say({"line": asdict(line)})
    finally:
        faulthandler.cancel_dump_traceback_later()
        _say({"checks": [asdict(check) for check in report.checks]})


def _say(message: Mapping[str, object]) -> None:
    sys.stdout.write(_MARK + json.dumps(message) + "\n")
    sys.stdout.flush()


# In the parent.


@dataclass(frozen=True)
class Job:
    """A step as the parent sees it.

    Attributes:
        together: nothing in it is timed, so it may run beside others of which that is true.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    together: bool = False


def run_jobs(jobs: Iterable[Job], total_s: float, report: Report, json_to: str | None) -> None:
    """Runs them in this order, in ``total_s`` all together, and finishes the report.

    Raises:
        typer.Exit: with status 1, if a line was missed or a check failed.
    """
    end_s = time.monotonic() + total_s

    def run(job: Job) -> list[Line]:
        limit_s = min(job.limit_s, end_s - time.monotonic())
        if limit_s < _STEP_S_MIN:
            line = Line(job.name, "not run", note="the time was up")
            show(line)
            return [line]
        return run_job(replace(job, limit_s=limit_s), report)

    lines: list[Line] = []
    for together, group in groupby(jobs, key=lambda job: job.together):
        with ThreadPoolExecutor(_AT_ONCE if together else 1) as pool:
            try:
                for made in pool.map(run, group):
                    lines += made
                    if json_to != "-":
                        with _report_lock:
                            report.write(json_to)  # what there is, whatever becomes of the rest
            except BaseException:  # Ctrl-C, SIGTERM: nobody waits for what still runs
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(_alive):
                    _kill_group(process)
                raise
    missed = any(line.verdict == "missed" for line in lines)
    report.check("lines that met their goal", bool(lines) and not missed, len(lines))
    report.finish(json_to)


def run_job(job: Job, report: Report) -> list[Line]:
    """Runs a step in a process group of its own, and shows and returns its lines.

    A last line says so if the step was killed or failed. Results and checks go into the report.
    """
    lines: list[Line] = []
    begin_s = time.monotonic()
    process = subprocess.Popen(
        job.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **job.environment, _LIMIT: str(job.limit_s)},
    )
    _alive.add(process)
    try:
        for text in _lines_until(process, begin_s + job.limit_s):
            if not text.startswith(_MARK):
                console.print(text, markup=False, highlight=False, soft_wrap=True)
                continue
            message = json.loads(text.removeprefix(_MARK))
            if "line" in message:
                lines.append(Line(**message["line"]))
                show(lines[-1])
            for check in message.get("checks", ()):
                with _report_lock:
                    _merge(report, Check(**check))
        status = process.poll()
    finally:
        _kill(process)
    seconds = time.monotonic() - begin_s
    if status is None:
        note = f"it did not end within {job.limit_s:.0f} s and was killed"
        lines.append(Line(job.name, "missed", note=note))
        show(lines[-1])
    elif status != 0:
        lines.append(Line(job.name, "missed", note=f"it ended with status {status} after {seconds:.0f} s"))
        show(lines[-1])
    with _report_lock:
        for line in lines:
            report.results.update(line.results)
        report.rows += [{"step": job.name, **asdict(line)} for line in lines]
    return lines


def _lines_until(process: subprocess.Popen[bytes], deadline_s: float) -> Iterator[str]:
    """What the process prints, until it has ended or time is up."""
    assert process.stdout is not None
    descriptor, rest = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not selector.select(min(left_s, _LOOK_S)):
                # What it started may hold its output open for longer than it lives.
                if process.poll() is not None:
                    break
                continue
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
    # It has closed its output, and so is about to end; if it does not, it is killed.
    while process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started, also what it left behind."""
    _kill_group(process)
    _alive.discard(process)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _merge(report: Report, check: Check) -> None:
    entry = next((c for c in report.checks if c.what == check.what), None)
    if entry is None:
        report.checks.append(check)
    else:
        entry.count += check.count
        entry.failed += check.failed
