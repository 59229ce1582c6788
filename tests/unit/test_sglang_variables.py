"""Every environment variable of SGLang has been judged: whether another value of it can change KV."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from sglang_flexkv.integration.compat import version
from sglang_flexkv.integration.compat.arguments import variables

sglang = pytest.importorskip("sglang")

# In the text of SGLang's documentation only.
NOT_VARIABLES = {"SGLANG_OLD_NAME", "SGLANG_"}
TABLES = ("sglang_variables.txt", "sglang_variables_0_5_22.txt")
CHANGED = "judge it by where SGLang reads it, and write it into integration/compat/sglang_variables.txt"


def declared() -> set[str]:
    from sglang.srt.environ import EnvField, envs

    return {name for name, field in vars(type(envs)).items() if isinstance(field, EnvField)}


def read_directly() -> set[str]:
    """Names that stand as strings in SGLang's source."""
    name = re.compile(rb"""["'](SGLANG_[A-Z0-9_]+)["']""")
    found: set[str] = set()
    for path in Path(sglang.__file__).parent.rglob("*"):
        if path.suffix in {".py", ".cuh", ".h", ".rs"}:
            found |= {match.decode() for match in name.findall(path.read_bytes())}
    return found - NOT_VARIABLES


def test_every_variable_of_sglang_is_judged_and_no_other() -> None:
    there = declared() | read_directly()
    of_newest, of_older = (set(variables([name])) for name in TABLES)
    assert len(declared()) > 650
    assert there - of_newest - of_older == set(), f"new in SGLang: {CHANGED}"
    assert of_newest & of_older == set(), "judged twice"
    older = version.is_0_5_22()
    assert (of_older if older else of_newest) - there == set(), (
        f"gone from SGLang: remove them from integration/compat/{TABLES[older]}"
    )


def test_the_table_can_be_read() -> None:
    room = resources.files("sglang_flexkv.integration.compat")
    texts = [room.joinpath(name).read_text() for name in TABLES]
    lines = [line for text in texts for line in text.splitlines() if line and line[0] not in "#["]
    assert all(re.fullmatch(r"(yes|no ) [A-Za-z0-9_]+", line) for line in lines)
    assert len({line.split()[1] for line in lines}) == len(lines), "a variable is judged twice"


@pytest.mark.parametrize(
    ("name", "changes_kv"),
    [
        ("SGLANG_ZMQ_SOURCE_IP", False),
        ("SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION", False),
        ("SGLANG_HOST_IP", False),
        ("SGLANG_CPU_OMP_THREADS_BIND", False),
        ("EXA_API_KEY", False),
        ("SGLANG_USE_MODELSCOPE", True),
        ("SGLANG_ROPE_CACHE_FP32", True),
        ("SGLANG_AITER_FP8_PREFILL_ATTN", True),
        ("FLASHINFER_NVFP4_4OVER6", True),
    ],
)
def test_some_of_them(name: str, changes_kv: bool) -> None:
    assert variables()[name] is changes_kv


def test_no_secret_of_sglang_counts() -> None:
    from sglang.srt.environ import EnvField, envs

    fields = [field for field in vars(type(envs)).values() if isinstance(field, EnvField)]
    assert [field.name for field in fields if field.secret and variables()[field.name]] == []
