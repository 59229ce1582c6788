"""Mooncake Store by itself: a master and the process that holds the memory are others than this one."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mooncake_server import MooncakeServer
from server import free_port
from store_suite import *  # noqa: F403
from store_suite import content, empty, some_names, value

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote.check import check
from sglang_flexkv.storage.remote.mooncake import MooncakeStore
from sglang_flexkv.storage.remote.store import Outcome, Session, Store, StoreError, StoreFullError

PATIENCE_S = 40.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeServer]:
    # Time limits are the process's, and those of the first client in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MC_RPC_TIMEOUT_MS", "2000")
        patch.setenv("MC_RPC_CONNECT_TIMEOUT_MS", "2000")
        patch.setenv("MC_TCP_STATUS_TIMEOUT_SEC", "2")
        patch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")
        patch.setenv("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        made = MooncakeServer(tmp_path_factory.mktemp("mooncake"))
        yield made
        made.stop()


def opened(url: str) -> MooncakeStore:
    made = MooncakeStore(parse_remote_url(url), 2.0)
    made.open()
    return made


@pytest.fixture
def store(server: MooncakeServer) -> Iterator[MooncakeStore]:
    made = opened(server.url)
    yield made
    made.close()


def test_the_time_limits_of_its_client_are_ours_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has them in the environment alone, and takes up to a minute without."""
    limits = {
        "MC_RPC_TIMEOUT_MS": "1500",
        "MC_RPC_CONNECT_TIMEOUT_MS": "1500",
        "MC_TCP_STATUS_TIMEOUT_SEC": "7",
        "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    }
    for name in limits:
        monkeypatch.setenv(name, "7")
        if name != "MC_TCP_STATUS_TIMEOUT_SEC":
            monkeypatch.delenv(name)
    with pytest.raises(AwayError):
        MooncakeStore(parse_remote_url(f"mooncake://127.0.0.1:{free_port()}"), 1.5).open()
    assert {name: os.environ.get(name) for name in limits} == limits


@pytest.mark.parametrize("answer", [1, 4095, 4097, -600, -800])
def test_success_is_the_exact_size(answer: int) -> None:
    """This client calls no other size a success; another call of it does."""
    store = MooncakeStore(parse_remote_url("mooncake://127.0.0.1"), 1.0)
    store.client = SimpleNamespace(
        batch_get_into_multi_buffers=lambda *_: [answer], get_size=lambda _: 1, register_buffer=lambda *_: 0
    )
    assert store.session().get(some_names(1), [empty(4096)]) == [Outcome.CORRUPT]


def until_it_works(store: Store) -> None:
    """As the tier does it: opened again and again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            store.close()
            store.open()
            session = store.session()
            assert session.put(some_names(1), [value(1)]) == [Outcome.GOOD]
            session.close()
            return
        except (AwayError, StoreError):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def with_values(store: Store, count: int) -> tuple[Session, list[str]]:
    """A session, and names of so many values."""
    session, names = store.session(), some_names(count)
    assert session.put(names, [value(i + 1) for i in range(count)]) == [Outcome.GOOD] * count
    return session, names


def test_memory_that_was_lent_is_used_where_it_is(store: MooncakeStore) -> None:
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    store.lend(memory)
    session, names = store.session(), some_names(2)
    header = memoryview(bytearray(b"h" * 4096))
    memory[:8192] = b"b" * 8192
    outcomes = session.put(names, [[header, memory[:4096]], [header, memory[4096:8192]]])
    assert outcomes == [Outcome.GOOD] * 2
    got = memoryview(bytearray(4096))
    assert session.get(names[:1], [[got, memory[-4096:]]]) == [Outcome.GOOD]
    assert got == header
    assert memory[-4096:] == memory[:4096]
    # Of the pieces only the headers were copied.
    assert len(session._own) == 8192
    session.close()


def test_a_store_without_room_is_full_and_nothing_worse(
    tmp_path: Path, server: MooncakeServer, request: pytest.FixtureRequest
) -> None:
    small = MooncakeServer(tmp_path, "32 MB")
    request.addfinalizer(small.stop)
    store = opened(small.url)
    session, names = store.session(), some_names(2)
    into = empty()
    # It evicts to make room, but this is more than all there is.
    with pytest.raises(StoreFullError, match="is full"):
        session.put(names[1:], [value(2, 40 << 20)])
    assert session.put(names[:1], [value(1)]) == [Outcome.GOOD]
    assert session.get(names[:1], [into]) == [Outcome.GOOD]
    assert content(into) == content(value(1))
    session.close()
    store.close()


@pytest.mark.timeout(25)  # not 30 and 60 s, as by the client's own limits
@pytest.mark.parametrize("name", ["master", "owner"])
def test_what_stands_still_takes_no_longer_than_it_may(server: MooncakeServer, name: str) -> None:
    store = opened(server.url)
    session, names = with_values(store, 4)
    server.send(signal.SIGSTOP, name)
    try:
        with pytest.raises(StoreError):
            session.get(names, [empty() for _ in names])
    finally:
        server.send(signal.SIGCONT, name)
    until_it_works(store)
    store.close()


@pytest.mark.usefixtures("server")  # whose time limits are this one's
@pytest.mark.parametrize("name", ["owner", "master"])
def test_what_was_killed_is_a_fault_and_comes_back(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    server = MooncakeServer(tmp_path, missed_after_s=1)
    request.addfinalizer(server.stop)
    store = opened(server.url)
    session, names = with_values(store, 2)
    server.kill(name)
    with pytest.raises(StoreError):
        session.get(names, [empty(), empty()])
    session.close()
    if name == "master":
        with pytest.raises(AwayError, match="cannot be reached"):
            opened(server.url)
        server.kill("owner")  # it would come back by itself, after a while
    server.start()
    until_it_works(store)
    store.close()


def test_a_client_that_was_killed_harms_no_other(server: MooncakeServer, store: MooncakeStore) -> None:
    session, names = with_values(store, 1)
    program = (
        "import os\n"
        "from sglang_flexkv.common.remote_url import parse_remote_url\n"
        "from sglang_flexkv.storage.remote.mooncake import MooncakeStore\n"
        f"store = MooncakeStore(parse_remote_url({server.url!r}), 5.0)\n"
        "store.open()\n"
        f"there = store.session().exists({names!r})\n"
        "os._exit(3 if there == [True] else 4)\n"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 3
        into = empty()
        assert session.get(names, [into]) == [Outcome.GOOD]
        assert content(into) == content(value(1))
    session.close()


def test_what_is_no_master_is_told(store: MooncakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AwayError, match="cannot be reached"):
        opened(f"mooncake://127.0.0.1:{free_port()}")
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match=r"pip install 'sglang-flexkv\[mooncake\]'"):
        opened("mooncake://127.0.0.1:1")


def test_a_check_tells_of_its_network(server: MooncakeServer, store: MooncakeStore) -> None:
    found = check(parse_remote_url(server.url), 2.0)
    assert not found.problem
    assert min(found.put_mb_s, found.get_mb_s, found.round_trip_s, found.look_up_s) > 0
    assert "listen on every address" in found.notes[0]
