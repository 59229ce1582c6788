"""The stub of the compiled core says what the compiled core has, no more and no less."""

from __future__ import annotations

import ast
from pathlib import Path

from sglang_flexkv import _core

STUB = Path(__file__).parents[2] / "sglang_flexkv" / "_core.pyi"
_PYBIND_ENUM = {"name", "value"}


def public_names(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_the_stub_and_the_module_agree() -> None:
    stub: dict[str, set[str]] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef):
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            members |= {t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets}
            inherited = (stub.get(base.id, set()) for base in node.bases if isinstance(base, ast.Name))
            stub[node.name] = {m for m in members if not m.startswith("_")}.union(*inherited)
        elif isinstance(node, ast.FunctionDef):
            stub[node.name] = set()
        elif isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            stub[node.target.id] = set()
    assert set(stub) == public_names(_core)
    for name, members in stub.items():
        thing = getattr(_core, name)
        if isinstance(thing, type) and not issubclass(thing, Exception):
            assert members == public_names(thing) - _PYBIND_ENUM, name
