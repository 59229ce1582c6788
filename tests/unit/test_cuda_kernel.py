"""The copy kernel's checked-in PTX is what its source says, and GPUs of three generations can be had from it.

What it does is tested in test_cuda_path.py, with the same text compiled for the CPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKED_IN = ROOT / "csrc" / "copy" / "copy_kernel_ptx.inc"


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip(f"{name} of the CUDA toolkit is missing")
    return found


def release(text: str) -> str | None:
    found = re.search(r"(?:nvcc |, V)(\d+\.\d+\.\d+)", text)
    return found.group(1) if found else None


def test_the_checked_in_ptx_is_what_the_source_compiles_to(tmp_path: Path) -> None:
    nvcc = tool("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    if release(version) != release(CHECKED_IN.read_text()):
        pytest.skip("another nvcc than the one that made the file orders instructions otherwise")
    made = tmp_path / "kernel.inc"
    environment = {**os.environ, "NVCC": nvcc, "PATH": f"{Path(nvcc).parent}:{os.environ['PATH']}"}
    subprocess.run([ROOT / "scripts" / "build_kernels.sh", made], check=True, env=environment)
    assert made.read_text() == CHECKED_IN.read_text(), "run scripts/build_kernels.sh"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_the_ptx_assembles(tmp_path: Path, architecture: str) -> None:
    ptxas = tool("ptxas")
    _, ptx, _ = re.split(r'R"ptx\(|\)ptx"', CHECKED_IN.read_text())
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    done = subprocess.run(
        [ptxas, "-v", f"-arch={architecture}", str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Spilled registers would be traffic of its own.
    kernels = done.stderr.count("Compiling entry function")
    assert kernels == 4
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == kernels
    # So small that it runs beside a kernel that fills the GPU.
    assert all(int(count) <= 40 for count in re.findall(r"Used (\d+) registers", done.stderr))
    assert ptx.count(".maxntid 128, 1, 1") == kernels
