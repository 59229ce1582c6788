"""`sglang-flexkv ssd`: on files that an engine wrote."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, KVManager, ModelConfig, _core, cli
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.storage import ssd_tools
from sglang_flexkv.storage.ssd_files import ShardFiles, lock_files, shards_in
from sglang_flexkv.storage.ssd_store import SsdStore

BLOCKS, SLOTS, TOKENS = 40, 64, 16
LAYERS, HEADS, HEAD_SIZE = 2, 2, 64
SLOT_BYTES = LAYERS * 2 * TOKENS * HEADS * HEAD_SIZE * 4


def run(*arguments: object, answer: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["ssd", *map(str, arguments)], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def write_store(*directories: Path) -> None:
    """Blocks of random bytes, on disk for certain."""
    model = ModelConfig(
        num_layers=LAYERS, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.float32, model_name="m"
    )
    cache = CacheConfig(
        tokens_per_block=TOKENS,
        num_cpu_blocks=64,
        enable_ssd=True,
        num_ssd_blocks=SLOTS,
        ssd_cache_dir=directories,
    )
    manager = KVManager(model, cache)
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, LAYERS, BLOCKS, TOKENS, HEADS, HEAD_SIZE)
    manager.register_kv_caches(torch.randn(layout.kv_shape), layout)
    manager.start()
    tokens = np.arange(TOKENS * BLOCKS)
    task = manager.put_async(tokens, tokens)
    manager.wait([task])
    assert manager.engine is not None
    assert manager.engine.sync(20.0)
    manager.shutdown()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    write_store(directory)
    return directory


@pytest.fixture
def directory(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "nvme")


def files_in(directory: Path) -> ShardFiles:
    (files,) = shards_in(directory)
    return files


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


# ---- inspect ----


def test_inspect(directory: Path) -> None:
    code, output = run("inspect", directory)
    assert code == 0, output
    assert str(files_in(directory).slots) in output
    for line in (
        r"format +version 1, namespace [0-9a-f]{12}$",
        rf"slots +{SLOTS} of ",
        rf"live +{BLOCKS} blocks, 0\.00 GiB$",
        rf"journal +.*, {BLOCKS} records, 0 bytes damaged$",
        r"at restart +kept, for the same model$",
        r"in use +no$",
        r"identity$",
        r"    num_layers: \d+$",
    ):
        assert re.search(line, output, re.MULTILINE), (line, output)


def test_inspect_changes_nothing(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    run("inspect", directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_inspect_every_directory_and_rank(written: Path, tmp_path: Path) -> None:
    two = tmp_path / "a", tmp_path / "b"
    for each in two:
        each.mkdir()
    write_store(*two)
    for path in written.glob("*.*"):
        shutil.copy(path, two[0] / path.name.replace("rank0", "rank1"))
    code, output = run("inspect", *two, two[0])  # named twice: shown once
    assert code == 0, output
    assert len(re.findall(r"^  live ", output, re.MULTILINE)) == 3
    live = [ssd_tools.inspect(files).live_blocks for files in ssd_tools.find(two)]
    assert live == [BLOCKS // 2, BLOCKS, BLOCKS // 2]
    assert run("verify", *two)[0] == 0


def test_inspect_says_what_will_be_given_up(tmp_path: Path) -> None:
    store = SsdStore((tmp_path,), 4, [4096], "rank0", namespace=make_namespace({}), label="some [model]")
    store.core.clear(False)
    assert store.core.sync(20.0)
    store.close()
    code, output = run("inspect", tmp_path)
    assert code == 0
    assert "some [model]" in output
    assert "given up: its contents were computed with weights that only the process before had" in output


def test_without_a_journal_there_is_nothing_to_verify(directory: Path) -> None:
    files_in(directory).journal.unlink()
    code, output = run("inspect", directory)
    assert code == 0
    assert "given up: its journal is missing, damaged, or belongs to other contents" in output
    code, output = run("verify", directory)
    assert code == 1
    assert "cannot be verified: its journal is missing" in output


def test_a_blank_slot_file(tmp_path: Path) -> None:
    (tmp_path / "flexkv-rank0.slots").write_bytes(bytes(8192))
    code, output = run("inspect", tmp_path)
    assert code == 0
    assert "given up: its header is blank or damaged" in output
    assert run("verify", tmp_path)[0] == 1


# ---- verify ----


def test_verify(directory: Path) -> None:
    code, output = run("verify", directory)
    assert code == 0, output
    assert f"{BLOCKS} blocks, 0.00 GiB read, 0 bad" in output


def test_verify_names_every_slot_that_is_bad(directory: Path) -> None:
    files = files_in(directory)
    bad = sorted(_core.SsdReader(str(files.slots), str(files.journal)).live_slots.tolist())[:2]
    for slot, offset in zip(bad, (0, SLOT_BYTES - 1), strict=True):
        flip(files.slots, _core.SSD_SLOTS_OFFSET + slot * SLOT_BYTES + offset)
    code, output = run("verify", directory)
    assert code == 1
    assert f"{BLOCKS} blocks, 0.00 GiB read, 2 bad" in output
    assert f"bad slots: {bad[0]}, {bad[1]}" in output


def test_verify_a_slot_file_that_was_cut(directory: Path) -> None:
    os.truncate(files_in(directory).slots, _core.SSD_SLOTS_OFFSET)
    code, output = run("verify", directory)
    assert code == 1
    assert "was cut off" in output


def test_verify_reports_progress(directory: Path) -> None:
    seen: list[tuple[int, int]] = []
    ssd_tools.verify(files_in(directory), lambda *progress: seen.append(progress))
    assert seen == [(0, BLOCKS), (32, BLOCKS), (BLOCKS, BLOCKS)]


def test_on_a_terminal_there_is_a_bar(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "console", Console(force_terminal=True, width=200))
    code, output = run("verify", directory)
    assert code == 0
    assert "━" in output
    assert f"{BLOCKS}/{BLOCKS}" in output


# ---- files that are not ours to read or to remove ----


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_foreign_file_does_not_hide_the_others(directory: Path, command: str) -> None:
    (directory / "flexkv-rank9.slots").write_bytes(b"x" * 8192)
    code, output = run(command, directory)
    assert code == 1
    assert "flexkv-rank9.slots is not a file of sglang-flexkv" in output
    assert f"{BLOCKS} blocks" in output


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_another_version(directory: Path, command: str) -> None:
    with files_in(directory).slots.open("r+b") as file:
        file.seek(8)
        file.write((2).to_bytes(4, "little"))
    code, output = run(command, directory)
    assert code == 1
    assert "has format version 2, this program knows version 1" in output


def test_files_in_use(directory: Path) -> None:
    tag = files_in(directory).rank_tag
    other = make_namespace({})
    store = SsdStore((directory,), SLOTS, [4096], tag, namespace=other, fresh_on_mismatch=True)
    try:
        exit_code, output = run("inspect", directory)
        assert exit_code == 0
        assert f"by process {os.getpid()}" in output
        for command in (["verify"], ["clear", "--yes"]):
            exit_code, output = run(*command, directory)
            assert exit_code == 1
            assert f"is in use by process {os.getpid()}" in output
        assert len(list(directory.iterdir())) == 4
        # Looking at the lock did not take it away from its owner.
        with pytest.raises(ValueError, match="in use by another server"):
            SsdStore((directory,), SLOTS, [4096], tag, namespace=other)
    finally:
        store.close()
    assert run("verify", directory)[0] == 0


def test_an_owner_that_is_about_to_end_is_waited_for(directory: Path) -> None:
    """As one is that was killed, whose memory has to be given back first."""
    files = files_in(directory)
    held = lock_files(files)
    assert ssd_tools.owner(files) == str(os.getpid())
    assert ssd_tools.owner(files, patience_s=0.1) == str(os.getpid())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ssd_tools.owner, files, patience_s=60.0)
        assert not asked.done()
        os.close(held)
        assert asked.result() is None


def test_no_server_starts_during_verify(directory: Path) -> None:
    files = files_in(directory)

    def start(done: int, total: int) -> None:
        with pytest.raises(ValueError, match=f"in use by another server .process {os.getpid()}"):
            SsdStore((directory,), SLOTS, [4096], files.rank_tag, namespace=make_namespace({}))

    ssd_tools.verify(files, start)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_nothing_there(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    for path, text in (
        (tmp_path, "holds no files of the SSD tier"),
        (tmp_path / "nowhere", "does not exist; name a directory of ssd_cache_dir"),
        (tmp_path / "file", "is not a directory; name a directory of ssd_cache_dir"),
    ):
        code, output = run(command, path)
        assert code == 1
        assert output == f"{path} {text}\n"


# ---- clear ----


def test_clear(directory: Path) -> None:
    files = files_in(directory)
    files.journal.with_name(files.journal.name + ".new").write_bytes(b"x" * 4096)
    (directory / "flexkv-rank7.journal").write_bytes(b"x")  # whose slots somebody removed
    (directory / "notes.txt").touch()
    size = sum(path.stat().st_blocks for path in directory.iterdir()) * 512
    code, output = run("clear", "--yes", directory)
    assert code == 0, output
    assert f"removed, {size / 2**30:.2f} GiB freed" in output
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]
    assert run("clear", "--yes", directory) == (0, "nothing to remove\n")
    assert run("clear", "--yes", directory / "nowhere") == (0, "nothing to remove\n")


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 0), ("n\n", 1, 4), ("", 1, 4)])
def test_clear_asks(directory: Path, answer: str, code: int, left: int) -> None:
    assert run("clear", directory, answer=answer)[0] == code
    assert len(list(directory.iterdir())) == left


def test_clear_removes_all_or_nothing(directory: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    store = SsdStore((second,), 4, [4096], "rank0", namespace=make_namespace({}))
    found = ssd_tools.remains([directory, second])
    try:
        with pytest.raises(ssd_tools.SsdFilesError, match="in use by process"):
            ssd_tools.clear(found)
    finally:
        store.close()
    assert len(list(directory.iterdir())) == 4


def test_a_server_starts_where_was_cleared(directory: Path) -> None:
    run("clear", "--yes", directory)
    write_store(directory)
    assert run("verify", directory)[0] == 0
