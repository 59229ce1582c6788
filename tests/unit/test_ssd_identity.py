"""Whose KV the SSD tier's files hold: kept readable beside them, and compared when it is another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sglang_flexkv import cli
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage import ssd_identity
from sglang_flexkv.storage.ssd_files import ShardFiles
from sglang_flexkv.storage.ssd_identity import Identity, conflict
from sglang_flexkv.storage.ssd_store import SsdStore

IDENTITY = Identity(
    settings={"model": "/models/m", "--dtype": "bfloat16", "SGLANG_ROPE_CACHE_FP32": "true"},
    pool={"TP rank": "0 of 1"},
)


def with_settings(**changes: str | None) -> Identity:
    fields = {**IDENTITY.settings, **{f"--{name}": value for name, value in changes.items()}}
    return replace(IDENTITY, settings={name: value for name, value in fields.items() if value is not None})


def open_store(*directories: Path, identity: Identity = IDENTITY, fresh: bool = False) -> SsdStore:
    return SsdStore(
        directories,
        8,
        [4096],
        "rank0",
        namespace=identity.namespace,
        label="a label",
        identity=identity,
        fresh_on_mismatch=fresh,
    )


def num_found(*directories: Path, identity: Identity = IDENTITY, fresh: bool = False) -> int:
    store = open_store(*directories, identity=identity, fresh=fresh)
    keys, _, _ = store.core.take_recovered()
    store.close()
    return len(keys)


def fill(*directories: Path, identity: Identity = IDENTITY) -> None:
    """Leaves a block in every directory."""
    for directory in directories:
        directory.mkdir(exist_ok=True)
    store = open_store(*directories, identity=identity)
    slots = np.arange(len(directories))
    keys = np.array([(n + 1, 1) for n in slots], dtype=np.uint64)
    store.core.publish(keys, np.zeros_like(keys), slots)
    store.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fill(tmp_path / "nvme")
    return tmp_path / "nvme"


def files_in(directory: Path) -> ShardFiles:
    return ShardFiles(directory, "rank0")


# ---- beside the files ----


def test_the_fields_can_be_read_beside_the_files(directory: Path) -> None:
    assert ssd_identity.read(files_in(directory)) == IDENTITY
    assert json.loads(files_in(directory).identity.read_text())["settings"]["--dtype"] == "bfloat16"
    output = CliRunner().invoke(cli.app, ["ssd", "inspect", str(directory)]).output
    for line in ("    --dtype: bfloat16", "    TP rank: 0 of 1", "    model: /models/m"):
        assert line in output.splitlines()


def test_what_is_cleared_is_all_gone(directory: Path) -> None:
    assert CliRunner().invoke(cli.app, ["ssd", "clear", "--yes", str(directory)]).exit_code == 0
    assert list(directory.iterdir()) == []


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    path.write_text(path.read_text().replace("bfloat16", "float16"))


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def blank(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_text("[1, 2]")


def later_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def in_the_way(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (remove, flip, cut, blank, foreign, later_format, in_the_way)


@pytest.mark.parametrize("damage", DAMAGES)
def test_its_owner_needs_no_fields(directory: Path, damage: Callable[[Path], None]) -> None:
    damage(files_in(directory).identity)
    assert ssd_identity.read(files_in(directory)) is None
    assert num_found(directory) == 1
    assert (ssd_identity.read(files_in(directory)) == IDENTITY) is (damage is not in_the_way)


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_fields_nothing_is_given_up(directory: Path, damage: Callable[[Path], None]) -> None:
    damage(files_in(directory).identity)
    with pytest.raises(
        ConfigError, match=r"another model or setting \(a label\): what differs is not recorded"
    ):
        open_store(directory, identity=replace(IDENTITY, unclassified={"SGLANG_NEW": "(1)"}))
    assert num_found(directory) == 1


def test_fields_of_other_contents_are_not_believed(directory: Path, tmp_path: Path) -> None:
    """A file that an interrupted start, or a copy, left there."""
    fill(tmp_path / "other", identity=with_settings(dtype="float16"))
    shutil.copy(files_in(tmp_path / "other").identity, files_in(directory).identity)
    with pytest.raises(ConfigError, match="what differs is not recorded"):
        open_store(directory, identity=with_settings(dtype="float32"))
    assert conflict(files_in(directory), with_settings(dtype="float32"), before_pool=True) is None
    assert num_found(directory) == 1


# ---- another identity ----


@pytest.mark.parametrize(
    ("wanted", "differs"),
    [
        (with_settings(dtype="float32"), ["--dtype: bfloat16 there, float32 now"]),
        (with_settings(dtype=None), ["--dtype: bfloat16 there, not set now"]),
        (with_settings(quantization="fp8"), ["--quantization: not set there, fp8 now"]),
        (
            with_settings(dtype="float32", revision="2"),
            ["--dtype: bfloat16 there, float32 now; --revision: not set there, 2 now"],
        ),
        (replace(IDENTITY, pool={"TP rank": "0 of 2"}), ["TP rank: 0 of 1 there, 0 of 2 now"]),
        # A variable that nobody knows does not hide a difference that somebody does.
        (
            replace(with_settings(dtype="float32"), unclassified={"SGLANG_NEW": "(1)"}),
            ["--dtype: bfloat16 there, float32 now;"],
        ),
        (
            replace(with_settings(weights="not told"), nonce="1"),
            ["--weights: not set there, not told now;"],
        ),
    ],
)
def test_it_is_refused_with_what_differs(directory: Path, wanted: Identity, differs: list[str]) -> None:
    before = contents(directory)
    with pytest.raises(ConfigError) as caught:
        open_store(directory, identity=wanted)
    message = str(caught.value)
    assert f"ssd_cache_dir: {files_in(directory).slots} holds the cache of another model" in message
    assert "(a label)" in message
    for part in (*differs, "ssd_on_mismatch: fresh", "ssd clear DIR"):
        assert part in message
    assert contents(directory) == before
    assert num_found(directory) == 1
    assert num_found(directory, identity=wanted, fresh=True) == 0
    assert ssd_identity.read(files_in(directory)) == wanted


def test_a_value_of_any_length_makes_one_short_message(directory: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(directory, identity=with_settings(override="x" * 10_000))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("there", "now"),
    [
        ({}, {"SGLANG_NEW": "(1)"}),
        ({"SGLANG_NEW": "(1)"}, {}),
        ({"SGLANG_NEW": "(1)"}, {"SGLANG_NEW": "(2)"}),
    ],
)
def test_a_variable_that_nobody_has_classified_costs_the_cache_and_not_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: dict[str, str], now: dict[str, str]
) -> None:
    directory = tmp_path / "nvme"
    fill(directory, identity=replace(IDENTITY, unclassified=there))
    assert num_found(directory, identity=replace(IDENTITY, unclassified=there)) == 1
    assert num_found(directory, identity=replace(IDENTITY, unclassified=now)) == 0
    assert "started empty: only variables differ that nobody has classified: SGLANG_NEW" in caplog.text


def test_what_nobody_else_can_find_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "nvme"
    mine = replace(with_settings(weights="not told"), nonce="1")
    fill(directory, identity=mine)
    output = CliRunner().invoke(cli.app, ["ssd", "inspect", str(directory)]).output
    assert "given up: what they hold could be found by the process that wrote it only" in output
    assert num_found(directory, identity=replace(mine, nonce="2")) == 0
    assert num_found(directory, identity=IDENTITY) == 0
    assert "could be found by the process that wrote it only" in caplog.text


def test_one_directory_that_is_worth_something_saves_all(tmp_path: Path) -> None:
    """Of two directories one holds what nobody can find, the other one what somebody may want."""
    a, b = tmp_path / "a", tmp_path / "b"
    fill(a, identity=replace(IDENTITY, nonce="1"))
    fill(b)
    before = contents(a), contents(b)
    with pytest.raises(
        ConfigError, match=r"b/flexkv-rank0.slots holds .*--dtype: bfloat16 there, float32 now"
    ):
        open_store(a, b, identity=with_settings(dtype="float32"))
    assert (contents(a), contents(b)) == before
    files_in(b).slots.write_bytes(b"a file of somebody else" * 1000)
    with pytest.raises(ConfigError, match="ssd_on_mismatch: fresh"):
        open_store(a, b)
    assert files_in(b).slots.read_bytes().startswith(b"a file of somebody else")


# ---- before the model is loaded ----


def test_what_the_pool_adds_is_left_out_before_there_is_one(directory: Path) -> None:
    early = replace(IDENTITY, pool={})
    assert conflict(files_in(directory), early, before_pool=True) is None
    wanted = replace(with_settings(dtype="float32"), pool={})
    found = conflict(files_in(directory), wanted, before_pool=True)
    assert found is not None
    assert found.fields == ("--dtype: bfloat16 there, float32 now",)
    unknown = replace(early, unclassified={"SGLANG_NEW": "(1)"})
    found = conflict(files_in(directory), unknown, before_pool=True)
    assert found is not None
    assert found.worth_nothing


def test_where_nothing_is_there_is_nothing_to_lose(tmp_path: Path, directory: Path) -> None:
    assert conflict(files_in(tmp_path), IDENTITY) is None
    store = open_store(directory)
    store.core.clear(False)  # new weights in the running server: nobody finds what it writes from now on
    assert store.core.sync(20.0)
    store.close()
    assert conflict(files_in(directory), with_settings(dtype="float32")) is None
