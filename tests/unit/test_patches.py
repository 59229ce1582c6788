"""The patches: each fits the installed SGLang, is refused where it does not, and has its page."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from forked_server import start_python

import sglang_flexkv
from sglang_flexkv.common.errors import ConfigError, FlexKVError, IncompatibleError
from sglang_flexkv.integration import checks, plugin
from sglang_flexkv.integration.compat import hooking, hooks, requests, version
from sglang_flexkv.integration.compat.hooking import Patch
from sglang_flexkv.integration.compat.patches import PATCHES
from sglang_flexkv.integration.compat.version import SUPPORTED_SGLANG

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "patches"
CHECK_APPLIED = hooking.check_applied


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("fake_sglang")
    monkeypatch.setitem(sys.modules, "fake_sglang", module)
    return module


def target_in(module: ModuleType, function: object) -> Patch:
    """The first patch, aimed at a function of a fake module."""
    module.target = function  # type: ignore[attr-defined]
    return replace(PATCHES[0], target="fake_sglang.target", parameters=("self", "ctx"))


# ---- targets and signatures ----


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_target_of_the_installed_sglang_fits(patch: Patch) -> None:
    assert hooking.problem_with(patch) is None


def test_names_and_targets_are_unique() -> None:
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    assert len({patch.target for patch in PATCHES}) == len(PATCHES)


def test_a_changed_signature_is_found(fake_module: ModuleType) -> None:
    assert hooking.problem_with(target_in(fake_module, lambda self, ctx: None)) is None
    problem = hooking.problem_with(target_in(fake_module, lambda self, ctx, more=None: None))
    assert problem == "fake_sglang.target takes (self, ctx, more), expected (self, ctx)"


def test_a_target_that_is_gone_is_found(fake_module: ModuleType) -> None:
    patch = target_in(fake_module, 3)
    assert "fake_sglang.target is not a function any more" in str(hooking.problem_with(patch))
    for target in ("fake_sglang.other", "no_such_module.target"):
        assert f"{target} does not exist" in str(hooking.problem_with(replace(patch, target=target)))


def test_nothing_is_patched_if_one_target_does_not_fit(
    fake_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered: list[object] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *args, **_: registered.append(args))
    wrong = target_in(fake_module, lambda other: None)
    monkeypatch.setattr(hooking, "_registered", [])
    with pytest.raises(IncompatibleError) as caught:
        hooking.apply((*PATCHES, wrong))
    assert "fake_sglang.target takes (other), expected (self, ctx)" in str(caught.value)
    assert f"Install an unmodified sglang=={SUPPORTED_SGLANG[-1]}" in str(caught.value)
    assert registered == []
    hooking.apply(PATCHES)
    assert len(registered) == len(PATCHES)


PATCHED = """
import json
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
import pkgutil
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_flexkv.integration.compat.patches import PATCHES
found = {}
for patch in PATCHES:
    parent, _, name = patch.target.rpartition(".")
    wrapped = hasattr(getattr(pkgutil.resolve_name(parent), name), "__wrapped__")
    found[patch.name] = [wrapped, len(HookRegistry._hooks[patch.target])]
from sglang_flexkv.integration.compat.hooking import check_applied
check_applied()
print(json.dumps(found))
"""


def test_the_patches_are_in_effect_in_a_process_of_sglang(tmp_path: Path) -> None:
    program, out = tmp_path / "patched.py", tmp_path / "out"
    program.write_text(PATCHED)
    with open(os.devnull) as nothing, out.open("wb") as stream:
        process = start_python(program, [], (nothing.fileno(), stream.fileno(), stream.fileno()))
        assert process.wait(300) == 0, out.read_text()
    expected = {patch.name: [True, 1] for patch in PATCHES}
    assert json.loads(out.read_text().splitlines()[-1]) == expected


# ---- versions ----


@pytest.mark.parametrize("number", [*SUPPORTED_SGLANG, f"{SUPPORTED_SGLANG[-1]}+cpu"])
def test_a_supported_version(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: number)
    version.check_version()


@pytest.mark.parametrize("number", ["0.5.10", "0.5.21", "0.5.24", "0.5.23rc1", "1.0.0"])
def test_another_version_is_refused_by_name(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: number)
    with pytest.raises(IncompatibleError) as caught:
        version.check_version()
    assert f"supports SGLang {', '.join(SUPPORTED_SGLANG)}, not {number}" in str(caught.value)
    assert f"pip install sglang=={SUPPORTED_SGLANG[-1]}" in str(caught.value)


def no_metadata(_: str) -> str:
    raise metadata.PackageNotFoundError


def test_no_sglang_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", no_metadata)
    monkeypatch.setattr(version.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(IncompatibleError, match=r"SGLang is not installed .* pip install sglang=="):
        version.check_version()


def test_a_source_checkout_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", no_metadata)
    monkeypatch.setattr("sglang.version.__version__", "0.5.99.dev1")
    with pytest.raises(IncompatibleError, match=r"not 0\.5\.99\.dev1"):
        version.check_version()


# ---- when something is wrong ----


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plugin of a process of SGLang whose version is not supported."""
    from sglang.srt.mem_cache import registry

    def stock(ctx: Any) -> str:
        return f"stock cache for {ctx.name}"

    monkeypatch.setattr(metadata, "version", lambda _: "0.4.1")
    monkeypatch.setattr(registry, "default_radix_cache_factory", stock)
    monkeypatch.setattr(plugin, "_done", False)
    return registry


def test_with_the_flag_the_process_ends(unusable: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch_server.py", "--enable-flexkv"])
    with pytest.raises(SystemExit) as caught:
        plugin.register()
    assert str(caught.value).startswith("sglang-flexkv cannot start: sglang-flexkv supports SGLang")


def test_with_the_flag_from_elsewhere_building_a_cache_ends(
    unusable: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    plugin.register()

    def context(enabled: bool) -> SimpleNamespace:
        return SimpleNamespace(name="m", server_args=SimpleNamespace(enable_flexkv=enabled))

    with pytest.raises(FlexKVError, match=r"cannot start: .* not 0\.4\.1"):
        unusable.default_radix_cache_factory(context(True))
    assert unusable.default_radix_cache_factory(context(False)) == "stock cache for m"
    assert unusable.default_radix_cache_factory(SimpleNamespace(name="x")) == "stock cache for x"


@pytest.mark.parametrize("error", [IncompatibleError("no fit"), RuntimeError("boom"), AttributeError("x")])
def test_whatever_goes_wrong_is_not_left_to_sglang(
    error: Exception, unusable: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(version, "check_version", lambda: None)
    monkeypatch.setattr(hooking, "apply", fail)
    monkeypatch.setattr(sys, "argv", ["launch_server.py", "--enable-flexkv"])
    with pytest.raises(SystemExit, match=str(error)):
        plugin.register()


@pytest.mark.parametrize(
    ("is_checkout", "remedy"), [(False, "pip install"), (True, "start it elsewhere than in {}, where Python")]
)
def test_a_missing_core_is_said(
    unusable: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_checkout: bool, remedy: str
) -> None:
    monkeypatch.setattr(checks, "_PARENT", tmp_path)
    if is_checkout:
        (tmp_path / "CMakeLists.txt").touch()
    monkeypatch.setattr(version, "check_version", lambda: None)
    monkeypatch.setattr(sys, "argv", ["launch_server.py", "--enable-flexkv"])
    monkeypatch.delattr(sglang_flexkv, "_core")
    monkeypatch.setitem(sys.modules, "sglang_flexkv._core", None)
    with pytest.raises(
        SystemExit, match="the compiled core .* cannot be loaded .*" + remedy.format(re.escape(str(tmp_path)))
    ):
        plugin.register()


def test_register_works_once(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    monkeypatch.setattr(plugin, "_done", False)
    monkeypatch.setattr(hooking, "apply", lambda _: applied.append(1))
    plugin.register()
    plugin.register()
    assert applied == [1]


# ---- the hooks: nothing without the flag, one thing with it ----


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    monkeypatch.setattr(hooking, "check_applied", lambda: None)  # nothing is patched in this process

    def set_flag(enabled: bool) -> None:
        memory = SimpleNamespace(enable_flexkv=enabled)
        monkeypatch.setattr("sglang.srt.runtime_context.get_memory", lambda: memory)

    return set_flag


def test_gates(flag: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides: list[dict[str, Any]] = []
    context = SimpleNamespace(
        override=lambda source, **fields: overrides.append(fields), config_leaf={"page_size": 48}.get
    )
    monkeypatch.setattr("sglang.srt.runtime_context.get_context", lambda: context)
    monkeypatch.setattr(hooks, "_at_start", None)

    attached: list[Any] = []

    def stock_init(scheduler: Any, args: str) -> None:
        scheduler.seen = (args, len(overrides))
        scheduler.enable_lmcache = False
        scheduler.tree_cache = SimpleNamespace(attach_scheduler=attached.append)

    flag(False)
    scheduler = SimpleNamespace()
    hooks.around_scheduler_init(stock_init, scheduler, "args")
    assert (scheduler.seen, scheduler.enable_lmcache, attached) == (("args", 0), False, [])
    flag(True)
    hooks.around_scheduler_init(stock_init, scheduler, "args")
    assert (scheduler.seen, scheduler.enable_lmcache, attached) == (("args", 1), True, [scheduler])
    assert overrides == [{"enable_unified_cache_external_linker": True}]
    assert hooks._at_start is not None  # taken before the model is loaded
    assert hooks._at_start.fields["--page-size"] == "48"

    def fail(*_args: Any) -> None:
        raise ConfigError("said already")

    with pytest.raises(ConfigError):
        hooks.around_scheduler_init(fail, scheduler, "args")
    # As SGLang ends a scheduler process that fails, without the traceback.
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(hooks.multiprocessing, "parent_process", lambda: "the launcher")
    monkeypatch.setattr(hooks.os, "kill", lambda *args: signals.append(args))
    with pytest.raises(SystemExit):
        hooks.around_scheduler_init(fail, scheduler, "args")
    assert signals == [(os.getppid(), signal.SIGQUIT)]


def test_building_a_cache(
    flag: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flag(False)
    built = hooks.around_create_unified_radix_cache(lambda *a, **k: (a, k), "ctx", cache_class=int)
    assert built == (("ctx",), {"cache_class": int})

    def fail(original: object, ctx: object, at_start: object) -> None:
        raise ConfigError("ssd_cache_dir: /a is in use")

    flag(True)
    monkeypatch.setattr("sglang_flexkv.integration.build.build_radix_cache", fail)
    with pytest.raises(ConfigError):
        hooks.around_create_unified_radix_cache(print, "ctx")
    assert "sglang-flexkv cannot start: ssd_cache_dir: /a is in use" in caplog.text


def test_another_cache_is_refused(flag: Callable[[bool], None]) -> None:
    from sglang_flexkv.integration.radix_cache import FlexKVRadixCache

    flag(False)
    assert hooks.after_create_tree_cache("another", "ctx") is None
    flag(True)
    with pytest.raises(FlexKVError, match=r"built str instead of FlexKVRadixCache.*sglang-flexkv status"):
        hooks.after_create_tree_cache("another", "ctx")
    ours = FlexKVRadixCache.__new__(FlexKVRadixCache)
    assert hooks.after_create_tree_cache(ours, "ctx") is None


NO_DRAFTS: dict[str, Any] = {
    "attention_backend": None,
    "speculative_algorithm": None,
    "uses_mamba_radix_cache": False,
}


@pytest.mark.parametrize(
    ("enabled", "stock", "expected"),
    [
        (True, {"page_size": 1}, {"page_size": hooks.DEFAULT_PAGE_SIZE}),
        (True, {"page_size": 64}, {"page_size": 64}),
        (True, {}, {}),  # the user has set it
        (False, {"page_size": 1}, {"page_size": 1}),
    ],
)
def test_default_of_the_page_size(enabled: bool, stock: dict[str, int], expected: dict[str, int]) -> None:
    view = SimpleNamespace(enable_flexkv=enabled, chunked_prefill_size=8192, **NO_DRAFTS)
    assert hooks.around_page_size_default(lambda _: stock, view) == expected


@pytest.mark.parametrize(
    ("chunk", "page_size"), [(None, 16), (-1, 16), (0, 16), (4096, 16), (1000, 8), (999, 1)]
)
def test_the_default_divides_the_chunks_of_the_user(chunk: int | None, page_size: int) -> None:
    view = SimpleNamespace(enable_flexkv=True, chunked_prefill_size=chunk, **NO_DRAFTS)
    assert hooks.around_page_size_default(lambda _: {"page_size": 1}, view) == {"page_size": page_size}


@pytest.mark.parametrize(
    ("algorithm", "breadth", "top_k", "backend", "page_size"),
    [
        ("NGRAM", 10, None, "torch_native", 1),
        ("NGRAM", 10, None, None, 1),
        ("NGRAM", 10, None, "flashinfer", 16),
        ("NGRAM", 1, None, "fa3", 16),
        ("EAGLE", 10, 4, "flashmla", 1),
        ("EAGLE", 10, 4, "fa3", 16),
        ("EAGLE", 10, 4, None, 16),
        ("EAGLE", 10, 1, "flashmla", 16),
        ("EAGLE3", 10, None, "flashmla", 16),
    ],
)
def test_the_default_yields_where_trees_of_drafts_need_pages_of_a_token(
    algorithm: str, breadth: int, top_k: int | None, backend: str | None, page_size: int
) -> None:
    view = SimpleNamespace(
        enable_flexkv=True,
        chunked_prefill_size=8192,
        uses_mamba_radix_cache=False,
        attention_backend=backend,
        speculative_algorithm=algorithm,
        speculative_ngram_max_bfs_breadth=breadth,
        speculative_eagle_topk=top_k,
    )
    assert hooks.around_page_size_default(lambda _: {"page_size": 1}, view) == {"page_size": page_size}


@pytest.mark.parametrize(
    ("strategy", "interval", "page_size"),
    [("no_buffer", 256, 1), ("extra_buffer", 256, 16), ("extra_buffer", 24, 8)],
)
def test_the_default_goes_with_where_states_are_kept(strategy: str, interval: int, page_size: int) -> None:
    view = SimpleNamespace(
        **{**NO_DRAFTS, "uses_mamba_radix_cache": True},
        enable_flexkv=True,
        chunked_prefill_size=8192,
        mamba_radix_cache_strategy=strategy,
        mamba_track_interval=interval,
    )
    assert hooks.around_page_size_default(lambda _: {"page_size": 1}, view) == {"page_size": page_size}


def test_name_of_the_storage_backend(flag: Callable[[bool], None]) -> None:
    flag(False)
    req = SimpleNamespace()
    requests.report_sources(req, {"SSD": 32, "redis": 64})

    def named(storage: int) -> str:
        details = {"device": 0, "host": 0, "storage": storage, "storage_backend": "none"}
        told = hooks.around_cached_tokens_details(lambda streamer, req: details, object(), req)
        assert told is details
        return str(details["storage_backend"])

    assert named(96) == "none"
    flag(True)
    assert named(96) == "FlexKV: SSD 32, redis 64"
    assert named(95) == "FlexKV: SSD, redis"  # it has not used all
    assert named(0) == "FlexKV"
    requests.report_sources(req, {"SSD": 96})
    assert named(96) == "FlexKV: SSD"
    for details in (None, {"device": 1, "host": 0}):  # nothing to name
        assert hooks.around_cached_tokens_details(lambda *_, told=details: told, object(), req) is details


# ---- the hooks on SGLang's weight updater ----


class Updater:
    """SGLang's own weight updater with our hooks on it, over a worker and a cache that note the order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: tuple[bool, str] | Exception) -> None:
        import torch
        from sglang.srt.managers.scheduler_components import weight_updater
        from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

        cls = weight_updater.SchedulerWeightUpdaterManager
        for patch in PATCHES:
            owner, _, name = patch.target.rpartition(".")
            if owner.endswith(f".{cls.__name__}"):
                monkeypatch.setattr(cls, name, _wrap_fn(getattr(cls, name), patch.hook, HookType(patch.kind)))
        monkeypatch.setattr(torch.distributed, "barrier", lambda **_: None)
        self.log: list[str] = []
        self.manager = cls.__new__(cls)
        self.manager.scheduler = SimpleNamespace(
            tree_cache=SimpleNamespace(weights_changed=lambda: self.log.append("told")),
            record_weight_version_change=lambda **_: None,
        )
        runner = SimpleNamespace(weight_updater=self, check_weights=self._note("check"))
        self.manager.tp_worker = SimpleNamespace(
            model_runner=runner,
            weight_update_runners=lambda: [("target", runner)],
            deserialize_own_rank=lambda tensors: tensors,
        )
        self.manager.draft_worker = self.manager.metrics_collector = None
        self.manager.tp_cpu_group = self.manager._session = None
        self.manager.flush_cache = self._note("flush", True)
        self.update_weights_from_disk = self._note("write", outcome)
        self.update_weights_from_ipc = self._note("write", outcome)
        self.update_weights_from_tensor = self._note("write", outcome)
        self.receive_weights_from_distributed = lambda **_: []
        self.load_weights_from_distributed = self._note("write", outcome)
        self.begin_weight_update = self._note("begin")
        self.end_weight_update = self._note("end")

    def _note(self, what: str, outcome: object = None) -> Callable[..., Any]:
        def call(*_: object, **__: object) -> object:
            self.log.append(what)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return call

    def call(self, method: str, **fields: Any) -> None:
        getattr(self.manager, method)(mock.MagicMock(selector="all", **fields))


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("outcome", [(True, ""), (False, "half done"), RuntimeError("half done")], ids=str)
@pytest.mark.parametrize("source", ["disk", "ipc", "tensor", "distributed"])
def test_the_cache_learns_of_new_weights_before_they_come(
    source: str,
    outcome: tuple[bool, str] | Exception,
    flush: bool,
    flag: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updater = Updater(monkeypatch, outcome)
    for enabled in (False, True):
        flag(enabled)
        updater.manager._session = None
        if source in ("tensor", "distributed"):
            updater.call("begin_weight_update")
        updater.log.clear()
        with contextlib.suppress(RuntimeError):
            updater.call(f"update_weights_from_{source}", flush_cache=flush)
        flushed = ["flush"] if flush and outcome == (True, "") else []
        assert updater.log == [*(["told"] if enabled else []), "write", *flushed]


def test_the_cache_learns_of_weights_that_a_trainer_writes(
    flag: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = Updater(monkeypatch, (True, ""))
    for enabled in (False, True):
        flag(enabled)
        updater.log.clear()
        updater.call("begin_weight_update")
        updater.call("end_weight_update")
        assert updater.log == [*(["told"] if enabled else []), "begin", "end"]


@pytest.mark.parametrize("action", ["checksum", "snapshot", "compare", "reset_tensors"])
def test_only_a_reset_of_the_weights_matters(
    action: str, flag: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = Updater(monkeypatch, (True, ""))
    monkeypatch.setattr(
        "sglang.srt.managers.scheduler_components.weight_updater._merge_checksum_payloads", lambda _: None
    )
    monkeypatch.setattr("torch.distributed.get_world_size", lambda **_: 1)
    for enabled in (False, True):
        flag(enabled)
        updater.log.clear()
        updater.call("check_weights", action=action)
        assert updater.log == [*(["told"] if enabled and action == "reset_tensors" else []), "check"]


@pytest.mark.parametrize(
    ("saver", "backup", "tags", "lost"),
    [
        (True, False, None, True),
        (True, False, [], True),
        (True, False, ["weights"], True),
        (True, False, ["kv_cache", "cuda_graph"], False),
        (True, True, ["weights"], False),
        (False, False, ["weights"], False),  # nothing was released
    ],
)
def test_weights_that_come_back_without_their_contents(
    saver: bool,
    backup: bool,
    tags: list[str] | None,
    lost: bool,
    flag: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = SimpleNamespace(enable_memory_saver=saver, enable_weights_cpu_backup=backup)
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: SimpleNamespace(features=features))
    updater = Updater(monkeypatch, (True, ""))
    for enabled in (False, True):
        flag(enabled)
        updater.log.clear()
        hooks.before_resume_memory(updater.manager, SimpleNamespace(tags=tags))
        assert updater.log == (["told"] if enabled and lost else [])


def test_every_way_to_change_the_weights_is_known() -> None:
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    # In it or before it a hook tells the cache; or it changes nothing.
    told = {
        "update_weights_from_disk",
        "update_weights_from_distributed",
        "update_weights_from_tensor",
        "update_weights_from_ipc",
        "begin_weight_update",
        "end_weight_update",
        "resume_memory_occupation",
        "check_weights",
    }
    harmless = {
        "flush_cache_after_weight_update",
        "record_weight_version_after_update",
        "init_weights_update_group",
        "destroy_weights_update_group",
        "get_weights_by_name",
        "release_memory_occupation",
        "save_remote_model",
        "save_sharded_model",
    }
    methods = inspect.getmembers(SchedulerWeightUpdaterManager, inspect.isfunction)
    assert {name for name, _ in methods if not name.startswith("_")} == told | harmless


@pytest.mark.parametrize("missing", PATCHES, ids=lambda patch: patch.name)
def test_a_patch_that_was_not_applied_is_named(
    missing: Patch, flag: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", {patch.target for patch in PATCHES} - {missing.target})
    flag(True)
    monkeypatch.setattr(hooking, "_registered", list(PATCHES))
    monkeypatch.setattr(hooking, "check_applied", CHECK_APPLIED)
    for call in (
        lambda: hooks.around_scheduler_init(lambda *_: None, SimpleNamespace()),
        lambda: hooks.after_create_tree_cache("cache", "ctx"),
    ):
        with pytest.raises(IncompatibleError, match=rf"did not apply the patches {missing.name};.*Install"):
            call()


def test_all_patches_applied_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", {patch.target for patch in PATCHES})
    monkeypatch.setattr(hooking, "_registered", list(PATCHES))
    hooking.check_applied()


# ---- the pages ----


def pages() -> dict[str, str]:
    """Text of each page by the name in its file name."""
    found = {}
    for path in PAGES.glob("[0-9]*.md"):
        number, _, name = path.stem.partition("-")
        assert re.fullmatch(r"\d{4}", number), path.name
        found[name] = path.read_text()
    return found


def field(page: str, name: str) -> str:
    (value,) = re.findall(rf"^\| {name} \| (.*) \|$", page, re.MULTILINE)
    return str(value).replace("`", "")


def test_every_patch_has_a_page_and_every_page_a_patch() -> None:
    numbered = sorted(path.stem for path in PAGES.glob("[0-9]*.md"))
    assert numbered == [f"{number:04d}-{patch.name}" for number, patch in enumerate(PATCHES, 1)]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_a_page_says_what_the_table_says(patch: Patch) -> None:
    page = pages()[patch.name]
    assert page.startswith(f"# {patch.name}\n")
    assert field(page, "Target") == patch.target
    assert field(page, "Parameters") == ", ".join(patch.parameters)
    assert field(page, "Kind") == patch.kind
    assert field(page, "Hook") == f"{patch.hook.__module__}.{patch.hook.__name__}"
    assert field(page, "SGLang") == ", ".join(SUPPORTED_SGLANG)
    sections = {
        title: " ".join(body.split()) for title, body in re.findall(r"## (.*)\n\n((?:(?!## ).*\n?)*)", page)
    }
    assert sections["Why"] == patch.reason
    assert sections["When it can go"] == patch.remove_when
    assert len(sections["What it changes"]) > 100
    for path in re.findall(r"`(tests/[\w/.]+)`", sections["How it is tested"]):
        assert (ROOT / path).exists(), path


def test_the_overview_lists_every_page() -> None:
    overview = (PAGES / "README.md").read_text()
    listed = re.findall(r"^\| \d+ \| \[([\w-]+)\]\(([\w.-]+)\)", overview, re.MULTILINE)
    expected = [(patch.name, f"{number:04d}-{patch.name}.md") for number, patch in enumerate(PATCHES, 1)]
    assert listed == expected
