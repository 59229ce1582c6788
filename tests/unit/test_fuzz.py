"""The fuzz target of the SSD tier's files runs, and a broken invariant ends it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXECUTIONS = 1500  # some hundreds a second on an idle core
SECONDS_MAX = 500

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.system() != "Linux",
    reason="g++, which builds the target, is missing",
)


def smoke(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "scripts" / "fuzz.sh"), "--smoke", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_arbitrary_files_break_nothing() -> None:
    done = smoke(str(SECONDS_MAX), "--runs", str(EXECUTIONS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{EXECUTIONS} executions, no findings" in done.stdout.splitlines()


def test_a_broken_invariant_is_a_finding() -> None:
    done = smoke(str(SECONDS_MAX), "--self-test")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken invariant: no more slots than the file has room for" in done.stderr
    saved = re.search(r"^FINDING: the input is in (.+)$", done.stderr, re.MULTILINE)
    assert saved, done.stderr
    # The same input alone leads there again, and nowhere without the planted fault.
    finding = Path(saved[1])
    try:
        assert smoke("--self-test", str(finding)).returncode == 1
        assert smoke(str(finding)).returncode == 0
    finally:
        finding.unlink()
