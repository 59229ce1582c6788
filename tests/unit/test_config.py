"""Every wrong setting ends in one message that names the setting and the remedy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_flexkv.common import config as config_module
from sglang_flexkv.common.config import (
    GIB,
    Admission,
    CacheConfig,
    EvictionPolicy,
    FlexKVConfig,
    IoEngine,
    LoadPolicy,
    PrefetchPolicy,
    RemoteCompression,
    SsdMismatch,
    WritePolicy,
)
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.common.storage import ModelConfig


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(config_module.os.environ):
        if name.startswith("FLEXKV_"):
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(text: str | bytes, name: str = "flexkv.yaml") -> FlexKVConfig:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return FlexKVConfig.load(str(path))

    return load


# ---- what is accepted ----


def test_defaults_without_a_file() -> None:
    config = FlexKVConfig.load(None)
    assert config.cpu_cache_gb is None
    assert config.ssd_cache_gb == 0
    assert config.ssd_cache_dir == ()
    assert config.ssd_on_mismatch is SsdMismatch.REFUSE
    assert config.ssd_admission is Admission.ALL
    assert config.ssd_write_limit_mb_s == 0
    assert config.write_policy is WritePolicy.WRITE_THROUGH


SETTINGS = {
    "cpu_cache_gb": 1.5,
    "ssd_cache_gb": 0.25,
    "ssd_cache_dir": "/a; /b;",
    "ssd_on_mismatch": "fresh",
    "ssd_admission": "reuse",
    "ssd_write_limit_mb_s": 250.5,
    "cpu_eviction_policy": "s3fifo",
    "ssd_eviction_policy": "fifo",
    "remote": "redis://:secret@host",
    "remote_admission": "reuse",
    "remote_write_limit_mb_s": 100.5,
    "remote_timeout_s": 2.5,
    "remote_compression": "auto",
    "write_policy": "write_back",
    "prefetch_policy": "best_effort",
    "prefetch_timeout_s": 0.5,
    "load_policy": "recompute",
    "copy_threads": 3,
    "io_engine": "threads",
    "io_depth": 8,
    "trace_file": "/tmp/t.json",
}


@pytest.mark.parametrize("name", ["flexkv.json", "flexkv.yaml", "flexkv"])
def test_every_setting_from_a_file(load: Any, name: str) -> None:
    as_json = json.dumps(SETTINGS)  # JSON is YAML, too
    as_yaml = "\n".join(f"{key}: {value}" for key, value in SETTINGS.items())
    config = load(as_json if name.endswith("json") else as_yaml, name)
    assert config == FlexKVConfig(
        cpu_cache_gb=1.5,
        ssd_cache_gb=0.25,
        ssd_cache_dir=(Path("/a"), Path("/b")),
        ssd_on_mismatch=SsdMismatch.FRESH,
        ssd_admission=Admission.REUSE,
        ssd_write_limit_mb_s=250.5,
        cpu_eviction_policy=EvictionPolicy.S3FIFO,
        ssd_eviction_policy=EvictionPolicy.FIFO,
        remote=RemoteUrl("redis", host="host", port=6379, password="secret"),
        remote_admission=Admission.REUSE,
        remote_write_limit_mb_s=100.5,
        remote_timeout_s=2.5,
        remote_compression=RemoteCompression.AUTO,
        write_policy=WritePolicy.WRITE_BACK,
        prefetch_policy=PrefetchPolicy.BEST_EFFORT,
        prefetch_timeout_s=0.5,
        load_policy=LoadPolicy.RECOMPUTE,
        copy_threads=3,
        io_engine=IoEngine.THREADS,
        io_depth=8,
        trace_file=Path("/tmp/t.json"),
    )
    assert set(SETTINGS) == set(FlexKVConfig.model_fields), "a setting is not covered here"


def test_directories_as_a_list_or_as_one_string(load: Any) -> None:
    expected = (Path("/a"), Path("/b c"))
    assert load("ssd_cache_gb: 1\nssd_cache_dir: [/a, /b c]").ssd_cache_dir == expected
    assert load("ssd_cache_gb: 1\nssd_cache_dir: /a;/b c").ssd_cache_dir == expected


def test_an_empty_file_is_the_defaults(load: Any) -> None:
    assert load("") == FlexKVConfig()


@pytest.mark.parametrize("empty", ["", '""', "' '", "null"])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_empty_in_a_file_is_not_set(load: Any, name: str, empty: str) -> None:
    assert load(f"{name}: {empty}") == FlexKVConfig()


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_empty_variable_is_not_set(
    load: Any, monkeypatch: pytest.MonkeyPatch, name: str, empty: str
) -> None:
    """It neither means something of its own nor takes away what the file says."""
    monkeypatch.setenv(f"FLEXKV_{name.upper()}", empty)
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", empty)
    assert FlexKVConfig.load(None) == FlexKVConfig()
    assert load(json.dumps(SETTINGS)) == FlexKVConfig(**SETTINGS)


def test_an_empty_part_of_a_list_is_no_directory(load: Any) -> None:
    assert load('ssd_cache_gb: 1\nssd_cache_dir: ["", /a]').ssd_cache_dir == (Path("/a"),)


def test_the_environment_overrides_the_file(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SETTINGS.items():
        monkeypatch.setenv(f"FLEXKV_{name.upper()}", str(value))
    config = load("cpu_cache_gb: 7\nio_engine: io_uring")
    assert config == FlexKVConfig(**SETTINGS)


def test_the_file_can_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flexkv.yaml"
    path.write_text("cpu_cache_gb: 2.5")
    monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(path))
    assert FlexKVConfig.load(None).cpu_cache_gb == 2.5
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*flexkv\.yaml.*check FLEXKV_CONFIG_PATH"):
        FlexKVConfig.load(None)


def test_other_variables_with_our_prefix_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_LOG_LEVEL", "DEBUG")
    assert FlexKVConfig.load(None) == FlexKVConfig()


def test_a_misspelt_variable_is_named_in_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACH_GB", "1")
    with caplog.at_level(logging.WARNING):
        FlexKVConfig.load(None)
    assert "FLEXKV_CPU_CACH_GB is not a setting" in caplog.text
    assert "did you mean FLEXKV_CPU_CACHE_GB" in caplog.text


# ---- what is refused ----

NAMED_IN_EVERY_MESSAGE = [
    ("cpu_cach_gb: 3", ["unknown setting 'cpu_cach_gb'", "did you mean 'cpu_cache_gb'"]),
    ("zzz: 1", ["unknown setting 'zzz'", "known: cpu_cache_gb, ssd_cache_gb"]),
    ("1: 2", ["unknown setting '1'", "known: cpu_cache_gb"]),
    ("cpu_cache_gb: -1", ["cpu_cache_gb", "must be greater than 0", "-1"]),
    ("cpu_cache_gb: 0", ["cpu_cache_gb", "must be greater than 0"]),
    ("cpu_cache_gb: lots", ["cpu_cache_gb", "must be a valid number", "'lots'"]),
    ("cpu_cache_gb: yes", ["cpu_cache_gb", "not true or false"]),
    ("cpu_cache_gb: .inf", ["cpu_cache_gb", "must be a finite number"]),
    ("cpu_cache_gb: .nan", ["cpu_cache_gb", "must be a finite number"]),
    ("ssd_cache_gb: -2", ["ssd_cache_gb", "must be greater than or equal to 0", "-2"]),
    ("ssd_cache_gb: .inf\nssd_cache_dir: /a", ["ssd_cache_gb", "must be a finite number"]),
    ("ssd_cache_gb: 3", ["ssd_cache_gb", "ssd_cache_dir is not", "name the directory"]),
    ("ssd_cache_dir: /a", ["ssd_cache_dir", "ssd_cache_gb is 0", "say how much"]),
    ("ssd_cache_gb: 1\nssd_cache_dir: ;", ["ssd_cache_dir is not", "name the directory"]),
    ("ssd_cache_gb: 1\nssd_cache_dir: [/a, 3]", ["ssd_cache_dir", "several with ';' between"]),
    ("ssd_cache_gb: 1\nssd_cache_dir: {a: 1}", ["ssd_cache_dir", "must be a directory"]),
    ("ssd_on_mismatch: ask", ["ssd_on_mismatch", "'refuse' or 'fresh'", "'ask'"]),
    ("ssd_on_mismatch: yes", ["ssd_on_mismatch", "not true or false"]),
    ("ssd_admission: none", ["ssd_admission", "'all' or 'reuse'", "'none'"]),
    ("ssd_write_limit_mb_s: -1", ["ssd_write_limit_mb_s", "must be greater than or equal to 0", "-1"]),
    ("ssd_write_limit_mb_s: .inf", ["ssd_write_limit_mb_s", "must be a finite number"]),
    ("ssd_write_limit_mb_s: 100M", ["ssd_write_limit_mb_s", "must be a valid number", "'100M'"]),
    ("enable_remote: true", ["enable_remote", "by its URL here, as 'remote'", "give file:///DIRECTORY"]),
    ("remote: mongodb://h", ["remote: there is no store 'mongodb' here", "give file:///DIRECTORY"]),
    ("remote: 3", ["remote: must be the URL of a store"]),
    ("remote_admission: none", ["remote_admission", "'all' or 'reuse'", "'none'"]),
    ("remote_write_limit_mb_s: -1", ["remote_write_limit_mb_s", "must be greater than or equal to 0", "-1"]),
    ("remote_compression: zip", ["remote_compression", "'none', 'auto' or 'always'", "'zip'"]),
    ("remote_compression: on", ["remote_compression: must be a value, not true or false"]),
    ("remote_timeout_s: 0", ["remote_timeout_s", "must be greater than 0"]),
    ("write_policy: never", ["write_policy", "'write_through_selective' or 'write_back'", "'never'"]),
    ("prefetch_policy: 3", ["prefetch_policy", "'best_effort', 'timeout' or 'wait_complete'"]),
    ("load_policy: never", ["load_policy", "'auto', 'load' or 'recompute'"]),
    ("prefetch_timeout_s: 0", ["prefetch_timeout_s", "must be greater than 0"]),
    ("prefetch_timeout_s: soon", ["prefetch_timeout_s", "must be a valid number"]),
    ("copy_threads: 0", ["copy_threads", "must be greater than 0"]),
    ("copy_threads: 65", ["copy_threads", "must be less than or equal to 64"]),
    ("copy_threads: 1.5", ["copy_threads", "must be a valid integer"]),
    ("io_engine: libaio", ["io_engine", "'auto', 'io_uring' or 'threads'", "'libaio'"]),
    ("io_depth: 0", ["io_depth", "must be greater than 0"]),
    ("io_depth: 5000", ["io_depth", "must be less than or equal to 4096"]),
    ("- a", ["must hold settings as 'name: value'", "not a list"]),
    ("hello", ["must hold settings as 'name: value'", "not a str"]),
    ("cpu_cache_gb: [", ["is not valid YAML", "line 1, column 16", "correct that place"]),
]


@pytest.mark.parametrize(
    ("text", "expected"), NAMED_IN_EVERY_MESSAGE, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_file_is_refused(load: Any, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert "flexkv.yaml" in message
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("url", ["redis://:s3cret@h/x", "redis://:s3cret@h:99999", "nil://:s3cret@h"])
def test_no_message_has_a_password(load: Any, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"remote: {url}")
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(load("remote: redis://:s3cret@h"))


def test_every_problem_is_reported_at_once(load: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load("cpu_cache_gb: -1\nio_depth: 0\nssd_cache: 1")
    for part in ("cpu_cache_gb", "io_depth", "'ssd_cache'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("settings", [FlexKVConfig, CacheConfig])
def test_a_trace_file_that_cannot_be_written_is_refused_early(
    tmp_path: Path, settings: type[FlexKVConfig | CacheConfig]
) -> None:
    for path, why in (
        (tmp_path, "is a directory; name a file"),
        (Path(""), "is a directory; name a file"),
        (tmp_path / "none" / "t.json", "none does not exist; create it"),
        (Path("/proc/self/t.json"), "cannot be written: /proc/self is"),
    ):
        with pytest.raises(ConfigError, match=f"trace_file: .*{why}"):
            settings(trace_file=path)
    assert settings(trace_file=tmp_path / "t.json").trace_file == tmp_path / "t.json"


def test_json_with_a_mistake_is_refused(load: Any) -> None:
    with pytest.raises(ConfigError, match=r"flexkv\.json is not valid JSON: .*line 1 column 18"):
        load('{"cpu_cache_gb": }', "flexkv.json")
    with pytest.raises(ConfigError, match="not a list"):
        load("[]", "flexkv.json")


def test_an_unreadable_file_is_refused(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file.*check --flexkv-config-file"):
        FlexKVConfig.load(str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match=r"cannot read .*Is a directory.*check --flexkv-config-file"):
        FlexKVConfig.load(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot read .*not UTF-8 text"):
        load(b"\xff\xfe\x00")


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXKV_CPU_CACHE_GB", "-3")
    with pytest.raises(ConfigError, match=r"FLEXKV_CPU_CACHE_GB.*cpu_cache_gb: must be greater than 0"):
        FlexKVConfig.load(None)


@pytest.mark.parametrize(("mode", "strict"), [("0\n", False), ("1\n", False), ("2\n", True)])
def test_the_kernel_says_how_it_counts_memory(
    monkeypatch: pytest.MonkeyPatch, mode: str, strict: bool
) -> None:
    monkeypatch.setattr(config_module.Path, "read_text", lambda path: mode)
    assert config_module.overcommit_is_strict() is strict


# ---- sizes in blocks ----

BLOCK = 8192


def blocks(num_ranks: int = 1, **settings: Any) -> CacheConfig:
    return FlexKVConfig(**settings).cache_config(block_bytes=BLOCK, tokens_per_block=16, num_ranks=num_ranks)


def test_ranks_share_the_sizes() -> None:
    one = blocks(cpu_cache_gb=0.5, ssd_cache_gb=1, ssd_cache_dir="/a")
    two = blocks(2, cpu_cache_gb=0.5, ssd_cache_gb=1, ssd_cache_dir="/a")
    assert one.num_cpu_blocks == GIB // 2 // BLOCK
    assert one.num_ssd_blocks == GIB // BLOCK
    assert (two.num_cpu_blocks, two.num_ssd_blocks) == (one.num_cpu_blocks // 2, one.num_ssd_blocks // 2)
    assert one.enable_ssd
    assert not blocks(cpu_cache_gb=0.5).enable_ssd


def test_ranks_with_one_copy_have_the_sizes_of_one() -> None:
    ssd: dict[str, Any] = {
        "cpu_cache_gb": 0.5,
        "ssd_cache_gb": 1,
        "ssd_cache_dir": "/a",
        "copy_threads": None,
    }
    sizes = {"block_bytes": BLOCK, "tokens_per_block": 16, "num_ranks": 8}
    config = FlexKVConfig(**ssd, ssd_write_limit_mb_s=100)
    for of_a_copy, num_copies in ((8, 1), (4, 2), (1, 8)):
        one = config.cache_config(**sizes, ranks_per_copy=of_a_copy)
        assert one.num_cpu_blocks == GIB // 2 // BLOCK // num_copies
        assert one.num_ssd_blocks == GIB // BLOCK // num_copies
        assert one.ssd_write_limit_mb_s == 100 / num_copies
        assert one.copy_threads == blocks(8, **ssd).copy_threads  # all ranks copy


def test_copies_of_some_ranks_leave_the_others_theirs() -> None:
    """Of a machine with six ranks four have a copy in common, and two are of ranks on another machine."""
    config = FlexKVConfig(cpu_cache_gb=0.75, ssd_cache_gb=1.5, ssd_cache_dir="/a", ssd_write_limit_mb_s=60)
    sizes = {"block_bytes": BLOCK, "tokens_per_block": 16, "num_ranks": 6}
    common, own = (config.cache_config(**sizes, ranks_per_copy=ranks) for ranks in (4, 1))
    assert (common.num_cpu_blocks, own.num_cpu_blocks) == (GIB // 2 // BLOCK, GIB // 8 // BLOCK)
    assert (common.num_ssd_blocks, own.num_ssd_blocks) == (GIB // BLOCK, GIB // 4 // BLOCK)
    assert (common.ssd_write_limit_mb_s, own.ssd_write_limit_mb_s) == (40, 10)


def test_ranks_share_the_limit_on_writes() -> None:
    ssd: dict[str, Any] = {"cpu_cache_gb": 0.5, "ssd_cache_gb": 1, "ssd_cache_dir": "/a"}
    assert blocks(4, **ssd, ssd_write_limit_mb_s=100).ssd_write_limit_mb_s == 25
    assert blocks(4, **ssd).ssd_write_limit_mb_s == 0


def test_what_happens_on_ssd_is_handed_on() -> None:
    ssd: dict[str, Any] = {"cpu_cache_gb": 0.5, "ssd_cache_gb": 1, "ssd_cache_dir": "/a"}
    config = blocks(**ssd, ssd_on_mismatch="fresh", ssd_admission="reuse")
    assert config.ssd_on_mismatch is SsdMismatch.FRESH
    assert config.ssd_admission is Admission.REUSE


def test_without_a_size_a_quarter_of_the_free_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "available_memory_bytes", lambda: 4 * GIB)
    assert blocks().num_cpu_blocks == GIB // BLOCK


def test_more_memory_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpu_cache_gb=1e\+06 .*GiB of memory this machine has.*lower it"):
        blocks(cpu_cache_gb=1e6)


def test_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"memory.max": str(3 * GIB), "memory.current": str(GIB)}
    monkeypatch.setattr(config_module.Path, "read_text", lambda path: limits[path.name])
    assert config_module.available_memory_bytes() <= 2 * GIB


def test_sizes_that_hold_no_block_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cpu_cache_gb=.* holds no block of 8192 bytes.*raise it"):
        blocks(cpu_cache_gb=1e-7)
    with pytest.raises(ConfigError, match=r"ssd_cache_gb=.* holds no block of 8192 bytes.*raise it"):
        blocks(cpu_cache_gb=0.1, ssd_cache_gb=1e-5, ssd_cache_dir="/a;/b")


# ---- the library's own settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_block": 0}, "tokens_per_block: must be greater than 0"),
        ({"enable_cpu": False}, "enable_cpu: the CPU tier cannot be off"),
        ({"enable_remote": True}, "enable_remote: a remote store is named by its URL here, as 'remote'"),
        ({"ssd_admission": "some"}, "ssd_admission: must be"),
        ({"ssd_on_mismatch": "ask"}, "ssd_on_mismatch: must be"),
        ({"ssd_write_limit_mb_s": -1}, "ssd_write_limit_mb_s: must be greater than or equal to 0"),
        ({"enable_ssd": True}, "enable_ssd needs num_ssd_blocks > 0 and ssd_cache_dir"),
        ({"num_cpu_blocks": -1}, "num_cpu_blocks: must be greater than 0"),
        ({"num_cpu_blocks": True}, "num_cpu_blocks: must be a value, not true or false"),
        ({"num_blocks": 1}, "unknown setting 'num_blocks'; did you mean 'num_"),
    ],
)
def test_wrong_cache_config_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**settings)
    assert message in str(caught.value)


def test_wrong_model_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_layers: must be greater than 0"):
        ModelConfig(num_layers=0, num_kv_heads=1, head_size=1)
    with pytest.raises(ConfigError, match="head_size: is missing and has no default; give it"):
        ModelConfig(num_layers=1, num_kv_heads=1)
    with pytest.raises(ConfigError, match="dtype: must be an instance of dtype"):
        ModelConfig(num_layers=1, num_kv_heads=1, head_size=1, dtype="bfloat16")


def test_bytes_of_a_token() -> None:
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_size": 8}
    assert ModelConfig(**shape, dtype=torch.float32).token_size_in_bytes == 3 * 2 * 8 * 2 * 4
    assert ModelConfig(**shape, use_mla=True).token_size_in_bytes == 3 * 2 * 8 * 2


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FlexKVConfig().cpu_cache_gb = 1.0  # type: ignore[misc]
