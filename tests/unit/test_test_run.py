"""How a test run ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

TESTS = """
import contextlib, subprocess, sys, time
import pytest

@pytest.fixture(scope="module")
def server():
    with subprocess.Popen(["sleep", "600"]) as process:
        print("server", process.pid, file=sys.__stderr__, flush=True)
        yield
        process.kill()

def test_first(server):
    with contextlib.suppress(SUPPRESSED):
        print("runs", file=sys.__stderr__, flush=True)
        time.sleep(600)

def test_second(server):
    print("goes on", file=sys.__stderr__, flush=True)
"""


@pytest.mark.parametrize("suppressed", ["Exception", "BaseException"])
def test_a_run_that_is_told_to_end_ends_and_leaves_no_server(tmp_path: Path, suppressed: str) -> None:
    (tmp_path / "test_it.py").write_text(TESTS.replace("SUPPRESSED", suppressed))
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-s", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stderr is not None
        server = int(run.stderr.readline().removeprefix("server "))
        assert run.stderr.readline() == "runs\n"
        run.terminate()
        assert run.stderr.read() == ""
        assert run.wait() == pytest.ExitCode.INTERRUPTED
    assert not psutil.pid_exists(server)
