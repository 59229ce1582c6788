"""What all benchmarks share: the machine they ran on, what they checked, tables, JSON and medians.

A benchmark that measured bytes nobody verified has measured nothing. So each one collects what it checked
in a ``Report``, and a report in which a check failed, or in which nothing was checked, is an error: exit
status 1.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import psutil
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
GIB = 1 << 30

Bytes = npt.NDArray[np.uint8]

SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="A few seconds with tiny sizes: shows that it works, not how fast.")
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the results as JSON; - is stdout.")
]
FlipOption = Annotated[
    bool,
    typer.Option("--flip-a-byte", help="Damage one byte before it is verified: the run must fail."),
]

# Tables and progress go to stderr, so that `--json -` leaves stdout to the JSON alone.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)


@dataclass(frozen=True)
class Machine:
    """Where a measurement was taken. Numbers without it cannot be compared."""

    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    python: str
    load_at_start: float  # runnable processes of others make every number worse
    disk: str = ""  # of the directory that was measured: file system, device

    @classmethod
    def here(cls, directory: Path | None = None) -> Machine:
        return cls(
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=round(psutil.virtual_memory().total / GIB, 1),
            kernel=platform.release(),
            python=platform.python_version(),
            load_at_start=round(os.getloadavg()[0], 2),
            disk=disk_of(directory) if directory else "",
        )

    def __str__(self) -> str:
        disk = f", disk {self.disk}" if self.disk else ""
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_gib} GiB, Linux {self.kernel}{disk}, "
            f"load {self.load_at_start} at start"
        )


def end_on_sigterm() -> None:
    """Makes SIGTERM (``timeout``, CI) end a benchmark like Ctrl-C does: servers stopped, files removed."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _mount_of(directory: Path) -> Any:
    resolved = directory.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint))


def disk_of(directory: Path) -> str:
    """File system and device under a directory, e.g. ``ext4 on /dev/vda``."""
    mount = _mount_of(directory)
    return f"{mount.fstype} on {mount.device}"


@contextmanager
def disk_directory(parent: Path | None, prefix: str) -> Iterator[Path]:
    """A new directory on a disk, removed at the end: under ``parent``, or under ``build/`` of the repository.

    Raises:
        typer.BadParameter: it would be in memory (tmpfs).
    """
    end_on_sigterm()
    parent = parent or ROOT / "build"
    parent.mkdir(parents=True, exist_ok=True)
    kind = _mount_of(parent).fstype
    if kind in ("tmpfs", "ramfs"):
        raise typer.BadParameter(f"{parent} is on {kind}, which is memory and no disk; name another --dir")
    with tempfile.TemporaryDirectory(prefix=f"{prefix}-", dir=parent) as directory:
        yield Path(directory)


def command_line() -> str:
    program = Path(sys.argv[0])
    name = (
        str(program.relative_to(ROOT)) if program.is_absolute() and program.is_relative_to(ROOT) else program
    )
    return shlex.join(["python", str(name), *sys.argv[1:]])


@dataclass
class Check:
    """One property that was verified, and how often."""

    what: str
    count: int = 0  # bytes, outputs, requests: `what` says which
    failed: int = 0


@dataclass
class Report:
    """What a benchmark found out.

    Attributes:
        results: the named numbers a reader compares with goals.
        rows: what they were computed from, one entry per configuration.
    """

    benchmark: str
    smoke: bool
    machine: Machine
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    goals: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    command: str = field(default_factory=command_line)

    def check(self, what: str, ok: bool, count: int = 1) -> None:
        """Notes that ``what`` was verified for ``count`` more items."""
        entry = next((c for c in self.checks if c.what == what), None)
        if entry is None:
            entry = Check(what)
            self.checks.append(entry)
        entry.count += count
        entry.failed += not ok

    def check_bytes(self, what: str, got: Bytes, expected: Bytes) -> None:
        """Compares every byte."""
        self.check(what, bool(np.array_equal(got, expected)), expected.nbytes)

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(c.count and not c.failed for c in self.checks)

    def write(self, json_to: str | None) -> None:
        """Writes what there is so far as JSON to a file, or to stdout if that is ``-``."""
        if json_to is None:
            return
        text = json.dumps({**asdict(self), "verified": self.verified}, indent=2) + "\n"
        if json_to == "-":
            sys.stdout.write(text)
        else:
            Path(json_to).write_text(text, encoding="utf-8")

    def finish(self, json_to: str | None) -> None:
        """Prints results and checks, writes the JSON, and ends with status 1 unless all was verified."""
        if self.results:
            table = Table(title=f"{self.benchmark}: results")
            for name in ("result", "value", "goal"):
                table.add_column(name, justify="left" if name == "result" else "right")
            for name, value in self.results.items():
                table.add_row(name, f"{value:.3f}", self.goals.get(name, ""))
            console.print(table)
        for check in self.checks:
            verdict = f"[red]{check.failed} FAILED[/red]" if check.failed else "all good"
            console.print(f"checked: {check.what}: {check.count:,} ({verdict})")
        console.print(f"machine: {self.machine}", highlight=False)
        console.print(f"command: {self.command}", highlight=False)
        if self.smoke:
            console.print("[yellow]a smoke run: its numbers mean nothing[/yellow]")
        self.write(json_to)
        if not self.verified:
            console.print("[red]verification failed: the numbers above are worthless[/red]")
            raise typer.Exit(1)


def print_table(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Some columns of some rows; floats with three digits."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console.print(table)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of values measured next to each other: what slows the machine down for a while
    slows both down."""
    return median([a / b for a, b in zip(numerators, denominators, strict=True)])


def spread(values: Sequence[float]) -> float:
    """How far values lie apart: (largest - smallest) / median. 0 for a quiet machine."""
    return (max(values) - min(values)) / median(values)


def random_bytes(shape: tuple[int, ...], seed: int) -> Bytes:
    """Bytes without a pattern: a byte in a wrong place is a wrong byte."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def run_json(command: Sequence[str]) -> Any:
    """Runs a program and parses its stdout.

    Raises:
        RuntimeError: it failed; with its command line and messages.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout[done.stdout.index("{") :])
