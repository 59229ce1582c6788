"""A real cluster of Redis servers: what every store owes, slots that move, a node that is lost."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Iterator

import pytest
import redis
from redis.crc import key_slot
from redis_server import RedisCluster
from store_suite import *  # noqa: F403
from store_suite import content, empty, some_names, value

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote.check import check
from sglang_flexkv.storage.remote.redis import RedisStore
from sglang_flexkv.storage.remote.store import Outcome, StoreError

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    made = RedisCluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.stop()


@pytest.fixture
def store(cluster: RedisCluster) -> Iterator[RedisStore]:
    made = RedisStore(parse_remote_url(cluster.url), 5.0)
    made.open()
    yield made
    made.close()


def test_values_lie_on_all_nodes(cluster: RedisCluster, store: RedisStore) -> None:
    assert store.is_cluster
    session, names = store.session(), some_names(100)
    session.put(names, [value(i) for i in range(100)])
    for node in cluster.nodes[:3]:
        with redis.Redis(port=node.port) as client:
            assert any(client.keys(f"{names[0][:37]}*"))
    session.close()


def test_slots_that_move_are_followed(cluster: RedisCluster, store: RedisStore) -> None:
    session, (name,) = store.session(), some_names(1)
    slot = key_slot(name.encode())
    clients = [redis.Redis(port=node.port) for node in cluster.nodes[:3]]
    ids = [client.execute_command("CLUSTER MYID") for client in clients]
    first = next(i for i in range(3) if slot < 16384 * (i + 1) // 3)
    second = (first + 1) % 3
    for source, target in ((first, second), (second, first)):  # and back
        session.exists([name])  # it has a connection, and a map
        clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        for client in clients[target:] + clients[:target]:  # who gets it learns of it first
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
        assert session.put([name], [value(target)]) == [Outcome.GOOD]
        assert clients[target].exists(name)
        into = empty()
        assert session.get([name], [into]) == [Outcome.GOOD]
        assert content(into) == content(value(target))
        clients[target].delete(name)
    session.close()
    for client in clients:
        client.close()


def test_a_slot_that_has_moved_does_not_fail_beside_values_that_came(
    cluster: RedisCluster, store: RedisStore
) -> None:
    session, names = store.session(), some_names(12)
    slot = key_slot(names[0].encode())
    assert {key_slot(name.encode()) for name in names} != {slot}
    clients = [redis.Redis(port=node.port) for node in cluster.nodes[:3]]
    ids = [client.execute_command("CLUSTER MYID") for client in clients]
    first = next(i for i in range(3) if slot < 16384 * (i + 1) // 3)
    second = (first + 1) % 3
    for source, target in ((first, second), (second, first)):  # and back
        session.exists(names)  # it has connections, and a map
        clients[source].delete(names[0])
        clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        for client in clients[target:] + clients[:target]:
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
        if target == second:
            assert session.put(names, [value(i) for i in range(12)]) == [Outcome.GOOD] * 12
        else:
            into = [empty() for _ in names]
            assert session.get(names, into) == [Outcome.MISSING, *[Outcome.GOOD] * 11]
            assert [content(each) for each in into[1:]] == [content(value(i)) for i in range(1, 12)]
    session.close()
    for client in clients:
        client.close()


def test_a_slot_that_is_on_its_way_is_a_miss_and_no_fault(cluster: RedisCluster, store: RedisStore) -> None:
    """Its node sends those who ask for what it has not to the next one (ASK)."""
    names = some_names(1)
    slot = key_slot(names[0].encode())
    there, elsewhere = (
        names[0],
        next(
            name
            for name in itertools.chain.from_iterable(some_names(1000) for _ in itertools.count())
            if key_slot(name.encode()) == slot
        ),
    )
    session = store.session()
    session.put([there], [value(1)])
    first = next(i for i in range(3) if slot < 16384 * (i + 1) // 3)
    source, target = (redis.Redis(port=cluster.nodes[i].port) for i in (first, (first + 1) % 3))
    ids = [client.execute_command("CLUSTER MYID") for client in (source, target)]
    target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    try:
        assert session.exists([there, elsewhere]) == [True, False]
        assert session.count_leading([there, elsewhere]) == 1
        into = [empty(), empty()]
        assert session.get([elsewhere, there], into) == [Outcome.MISSING, Outcome.GOOD]
        assert content(into[1]) == content(value(1))
        assert session.put([elsewhere, there], [value(2), value(3)]) == [Outcome.MISSING, Outcome.GOOD]
    finally:
        for client in (source, target):
            client.execute_command("CLUSTER SETSLOT", slot, "STABLE")
    assert session.put([elsewhere], [value(2)]) == [Outcome.GOOD]
    for client in (source, target):
        client.close()
    session.close()


def test_without_its_client_the_way_to_get_it_is_said(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "redis.crc", None)
    with pytest.raises(ConfigError, match=r"pip install 'sglang-flexkv\[redis\]'"):
        RedisStore(parse_remote_url(cluster.url), 5.0).open()


def test_a_check_tries_a_cluster(cluster: RedisCluster) -> None:
    found = check(parse_remote_url(cluster.url), 5.0)
    assert not found.problem
    assert min(found.put_mb_s, found.get_mb_s, found.look_up_s) > 0
    assert any("cluster" in note for note in found.notes)


def test_who_works_answers_while_another_node_does_not(
    cluster: RedisCluster, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """What is on a node that is gone, and on none in its place, counts as not there; the rest is of use. Also
    where a store is opened meanwhile."""
    session, names = store.session(), some_names(30)
    session.put(names, [value(i) for i in range(30)])
    of_it = [16384 // 3 <= key_slot(name.encode()) < 16384 * 2 // 3 for name in names]
    names = [name for name, lost in zip(names, of_it, strict=True) if not lost][:2] + names
    of_it = [False, False, *of_it]
    cluster.nodes[1].stop()
    try:
        for _ in range(5):
            assert session.count_leading(names) == of_it.index(True)
            assert session.exists(names) == [not lost for lost in of_it]
        into = [empty() for _ in names]
        expected = [Outcome.MISSING if lost else Outcome.GOOD for lost in of_it]
        assert session.get(names, into) == expected
        assert [content(into[i]) for i in (0, 1)] == [content(into[names.index(names[i], 2)]) for i in (0, 1)]
        assert session.put(names, [value(i) for i in range(32)]) == expected
        # A call that is of nothing else is no fault of the cluster either.
        lost = [name for name, gone in zip(names, of_it, strict=True) if gone]
        assert session.put(lost, [value(1) for _ in lost]) == [Outcome.MISSING] * len(lost)
        assert session.get(lost, [empty() for _ in lost]) == [Outcome.MISSING] * len(lost)
        assert [f"node 127.0.0.1:{cluster.nodes[1].port}" in text for text in caplog.messages] == [True]
        other = RedisStore(parse_remote_url(cluster.url), 5.0)
        other.open()
        other.close()
    finally:
        cluster.nodes[1].start()
    deadline = time.monotonic() + PATIENCE_S
    while session.put(names, [value(i) for i in range(32)]) != [Outcome.GOOD] * 32:
        assert time.monotonic() < deadline, "a node that is back is not used again"
        time.sleep(0.05)
    assert session.count_leading(names) == 32
    session.close()


def test_where_no_node_answers_calls_fail(cluster: RedisCluster) -> None:
    store = RedisStore(parse_remote_url(cluster.url), 0.2)
    store.open()
    session, names = store.session(), some_names(30)
    session.exists(names)
    for node in cluster.nodes:
        node.send(signal.SIGSTOP)
    try:
        for call in (
            lambda: session.count_leading(names),
            lambda: session.get(names, [empty() for _ in names]),
            lambda: session.put(names, [value(1) for _ in names]),
        ):
            with pytest.raises(StoreError):
                call()
    finally:
        for node in cluster.nodes:
            node.send(signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if session.put(names, [value(1) for _ in names]) == [Outcome.GOOD] * 30:
                break
        except StoreError:
            pass
        assert time.monotonic() < deadline, "a cluster that is back is not used again"
        time.sleep(0.05)
    session.close()
    store.close()


def test_a_node_that_is_lost_misses_its_values_until_its_replica_has_taken_its_place(
    cluster: RedisCluster, store: RedisStore
) -> None:
    session, names = store.session(), some_names(30)
    session.put(names, [value(i) for i in range(30)])
    with redis.Redis(port=cluster.nodes[2].port) as client:
        assert client.wait(1, 20_000) == 1  # its replica has all of it
    cluster.nodes[2].stop()
    of_it = [key_slot(name.encode()) >= 16384 * 2 // 3 for name in names]
    assert True in of_it
    assert False in of_it
    into = [empty() for _ in names]
    assert session.get(names, into) == [Outcome.MISSING if lost else Outcome.GOOD for lost in of_it]
    for i in range(30):
        assert of_it[i] or content(into[i]) == content(value(i))
    deadline = time.monotonic() + PATIENCE_S
    while session.get(names, into) != [Outcome.GOOD] * 30 or session.exists(names) != [True] * 30:
        assert time.monotonic() < deadline, "the replica is not found"
        time.sleep(0.05)
    assert [content(each) for each in into] == [content(value(i)) for i in range(30)]
    assert session.put(names, [value(i + 1) for i in range(30)]) == [Outcome.GOOD] * 30
    session.close()
