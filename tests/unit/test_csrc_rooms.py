"""Rooms of the C++ core: an include points to a room below, and no files include each other in a circle."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import sglang_flexkv_testing

from sglang_flexkv import _core

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# What each room may include, besides itself. What is not shipped is `testing`, and nobody includes it.
BELOW: dict[str, set[str]] = {
    "base": set(),
    "index": {"base"},
    "cuda": {"base"},
    "memory": {"base", "cuda"},
    "copy": {"base", "cuda", "memory"},
    "tier": {"base", "memory"},
    "ssd": {"base", "memory", "tier"},
    "remote": {"base", "memory", "tier"},
    "transfer": {"base", "cuda", "memory", "copy", "tier"},
    "bindings": {"base", "index", "cuda", "memory", "copy", "tier", "ssd", "remote", "transfer"},
    "testing": {"base", "index", "cuda", "memory", "copy", "tier", "ssd", "remote", "transfer"},
}


def sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".hpp", ".cu", ".inc"})


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def includes(source: str) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include\s*"([^"]+)"', source, re.MULTILINE)


def wrong_arrows(name: str, source: str) -> list[str]:
    """What is wrong with the includes of the file of this name."""
    room = name.split("/", maxsplit=1)[0]
    wrong = []
    for included in includes(source):
        if not (CSRC / included).is_file():
            wrong.append(f"{name} includes {included}: a file is named by its room, as seen from csrc/")
        elif included.split("/")[0] not in BELOW[room] | {room}:
            wrong.append(f"{name} includes {included}, which is not below {room}/")
    return wrong


def unit_of(name: str) -> str:
    """A header and its source are one thing."""
    return name.rsplit(".", 1)[0]


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A way that comes back to where it began; empty if there is none."""
    done: set[str] = set()

    def walk(way: list[str]) -> list[str]:
        here = way[-1]
        for there in sorted(arrows.get(here, ())):
            if there in way:
                return [*way[way.index(there) :], there]
            if there not in done and (found := walk([*way, there])):
                return found
        done.add(here)
        return []

    for start in sorted(arrows):
        if start not in done and (found := walk([start])):
            return found
    return []


def arrows_of(texts: dict[str, str]) -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = {}
    for name, text in texts.items():
        arrows.setdefault(unit_of(name), set()).update(
            unit for included in includes(text) if (unit := unit_of(included)) != unit_of(name)
        )
    return arrows


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_file_is_in_a_room_and_includes_only_what_is_below(path: Path) -> None:
    name = name_of(path)
    assert name.split("/")[0] in BELOW, f"{name} is in no room: give it one in {Path(__file__).name}"
    assert wrong_arrows(name, path.read_text()) == []


def test_the_rooms_themselves_are_in_no_circle() -> None:
    assert circle(BELOW) == []


def test_no_file_includes_itself_in_a_circle() -> None:
    assert circle(arrows_of({name_of(path): path.read_text() for path in sources()})) == []


@pytest.mark.parametrize(
    ("name", "included"),
    [
        ("base/types.hpp", "index/prefix_index.hpp"),
        ("index/prefix_index.cpp", "ssd/ssd_store.hpp"),
        ("cuda/cuda_stream.hpp", "copy/cuda_copier.hpp"),
        ("ssd/ssd_store.cpp", "transfer/transfer_engine.hpp"),
        ("ssd/ssd_store.cpp", "testing/fault_disk.hpp"),
        ("bindings/ssd.cpp", "testing/fault_disk.hpp"),
        ("index/eviction_policies.cpp", "bucket_queue.hpp"),
    ],
)
def test_an_include_that_points_up_is_found(name: str, included: str) -> None:
    assert wrong_arrows(name, f'#include <vector>\n#include "{included}"\n')


def test_a_circle_through_a_source_is_found() -> None:
    texts = {"ssd/a.hpp": "", "ssd/a.cpp": '#include "ssd/b.hpp"', "ssd/b.hpp": '#include "ssd/a.hpp"'}
    assert circle(arrows_of(texts)) == ["ssd/a", "ssd/b", "ssd/a"]


def test_users_get_no_disks_that_fail() -> None:
    """They are in a module of their own, which wheels are built without."""
    core = Path(_core.__file__)
    assert b"FaultyDisk" not in core.read_bytes()
    assert b"FaultyDisk" in Path(sglang_flexkv_testing.__file__).read_bytes()
    build = tomllib.loads((CSRC.parent / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert build["cmake"]["define"]["FLEXKV_TESTING"] == "OFF"
    assert [override["if"] for override in build["overrides"]] == [{"state": "editable"}]
