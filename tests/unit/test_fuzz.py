"""The fuzz targets run, and a broken invariant ends them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXECUTIONS = 1500  # some hundreds a second on an idle core
TARGETS = {
    "ssd_files": "no more slots than the file has room for",
    "remote_values": "nothing is encoded",
}
SECONDS_MAX = 500

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux",
    reason="g++, which builds the target, is missing",
)


def smoke(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts" / "fuzz.sh"), target, "--smoke", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_arbitrary_bytes_break_nothing(target: str) -> None:
    done = smoke(target, str(SECONDS_MAX), "--runs", str(EXECUTIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{EXECUTIONS} executions, no findings" in done.stdout.splitlines()


@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_invariant_is_a_finding(target: str) -> None:
    done = smoke(target, str(SECONDS_MAX), "--self-test")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"broken invariant: {TARGETS[target]}" in done.stderr
    saved = re.search(r"^FINDING: the input is in (.+)$", done.stderr, re.MULTILINE)
    assert saved, done.stderr
    # The same input alone leads there again, and nowhere without the planted fault.
    finding = Path(saved[1])
    try:
        assert smoke(target, "--self-test", str(finding)).returncode == 1
        assert smoke(target, str(finding)).returncode == 0
    finally:
        finding.unlink()
