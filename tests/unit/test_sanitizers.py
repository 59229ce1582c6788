"""The control plane is clean under sanitizers, which do notice what is not."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sanitize.sh"

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("make") is None or platform.system() != "Linux",
    reason="g++ or make, which build it, is missing",
)


def sanitize(option: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), option], capture_output=True, text=True, timeout=600, check=False)


def test_the_control_plane_is_clean() -> None:
    done = sanitize("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["clean", "clean"], done.stdout


def test_planted_faults_are_findings() -> None:
    done = sanitize("--self-test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [
        word for fault in ("check", "overflow", "undefined", "race") for word in ("noticed", fault)
    ]
