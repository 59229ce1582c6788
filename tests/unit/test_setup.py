"""`make` hands the interpreter that its user names to the set-up, which takes that one or none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["setup", "test", "demo"])
def test_an_interpreter_that_does_not_do_is_named(tmp_path: Path, target: str) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = subprocess.run(
        ["make", target],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "PYTHON is '/bin/false', which is no Python 3.11, 3.12 or 3.13." in done.stderr
    assert not (tmp_path / ".venv").exists()
