"""The map of the house: what docs/architecture.md says where to go to is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_ways_to_go_lead_somewhere() -> None:
    rows = [row for row in section("To change X, go to Y").splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 10
    named = [path for row in rows for path in re.findall(r"`([\w./-]+/[\w./-]*)`", row)]
    assert len(named) > len(rows)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_files_of_the_integration_are_those_that_are_there() -> None:
    folder = ROOT / "sglang_flexkv" / "integration"
    named = set(re.findall(r"`(\w+\.py)`", section("Under SGLang").split("*A verdict")[0]))
    there = {path.name for path in folder.rglob("*.py")} - {"__init__.py"}
    assert named == there
