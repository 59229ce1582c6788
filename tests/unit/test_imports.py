"""The package's layers: an import may only point down, and few modules may reach outside."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_flexkv

PACKAGE = Path(sglang_flexkv.__file__).parent

# From the bottom. Modules of one layer may import each other if they are of the same part.
LAYERS = (
    ("_core",),
    ("common",),
    ("storage",),
    ("cache", "transfer"),
    ("tierlife",),
    ("kvtask", "replay"),
    ("kvmanager",),
    ("integration",),
    ("cli_output",),
    ("cli_replay",),
    ("cli",),
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
# The package itself is the library's face: it re-exports kvmanager and what is below it.
HEIGHT["sglang_flexkv"] = HEIGHT["kvmanager"]

# Reads of files and of the environment that are no settings; everything else belongs into common/config.py.
OPENS_FILES = {
    "common/config.py": "the configuration file, the container's memory limit",
    "integration/compat/arguments.py": "the table of variables",
    "integration/file_contents.py": "what a model's own files hold, as digests, and a note of these",
    "integration/model_identity.py": "what a model's own files hold, as digests",
    "integration/startup.py": "the monkey-patch it compares and writes",
    "storage/ssd_identity.py": "the fields of an identity beside the SSD tier's files",
    "storage/remote/s3.py": "AWS's credentials, the certificates of a CA",
    "replay/planner.py": "a model's config.json, for the size of its KV",
}


ROOM = "integration/compat/"

parse = functools.cache(ast.parse)  # each module is looked at many times


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if relative.name == "__init__.py" and len(relative.parts) == 1:
        return "sglang_flexkv"
    return relative.parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what is imported anywhere in a module, inside functions, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow points"
            # `from sglang_flexkv import _core` imports a module; of others the last part may be a name in it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(path: Path, source: str) -> list[str]:
    """What is wrong with a module's imports of this package."""
    mine = part_of(path)
    wrong = []
    for imported in imports(parse(source)):
        top, *rest = imported.split(".")
        if top != "sglang_flexkv":
            continue
        # Its version is all that lower modules may take from the package itself.
        part = rest[0] if rest and rest[0] in HEIGHT else "sglang_flexkv"
        if imported == "sglang_flexkv.__version__" or part == mine:
            continue
        if HEIGHT[part] >= HEIGHT[mine] and mine != "sglang_flexkv":
            wrong.append(f"{name_of(path)} ({mine}) imports {imported} ({part})")
        if mine == "sglang_flexkv" and HEIGHT[part] > HEIGHT[mine]:
            wrong.append(f"{name_of(path)} imports {imported}")
    return wrong


def calls(tree: ast.AST, names: set[str]) -> set[str]:
    """Which of ``names`` are called, as functions or methods, or used as attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.add(node.attr)
        elif isinstance(node, ast.Name) and node.id in names:
            found.add(node.id)
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_belongs_to_a_layer(path: Path) -> None:
    assert part_of(path) in HEIGHT, f"{name_of(path)} has no layer: give it one in {Path(__file__).name}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    assert arrows(path, path.read_text()) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_one_room_knows_sglang(path: Path) -> None:
    """What depends on SGLang's version is in it, so that another version can stand beside this one."""
    known = any(name.split(".")[0] == "sglang" for name in imports(parse(path.read_text())))
    assert not known or name_of(path).startswith(ROOM)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_one_file_says_what_the_ranks_agree_on(path: Path) -> None:
    used = calls(parse(path.read_text()), {"ReduceOp", "all_reduce", "broadcast", "all_gather"})
    assert not used or name_of(path) == "integration/ranks.py"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_configuration_reads_the_environment(path: Path) -> None:
    used = calls(parse(path.read_text()), {"environ", "getenv", "environb"})
    assert not used or name_of(path) == "common/config.py"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_known_modules_open_files(path: Path) -> None:
    tree = parse(path.read_text())
    used = calls(tree, {"read_text", "read_bytes", "safe_load"})
    used |= {
        "open"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    }
    assert not used or name_of(path) in OPENS_FILES


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_the_command_line_is_read_by_the_plugin_only(path: Path) -> None:
    """``sys.argv`` is SGLang's: it tells whether the flag was given before SGLang can say so."""
    used = calls(parse(path.read_text()), {"argv"})
    assert not used or part_of(path) == "integration"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("common/block.py", "from sglang_flexkv.storage import ssd_store"),
        ("storage/ssd_store.py", "from sglang_flexkv.transfer.transfer_engine import TransferEngine"),
        ("cache/cache_engine.py", "import sglang_flexkv.transfer.transfer_engine"),
        ("transfer/transfer_engine.py", "from sglang_flexkv.cache import cache_engine"),
        ("kvtask.py", "from sglang_flexkv.kvmanager import KVManager"),
        ("replay/simulator.py", "from sglang_flexkv.kvtask import KVTaskEngine"),
        ("cache/cache_engine.py", "from sglang_flexkv.replay import trace"),
        ("kvtask.py", "from sglang_flexkv import KVManager"),
        ("kvmanager.py", "def f():\n    from sglang_flexkv.integration.compat import hooks"),
        ("integration/compat/hooks.py", "from sglang_flexkv import cli"),
        ("__init__.py", "from sglang_flexkv.integration.compat import hooks"),
    ],
)
def test_an_arrow_that_points_up_is_found(module: str, line: str) -> None:
    assert arrows(PACKAGE / module, line)


# ---- what SGLang calls private ----


def private_names(source: str) -> list[str]:
    """Attributes with a leading underscore of anything but ``self`` and ``cls``, and private names that are
    imported."""
    found = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Attribute) and re.fullmatch("_[^_].*", node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
            found += [f"line {node.lineno}: {a.name}" for a in node.names if a.name.startswith("_")]
    return found


def outside_the_room() -> list[Path]:
    return [path for path in modules() if name_of(path).startswith("integration/") and ROOM not in str(path)]


@pytest.mark.parametrize("path", outside_the_room(), ids=name_of)
def test_nothing_private_of_others_is_used(path: Path) -> None:
    allowed = ("torch._C._cuda_getCurrentRawStream", "torch._C")
    assert [use for use in private_names(path.read_text()) if not use.endswith(allowed)] == []


def test_our_classes_neither_override_nor_use_what_is_private_in_those_of_sglang() -> None:
    """Through ``self`` as well: only the classes of the room do, on which ours are built."""
    pytest.importorskip("sglang")
    from sglang_flexkv.integration import linker, radix_cache

    for module in (linker, radix_cache):
        tree = parse(Path(module.__file__).read_text())
        for definition in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            ours = getattr(module, definition.name)
            inherited = {
                name
                for base in ours.__mro__
                if base.__module__.startswith("sglang.")
                for name in (*vars(base), *vars_set_in(base))
                if re.fullmatch("_[^_].*", name)
            }
            used = {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute)}
            used |= {node.name for node in ast.walk(definition) if isinstance(node, ast.FunctionDef)}
            assert used & inherited == set(), definition.name


def vars_set_in(base: type) -> set[str]:
    """Attributes that a class gives its objects."""
    tree = parse(textwrap.dedent(inspect.getsource(base)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


@pytest.mark.parametrize(
    "line",
    [
        "scheduler._engine_paused",
        "self.cache._reduce(x)",
        "from sglang.srt.mem_cache.x import _PendingOffload",
    ],
)
def test_what_is_private_is_found(line: str) -> None:
    assert private_names(line)


# ---- no circles ----


def dependencies() -> dict[str, set[str]]:
    """Of each module the modules of this package that it imports, inside functions, too."""
    paths = {
        f"sglang_flexkv.{name_of(path)}".removesuffix(".py").replace("/", "."): path for path in modules()
    }
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        wanted = set(imports(parse(path.read_text())))
        # `from module import name` is an import of the module; what names packages only is none of a module.
        found[name] = ({w for w in wanted} | {w.rpartition(".")[0] for w in wanted}) & set(paths) - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if none do."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    for name in graph:
        if found := walk(name, []):
            return found
    return []


def test_no_module_imports_itself_through_others() -> None:
    assert circle(dependencies()) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


# ---- one door to the engine ----

REPOSITORY = Path(__file__).parents[2]


def doors_passed_by(source: str) -> list[str]:
    """Private attributes of a KVTaskEngine that a module uses. Whoever holds one calls it ``engine``."""
    found = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Attribute) and re.fullmatch("_[^_].*", node.attr):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            if name.strip("_") == "engine":
                found.append(f"line {node.lineno}: {name}.{node.attr}")
    return found


def users_of_the_engine() -> list[Path]:
    folders = ("sglang_flexkv", "tests", "benchmarks", "demo", "examples")
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path for path in paths if "KVTaskEngine" in (text := path.read_text()) or "engine." in text]


@pytest.mark.parametrize(
    "path", users_of_the_engine(), ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)
def test_nobody_passes_by_the_engines_door(path: Path) -> None:
    assert doors_passed_by(path.read_text()) == []


def test_behind_the_door_everything_is_private() -> None:
    """What the engine is made of has no name that others could use, by whatever variable they hold it."""
    tree = parse((PACKAGE / "kvtask.py").read_text())
    (engine,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "KVTaskEngine")
    public = {
        node.attr
        for node in ast.walk(engine)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        and not node.attr.startswith("_")
    }
    assert public == {"config"}


@pytest.mark.parametrize("line", ["rig.engine._cache.index", "engine._transfer", "self._engine._tasks"])
def test_a_door_that_is_passed_by_is_found(line: str) -> None:
    assert doors_passed_by(line)


def test_the_patches_load_without_the_compiled_core() -> None:
    """Only so can a core that does not load be reported in our own words."""
    code = (
        "import sys, sglang_flexkv.integration.compat.patches; sys.exit('sglang_flexkv._core' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trace_is_replayed_without_torch() -> None:
    """It takes more memory than a trace of millions of blocks, and longer to import than most to replay."""
    code = (
        "import sys, sglang_flexkv.cli_replay, sglang_flexkv.replay.comparison; "
        "import sglang_flexkv.replay.planner; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
