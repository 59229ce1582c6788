"""The kit for a GPU machine (scripts/gpu), as far as it goes without one: it is packed, unpacked and run,
with an interpreter that notes what it is asked to do."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "scripts" / "gpu"
STAGES = [
    "sanity",
    "unpack",
    "core",
    "probe",
    "bytes",
    "built",
    "speed",
    "overlap",
    "kernels",
    "gqa",
    "mla",
    "sanitizer",
    "serving",
    "demo",
    "tests",
]

pytestmark = pytest.mark.skipif(shutil.which("xz") is None, reason="xz, which packs the kit, is missing")


def make_kit(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SOURCES / "make_kit.sh"), *stages],
        env={**os.environ, "WORK": str(folder / "work"), "KIT": str(folder / "kit"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def python312(tmp_path: Path) -> str:
    """This interpreter, which says that it is the other machine's."""
    script = tmp_path / "python3.12"
    script.write_text(
        f'#!/bin/sh\ncase "$2" in *version_info*) echo 3.12;; *) exec {sys.executable} "$@";; esac\n'
    )
    script.chmod(0o755)
    return str(script)


def fill_work(work: Path) -> None:
    """What the stages before `pack` would have made, with nothing in it."""
    for name in (
        "site/sglang/a.py",
        "site/flashinfer/data/b.h",
        "site/fastapi/c.py",
        "aot/batch_prefill_head_dim_qk_128_sm90/x.so",
        "jit/sgl_kernel_jit_x.so",
        "models/big-gqa/config.json",
        "extras/curand/curand.h",
        "extras/libcuda.so",
    ):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (work / "site.done").write_text("as asked for")
    (work / "core").mkdir()
    with zipfile.ZipFile(work / "core" / "core.whl", "w") as wheel:
        wheel.writestr("sglang_flexkv/__init__.py", "")
        wheel.writestr("sglang_flexkv-0.1.0.dist-info/entry_points.txt", "[sglang.srt.plugins]\n")


# Stands for the GPU machine's interpreter: notes its arguments, writes the JSON it is asked for, misbehaves
# on demand. What it is given with `-S` (unpacking, collecting results) is really run.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-S":
    sys.exit(subprocess.run([{sys.executable!r}, *arguments]).returncode)
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
text = " ".join(arguments)
if "--json" in arguments:
    pathlib.Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({{"asked": arguments}}))
hangs, fails = os.environ.get("HANGS"), os.environ.get("FAILS")
if hangs and hangs in text:
    print("hangs now", flush=True)
    time.sleep(600)
sys.exit(3 if fails and fails in text else 0)
"""


class Run:
    """One call of run.sh from a packed kit."""

    def __init__(self, folder: Path, python312: str) -> None:
        self.folder = folder
        fill_work(folder / "work")
        packed = make_kit(folder, "pack", PYTHON=python312)
        assert packed.returncode == 0, packed.stdout + packed.stderr
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def __call__(self, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["bash", str(self.folder / "kit" / "run.sh"), *stages],
            cwd=ROOT,
            env={
                **os.environ,
                "PY": str(self.python),
                "SITE": str(self.folder / "site"),
                "OUT": str(self.folder / "out"),
                "CALLS": str(self.folder / "calls"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def results(self) -> dict[str, dict[str, dict[str, int]]]:
        return json.loads((self.folder / "out" / "results.json").read_text())

    def statuses(self) -> dict[str, int]:
        return {name: stage["status"] for name, stage in self.results["stages"].items()}


@pytest.fixture
def run(tmp_path: Path, python312: str) -> Run:
    return Run(tmp_path, python312)


def test_all_stages_run_in_order_and_leave_their_results(run: Run) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert list(run.statuses()) == STAGES
    assert set(run.statuses().values()) == {0}, done.stdout
    written = {"probe", "bytes", "speed", "overlap", "kernels", "gqa", "mla", "sanitizer"}
    assert set(run.results) == {"stages", *written}
    site = run.folder / "site"
    for name in ("sglang/a.py", "fastapi/c.py", "sglang_flexkv/__init__.py", "sgl_kernel/functions.py"):
        assert (site / name).exists(), name
    assert (site / "flashinfer/data/aot/batch_prefill_head_dim_qk_128_sm90/x.so").exists()
    assert (site / "prebuilt_jit/sgl_kernel_jit_x.so").exists()
    assert (site / "sitecustomize.py").exists()
    scripts = [Path(a).name for call in run.calls for a in call if a.endswith(".py")]
    assert scripts.index("probe_gpu.py") < scripts.index("verify_gpu.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_the_kit_asks_of_the_benchmarks_is_what_they_take(run: Run) -> None:
    """They understand it, and go as far as to look for a GPU."""
    run("probe", "bytes", "speed", "overlap", "sanitizer")
    assert len(run.calls) == 5
    for script, *options in run.calls:
        module = importlib.import_module(Path(script).stem)
        assert Path(module.__file__ or "") == ROOT / script
        app = typer.Typer()
        app.command()(module.main)
        done = CliRunner().invoke(app, options)
        assert re.search(r"no NVIDIA GPU here|finds no\s+CUDA device here", done.output), done.output


def test_a_stage_that_hangs_is_stopped_and_what_there_was_is_kept(run: Run) -> None:
    run("kernels", "gqa", "mla", HANGS="big-gqa", TOTAL="8")
    assert run.statuses() == {"kernels": 0, "gqa": 124, "mla": -1}  # for the last one no time is left
    assert "kernels" in run.results
    assert "hangs now" in (run.folder / "out" / "stage.log").read_text()


def test_a_stage_that_fails_does_not_stop_the_others(run: Run) -> None:
    run("probe", "kernels", FAILS="probe_gpu.py")
    assert run.statuses() == {"probe": 3, "kernels": 0}


def test_stages_that_there_are_not(run: Run) -> None:
    done = run("bites")
    assert done.returncode == 2
    assert "no stage 'bites'" in done.stderr
    made = make_kit(run.folder, "pakc")
    assert made.returncode == 1
    assert "no stage 'pakc'" in made.stderr


def test_a_kit_that_is_too_large_is_refused(run: Run, python312: str) -> None:
    made = make_kit(run.folder, "pack", PYTHON=python312, MAX_MIB="0")
    assert made.returncode == 1
    assert "more than MAX_MIB=0" in made.stderr


def test_an_interpreter_of_another_version_is_refused(tmp_path: Path) -> None:
    made = make_kit(tmp_path, "image", PYTHON="/bin/false", HOME=str(tmp_path))
    assert made.returncode == 1
    assert "PYTHON is '/bin/false', which is no Python 3.12" in made.stderr
