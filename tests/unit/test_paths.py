"""Paths that people name and that cannot be used: one line that names what was set, what is wrong and what to
do, before any work is done. Permissions bind an ordinary user only, so that is what we are here."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, KVManager, ModelConfig, cli
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import FlexKVConfig
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.paths import parse_path
from sglang_flexkv.integration import checks
from sglang_flexkv.storage import ssd_files
from sglang_flexkv.storage.ssd_store import SsdStore

_NOBODY = 65534
_TRACE = '{"token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]}\n'


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root is nobody meanwhile; everybody else is bound by permissions already."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Paths of all kinds. Not below pytest's own directory, which no other user can enter."""
    root = Path(tempfile.mkdtemp(prefix="flexkv-test-"))
    root.chmod(0o755)
    for name, mode in (("open", 0o777), ("closed", 0o000), ("read-only", 0o555), ("no-list", 0o333)):
        (root / name).mkdir()
        (root / name / "in").mkdir()
        (root / name).chmod(mode)
    (root / "file").write_text(_TRACE)
    (root / "secret").write_text(_TRACE)
    (root / "secret").chmod(0o000)
    (root / "dangling").symlink_to(root / "gone")
    (root / "loop").symlink_to("loop")
    yield root
    for directory in root.iterdir():
        if directory.is_dir() and not directory.is_symlink():
            directory.chmod(0o755)
    shutil.rmtree(root)


LONG = "x" * 300
NO_ACCESS = (
    r"Permission denied; give user \d+ access to it and to every directory above it or name another one"
)
# Name, and what is said about it as a directory.
NO_DIRECTORIES = {
    "nowhere": "does not exist; ",
    "file": "is not a directory; ",
    "file/below": "cannot be used: Not a directory; ",
    "dangling": "is a symbolic link to .*gone, which does not exist; ",
    "loop": "cannot be used: Too many levels of symbolic links; correct its symbolic links",
    LONG: "cannot be used: File name too long; shorten it",
    "closed": f"cannot be used: {NO_ACCESS}",
    "closed/in": f"cannot be used: {NO_ACCESS}",
}
# Those that can be entered, and not used.
CLOSED_DIRECTORIES = {
    "read-only": f": {NO_ACCESS}",
    "no-list": f": {NO_ACCESS}",
}


def run(*arguments: object, lines: int = 1) -> str:
    """A command that must fail, as a user without rights; what it says."""
    with ordinary_user():
        result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == lines, result.output
    return result.output


def start_library(**settings: object) -> None:
    model = ModelConfig(num_layers=1, num_kv_heads=1, head_size=64, dtype=torch.float32)
    manager = KVManager(model, CacheConfig(num_cpu_blocks=4, **settings))  # type: ignore[arg-type]
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, 1, 4, 16, 1, 64)
    manager.register_kv_caches(torch.zeros(layout.kv_shape), layout)
    manager.start()
    manager.shutdown()


# ---- what a path may look like ----


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FlexKVConfig(ssd_cache_gb=1, ssd_cache_dir="~/a; /b/~c").ssd_cache_dir == (
        tmp_path / "a",
        Path("/b/~c"),
    )
    assert CacheConfig(trace_file=Path("~/t.json")).trace_file == tmp_path / "t.json"
    with pytest.raises(ConfigError, match=r"ssd_cache_dir: ~no-such-user/a cannot be resolved .*in full"):
        FlexKVConfig(ssd_cache_gb=1, ssd_cache_dir="~no-such-user/a")


def test_a_path_means_the_same_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = FlexKVConfig(ssd_cache_gb=1, ssd_cache_dir="a b;c", trace_file="t.json")
    monkeypatch.chdir("/")
    assert config.ssd_cache_dir == (tmp_path / "a b", tmp_path / "c")
    assert config.trace_file == tmp_path / "t.json"


@pytest.mark.parametrize("value", ["/a\n/b", "/a\0", "/\udcff", ["/a", "/b\tc"]])
def test_characters_that_nobody_means(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^ssd_cache_dir: '/.*' has line breaks.*name another path$") as it:
        FlexKVConfig(ssd_cache_gb=1, ssd_cache_dir=value)
    assert str(it.value).isprintable()


def test_an_empty_path_is_not_the_working_directory() -> None:
    assert FlexKVConfig(ssd_cache_gb=1, ssd_cache_dir=["/a", ""]).ssd_cache_dir == (Path("/a"),)
    with pytest.raises(ConfigError, match=r"^trace_file: is empty; name a path"):
        FlexKVConfig(trace_file=" ")


def test_a_directory_with_a_semicolon(tmp_path: Path) -> None:
    directory = tmp_path / "a;b ü"
    directory.mkdir()
    config = CacheConfig(ssd_cache_dir=[str(directory)])
    SsdStore(config.ssd_cache_dir, 4, [4096], "rank0", namespace=make_namespace({})).close()
    assert (directory / "flexkv-rank0.slots").exists()


# ---- directories of the SSD tier ----


@pytest.mark.parametrize("name", [*NO_DIRECTORIES, *CLOSED_DIRECTORIES])
def test_a_directory_that_cannot_be_used(place: Path, name: str) -> None:
    path = place / name
    expected = (NO_DIRECTORIES | CLOSED_DIRECTORIES)[name]
    settings = {"ssd_cache_dir": str(path), "enable_ssd": True, "num_ssd_blocks": 4}
    with ordinary_user():
        # Before a model is loaded.
        config = FlexKVConfig(ssd_cache_gb=0.001, ssd_cache_dir=str(path))
        with pytest.raises(ConfigError, match=rf"^ssd_cache_dir: {path}.*{expected}"):
            checks.check_machine(config)
        if name != "no-list":  # nobody has to list it
            with pytest.raises(ConfigError, match=rf"^ssd_cache_dir: {path}.*{expected}"):
                start_library(**settings)


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["clear", "--yes"]])
@pytest.mark.parametrize("name", [*NO_DIRECTORIES, "no-list"])
def test_a_directory_that_cannot_be_looked_at(place: Path, name: str, command: list[str]) -> None:
    expected = (NO_DIRECTORIES | {"no-list": f"cannot be listed: {NO_ACCESS}"})[name]
    if name != "nowhere" or command[0] != "clear":  # what is not there is clear
        assert re.match(rf"{place / name} {expected}", run("ssd", *command, place / name))


def test_files_of_another_user(place: Path) -> None:
    directory = place / "open"
    SsdStore((directory,), 4, [4096], "dp0-tp0", namespace=make_namespace({})).close()
    for path in directory.glob("flexkv-*"):
        path.chmod(0o000)
    slots, lock = (directory / f"flexkv-dp0-tp0.{suffix}" for suffix in ("slots", "lock"))
    with (
        ordinary_user(),
        pytest.raises(ConfigError, match=rf"ssd_cache_dir: {lock} cannot be .*: {NO_ACCESS}"),
    ):
        SsdStore((directory,), 4, [4096], "dp0-tp0", namespace=make_namespace({}))
    assert f"{slots}: cannot be opened: Permission denied" in run("ssd", "inspect", directory)
    # It cannot be told whether a server uses them.
    assert f"{lock} cannot be opened: Permission" in run("ssd", "clear", "--yes", directory, lines=4)
    lock.chmod(0o666)
    directory.chmod(0o755)
    assert f"{slots} cannot be removed: Permission" in run("ssd", "clear", "--yes", directory, lines=4)
    directory.chmod(0o777)
    assert len(list(directory.glob("flexkv-*"))) == 3


def test_looking_at_a_machine_leaves_nothing_behind(tmp_path: Path) -> None:
    checks.check_machine(FlexKVConfig(ssd_cache_gb=0.001, ssd_cache_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_same_directory_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    for other in ("a", "b", "../" + tmp_path.name + "/a"):
        config = FlexKVConfig(ssd_cache_gb=0.001, ssd_cache_dir=[str(tmp_path / "a"), str(tmp_path / other)])
        with pytest.raises(
            ConfigError, match=r"ssd_cache_dir lists the same directory twice .*list each once"
        ):
            checks.check_machine(config)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ssd_files.fcntl, "flock", flock)
    expected = (
        rf"ssd_cache_dir: the file system of {tmp_path} has no file locks \(flock: {os.strerror(number)}\)"
    )
    with pytest.raises(ConfigError, match=expected):
        checks.check_machine(FlexKVConfig(ssd_cache_gb=0.001, ssd_cache_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match=expected):
        SsdStore((tmp_path,), 4, [4096], "rank0", namespace=make_namespace({}))


# ---- files ----


NO_FILES = {
    "nowhere/t": r"cannot be written: .*/nowhere does not exist; create it or name another file",
    "open": "is a directory; name a file",
    "file/t": "cannot be written: Not a directory; ",
    "loop": "cannot be written: Too many levels of symbolic links; ",
    LONG: "cannot be written: File name too long; shorten it",
    "closed/t": f"cannot be written: {NO_ACCESS}",
    "read-only/t": r"cannot be written: .*/read-only is on a read-only file system or not open to user \d+",
    "secret": r"cannot be written: .*/secret is on a read-only file system or not open to user \d+",
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_cannot_be_written(place: Path, name: str) -> None:
    path = place / name
    expected = rf"{path} {NO_FILES[name]}"
    with ordinary_user():
        with pytest.raises(ConfigError, match=f"^trace_file: {expected}"):
            checks.check_machine(FlexKVConfig(trace_file=str(path)))
        with pytest.raises(ConfigError, match=f"^trace_file: {expected}"):
            start_library(trace_file=path)
    trace = place / "nowhere"  # which would be the next error
    plan = ["plan", trace, "--cpu-gib", 1, "--prefill-tokens-s", 1, "--kv-bytes-per-token", 1]
    for command in (
        ["replay", trace, "--json", path],
        ["replay", trace, "--plot", path],
        [*plan, "--json", path],
        [*plan, "--write", path],
        ["generate-trace", "chat", path],
    ):
        assert re.match(expected, run(*command)), command


@pytest.mark.parametrize("name", ["closed/t", "secret", "nowhere", "open", "loop", "file/t", LONG])
def test_a_file_that_cannot_be_read(place: Path, name: str) -> None:
    path = place / name
    with ordinary_user(), pytest.raises(ConfigError, match=rf"file {path}: .*; check --flexkv-config-file$"):
        FlexKVConfig.load(str(path))
    assert str(path) in run("replay", path)
    assert str(path) in run("plan", place / "file", "--cpu-gib", 1, "--prefill-tokens-s", 1, "--model", path)


def test_a_configuration_file_that_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--flexkv-config-file: '/\\udcff' has "):
        FlexKVConfig.load("/\udcff")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe is a pipe; give --flexkv-config-file a file"):
        FlexKVConfig.load(str(tmp_path / "pipe"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("io_depth: 7")
    assert FlexKVConfig.load("~/c.yaml").io_depth == 7
    for text in ("cpu_cache_gb: 2026-99-99", "[" * 20_000):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"~/c.yaml is not valid YAML: .*; correct that place"):
            FlexKVConfig.load("~/c.yaml")


def test_a_path_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "\udcff"
    for command in ("inspect", "verify"):
        assert "no UTF-8; name another path" in run("ssd", command, path)
    assert "\\udcff cannot be read: " in run("replay", path)


def test_spaces_around_a_path_are_not_meant() -> None:
    assert parse_path(" /a b ") == Path("/a b")
