"""LoRA adapters on a real server: each answers as it does without a cache, and finds its own KV alone, in
every tier and after a restart."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from answers import ASK, difference, rounding
from forked_server import ForkedServer
from server import KV_ITEM_BYTES, ServerStartError, SGLangServer
from slot_files import store_on_ssd
from workload import some_tokens

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny-gqa"
NEW_TOKENS = 6
PAGE = 16
# With the base model, two adapters of the launch and one that is loaded later 16 answers of about 350 tokens:
# several times what the device holds, and more than the CPU tier does.
DEVICE_TOKENS, CPU_TOKENS = 2048, 4000
RNG = random.Random(31)
PROMPTS = [some_tokens(RNG, length) for length in (300, 330, 370, 401)]
AT_LAUNCH = (None, "red", "green")

Key = tuple[str | None, int]  # an adapter's name, None for the base model, and the number of a prompt


def tokens_from(answer: dict[str, Any], where: str) -> int:
    return (answer["meta_info"].get("cached_tokens_details") or {}).get(where, 0)


def with_adapter(key: Key) -> dict[str, Any]:
    name, number = key
    return {"prompt": PROMPTS[number], **({} if name is None else {"lora_path": name})}


def test_adapters_have_kv_of_their_own(tmp_path: Path) -> None:
    adapters = {
        name: make_adapter(tmp_path / name, MODEL, seed)
        for seed, name in enumerate(("red", "green", "blue", "other blue"))
    }
    directory = tmp_path / "ssd"
    directory.mkdir()
    config = tmp_path / "flexkv.yaml"
    config.write_text(
        f"cpu_cache_gb: {CPU_TOKENS * 1024 * KV_ITEM_BYTES / 2**30}\n"
        f"ssd_cache_gb: 0.5\nssd_cache_dir: {directory}\nload_policy: load\n"
    )
    flags = {
        "enable-flexkv": True,
        "flexkv-config-file": str(config),
        "max-total-tokens": DEVICE_TOKENS,
        "page-size": PAGE,
        "enable-lora": True,
        "lora-paths": [f"{name}={adapters[name]}" for name in ("red", "green")],
        "lora-backend": "torch_native",
        "max-loras-per-batch": 2,  # fewer than there are: their weights come and go
        "log-level": "info",
    }
    apart = rounding(MODEL)

    def server(log: str) -> SGLangServer:
        return ForkedServer(MODEL, flags, log_path=tmp_path / log)

    def load(server: SGLangServer, source: str) -> None:
        given = {"lora_name": "blue", "lora_path": str(adapters[source])}
        server.request("POST", "/load_lora_adapter", json=given)

    def cold(server: SGLangServer, keys: list[Key]) -> dict[Key, dict[str, Any]]:
        answers = {
            key: store_on_ssd(server, max_new_tokens=NEW_TOKENS, **with_adapter(key), **ASK) for key in keys
        }
        for key, answer in answers.items():
            assert answer["meta_info"]["cached_tokens"] == 0, f"{key} was served KV of another adapter"
        return answers

    def check_again(server: SGLangServer, expected: dict[Key, dict[str, Any]]) -> Counter[str]:
        """All of them, in any order and four at a time. Returns the tokens by where they came from."""
        keys = list(expected)
        RNG.shuffle(keys)
        answers = server.generate_many([with_adapter(key) for key in keys], NEW_TOKENS, **ASK)
        for key, answer in zip(keys, answers, strict=True):
            assert (why := difference(answer, expected[key], apart)) is None, f"{key}: {why}"
            assert answer["meta_info"]["cached_tokens"] > len(PROMPTS[key[1]]) - 2 * PAGE, key
        return Counter({where: sum(tokens_from(a, where) for a in answers) for where in ("host", "storage")})

    numbers = range(len(PROMPTS))
    of_launch = [(name, number) for number in numbers for name in AT_LAUNCH]
    of_blue: list[Key] = [("blue", number) for number in numbers]
    with server("first.log") as first:
        load(first, "blue")
        expected = cold(first, [*of_launch, *of_blue])
        for number in numbers:  # or the test would show nothing
            outputs = {tuple(expected[name, number]["output_ids"]) for name in (*AT_LAUNCH, "blue")}
            assert len(outputs) == len(AT_LAUNCH) + 1
        found = check_again(first, expected) + check_again(first, expected)
        assert min(found["host"], found["storage"]) > 500, found
        # Under the name of one that has gone, and with its path's id gone too: other weights, other KV.
        first.request("POST", "/unload_lora_adapter", json={"lora_name": "blue"})
        load(first, "other blue")
        other = cold(first, of_blue)
        assert all(other[key]["output_ids"] != expected[key]["output_ids"] for key in of_blue)
        check_again(first, {**expected, **other})
    with server("second.log") as second:
        before = {key: expected[key] for key in of_launch}
        found = check_again(second, before)
        assert found["storage"] > 0.8 * sum(len(PROMPTS[number]) for _, number in of_launch)
        # An id that SGLang has drawn for one process means nothing to another one.
        load(second, "blue")
        for key, answer in cold(second, of_blue).items():
            assert difference(answer, expected[key], apart) is None
    for log in ("first.log", "second.log"):
        text = (tmp_path / log).read_text()
        assert "hit an exception" not in text
        assert len(re.findall(r"sglang-flexkv closed: nothing left held", text)) == 1, log
    # Other weights under the path of one of the launch, whose id SGLang makes of name and path.
    make_adapter(adapters["red"], MODEL, seed=99)
    with pytest.raises(ServerStartError, match="files of lora"), server("third.log"):
        pass
