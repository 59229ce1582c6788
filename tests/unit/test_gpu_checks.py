"""What is made to check a GPU, on a pretended one: it runs, it verifies what it moves, it notices what is
wrong, and a step that hangs costs its own lines only. No number is looked at: there is no GPU behind them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_overlap
import common
import probe_gpu
import psutil
import pytest
import steps
import torch
import typer
import verify_gpu
from fake_cuda import build
from pretended_gpu import PretendedGpu

DEVICE = torch.device("cuda", 0)

needs_stand_in = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which builds the driver, is missing"
)


@pytest.fixture(scope="module")
def library() -> Path:
    return build(13)


@pytest.fixture
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(probe_gpu, "_DRIVER", str(library))
    monkeypatch.setattr(probe_gpu, "_PINNED_BYTES", 1 << 20)
    monkeypatch.setattr(probe_gpu, "LATE_S", 0.05)
    monkeypatch.setattr(probe_gpu, "RESCUE_S", 120.0)  # a machine may be busy; here nothing hangs
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Where it is installed it would want a real GPU.
    find_spec = importlib.util.find_spec

    def without_flashinfer(name: str, *about: str) -> Any:
        return None if name == "flashinfer" else find_spec(name, *about)

    monkeypatch.setattr(importlib.util, "find_spec", without_flashinfer)
    with PretendedGpu(library, 13).entered() as gpu:
        monkeypatch.setattr(probe_gpu.Driver, "wait_value", lambda driver, *about: gpu.wait_value(*about))
        monkeypatch.setattr(probe_gpu.Driver, "write_value", lambda driver, *about: gpu.write_value(*about))
        yield gpu
    assert gpu.cuda.violations == ""


def new_report() -> common.Report:
    return common.Report("gpu", True, common.Machine.here())


@needs_stand_in
@pytest.mark.parametrize("name", ["bytes", "bandwidth", "queueing", "slowdown", "few-bytes"])
def test_steps_of_verify_gpu(gpu: PretendedGpu, name: str) -> None:
    report = new_report()
    lines = list(verify_gpu.STEPS[name].run(report, DEVICE, True))
    assert lines
    assert all(check.count > 0 and check.failed == 0 for check in report.checks)
    assert bool(report.checks) == (name != "queueing")
    if name == "bytes":
        assert {line.verdict for line in lines} == {"met"}
        # Small pieces and those of 512 KiB: both ways of a copy were taken.
        assert gpu.cuda.calls("cuLaunchKernel") > 0
        assert gpu.cuda.calls("cuMemcpyBatchAsync_v2") > 0


@needs_stand_in
@pytest.mark.parametrize("damaged", [False, True])
def test_one_copy_on_a_gpu(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """The other process is this one: a second has no pretended GPU."""
    report = new_report()

    def run_here(what: str, command: list[str], stdin: int) -> steps.Line:
        assert command[2:] == ["one-copy-loads", "--alone", "--smoke"]
        monkeypatch.setattr(verify_gpu, "_FILE", stdin)
        if damaged:
            monkeypatch.setattr(verify_gpu.Rig, "op", wrong_op)
        (line,) = verify_gpu.STEPS["one-copy-loads"].run(report, DEVICE, True)
        return line

    monkeypatch.setattr(verify_gpu, "program", run_here)
    lines = list(verify_gpu.STEPS["one-copy"].run(report, DEVICE, True))
    assert [line.verdict for line in lines] == ["met", "missed" if damaged else "met"]
    assert [check.count > 0 for check in report.checks] == [True, True]
    assert [check.failed > 0 for check in report.checks] == [False, damaged]


@needs_stand_in
@pytest.mark.parametrize("case", list(probe_gpu.HAZARDS))
@pytest.mark.parametrize("step", [probe_gpu.hazard, probe_gpu.late_load])
def test_disturbances_of_the_probe(gpu: PretendedGpu, step: Any, case: str) -> None:
    report = new_report()
    (line,) = step(report, DEVICE, True, case)
    assert line.verdict in ("measured", "met"), line
    assert "hangs" not in line.value
    assert report.verified


@needs_stand_in
def test_the_probe_gets_a_stream_going_that_nobody_else_would(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_gpu, "RESCUE_S", 0.5)
    monkeypatch.setattr(probe_gpu.Driver, "write_value", lambda *_: None)
    (line,) = probe_gpu.hazard(new_report(), DEVICE, True, "nothing")
    assert line.value == "hangs until the host raises the word"
    assert line.results == {"hangs_nothing": 1.0}


@needs_stand_in
@pytest.mark.parametrize("step", [probe_gpu.sweep, probe_gpu.beside])
def test_copies_of_the_probe(gpu: PretendedGpu, step: Any) -> None:
    report = new_report()
    lines = list(step(report, DEVICE, True))
    assert {line.verdict for line in lines} == {"measured"}
    if step is probe_gpu.sweep:
        assert report.verified
        assert {check.what for check in report.checks} == {"bytes by the kernel", "bytes by the copy engine"}


@needs_stand_in
def test_the_probe_notices_a_layer_with_wrong_bytes(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        probe_gpu.Rig, "op", lambda rig, kind, pages, slots: wrong_op(rig, kind, pages, slots)
    )
    report = new_report()
    (line,) = probe_gpu.late_load(report, DEVICE, True, "nothing")
    assert line.verdict == "missed"
    assert not report.verified


def wrong_op(rig: verify_gpu.Rig, kind: Any, pages: Any, slots: Any) -> Any:
    """Loads the pages in reverse."""
    tokens = rig.tokens(pages if kind.name == "D2H" else pages[::-1])
    return verify_gpu._core.OpSpec(kind, *((tokens, slots) if kind.name == "D2H" else (slots, tokens)))


@needs_stand_in
def test_overlap_on_a_gpu(gpu: PretendedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are timed on a stream of their own, and the bytes are right."""
    monkeypatch.setitem(bench_overlap._PRODUCT, "cuda", (16, 64))
    shape = replace(bench_overlap._SHAPES["cuda"], layers=4, tokens=256, new_tokens=4)
    report = new_report()
    bench = bench_overlap.Bench(shape, DEVICE, tmp_path)
    try:
        with torch.inference_mode():
            for tier in ("cpu", "ssd"):
                open_s = bench.load(report, tier)
                assert len(open_s) == shape.layers
                assert open_s == sorted(open_s)
                bench_overlap.measure(bench, report, tier, 1.0, 1)
    finally:
        bench.close()
    assert report.verified
    assert {check.what for check in report.checks} >= {
        "bytes after loading",
        "layers that attend to the same while loading",
    }


# Steps in processes of their own.

CHILD = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from common import Machine, Report
from steps import Line, tell
report = Report("child", True, Machine.here())
def lines():
    print("something else")
    report.check("bytes", True, 7)
    yield Line("first", "met", "1", results={{"one": 1.0}})
    {then}
tell(lines(), report)
"""


def job(then: str, limit_s: float = 30.0) -> steps.Job:
    code = CHILD.format(benchmarks=str(Path(steps.__file__).parent), then=then)
    return steps.Job("the step", [sys.executable, "-c", code], limit_s)


def test_a_step_that_ends_well() -> None:
    report = new_report()
    lines = steps.run_job(job('yield Line("second", "measured")'), report)
    assert [(line.what, line.verdict) for line in lines] == [("first", "met"), ("second", "measured")]
    assert report.results == {"one": 1.0}
    assert [(check.what, check.count) for check in report.checks] == [("bytes", 7)]


def is_gone(pid: int) -> bool:
    """Whether a process that was killed has ended: that takes the kernel a moment."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == "zombie":
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_a_step_that_hangs_is_killed_with_all_it_started_and_leaves_its_lines(
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = new_report()
    # It starts at once, and a child of it holds its output open.
    hangs = (
        "import subprocess\n"
        'print(\'@step {"line": {"what": "first", "verdict": "met"}}\', flush=True)\n'
        "process = subprocess.Popen(['sleep', '600'])\n"
        "print('pid', process.pid, flush=True)\n"
        "process.wait()"
    )
    lines = steps.run_job(steps.Job("the step", [sys.executable, "-S", "-c", hangs], 3.0), report)
    assert [line.what for line in lines] == ["first", "the step"]
    assert lines[1].verdict == "missed"
    assert "did not end within 3 s" in lines[1].note
    pid = re.search(r"pid (\d+)", capfd.readouterr().err)
    assert pid is not None
    assert is_gone(int(pid[1]))


def test_who_is_told_to_end_leaves_no_step_behind() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(steps.__file__).parent)!r})
from common import Machine, Report, end_on_sigterm
from steps import Job, run_jobs
end_on_sigterm()
hangs = "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"
job = Job("it", [sys.executable, "-S", "-c", hangs], 600.0)
run_jobs([job, job], 600.0, Report("parent", True, Machine.here()), None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        try:
            pid = int(parent.stderr.readline().split()[1])
            parent.terminate()
            assert parent.wait(300) == 143
        finally:
            parent.kill()
    assert is_gone(pid)


def test_a_step_says_where_it_is_before_its_time_is_up() -> None:
    child = job("time.sleep(2)")
    done = subprocess.run(
        child.command, env={**os.environ, "STEP_LIMIT_S": "1"}, capture_output=True, text=True, check=True
    )
    assert "most recent call first" in done.stderr


def test_a_step_that_fails_says_so_and_the_others_run(tmp_path: Path) -> None:
    report = new_report()
    out = tmp_path / "out.json"
    with pytest.raises(typer.Exit):
        steps.run_jobs([job("raise ValueError('no')"), job("pass")], 60.0, report, str(out))
    written = json.loads(out.read_text())
    assert [row["what"] for row in written["rows"]] == ["first", "the step", "first"]
    assert "ended with status 1" in written["rows"][1]["note"]
    assert not written["verified"]


def test_steps_for_which_there_is_no_time_are_not_run(capfd: pytest.CaptureFixture[str]) -> None:
    report = new_report()
    steps.run_jobs([job("pass"), job("pass")], 0.0, report, None)
    assert report.rows == []
    assert capfd.readouterr().err.count("not run") == 2


def test_steps_that_may_run_beside_others(tmp_path: Path) -> None:
    """Each of two waits for what the other one does."""
    one, other = tmp_path / "one", tmp_path / "other"
    then = "from pathlib import Path; Path({!r}).touch()\n    while not Path({!r}).exists(): time.sleep(0.01)"
    jobs = [
        replace(job(then.format(str(mine), str(theirs))), together=True)
        for mine, theirs in ((one, other), (other, one))
    ]
    report = new_report()
    steps.run_jobs([*jobs, job("pass")], 60.0, report, None)
    assert [row["verdict"] for row in report.rows] == ["met"] * 3
    assert report.checks[0].count == 3 * 7
