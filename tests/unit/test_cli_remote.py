"""``sglang-flexkv remote check``: what it says of a store, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis_server import RedisServer
from typer.testing import CliRunner, Result

from sglang_flexkv import cli


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXKV_REMOTE", raising=False)
    monkeypatch.delenv("FLEXKV_CONFIG_PATH", raising=False)


def check(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["remote", "check", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_store_that_works(tmp_path: Path) -> None:
    result = check(f"file://{tmp_path}?max_gb=1")
    assert result.exit_code == 0, result.output
    for part in (f"directory {tmp_path}", "1.0 GiB (max_gb)", "MB/s", " ms", "A server can use it."):
        assert part in result.output
    assert "remote_compression pays" in result.output or "remote_compression does not pay" in result.output


def test_the_setting_is_taken_where_no_url_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "flexkv.yaml"
    config.write_text(f"remote: file://{tmp_path}?max_gb=1\n")
    assert "A server can use it." in check("--flexkv-config-file", str(config)).output
    server = RedisServer(tmp_path, "--requirepass", "hunter2")
    try:
        monkeypatch.setenv("FLEXKV_REMOTE", server.url.replace("//", "//:hunter2@"))
        result = check()
        assert result.exit_code == 0
        assert f"Redis at 127.0.0.1:{server.port}" in result.output
        assert "maxmemory is not set" in result.output
        assert "hunter2" not in result.output
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "set FLEXKV_REMOTE"),
        (("redis://:hunter2@127.0.0.1",), "set FLEXKV_REMOTE to it and leave the argument out"),
        (("redis://127.0.0.1:1",), "cannot be reached"),
        (("file:///none/at/all",), "create it or mount what belongs there"),
        (("mongodb://host",), "URL there is no store 'mongodb' here"),
    ],
)
def test_what_cannot_be_used_is_told_with_the_remedy(arguments: tuple[str, ...], told: str) -> None:
    result = check(*arguments)
    assert result.exit_code == 1
    assert told in result.output
    assert "hunter2" not in result.output
