"""The adapter for SGLang's own storage backends, on its file backend and on some that misbehave."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
from store_suite import (
    content,
    empty,
    session,
    some_names,
    test_it_is_used_again_after_it_was_closed,
    test_what_is_stored_is_there,
    value,
)

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote.check import check
from sglang_flexkv.storage.remote.hicache import HiCacheStore
from sglang_flexkv.storage.remote.store import Outcome, Session, StoreError, StoreFullError

__all__ = ["session", "test_it_is_used_again_after_it_was_closed", "test_what_is_stored_is_there"]


def opened(url: str) -> HiCacheStore:
    made = HiCacheStore(parse_remote_url(url), 5.0)
    made.open()
    return made


def file_url(directory: Path) -> str:
    return f"hicache://file?{urlencode({'file_storage_path': str(directory)})}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HiCacheStore]:
    made = opened(file_url(tmp_path))
    yield made
    made.close()


def test_a_value_that_is_short_fails_alone(session: Session, tmp_path: Path) -> None:
    names = some_names(3)
    session.put(names, [value(0), value(1), value(2)])
    (file,) = tmp_path.glob(f"{names[1].replace('/', '-')}*")
    file.write_bytes(file.read_bytes()[:-1])
    into = [empty() for _ in names]
    assert session.get(names, into) == [Outcome.GOOD, Outcome.FAILED, Outcome.GOOD]
    assert content(into[2]) == content(value(2))
    with pytest.raises(StoreError, match="HiCache backend file"):
        session.get(names[1:2], into[:1])


def test_a_check_tries_a_backend(tmp_path: Path) -> None:
    found = check(parse_remote_url(file_url(tmp_path)))
    assert not found.problem
    assert min(found.put_mb_s, found.get_mb_s, found.round_trip_s, found.look_up_s) > 0


class Backend(HiCacheStorage):
    """In memory, made by SGLang's factory of its ``extra_config``, with a fault."""

    def __init__(self, config: Any, kwargs: Any) -> None:
        self.fault = config.extra_config["fault"]
        assert config.extra_config["number"] == 7
        if self.fault == "dies":
            raise RuntimeError("no entry for hunter2")
        self.held: dict[str, torch.Tensor] = {}
        self.num_inside = self.most_inside = 0

    def set(self, key: str, value: Any = None, *_: Any) -> bool:
        self.held[key] = value[:-1] if self.fault == "cuts" else value
        return self.fault != "refuses"

    def get(self, key: str, *_: Any) -> torch.Tensor | None:
        if self.fault == "counts":
            return self._counted(key)
        if self.fault == "alters":
            return self.held[key] + 1
        if self.fault == "fails":
            raise RuntimeError("hunter2")
        return self.held.get(key)

    def _counted(self, key: str) -> torch.Tensor:
        self.num_inside += 1
        self.most_inside = max(self.most_inside, self.num_inside)
        time.sleep(0.001)  # lets go of the GIL, as a backend does that reads
        self.num_inside -= 1
        return self.held[key]

    def exists(self, key: str) -> bool:
        return key in self.held

    def batch_get(self, *_: Any) -> Any: ...
    def batch_set(self, *_: Any) -> Any: ...


def dynamic(fault: str) -> str:
    settings = {
        "backend_name": "ours",
        "module_path": __name__,
        "class_name": "Backend",
        "number": json.dumps(7),
    }
    return f"hicache://dynamic?{urlencode({**settings, 'fault': fault, 'password': 'hunter2'})}"


def test_a_backend_of_somebody_else_is_loaded_by_sglang() -> None:
    store = opened(dynamic("none"))
    session, names = store.session(), some_names(1)
    assert session.put(names, [value(1)]) == [Outcome.GOOD]
    into = empty()
    assert session.get(names, [into]) == [Outcome.GOOD]
    assert content(into) == content(value(1))
    store.backend.fault = "refuses"
    with pytest.raises(StoreFullError):
        session.put(names, [value(2)])
    store.backend.fault = "fails"
    with pytest.raises(StoreError, match="RuntimeError") as error:
        session.get(names, [into])
    assert "hunter" not in str(error.value)


def test_a_backend_loads_in_one_thread_at_a_time() -> None:
    """Nobody has promised that it bears more."""
    store = opened(dynamic("counts"))
    names = some_names(4)
    store.session().put(names, [value(i) for i in range(4)])

    def load() -> None:
        session = store.session()
        for _ in range(10):
            assert session.get(names, [empty() for _ in names]) == [Outcome.GOOD] * 4

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(load) for _ in range(4)]:
            future.result()
    assert store.backend.most_inside == 1


def test_a_value_that_is_longer_or_shorter_is_no_hit() -> None:
    store = opened(dynamic("none"))
    session, names = store.session(), some_names(2)
    session.put(names, [value(1, 4096), value(2, 12288)])
    into = [empty(), empty()]
    assert session.get(names, into) == [Outcome.CORRUPT] * 2
    assert [content(each) for each in into] == [content(empty())] * 2  # nothing was written anywhere


@pytest.mark.parametrize("fault", ["dies", "cuts", "alters", "fails", "refuses"])
def test_a_backend_that_does_not_keep_what_it_is_given_is_refused(fault: str) -> None:
    with pytest.raises(ConfigError, match="name another store") as error:
        opened(dynamic(fault))
    assert "hunter" not in str(error.value)
    assert "hunter" not in repr(parse_remote_url(dynamic(fault)))


def test_a_backend_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown storage backend"):
        opened("hicache://nobody")
    with pytest.raises(ConfigError, match="cannot be used"):
        opened("hicache://mooncake")  # stores pages of SGLang's own pool only
