"""The identity of a model: the same for the same files in every process, another one when they change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_server import start_python

from sglang_flexkv.integration import file_contents
from sglang_flexkv.integration import model_identity as identity_module
from sglang_flexkv.integration.compat.arguments import ARGUMENTS, PATH_ARGUMENTS
from sglang_flexkv.integration.model_identity import (
    describe,
    find_local,
    model_identity,
    notes,
)
from sglang_flexkv.storage.ssd_identity import Identity

LATER = 4e9  # the files of a test are older than this start of a process
WEIGHTS = "model-00002-of-00002.safetensors"
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]  # of this file, for others
COMMIT = "0123456789abcdef0123456789abcdef01234567"

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(ARGUMENTS),
    **dict.fromkeys(PATH_ARGUMENTS),
    # Those that say whether files tell the weights at all.
    "download_dir": None,
    "lora_paths": None,
    "checkpoint_engine_wait_weights_before_ready": None,
    "quantize_and_serve": None,
    "load_format": "auto",
    "weight_cache_mode": "off",
    "page_size": 16,
    "tp_size": 1,
}


def whole_identity(
    path: Path | str, revision: str | None = None, started_s: float = LATER, **arguments: Any
) -> Identity:
    values = {**DEFAULTS, "model_path": str(path), "revision": revision, **arguments}
    return model_identity(values.__getitem__, str(path), revision, started_s=started_s)


def identity(path: Path | str, *args: Any, **arguments: Any) -> bytes:
    return whole_identity(path, *args, **arguments).namespace


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"rope_theta": 10000}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_x.py").write_text("x = 1")
    (folder / "README.md").write_text("# a model")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes([number]) * 300_000)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fill(tmp_path / "model")


def test_every_argument_is_one_of_sglang() -> None:
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.server_args import ServerArgs

    assert set(DEFAULTS) <= set(namespace_of(ServerArgs))


# ---- files ----


def test_the_same_files_in_another_process(model: Path) -> None:
    """Which hashes strings otherwise, and so is none that was forked."""
    program = f"""
import sys
sys.path[:0] = {PATHS!r}
from test_model_identity import identity
print(identity({str(model)!r}, lora_backend={{"b", "a", "c"}}).hex())
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split()[-1] == identity(model, lora_backend={"c", "b", "a"}).hex()


def touch(model: Path) -> None:
    os.utime(model / WEIGHTS)


def rewrite_in_place(model: Path) -> None:
    """Other bytes of the same size, with the old times put back."""
    before = (model / WEIGHTS).stat()
    (model / WEIGHTS).write_bytes(b"\7" * before.st_size)
    os.utime(model / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_rename(model: Path) -> None:
    (model / "new").write_bytes(b"\2" * 300_000)
    (model / "new").rename(model / WEIGHTS)


def grow(model: Path) -> None:
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"x")


def edit_config(model: Path) -> None:
    (model / "config.json").write_text('{"rope_theta": 10001}')


def edit_code(model: Path) -> None:
    (model / "modeling_x.py").write_text("x = 2")


def add_scales(model: Path) -> None:
    (model / "kv_cache_scales.json").write_text("{}")


def drop_a_shard(model: Path) -> None:
    (model / WEIGHTS).unlink()


@pytest.mark.parametrize(
    "change",
    [
        touch,
        rewrite_in_place,
        replace_by_rename,
        grow,
        edit_config,
        edit_code,
        add_scales,
        drop_a_shard,
    ],
)
def test_a_changed_file_changes_it(model: Path, change: Callable[[Path], None]) -> None:
    before = identity(model)
    time.sleep(0.02)  # above the resolution of file times
    change(model)
    assert identity(model) != before
    assert identity(model) == identity(model)  # no nonce


def test_what_computes_nothing_does_not_count(model: Path) -> None:
    before = identity(model)
    (model / "README.md").write_text("# the same model")
    os.utime(model / "config.json")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock").touch()
    assert identity(model) == before


def test_a_copy_elsewhere_is_another_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert identity(tmp_path / "copy") != identity(model)


def test_another_name_of_the_same_directory_changes_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    assert identity(model.name) == identity(f"{model}/") == identity(model)


def test_a_link_that_points_elsewhere_changes_it(model: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    link = tmp_path / "current"
    link.symlink_to(model)
    before = identity(link)
    assert identity(link) == before
    link.unlink()
    link.symlink_to(other)
    assert identity(link) != before


def test_shards_of_a_gguf_count_together(tmp_path: Path) -> None:
    shards = [tmp_path / f"w-0000{number}-of-00002.gguf" for number in (1, 2)]
    for shard in shards:
        shard.write_bytes(b"gguf")
    (tmp_path / "another.gguf").write_bytes(b"1")
    before = identity(shards[0], load_format="gguf")
    (tmp_path / "another.gguf").write_bytes(b"22")
    assert identity(shards[0], load_format="gguf") == before
    shards[1].write_bytes(b"more")
    assert identity(shards[0], load_format="gguf") != before


# ---- arguments and environment ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("json_model_override_args", '{"rope_scaling": {"factor": 2}}'),
        ("dtype", "float16"),
        ("quantization", "fp8"),
        ("kv_cache_dtype", "fp8_e4m3"),
        ("context_length", 4096),
        ("attention_backend", "triton"),
        ("weight_version", "2"),
        ("page_size", 48),
        ("tp_size", 2),
    ],
)
def test_an_argument_changes_it(model: Path, name: str, value: object) -> None:
    assert identity(model, **{name: value}) != identity(model)
    assert identity(model, **{name: value}) == identity(model, **{name: value})


def test_the_revision_changes_it(model: Path) -> None:
    assert identity(model, revision="v2") != identity(model)


def test_the_draft_model_changes_it(model: Path, tmp_path: Path) -> None:
    draft = fill(tmp_path / "draft")
    drafts = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(draft)}
    before = identity(model, **drafts)
    assert before == identity(model, **drafts) != identity(model)
    assert before != identity(model, **drafts | {"speculative_algorithm": "EAGLE3"})
    (draft / WEIGHTS).write_bytes(bytes(300_000))
    assert identity(model, **drafts) != before


def test_scales_in_a_file_of_their_own(model: Path, tmp_path: Path) -> None:
    scales = tmp_path / "scales.json"
    scales.write_text(json.dumps({"k": 1}))
    before = identity(model, quantization_param_path=str(scales))
    assert identity(model, quantization_param_path=str(scales)) == before
    scales.write_text(json.dumps({"k": 2}))
    assert identity(model, quantization_param_path=str(scales)) != before


def test_an_adapter_that_was_trained_further_changes_it(model: Path, tmp_path: Path) -> None:
    adapter = fill(tmp_path / "adapter")
    refs = [SimpleNamespace(lora_id="of-its-path", lora_path=str(adapter))]
    before = identity(model, lora_paths=refs)
    assert identity(model, lora_paths=refs) == before
    grow(adapter)
    assert identity(model, lora_paths=refs) != before


OPERATION = {
    "SGLANG_RUN_ID": "another at every start",
    "SGLANG_LOG_GC": "1",
    "SGLANG_ZMQ_SOURCE_IP": "10.1.2.3",
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "2048",
    "EXA_API_KEY": "a secret",
    # Kubernetes, for services named sglang and sglang-router.
    "SGLANG_SERVICE_HOST": "10.0.0.7",
    "SGLANG_SERVICE_PORT_HTTP": "30000",
    "SGLANG_ROUTER_PORT_30000_TCP_ADDR": "10.0.0.8",
    "SGLANG_ROUTER_PORT": "tcp://10.0.0.8:30000",
    # As it is without.
    "SGLANG_FORCE_FP8_MARLIN": "false",
    # Of another program.
    "NOT_OF_SGLANG": "1",
}


@pytest.mark.parametrize("name", OPERATION)
def test_a_variable_about_operation_changes_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = whole_identity(model)
    monkeypatch.setenv(name, OPERATION[name])
    assert whole_identity(model) == before


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "my_models", "my_models"),
        ("SGLANG_FORCE_FP8_MARLIN", "1", "true"),
        ("SGLANG_QK_RMSNORM_TORCH", "1", "1"),  # read without a declaration
        ("FLASHINFER_NVFP4_4OVER6", "yes", "true"),  # declared under a name of its own
    ],
)
def test_a_variable_that_changes_kv_is_a_field(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, shown: str
) -> None:
    before = identity(model)
    monkeypatch.setenv(name, value)
    assert identity(model) != before
    assert whole_identity(model).settings[name].strip('"') == shown
    assert whole_identity(model).unclassified == {}


def test_a_variable_that_nobody_knows_is_another_identity_and_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = whole_identity(model)
    monkeypatch.setenv("SGLANG_OF_THE_NEXT_RELEASE", "whatever it holds")
    after = whole_identity(model)
    assert after.settings == before.settings
    assert after.namespace != before.namespace
    (note,) = notes(after, "to SSD")
    assert "whether SGLANG_OF_THE_NEXT_RELEASE changes KV is not known" in note
    assert notes(before, "to SSD") == []
    assert "whatever it holds" not in repr(after)


def test_a_variable_that_sglang_declares_and_the_table_lacks(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.environ import EnvBool, EnvStr, envs

    for field, name in ((EnvBool(False), "NEW_KERNEL"), (EnvStr(None, secret=True), "NEW_SERVICE")):
        field.name = name
        monkeypatch.setattr(type(envs), name, field, raising=False)
        monkeypatch.setenv(name, "1")
    assert set(whole_identity(model).unclassified) == {"NEW_KERNEL"}


def test_the_environment_counts_as_it_was_before_the_model_was_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**DEFAULTS, "model_path": str(model)}
    at_start = identity_module.settings(values.__getitem__)
    before = whole_identity(model)
    monkeypatch.setenv("SGLANG_FLASHINFER_WORKSPACE_SIZE", "4711")  # as SGLang does for some models
    again = model_identity(values.__getitem__, str(model), None, at_start=at_start, started_s=LATER)
    assert again == before != whole_identity(model)


SECRET = "hunter2-hunter2"


def test_no_secret_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(model)
    monkeypatch.setenv("SGLANG_OF_THE_NEXT_RELEASE_API_KEY", SECRET)
    monkeypatch.setenv("EXA_API_KEY", SECRET)
    assert identity(model) == before  # another key leads to the same model
    monkeypatch.setenv("SGLANG_OF_THE_NEXT_RELEASE", SECRET)
    found = whole_identity(
        f"s3://user:{SECRET}@bucket/model?X-Amz-Signature={SECRET}",
        model_loader_extra_config=json.dumps({"aws_secret": SECRET}),
        lora_paths=[SimpleNamespace(lora_id="1", lora_path=f"https://{SECRET}@host/adapter")],
    )
    assert SECRET not in repr(found)
    assert SECRET not in " ".join(notes(found, "to SSD"))
    assert SECRET not in describe(f"s3://user:{SECRET}@bucket/model", "torch.bfloat16", 16, 0, 1)
    assert found.settings["model"] == "s3://***@bucket/model?***"


# ---- what cannot be told is unique ----


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"load_format": SimpleNamespace(value="remote_instance")}, "--load-format remote_instance"),
        ({"speculative_draft_load_format": "dummy"}, "--speculative-draft-load-format dummy"),
        ({"weight_cache_mode": "client"}, "another process"),
        ({"checkpoint_engine_wait_weights_before_ready": True}, "checkpoint engine"),
        ({"quantize_and_serve": True}, "--quantize-and-serve"),
        ({"quantization_param_path": "/no/such/file"}, "--quantization-param-path are not on this machine"),
    ],
)
def test_weights_that_are_not_in_the_files(model: Path, arguments: dict[str, Any], reason: str) -> None:
    assert identity(model, **arguments) != identity(model, **arguments)
    (note,) = notes(whole_identity(model, **arguments), "to SSD")
    assert "will not be found by another one" in note
    assert reason in note


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", "s3://bucket/model", "nobody/no-such-model-of-ours"):
        assert identity(path) != identity(path)


def test_a_folder_without_weights(model: Path) -> None:
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    assert identity(model) != identity(model)


def test_files_that_changed_while_they_may_have_been_loaded(model: Path, tmp_path: Path) -> None:
    started_s = time.time()
    time.sleep(0.02)
    assert identity(model, started_s=started_s + 60) == identity(model, started_s=started_s + 60)
    # As a deployment does it: the times of the files are those of the original.
    touch(model)
    os.utime(model / WEIGHTS, (1, 1))
    assert identity(model, started_s=started_s) != identity(model, started_s=started_s)


def test_the_start_of_the_process_counts_by_default(model: Path) -> None:
    nonces = {
        model_identity({**DEFAULTS, "model_path": str(model)}.__getitem__, str(model), None).nonce
        for _ in range(2)
    }
    assert len(nonces) == 2  # the files are younger than this process


# ---- hub ids ----


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache of downloads with one commit of one repository, in the layout of the hub's client."""
    repository = tmp_path / "hub" / "models--some--model"
    blobs = fill(repository / "blobs")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def test_a_hub_id_is_its_snapshot(hub: Path) -> None:
    snapshot = hub / "snapshots" / COMMIT
    assert find_local("some/model", None, str(hub.parent)) == snapshot
    assert find_local("some/model", "main", str(hub.parent)) == snapshot
    assert find_local("some/model", COMMIT, str(hub.parent)) == snapshot
    assert find_local("some/other", None, str(hub.parent)) is None
    cache = str(hub.parent)
    before = identity("some/model", download_dir=cache)
    assert identity("some/model", download_dir=cache) == before
    touch(hub / "blobs")  # what the links lead to
    assert identity("some/model", download_dir=cache) != before


def test_another_commit_is_another_model(hub: Path) -> None:
    cache = str(hub.parent)
    before = identity("some/model", download_dir=cache)
    shutil.copytree(hub / "snapshots" / COMMIT, hub / "snapshots" / ("f" * 40), symlinks=True)
    assert identity("some/model", download_dir=cache) == before
    (hub / "refs" / "main").write_text("f" * 40)
    assert identity("some/model", download_dir=cache) != before


# ---- for people ----


def test_the_label_is_one_line() -> None:
    label = describe("/models/m", "torch.bfloat16", 16, 1, 2)
    assert label == "/models/m, bfloat16, blocks of 16 tokens, TP rank 1 of 2"


# ---- what is shared with other machines ----


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests of files are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sglang-flexkv" / "sha256.json"


def whole_shared(path: Path | str, started_s: float = LATER, **arguments: Any) -> Identity:
    values = {**DEFAULTS, "model_path": str(path), **arguments}
    return model_identity(values.__getitem__, str(path), values["revision"], shared=True, started_s=started_s)


def shared(path: Path | str, **arguments: Any) -> bytes:
    return whole_shared(path, **arguments).namespace


def hub_snapshot(cache: Path, files: Path, commit: str = COMMIT) -> Path:
    """These files as the Hugging Face hub's cache has them."""
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for path in files.iterdir():
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        (repository / "blobs" / name).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_the_same_files_elsewhere_and_since_another_time(
    model: Path, tmp_path: Path, remembered: Path
) -> None:
    expected = shared(model)
    copy = tmp_path / "elsewhere" / "under-another-name"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)  # times are new
    (copy / "LICENSE").write_text("what the other one did not download")
    (copy / "README.md").unlink()
    snapshot = hub_snapshot(tmp_path / "hub", model)
    assert shared(copy) == shared(snapshot) == shared(snapshot, revision="v2") == expected
    assert identity(copy) != identity(model)
    assert not whole_shared(model).nonce


@pytest.mark.parametrize("change", [rewrite_in_place, grow, edit_config, edit_code, add_scales, drop_a_shard])
def test_what_is_in_the_files_counts_for_others(
    model: Path, remembered: Path, change: Callable[[Path], None]
) -> None:
    before = shared(model)
    change(model)
    assert shared(model) != before
    assert shared(model) == shared(model)


def test_every_byte_of_the_weights_counts_for_others(model: Path, tmp_path: Path, remembered: Path) -> None:
    """Samples would miss it: a row of an embedding, say."""
    whole = b"\2" * 50_000_000
    (model / WEIGHTS).write_bytes(whole)
    before = shared(model)
    other = tmp_path / "other" / "model"
    shutil.copytree(model, other)
    with (other / WEIGHTS).open("r+b") as file:
        file.seek(12_345_678)
        file.write(b"\3")
    os.utime(other / WEIGHTS, ns=((model / WEIGHTS).stat().st_atime_ns, (model / WEIGHTS).stat().st_mtime_ns))
    assert shared(other) != before


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "float16"), ("page_size", 48), ("weight_version", "2"), ("lora_backend", "x")],
)
def test_an_argument_counts_for_others(model: Path, remembered: Path, name: str, value: object) -> None:
    assert shared(model, **{name: value}) != shared(model)


def test_what_was_downloaded_while_the_server_started_is_shared(
    model: Path, tmp_path: Path, remembered: Path
) -> None:
    """From the hub, whose cache names files by their contents; other files may have changed since they were
    loaded."""
    snapshot = hub_snapshot(tmp_path / "hub", model)
    assert whole_shared(snapshot, started_s=0.0).namespace == shared(model)
    assert not whole_identity(snapshot, started_s=0.0).nonce
    found = whole_shared(model, started_s=0.0)
    assert found.nonce
    (note,) = notes(found, "to the store")
    assert "KV that this process writes to the store will not be found by another one" in note


def test_a_directory_without_files_tells_nothing(tmp_path: Path, remembered: Path) -> None:
    for identify in (whole_identity, whole_shared):
        assert "holds no weights" in identify(tmp_path).settings["weights"]


@pytest.mark.parametrize(
    "arguments", [{"load_format": "dummy"}, {"weight_cache_mode": "client"}, {"quantize_and_serve": True}]
)
def test_weights_that_files_do_not_tell_are_not_shared(
    model: Path, remembered: Path, arguments: dict[str, Any]
) -> None:
    assert shared(model, **arguments) != shared(model, **arguments)


def test_weights_are_read_once(model: Path, remembered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = file_contents._read

    def watched(path: Path, stamp: str) -> str:
        read.append(path.name)
        return real(path, stamp)

    monkeypatch.setattr(file_contents, "_read", watched)
    expected = shared(model)
    assert WEIGHTS in read
    read.clear()
    assert shared(model) == expected
    assert read == []
    (model / "config.json").write_text('{"rope_theta": 1}')
    assert shared(model) != expected
    assert read == ["config.json"]
    # What is remembered is lost, or nonsense, or cannot be written: it is read again.
    edit_config(model)
    expected = shared(model)
    for damage in (b"", b"[1]", b'{"a": 1}', b"\xff\xfe"):
        remembered.write_bytes(damage)
        read.clear()
        assert shared(model) == expected
        assert WEIGHTS in read
    shutil.rmtree(remembered.parent)
    remembered.parent.write_text("no directory")
    assert shared(model) == shared(model) == expected


def test_weights_are_read_by_one_of_several_processes(model: Path, remembered: Path, tmp_path: Path) -> None:
    """The ranks of a server, which all ask at once."""
    program = f"""
import sys, time
sys.path[:0] = {PATHS!r}
from test_model_identity import file_contents, shared, Path
real = file_contents._read
def read(path, stamp):
    print(f"read {{path.name}}\\n", end="")
    time.sleep(1)  # long enough for the others to begin as well
    return real(path, stamp)
file_contents._read = read
print(shared({str(model)!r}).hex())
"""
    out = tmp_path / "out"
    with open(os.devnull) as nothing, out.open("ab") as stream:
        streams = (nothing.fileno(), stream.fileno(), stream.fileno())
        ranks = [start_python(program, [], streams) for _ in range(3)]
        assert [rank.wait(100) for rank in ranks] == [0] * 3, out.read_text()
    lines = out.read_text().splitlines()
    assert len([line for line in lines if line == f"read {WEIGHTS}"]) == 1
    assert lines.count(shared(model).hex()) == 3


def test_a_file_that_changes_while_it_is_read_tells_nothing(
    model: Path, remembered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hashlib.file_digest

    def slow(file: Any, name: str) -> Any:
        found = real(file, name)
        if file.name.endswith(WEIGHTS):
            grow(model)
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    assert "changes while it is read" in whole_shared(model).settings["weights"]
