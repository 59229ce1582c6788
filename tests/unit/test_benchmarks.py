"""Benchmarks run, verify what they move, and notice when a byte is wrong. No time is asserted here."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import common
import pytest
import torch
import verify_gpu
from forked_server import start_python

ROOT = Path(__file__).resolve().parents[2]

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="fio, the yardstick, is not installed")


# Starts cost more than all else that these benchmarks do here, and that they work others show.
WITH_FORKED_SERVERS = """
import runpy, sys
del sys.argv[0]
sys.path[:0] = [sys.argv[0].rpartition("/")[0]]
import serving
from forked_server import ForkedServer
serving.SGLangServer = ForkedServer
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# HiCache's stand-in for its kernels is found by an interpreter that starts (PYTHONPATH), which no fork does.
# So the servers of this benchmark are forks of a process that starts with it, not of that of the whole run.
WITH_SERVERS_OF_ITS_OWN = "import os; os.environ.pop('SERVER_ZYGOTE', None)" + WITH_FORKED_SERVERS


def run(name: str, *options: str, program: str | None = None) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / name
    arguments = ["--smoke", "--json", "-", *options]
    if program is not None:
        arguments.insert(0, str(script))
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (nothing.fileno(), out.fileno(), err.fileno())
        process = start_python(program or script, arguments, streams)
        try:
            process.wait(300)
        finally:  # with what it has started, where this run is told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out.seek(0)
        err.seek(0)
        texts = (out.read().decode(), err.read().decode())
    return subprocess.CompletedProcess([str(script), *arguments], process.returncode, *texts)


def report_of(name: str, *options: str, program: str | None = None) -> dict[str, Any]:
    report = any_report_of(name, *options, program=program)
    assert all(value > 0 for value in report["results"].values())
    return report


def any_report_of(name: str, *options: str, program: str | None = None) -> dict[str, Any]:
    """A report whose results may be differences of times, and so have any sign."""
    done = run(name, *options, program=program)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["smoke"]
    assert report["verified"]
    assert report["command"].startswith(f"python benchmarks/{name}")
    assert report["machine"]["cpu"]
    assert report["machine"]["cores"] > 0
    assert all(check["count"] > 0 and check["failed"] == 0 for check in report["checks"])
    return report


def checked(report: dict[str, Any], what: str) -> int:
    return sum(check["count"] for check in report["checks"] if check["what"] == what)


def test_copy_verifies_every_byte() -> None:
    report = report_of("bench_copy.py")
    ratios = {f"{way}_ratio_{of}" for way in ("gather", "scatter") for of in ("memcpy", "stream")}
    assert ratios <= set(report["results"])
    # Each configuration copies its bytes once to warm up and then `repeats` times.
    expected = sum(row["mib"] for row in report["rows"]) * (report["settings"]["repeats"] + 1) * 2**20
    assert checked(report, "bytes after gather") == expected
    assert checked(report, "bytes after scatter") == expected


def test_overlap_attends_to_the_same_bytes_while_they_are_loaded() -> None:
    report = any_report_of("bench_overlap.py")
    assert {"exposed_over_first_group", "ssd_pipeline_over_max", "attention_slowdown"} <= set(
        report["results"]
    )
    assert report["results"]["ssd_pipeline_over_max"] > 0
    assert [(row["tier"], row["ratio"]) for row in report["rows"]] == [
        ("cpu", 2.0),
        ("ssd", 0.5),
        ("ssd", 1.0),
        ("ssd", 2.0),
    ]
    settings = report["settings"]
    for tier in ("cpu", "ssd"):
        cases = sum(row["tier"] == tier for row in report["rows"])
        # One load to warm up and three to size the prefill by, then one alone and one under it per round.
        assert checked(report, f"loads came from {tier}") == cases * (4 + 2 * settings["rounds"])
    loads = len(report["rows"]) * (4 + 2 * settings["rounds"])
    assert checked(report, "bytes after loading") == loads * settings["mib"] * 2**20
    assert checked(report, "layers that attend to the same while loading") == (
        len(report["rows"]) * settings["rounds"] * settings["layers"]
    )


@needs_fio
def test_ssd_verifies_every_byte() -> None:
    report = report_of("bench_ssd.py")
    names = ("read", "write", "slice_read", "slice_write", "mixed_read")
    assert {f"{name}_ratio_fio" for name in names} <= set(report["results"])
    assert {row["io_engine"] for row in report["rows"]} == {"io_uring", "threads"}
    assert report["machine"]["disk"]
    settings = report["settings"]
    # Each round reads everything once by itself and once under a mixed load.
    expected = 2 * len(report["rows"]) * settings["mib"] * (settings["repeats"] + 1) * 2**20
    assert checked(report, "bytes after reading") == expected


def test_index_compares_calls_with_what_the_processor_can_do() -> None:
    report = report_of("bench_index.py")
    goals = set(report["goals"])
    assert goals <= set(report["results"])
    # A goal in microseconds holds on one processor only.
    assert all("_over_" in name or name == "bytes_per_block" for name in goals)
    assert checked(report, "matched prompts") == 3 * report["settings"]["repeats"]


def test_what_the_scheduler_spends_is_compared_with_stock() -> None:
    report = any_report_of("bench_scheduler.py")
    assert set(report["goals"]) <= set(report["results"])
    prompts = ("8k", "32k", "128k")
    assert [(row["prompt"], row["way"]) for row in report["rows"]] == [
        (prompt, way) for prompt in prompts for way in ("new", "hit", "stock")
    ]
    # One prompt of each length to warm up, and one per repeat.
    for what in ("new prompts without a hit", "prompts that came back from the CPU tier"):
        assert checked(report, what) == len(prompts) * (report["settings"]["repeats"] + 1)


def test_remote_stores_bring_every_byte() -> None:
    report = report_of("bench_remote.py")
    kinds = {row["store"] for row in report["rows"]}
    assert "directory" in kinds
    assert {f"{kind}_{way}_ratio" for kind in kinds for way in ("put", "get")} <= set(report["results"])
    settings = report["settings"]
    least = len(report["rows"]) * (settings["rounds"] + 1) * settings["mib"] * 2**20
    assert checked(report, "bytes after get") > least
    assert checked(report, "bytes after bare_get") == checked(report, "bytes after get")


def test_faults_of_a_store_change_no_answer() -> None:
    report = any_report_of(
        "bench_remote_faults.py", "--only", "redis", "--fault", "garbage", "--fault", "killed"
    )
    assert [row["fault"] for row in report["rows"]] == ["garbage", "killed"]
    assert {"max_added_ms", "p50_ratio", "grown_mib"} <= set(report["results"])
    assert checked(report, "stores with values that were damaged") == 1
    assert checked(report, "answers as without a store") > 2 * report["settings"]["requests"]


def test_recovery_finds_every_key() -> None:
    report = report_of("bench_recovery.py")
    assert report["results"]["recovery_s"] > 0
    assert checked(report, "bytes of masks of all keys") == report["settings"]["blocks"]


WITHOUT_RECORDED_TRACE = """
import sys
del sys.argv[0]
sys.path[:0] = [sys.argv[0].rpartition("/")[0]]
from pathlib import Path
import bench_replay, typer
bench_replay._RECORDED = Path("/nowhere/recorded.jsonl")
typer.run(bench_replay.main)
"""


def test_replay_compares_every_policy_with_the_optimum() -> None:
    """The recorded trace is not in the repository: its absence is no error, but said."""
    report = report_of("bench_replay.py", "--requests", "100", program=WITHOUT_RECORDED_TRACE)
    assert report["settings"]["trace_not_found"] == "/nowhere/recorded.jsonl"
    assert "worst_over_lru_lfu" in report["results"]
    assert {row["trace"] for row in report["rows"]} == {"chat", "agents", "rag", "scan", "stack", "phases"}
    assert {"lru", "fifo"} <= {row["policy"] for row in report["rows"]}
    assert checked(report, "hit rates not above the optimum") == len(report["rows"])
    assert checked(report, "hits of a tier with room for all")


def test_replay_refuses_a_trace_that_is_not_there(tmp_path: Path) -> None:
    done = run("bench_replay.py", "--trace", str(tmp_path / "missing.jsonl"))
    assert done.returncode == 2
    assert "is not a file" in done.stderr


@pytest.mark.parametrize("name", ["bench_copy.py", pytest.param("bench_ssd.py", marks=needs_fio)])
def test_a_wrong_byte_fails_the_run(name: str) -> None:
    done = run(name, "--flip-a-byte")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["verified"]
    assert "verification failed" in done.stderr


def test_ttft_serves_hits_from_every_tier() -> None:
    report = report_of("bench_ttft.py", program=WITH_FORKED_SERVERS)
    assert {"cpu_hit_over_device_hit", "cold_over_cpu_hit", "ssd_ttft_ms"} <= set(report["results"])
    for source in ("device", "cpu", "ssd"):
        assert checked(report, f"{source} hits came from there")
    assert checked(report, "outputs equal those of stock SGLang")


def test_throughput_compares_servers_without_hits() -> None:
    report = report_of("bench_throughput.py", program=WITH_FORKED_SERVERS)
    assert "throughput_ratio_no_hit" in report["results"]
    assert [row["server"] for row in report["rows"]] == ["stock", "flexkv"]
    assert checked(report, "runs without a single hit") == 2


def test_the_comparison_counts_hits_of_each_tier_and_draws_them(tmp_path: Path) -> None:
    report = any_report_of("compare.py", "--out", str(tmp_path), program=WITH_SERVERS_OF_ITS_OWN)
    rows = {row["contender"]: row["parts"] for row in report["rows"]}
    assert set(rows) == {"radix", "ours-ssd", "hicache-file"}
    for name in ("ours-ssd", "hicache-file"):
        assert checked(report, f"outputs of {name} are those of stock SGLang")
        for source in ("host", "storage"):
            served = sum(part[f"{source}_tokens"] for part in rows[name].values())
            assert checked(report, f"tokens that {name} served from {source}") == served
        # Of bench_serving, too: every other prompt begins with what one before it began with.
        assert sum(rows[name]["prefix"][f"{source}_tokens"] for source in ("device", "host", "storage"))
    assert all(rows["radix"][part]["host_tokens"] == 0 for part in rows["radix"])
    assert report["settings"]["versions"]["sglang"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".png"}


@pytest.mark.parametrize("kind", [None, "D2H", "H2D"])
def test_the_check_of_a_gpu_compares_bytes(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    """On a device of CPU memory, where its comparison of pools is the same; then with a byte damaged."""
    move = verify_gpu.Rig.move

    def damaged(rig: verify_gpu.Rig, of: Any, pages: Any, slots: Any, gate: Any = None) -> float:
        if of.name == kind == "H2D":
            rig.host.slot_view(int(slots[3]))[5] ^= 1
        seconds = move(rig, of, pages, slots, gate)
        if of.name == kind == "D2H":
            rig.host.slot_view(int(slots[3]))[5] ^= 1
        return seconds

    monkeypatch.setattr(verify_gpu.Rig, "move", damaged)
    report = common.Report("verify_gpu", True, common.Machine.here())
    verify_gpu.check_bytes(report, torch.device("cpu"), [16])
    assert {check.what for check in report.checks} == {"bytes that were stored", "bytes that were loaded"}
    assert report.verified == (kind is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_of_a_gpu_says_that_there_is_none() -> None:
    done = run("verify_gpu.py")
    assert done.returncode == 1
    assert "there is no NVIDIA GPU here" in " ".join(done.stderr.split())
