"""What cannot work ends a real server at its start, with one message that says why and what to do.

Never is the flag ignored, and never is another cache built in silence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple
from unittest import mock

import pytest
from forked_server import ForkedServer, start_python
from server import FlagValue, ServerStartError, flag_arguments

import sglang_flexkv
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import FlexKVConfig
from sglang_flexkv.common.errors import ConfigError, IncompatibleError
from sglang_flexkv.integration.compat import refused, version
from sglang_flexkv.storage.ssd_store import SsdStore

MODEL = Path(__file__).parents[2] / "models" / "tiny-gqa"
OURS = "sglang-flexkv cannot start: "


class FailedStart(NamedTuple):
    status: int
    log: str

    @property
    def messages(self) -> list[str]:
        """What our lines say, without the logger's prefix."""
        return [line.partition(OURS)[2] for line in self.log.splitlines() if OURS in line]


class ChangedServer(ForkedServer):
    """A server in all of whose processes something was changed before it started."""

    def __init__(self, change: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.program = change + RUN_LAUNCHER if change else None

    def _launch(self, log: BinaryIO) -> Any:
        if self.program is None:
            return super()._launch(log)
        with open(os.devnull, "rb") as nothing:
            streams = (nothing.fileno(), log.fileno(), log.fileno())
            return start_python(self.program, flag_arguments(self.flags), streams, **self._environment)


RUN_LAUNCHER = """
import runpy
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
"""


def fail_to_start(
    tmp_path: Path,
    config: str = "",
    flags: dict[str, FlagValue] | None = None,
    env: dict[str, str | None] | None = None,
    model: Path = MODEL,
    change: str = "",
) -> FailedStart:
    """Starts a server that must not come up.

    Args:
        change: what is done to its modules before it starts.
    """
    path = tmp_path / "flexkv.yaml"
    path.write_text(config)
    ours: dict[str, FlagValue] = {"enable-flexkv": True, "flexkv-config-file": str(path)}
    server = ChangedServer(
        change,
        model,
        {**ours, **(flags or {})},
        env=env,
        log_path=tmp_path / "server.log",
        start_timeout_s=150,
        stop_grace_s=0,
    )
    try:
        with pytest.raises(ServerStartError, match="exited with status") as caught:
            server.start()
    finally:
        server.stop()
    status = re.search(r"exited with status (-?\d+)", str(caught.value))
    assert status is not None
    return FailedStart(int(status[1]), server.log())


# ---- real servers that end in the launcher, before a model is loaded ----

IN_THE_LAUNCHER: dict[str, tuple[str, dict[str, FlagValue], dict[str, str | None], list[str]]] = {
    "wrong key": ("cpu_cach_gb: 1", {}, {}, ["flexkv.yaml", "'cpu_cach_gb'; did you mean 'cpu_cache_gb'"]),
    "negative size": (
        "",
        {},
        {"FLEXKV_CPU_CACHE_GB": "-1"},
        ["FLEXKV_CPU_CACHE_GB", "cpu_cache_gb: must be greater than 0"],
    ),
    "too much memory": ("cpu_cache_gb: 100000", {}, {}, ["cpu_cache_gb=100000", "GiB of memory", "lower it"]),
    # Permissions do not bind root, but this is refused like a directory that may not be entered.
    "no directory": (
        f"ssd_cache_gb: 1\nssd_cache_dir: /{'x' * 300}",
        {},
        {},
        ["ssd_cache_dir: /xxx", "cannot be used: File name too long; shorten it or name another one"],
    ),
    "one directory twice": (
        "cpu_cache_gb: 0.01\nssd_cache_gb: 0.01\nssd_cache_dir: {tmp};{tmp}/.",
        {},
        {},
        ["ssd_cache_dir lists the same directory twice (", "list each once"],
    ),
    "full disk": (
        "cpu_cache_gb: 0.1\nssd_cache_gb: 1000000\nssd_cache_dir: {tmp}",
        {},
        {},
        ["ssd_cache_gb: ", "cannot take 1000000.00 GiB; lower ssd_cache_gb or free space"],
    ),
    "another cache": (
        "",
        {"enable-lmcache": True},
        {},
        ["--enable-flexkv does not work with --enable-lmcache", "drop it"],
    ),
    "no cache": (
        "",
        {"disable-radix-cache": True},
        {},
        ["--enable-flexkv does not work with --disable-radix-cache", "drop it"],
    ),
}


@pytest.mark.parametrize("case", IN_THE_LAUNCHER)
def test_a_server_ends_with_one_message(case: str, tmp_path: Path) -> None:
    config, flags, env, expected = IN_THE_LAUNCHER[case]
    start = fail_to_start(tmp_path, config.replace("{tmp}", str(tmp_path)), flags, env)
    assert start.status == 1
    assert len(start.messages) == 1, start.log
    for part in expected:
        assert part in start.messages[0]
    assert "Traceback" not in start.log
    assert list(tmp_path.glob("flexkv-*")) == [], "files were left behind"


def in_the_launcher(start: FailedStart) -> bool:
    """With one message, before a process for the model was started."""
    return (
        start.status == 1
        and len(start.messages) == 1
        and "Traceback" not in start.log
        and "Init torch distributed" not in start.log
    )


@pytest.mark.parametrize(
    ("rank", "flags"),
    [
        ("dp0-tp0", {}),
        ("dp1-tp1", {"tp-size": 2, "dp-size": 2, "enable-dp-attention": True}),
    ],
    ids=["one_rank", "dp_attention"],
)
def test_a_directory_in_use_by_another_server(tmp_path: Path, rank: str, flags: dict[str, FlagValue]) -> None:
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    owner = SsdStore((ssd,), 4, [4096], rank, namespace=make_namespace({"model": "another"}))
    config = f"cpu_cache_gb: 0.01\nssd_cache_gb: 0.01\nssd_cache_dir: {ssd}"
    start = fail_to_start(tmp_path, config, flags)
    owner.close()
    assert in_the_launcher(start), start.log
    assert f"ssd_cache_dir: {ssd} is in use by another server (process " in start.messages[0]
    assert "give each server a directory of its own" in start.messages[0]


def variant(tmp_path: Path, **changes: object) -> Path:
    """The configuration of another model, without weights."""
    model = tmp_path / "variant"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MODEL / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    return model


SLIDING_WINDOWS: dict[str, object] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
DEEPSEEK_V32: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 64,
    "index_head_dim": 64,
    "index_n_heads": 4,
}
MAMBA: dict[str, object] = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
LINEAR_ATTENTION: dict[str, object] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
OTHER_STATE: dict[str, tuple[dict[str, object], str]] = {
    "index keys with tails": (
        DEEPSEEK_V32 | {"index_kpool": 2, "index_kpool_compress": True},
        "index keys that wait for more tokens (index_kpool_compress)",
    ),
}


@pytest.mark.parametrize("case", OTHER_STATE)
def test_a_model_with_other_state_is_known_by_its_configuration(case: str, tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    changes, expected = OTHER_STATE[case]
    config = FlexKVConfig()
    refused.check_model(ModelConfig(str(MODEL)), config)
    if case == "index keys with tails":
        # SGLang looks at a plain configuration for that; ModelConfig would ask for all of DeepSeek's fields.
        model = ModelConfig(str(MODEL))
        model.hf_config.update(DEEPSEEK_V32)
        refused.check_model(model, config)
        model.hf_config.update(changes)
    else:
        model = ModelConfig(str(variant(tmp_path, **changes)))
    with pytest.raises(IncompatibleError) as caught:
        refused.check_model(model, config)
    assert f"the model {model.model_path} keeps {expected} beside" in str(caught.value)
    assert "start without --enable-flexkv" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        (SLIDING_WINDOWS, "sliding windows"),
        (MAMBA, "Mamba or linear-attention state"),
        (LINEAR_ATTENTION, "Mamba or linear-attention state"),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_windows_and_states(
    changes: dict[str, object], keeps: str, tmp_path: Path
) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig(str(variant(tmp_path, **changes)))
    refused.check_model(model, FlexKVConfig())
    with pytest.raises(IncompatibleError, match=f"{keeps}: .* --disaggregation-mode yet; drop one"):
        refused.check_model(model, FlexKVConfig(), disaggregated=True)
    with pytest.raises(ConfigError, match=f"write_policy: the model .* keeps {keeps} .* use write_through"):
        refused.check_model(model, FlexKVConfig(write_policy="write_back"))
    refused.check_model(model, FlexKVConfig(remote="redis://127.0.0.1:6379"))
    with (
        nullcontext()
        if changes is SLIDING_WINDOWS
        else pytest.raises(IncompatibleError, match=f"{keeps}: .* --enable-prefill-cp yet; drop one")
    ):
        refused.check_model(model, FlexKVConfig(), context_parallel=True)


def test_states_are_refused_by_name_in_the_version_before(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig(str(variant(tmp_path, **MAMBA)))
    with (
        mock.patch.object(version, "installed_sglang", return_value="0.5.22"),
        pytest.raises(IncompatibleError, match=r"state \(with this version of SGLang\) beside"),
    ):
        refused.check_model(model, FlexKVConfig())


def test_a_real_server_ends_before_it_loads_such_a_model(tmp_path: Path) -> None:
    model = variant(tmp_path, **SLIDING_WINDOWS)
    settings = "cpu_cache_gb: 0.01\nwrite_policy: write_back"
    start = fail_to_start(tmp_path, settings, model=model)
    assert in_the_launcher(start), start.log
    assert f"write_policy: the model {model} keeps sliding windows" in start.messages[0]


# ---- real servers that end while the cache is built ----


def test_a_tier_that_holds_no_block(tmp_path: Path) -> None:
    """How large a block is is known when the device pool is there."""
    start = fail_to_start(tmp_path, "cpu_cache_gb: 0.000001")
    assert start.status != 0
    assert len(start.messages) == 1, start.log
    assert "cpu_cache_gb=1e-06 holds no block of " in start.messages[0]
    assert "Traceback" not in start.log


def test_a_function_of_sglang_that_has_changed(tmp_path: Path) -> None:
    change = """
from sglang.srt.mem_cache import registry
registry.create_tree_cache = lambda context, server_args: None
"""
    start = fail_to_start(tmp_path, change=change)
    assert start.status == 1
    assert len(start.messages) == 1, start.log
    assert "create_tree_cache takes (context, server_args), expected (ctx)" in start.messages[0]
    assert "Install an unmodified sglang==" in start.messages[0]


def test_a_patch_that_sglang_fails_to_apply(tmp_path: Path) -> None:
    """SGLang logs that and goes on, with a linker of its own or with none."""
    change = """
from sglang.srt.plugins.hook_registry import HookRegistry
stock = HookRegistry._apply_target.__func__
def apply(cls, target, hooks):
    if target.endswith("create_unified_radix_cache"):
        raise RuntimeError("cannot be applied")
    stock(cls, target, hooks)
HookRegistry._apply_target = classmethod(apply)
"""
    start = fail_to_start(tmp_path, change=change)
    assert start.status != 0
    assert len(start.messages) == 1, start.log
    assert "SGLang did not apply the patches build-our-cache" in start.messages[0]
    assert "Install an unmodified sglang==" in start.messages[0]


# The copy must win over an editable install, whose finder would also find the core.
ONLY_FROM = """
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] != "sglang_flexkv":
            return None
        spec = PathFinder.find_spec(name, path or [{directory!r}], target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return spec

for name in [name for name in sys.modules if name.partition(".")[0] == "sglang_flexkv"]:
    del sys.modules[name]
sys.meta_path.insert(0, Finder)
"""


def test_a_missing_core(tmp_path: Path) -> None:
    package = tmp_path / "site" / "sglang_flexkv"
    shutil.copytree(Path(sglang_flexkv.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    start = fail_to_start(tmp_path, change=ONLY_FROM.format(directory=str(package.parent)))
    assert start.status == 1
    assert len(start.messages) == 1, start.log
    assert "the compiled core of sglang-flexkv cannot be loaded" in start.messages[0]
    assert "pip install" in start.messages[0]


# ---- flags of SGLang ----

REFUSED_VALUES: dict[str, object] = {
    "enable_hierarchical_cache": True,
    "enable_lmcache": True,
    "enable_unified_cache_external_linker": True,
    "radix_cache_backend": "mine",
    "disable_radix_cache": True,
    "enable_unified_memory": True,
    "enable_hisparse": True,
    "speculative_algorithm": "STANDALONE",
    "enable_kv_cache_sharding": True,
    "prefill_only_disable_kv_cache": True,
    "enable_pdmux": True,
    "enable_int8_mamba_checkpoint": True,
    "enable_linear_replayssm": True,
    "mamba_radix_cache_strategy": "extra_buffer_lazy",
    "pp_size": 2,
    "dcp_size": 2,
    "enable_dsa_cache_layer_split": True,
    "disaggregation_mode": "decode",
}


def resolved(**changes: object) -> Any:
    """SGLang's arguments as they are resolved by default, with the fields that we look at."""
    plain: dict[str, object] = dict.fromkeys(REFUSED_VALUES, False) | {
        "radix_cache_backend": None,
        "mamba_radix_cache_strategy": "auto",
        "speculative_algorithm": None,
        "pp_size": 1,
        "dcp_size": 1,
        "attn_cp_size": 1,
        "enable_prefill_cp": False,
        "disaggregation_mode": "null",
        "device": "cpu",
    }
    return SimpleNamespace(**plain | changes)


def test_plain_flags_are_accepted() -> None:
    refused.check_flags(resolved(), resolved())
    refused.check_flags(resolved(device="cuda"), resolved(device=None))


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "NEXTN", "NGRAM"])
def test_speculative_decoding_is_accepted(algorithm: str) -> None:
    refused.check_flags(resolved(speculative_algorithm=algorithm), resolved())


@pytest.mark.parametrize("number", ["0.5.22", "0.5.23"])
def test_the_prefill_side_of_a_disaggregated_deployment(number: str) -> None:
    flags = resolved(disaggregation_mode="prefill")
    with mock.patch.object(version, "installed_sglang", return_value=number):
        if number == "0.5.23":
            refused.check_flags(flags, flags)
            flags.speculative_algorithm = "EAGLE"
            with pytest.raises(IncompatibleError, match="--speculative-algorithm together yet; drop one"):
                refused.check_flags(flags, flags)
            return
        with pytest.raises(
            IncompatibleError, match=r"0\.5\.22, which sends KV that is still being loaded: pip"
        ):
            refused.check_flags(flags, flags)


def test_ranks_that_share_prefills_each_have_all_kv() -> None:
    flags = resolved(attn_cp_size=2, enable_prefill_cp=True)
    refused.check_flags(flags, flags)
    for changes, expected in (
        ({"enable_prefill_cp": False}, "add --enable-prefill-cp and --cp-strategy, or leave it at 1"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm together yet; drop one of them"),
    ):
        changed = SimpleNamespace(**vars(flags) | changes)
        with pytest.raises(IncompatibleError, match=expected):
            refused.check_flags(changed, changed)


def test_every_conflict_has_a_case_here() -> None:
    assert [name for name, _, _ in refused._CONFLICTS] == list(REFUSED_VALUES)


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_a_conflicting_flag_is_named(name: str) -> None:
    flags = resolved(**{name: REFUSED_VALUES[name]})
    with pytest.raises(IncompatibleError) as caught:
        refused.check_flags(flags, flags)
    message = str(caught.value)
    assert f"--enable-flexkv does not work with --{name.replace('_', '-')}" in message
    assert re.search(r"; (drop it|use |run |leave )", message), "no remedy"


def test_every_kv_dtype_of_sglang_is_judged() -> None:
    from sglang.srt.server_args import ServerArgs

    choices = {"auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2", "nvfp4", "fp4_mx_block16", "mxfp8"}
    (arg,) = ServerArgs.__annotations__["kv_cache_dtype"].__metadata__
    assert set(arg.choices) == choices


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_a_flag_that_sglang_has_set_is_not_called_given(name: str) -> None:
    with pytest.raises(IncompatibleError, match=r"You have not given it: SGLang set .* drop that flag, or"):
        refused.check_flags(resolved(**{name: REFUSED_VALUES[name]}), resolved())


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_flags_are_known_to_sglang(name: str) -> None:
    from sglang.srt.server_args import ServerArgs

    assert name in ServerArgs.__struct_fields__


def test_other_devices_are_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"--device xpu is not supported: .* cpu, cuda"):
        refused.check_flags(resolved(device="xpu"), resolved(device=None))


# ---- models ----


class Component(Enum):
    """As SGLang's ComponentType, which names them the same."""

    FULL = "full"
    SWA = "swa"
    MAMBA = "mamba"


def test_components_are_those_of_sglang() -> None:
    from sglang.srt.mem_cache.unified_cache.components import ComponentType

    for component in Component:
        assert component.name in ComponentType.__members__
    refused.check_components((ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA))


def test_models_with_other_state_are_refused() -> None:
    with pytest.raises(IncompatibleError) as caught:
        refused.check_components((Component.FULL, SimpleNamespace(name="ECHO")))
    assert "keeps ECHO state" in str(caught.value)
    assert "start without --enable-flexkv" in str(caught.value)
