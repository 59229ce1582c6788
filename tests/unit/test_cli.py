"""The command `sglang-flexkv`, and the monkey-patch it installs, in interpreters of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections import namedtuple
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import sglang_flexkv
from sglang_flexkv import _core, cli
from sglang_flexkv.integration import checks, diagnosis, startup
from sglang_flexkv.integration.compat import hooking, version
from sglang_flexkv.integration.compat.patches import PATCHES

runner = CliRunner()
PATCH_FILES = ["_sglang_flexkv_startup.py", "sglang_flexkv_startup.pth"]


def run(*arguments: str) -> Result:
    result = runner.invoke(cli.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory in place of this interpreter's site-packages."""
    directory = tmp_path / "site-packages"
    directory.mkdir()
    monkeypatch.setattr(startup, "site_packages", lambda: directory)
    return directory


@pytest.fixture
def no_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")


# ---- status ----


def test_status_of_a_machine_where_all_is_well(site: Path) -> None:
    result = run("status")
    assert result.exit_code == 0, result.output
    for part in (
        "Python",
        f"all {len(PATCHES)} fit",
        "compiled core",
        f"{version.installed_sglang()} (",
        "SGLang sees it",
        "not installed",
        "--enable-flexkv works here.",
    ):
        assert part in result.output


def test_status_of_an_excluded_plugin(site: Path, no_entry_point: None) -> None:
    result = run("status")
    assert result.exit_code == 1
    assert (
        "SGLANG_PLUGINS=other, another leaves out 'flexkv'. To do: run 'sglang-flexkv install'"
        in result.output
    )
    startup.install(site)
    result = run("status")
    assert result.exit_code == 0, result.output


def test_status_without_our_metadata(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    result = run("status")
    assert result.exit_code == 1
    assert "no installed package brings the entry point" in result.output


def test_status_of_another_sglang(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0.5.12")
    result = run("status")
    assert result.exit_code == 1
    assert "supports SGLang 0.5.22, 0.5.23, not 0.5.12. To do: pip install sglang==0.5.23" in result.output


def test_status_of_no_sglang(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(version.importlib.util, "find_spec", lambda _: None)
    result = run("status")
    assert result.exit_code == 1
    assert "SGLang is not installed in this environment. To do: pip install sglang==" in result.output


@pytest.fixture
def changed_target(monkeypatch: pytest.MonkeyPatch) -> str:
    """A patch whose target takes something else than it was written for."""
    changed = replace(PATCHES[2], parameters=("ctx", "new"))
    monkeypatch.setattr("sglang_flexkv.integration.compat.patches.PATCHES", (*PATCHES[:2], changed))
    return "create_tree_cache takes (ctx), expected (ctx, new). To do: install an unmodified SGLang"


def test_status_of_a_changed_target(site: Path, changed_target: str) -> None:
    result = run("status")
    assert result.exit_code == 1
    assert changed_target in result.output


def test_status_of_a_target_whose_module_cannot_be_imported(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(patch: object) -> None:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(hooking, "problem_with", fail)
    result = run("status")
    assert result.exit_code == 1
    assert "cannot be imported (RuntimeError: no GPU)" in result.output


def test_status_without_the_core(site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "_PARENT", tmp_path)
    monkeypatch.delattr(sglang_flexkv, "_core")
    monkeypatch.setitem(sys.modules, "sglang_flexkv._core", None)
    result = run("status")
    assert result.exit_code == 1
    assert "the compiled core of sglang-flexkv cannot be loaded" in result.output
    assert "To do: build it for this interpreter with pip install" in result.output


def test_status_of_an_old_interpreter(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor micro")(3, 10, 4)
    monkeypatch.setattr(diagnosis.sys, "version_info", version)
    (found,) = diagnosis.prerequisites()
    monkeypatch.undo()
    assert found == ("interpreter", diagnosis.Level.PROBLEM, "Python 3.10.4", found.remedy)
    assert "Python 3.11 or newer" in found.remedy


# A seccomp filter as container runtimes have it: io_uring_setup (425) fails with EPERM.
REFUSE_IO_URING = """
    import ctypes, struct
    refuse, allow = 0x00050001, 0x7FFF0000
    code = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 425, 6, 0, 0, refuse, 6, 0, 0, allow)
    program = struct.pack("HxxxxxxP", 4, ctypes.addressof(keep := ctypes.create_string_buffer(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0
    from sglang_flexkv.integration.diagnosis import _core
    for finding in _core():
        print(*finding)
"""


def test_status_says_why_io_uring_is_not_used() -> None:
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REFUSE_IO_URING)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "SSD I/O Level.NOTE threads: the kernel refuses io_uring: Operation not permitted" in out
    assert "seccomp" in out


# ---- install and uninstall ----


def test_nothing_is_installed_where_the_entry_point_works(site: Path) -> None:
    result = run("install")
    assert result.exit_code == 0
    assert "SGLang sees the entry point of sglang-flexkv: nothing needs to be installed." in result.output
    assert files(site) == []


def test_install_and_uninstall(site: Path, no_entry_point: None) -> None:
    (site / "other.pth").write_text("import sys")
    result = run("install")
    assert result.exit_code == 0, result.output
    assert files(site) == [*PATCH_FILES[:1], "other.pth", *PATCH_FILES[1:]]
    for name in PATCH_FILES:
        assert f"wrote {site / name}" in result.output
    before = {path: path.stat().st_mtime_ns for path in site.iterdir()}
    assert "is installed already" in run("install").output
    assert {path: path.stat().st_mtime_ns for path in site.iterdir()} == before
    # What Python compiles from the module goes, too.
    pyc = Path(importlib.util.cache_from_source(str(site / PATCH_FILES[0])))
    pyc.parent.mkdir()
    pyc.touch()
    result = run("uninstall")
    assert result.exit_code == 0
    assert files(site) == ["other.pth"]
    result = run("uninstall")
    assert result.exit_code == 0
    assert "is not installed" in result.output


def test_force_installs_where_nothing_is_needed(site: Path) -> None:
    assert run("install", "--force").exit_code == 0
    assert files(site) == PATCH_FILES
    status = run("status")
    assert status.exit_code == 0
    assert startup.state(site) is startup.PatchState.CURRENT


def test_an_older_one_is_renewed(site: Path, no_entry_point: None) -> None:
    startup.install(site)
    (site / PATCH_FILES[0]).write_text("# of another version")
    assert startup.state(site) is startup.PatchState.OUTDATED
    assert run("status").exit_code == 1
    assert run("install").exit_code == 0
    assert startup.state(site) is startup.PatchState.CURRENT


def test_install_refuses_an_sglang_that_does_not_fit(
    site: Path, no_entry_point: None, changed_target: str
) -> None:
    for arguments in (["install"], ["install", "--force"]):
        result = run(*arguments)
        assert result.exit_code == 1
        assert changed_target in result.output
        assert "Nothing was installed." in result.output
        assert files(site) == []


def test_a_site_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(startup, "site_packages", lambda: file)
    result = run("install", "--force")
    assert result.exit_code == 1
    assert f"cannot write {file}/_sglang_flexkv_startup.py: Not a directory" in result.output
    assert "virtual environment" in result.output


# ---- in real interpreters ----


class Interpreter:
    """A virtual environment with everything of this one but sglang-flexkv, which comes as a checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.python = root / "venv" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = root / "venv" / "lib" / version / "site-packages"
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if "sglang_flexkv" not in path.name and path.name != "__pycache__":
                (self.site / path.name).symlink_to(path)
        self.checkout = root / "checkout"
        package = self.checkout / "sglang_flexkv"
        shutil.copytree(Path(sglang_flexkv.__file__).parent, package)
        shutil.copy(_core.__file__, package)

    def run(
        self, *arguments: str, path: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), *arguments],
            cwd=self.root,  # -c and -m look for modules there first
            env=plain | ({"PYTHONPATH": str(path)} if path else {}) | (env or {}),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """With the monkey-patch, installed by the command in the checkout."""
    interpreter = Interpreter(tmp_path_factory.mktemp("interpreter"))
    done = interpreter.run("-m", "sglang_flexkv.cli", "install", path=interpreter.checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is in effect for every process" in done.stdout
    for name in PATCH_FILES:
        assert (interpreter.site / name).is_file()
    return interpreter


COUNT_HOOKS = """
import json, logging, multiprocessing, sys
import sglang.srt.managers.scheduler  # what takes long, for both processes

def count(begin=None):
    if begin:
        begin.wait()
        sys.path.append(sys.argv[1])
    logging.basicConfig(level="INFO", stream=sys.stdout, force=True)
    from sglang.srt.plugins import load_plugins
    load_plugins()
    load_plugins()
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang_flexkv.integration.compat.hooking import check_applied
    from sglang_flexkv.integration.compat.patches import PATCHES
    check_applied()
    print(json.dumps({patch.name: len(HookRegistry._hooks[patch.target]) for patch in PATCHES}), flush=True)

context = multiprocessing.get_context("fork")
begin = context.Event()
child = context.Process(target=count, args=(begin,))
child.start()
count()
begin.set()
child.join()
"""
BY_ENTRY_POINT = "Executed general plugin: flexkv"


def test_every_process_is_patched_once(interpreter: Interpreter, tmp_path: Path) -> None:
    """With the monkey-patch alone, and in a second process together with the entry point."""
    info = tmp_path / "metadata" / "sglang_flexkv-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-flexkv\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nflexkv = sglang_flexkv.integration.plugin:register\n"
    )
    program = tmp_path / "program.py"
    program.write_text(COUNT_HOOKS)
    one_thread = {"OPENBLAS_NUM_THREADS": "1"}  # before it forks itself
    done = interpreter.run(str(program), str(info.parent), path=interpreter.checkout, env=one_thread)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    alone, together = (at for at, line in enumerate(lines) if line.startswith("{"))
    once = {patch.name: 1 for patch in PATCHES}
    assert [json.loads(lines[at]) for at in (alone, together)] == [once, once]
    assert [at > alone for at, line in enumerate(lines) if BY_ENTRY_POINT in line] == [True]


MODULES = "import sys; print(*sorted(sys.modules))"


def test_an_interpreter_without_sglang_pays_nothing(interpreter: Interpreter) -> None:
    """It loads one module of its own, and nothing for that one's sake."""
    pth = interpreter.site / PATCH_FILES[1]
    patched = set(interpreter.run("-c", MODULES).stdout.split())
    hidden = pth.rename(pth.with_suffix(".off"))
    try:
        plain = set(interpreter.run("-c", MODULES).stdout.split())
    finally:
        hidden.rename(pth)
    assert patched - plain == {"_sglang_flexkv_startup"}


# Just enough of SGLang to be hooked, which starts in no time.
FAKE_PLUGINS = """
def load_plugins():
    print("stock")
"""


@pytest.fixture
def fake_sglang(tmp_path: Path) -> Path:
    package = tmp_path / "fake" / "sglang" / "srt" / "plugins"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_PLUGINS)
    for directory in (package.parent, package.parent.parent):
        (directory / "__init__.py").touch()
    return tmp_path / "fake"


LOAD = "from sglang.srt.plugins import load_plugins; load_plugins()"


def test_a_package_that_is_gone_breaks_nothing(interpreter: Interpreter, fake_sglang: Path) -> None:
    done = interpreter.run("-c", "print('fine')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")
    hide = {"PYTHONPATH": str(fake_sglang)}
    (interpreter.site / "sglang").rename(interpreter.site / "sglang.off")
    try:
        plain = interpreter.run("-c", LOAD, env=hide)
        asked = interpreter.run("-c", LOAD, "--enable-flexkv", env=hide)
    finally:
        (interpreter.site / "sglang.off").rename(interpreter.site / "sglang")
    assert (plain.returncode, plain.stdout) == (0, "stock\n")
    assert asked.returncode == 1
    assert asked.stdout == "", "another cache would have been built"
    for text in (plain.stderr, asked.stderr):
        assert text.startswith("sglang-flexkv cannot start: its monkey-patch ")
        assert "No module named 'sglang_flexkv'" in text
        assert "delete that file and sglang_flexkv_startup.pth beside it" in text


def test_a_module_that_is_gone_breaks_nothing(interpreter: Interpreter) -> None:
    module = interpreter.site / PATCH_FILES[0]
    hidden = module.rename(module.with_suffix(".off"))
    try:
        done = interpreter.run("-c", "print('fine')")
    finally:
        hidden.rename(module)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_uninstall_leaves_the_interpreter_as_it_was(interpreter: Interpreter) -> None:
    """The last test here: it takes the monkey-patch away."""
    done = interpreter.run("-m", "sglang_flexkv.cli", "uninstall", path=interpreter.checkout)
    assert done.returncode == 0, done.stderr
    left = [path.name for path in interpreter.site.iterdir() if "flexkv" in path.name]
    compiled = interpreter.site / "__pycache__"
    left += [path.name for path in compiled.glob("*flexkv*")] if compiled.exists() else []
    assert left == []
