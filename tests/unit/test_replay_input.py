"""Whatever is given to replay, plan and generate-trace ends in a result or in a line of words, never in a
traceback."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from replay_traces import write_lines
from typer.testing import CliRunner, Result

from sglang_flexkv import cli, cli_replay
from sglang_flexkv.cli_output import errors
from sglang_flexkv.replay.synthetic import TraceKind, generate
from sglang_flexkv.replay.trace import TraceError, load_trace

ODD = (
    "",
    "-1",
    "0",
    "1",
    "nan",
    "inf",
    "1e300",
    "1073741824",
    "1073741825",
    "9" * 25,
    "9" * 5000,
    "ten",
    "$x$",
    "\udcff",
    "lru,fifo",
    "all",
)


def run(*arguments: object) -> Result:
    """Checks what holds for every command: results on stdout, what is wrong on stderr, and the exit code."""
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), arguments
    assert result.exit_code in (0, 1, 2), arguments
    if result.exit_code:
        assert result.stderr.strip(), arguments
        assert result.stdout == "", arguments
        assert len(result.stderr) < 8000, arguments
    return result


def words(result: Result) -> str:
    """What is said on stderr, without the frame and the breaks of lines."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "agents.jsonl"
    return write_lines(path, generate(TraceKind.AGENTS, 12))


REPLAY = (
    "--cpu-blocks",
    "--ssd-blocks",
    "--policy",
    "--ssd-policy",
    "--tokens-per-block",
    "--block-kib",
    "--requests",
)
PLAN = {
    "--cpu-gib": "1",
    "--prefill-tokens-s": "10000",
    "--kv-bytes-per-token": "1024",
    "--kv-dtype": None,
    "--tp": None,
    "--gpu-kv-gib": None,
    "--ssd-gib": None,
    "--pcie-gb-s": None,
    "--ssd-read-gb-s": None,
    "--tokens-per-block": None,
    "--requests": None,
}


@pytest.mark.parametrize("option", REPLAY)
def test_odd_values_of_replay(trace: Path, option: str) -> None:
    for value in ODD:
        run("replay", trace, option, value)


@pytest.mark.parametrize("option", PLAN)
def test_odd_values_of_plan(trace: Path, option: str) -> None:
    given = [word for name, value in PLAN.items() if value and name != option for word in (name, value)]
    for value in ODD:
        run("plan", trace, *given, option, value)


def test_nan_is_refused_where_the_range_of_an_option_takes_it() -> None:
    """As with typer of other versions than this one's."""
    with pytest.raises(typer.BadParameter, match="nan is not a number"):
        cli_replay._no_nan(float("nan"))
    assert cli_replay._no_nan(None) is None
    assert cli_replay._no_nan(0.5) == 0.5


def test_odd_models(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    machine = ("plan", trace, "--cpu-gib", 1, "--prefill-tokens-s", 10_000, "--model", file)
    good = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512, "dtype": "bfloat16"}
    odd: list[object] = [None, True, -1, 10**30, "x", []]
    for name in (*good, "num_key_value_heads", "head_dim", "kv_lora_rank", "text_config", "torch_dtype"):
        for value in odd:
            file.write_text(json.dumps({**good, name: value}))
            run(*machine)
    for text in (b"", b"[]", b"null", b"1", b"\xff", b"[" * 100_000, b"{}"):
        file.write_bytes(text)
        assert run(*machine).exit_code == 1
    for path in ("/dev/zero", tmp_path, tmp_path / "missing", trace):
        assert run(*machine[:-1], path).exit_code == 1


def test_ranks_that_do_not_share_equally(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {"num_hidden_layers": 2, "num_attention_heads": 12, "hidden_size": 768, "dtype": "float16"}
        )
    )
    machine = ("plan", trace, "--cpu-gib", 1, "--prefill-tokens-s", 10_000)
    for ranks, message in ((100_000, "--tp"), (5, "12 attention heads"), (12, ""), (3, "")):
        result = run(*machine, "--model", file, "--tp", ranks)
        assert message in words(result)
        assert (result.exit_code == 0) == (message == "")
    result = run(*machine, "--kv-bytes-per-token", 1000, "--tp", 3)
    assert result.exit_code == 1
    assert "correct --kv-bytes-per-token or --tp" in words(result)


VALUES = (
    *("null", "true", "-1", "0", "1", "1.5", "1e400", "NaN", "-Infinity", "9" * 400, "9" * 5000),
    *('""', '"x"', "[]", "{}", "[1]", "[[1]]", "[-1]", "[1.0]", "[true]", "[null]", f"[{2**63}]", '["1"]'),
)


@pytest.mark.parametrize("field", ["timestamp", "input_length", "hash_ids", "token_ids", "output_length", ""])
def test_odd_fields(tmp_path: Path, field: str) -> None:
    path = tmp_path / "t.jsonl"
    others = {"timestamp": "1", "input_length": "512", "hash_ids": "[1]"} if field != "token_ids" else {}
    others.pop(field, None)
    for value in VALUES:
        inside = ", ".join(f'"{name}": {text}' for name, text in (*others.items(), (field, value)))
        path.write_text(f"{{{inside}}}\n" * 3)
        read_or_refused(path)


def test_damaged_files(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "t"
    outcomes = set()
    for seed in range(300):
        rng = random.Random(seed)
        content = bytearray(trace.read_bytes())
        if packed := rng.random() < 0.4:
            content = bytearray(gzip.compress(bytes(content), mtime=0))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(2 * packed, len(content))
            if rng.random() < 0.7:
                content[at] = rng.randrange(256)
            else:
                del content[at : at + rng.choice([1, 10, len(content)])]
        path.write_bytes(content)
        outcomes.add(read_or_refused(path))
    assert outcomes == {True, False}


def read_or_refused(path: Path) -> bool:
    try:
        trace = load_trace(path)
    except TraceError as error:
        message = str(error)
    else:
        assert 0 < trace.num_blocks <= len(trace.blocks)
        return True
    assert message.startswith(str(path))
    assert len(message) < len(str(path)) + 400
    return False


def test_things_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = (
        tmp_path,
        "/dev/null",
        "/dev/zero",
        "",
        "x" * 5000,
        "loop",
        "/proc/self/mem",
        "missing",
        "\udcff",
    )
    for name in names:
        assert run("replay", name).exit_code == 1
    for name in (tmp_path, "", "x" * 5000, "loop", "missing/file", "/dev/full"):
        assert run("generate-trace", "chat", name, "--requests", 1).exit_code == 1
    assert run("generate-trace", "chat", "\udcff", "--requests", 1).exit_code == 0
    assert run("replay", "\udcff", "--plot", "\udcfe").exit_code == 0, "a name need not be text"


def test_targets_are_checked_before_the_run(trace: Path, tmp_path: Path) -> None:
    """The trace is not even looked at."""
    missing = tmp_path / "no trace"
    machine = ("--cpu-gib", 1, "--prefill-tokens-s", 9, "--kv-bytes-per-token", 9)
    for command, options in (
        (("replay", missing), ("--json", "--plot")),
        (("plan", missing, *machine), ("--json", "--write")),
    ):
        for option in options:
            for target in (tmp_path, tmp_path / "missing" / "file", missing, "x" * 5000):
                result = run(*command, option, target)
                assert result.exit_code == 1
                assert str(target) in words(result), result.stderr
        same = [word for option in options for word in (option, tmp_path / "same")]
        assert f"is also {options[1] if options[0] == '--plot' else ''}" in words(run(*command, *same))
    assert not list(tmp_path.iterdir())
    before = trace.read_bytes()
    assert "is also the trace" in words(run("replay", trace, "--json", trace))
    assert trace.read_bytes() == before


def test_one_policy_for_ssd(trace: Path) -> None:
    for value in ("lru,fifo", "all", "lru,"):
        result = run("replay", trace, "--ssd-policy", value)
        assert result.exit_code == 2
        assert "give one name" in words(result)
    assert run("replay", trace, "--ssd-policy", "lru", "--ssd-blocks", 9).exit_code == 0


def test_sizes_beyond_the_trace(trace: Path) -> None:
    """Room for more than the trace has costs no memory, and is said to change nothing."""
    result = run("replay", trace, "--cpu-blocks", 2**30, "--ssd-blocks", 2**30)
    assert result.exit_code == 0
    assert "room for more changes nothing" in result.stdout
    assert "1,073,741,824" in result.stdout
    for option in ("--cpu-blocks", "--ssd-blocks"):
        result = run("replay", trace, option, 2**30 + 1)
        assert result.exit_code == 2
        assert option in words(result)


def test_words_about_the_trace(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 9, "input_length": 32, "hash_ids": [1, 2]},
        {"timestamp": 8, "input_length": 32, "hash_ids": [2, 1]},
    ]
    path = write_lines(tmp_path / "t.jsonl", lines)
    for command in (
        ("replay",),
        ("plan", "--cpu-gib", 1, "--prefill-tokens-s", 9, "--kv-bytes-per-token", 9),
    ):
        given = (*command, path, "--tokens-per-block", 16)
        result = run(*given)
        assert "2 of its hash ids come after different blocks" in result.stdout
        assert "1 requests have an earlier timestamp" in result.stdout
        about = json.loads(run(*given, "--json", "-").stdout)
        assert (about["unchained_hash_ids"], about["late_requests"], about["blocks"]) == (2, 1, 4)


# ---- in a process of its own ----


def test_the_standard_streams(trace: Path) -> None:
    """A trace from a pipe, a stdout that knows no letter but ASCII."""
    command = [sys.executable, "-m", "sglang_flexkv.cli", "replay", "-", "--policy", "lru"]
    content = gzip.compress(trace.read_bytes())
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input=content, capture_output=True, env=ascii_only, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"-: 12 requests")


def test_a_stdout_that_is_full(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing to it fails: without a name
    with pytest.raises(typer.Exit) as caught, errors():
        raise full
    assert caught.value.exit_code == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "the output: No space left on device; free space or name another one\n")
