"""A directory and Redis by themselves: what they keep, what they say when they cannot, who they let in."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import make_certificates
from redis import Redis
from redis_server import RedisServer, ValkeyServer
from store_suite import *  # noqa: F403
from store_suite import SIZE, content, empty, some_names, value

from sglang_flexkv.common.config import GIB
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote.check import check
from sglang_flexkv.storage.remote.directory import DirectoryStore
from sglang_flexkv.storage.remote.redis import RedisStore
from sglang_flexkv.storage.remote.store import Outcome, Store, StoreError, StoreFullError

NAMES = some_names()
LARGE = 512 << 10


def redis_store(url: str, timeout_s: float = 5.0) -> RedisStore:
    return RedisStore(parse_remote_url(url), timeout_s)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["directory", "memory", "redis", "valkey"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    server: RedisServer | None = None
    in_memory: tempfile.TemporaryDirectory[str] | None = None
    made: Store
    if request.param == "directory":
        made = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    elif request.param == "memory":
        in_memory = tempfile.TemporaryDirectory(dir="/dev/shm")
        made = DirectoryStore(parse_remote_url(f"file://{in_memory.name}"), 5.0)
    else:
        server = {"redis": RedisServer, "valkey": ValkeyServer}[request.param](tmp_path)
        made = redis_store(server.url)
    made.open()
    yield made
    made.close()
    if server is not None:
        server.stop()
    if in_memory is not None:
        in_memory.cleanup()


# ---- directory ----


def test_files_are_spread_and_none_is_seen_half_written(tmp_path: Path) -> None:
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    store.open()
    name = f"fkv1/{'ab' * 16}/{'cdef' + '0' * 28}"
    assert store.path_of(name) == f"{tmp_path}/fkv1/cd/{'ab' * 16}-{'cdef' + '0' * 28}"
    stop = threading.Event()
    wrong: list[bytes] = []

    def read() -> None:
        session = store.session()
        while not stop.is_set():
            into = empty()
            if session.get([name], [into]) == [Outcome.GOOD] and len(set(content(into))) != 1:
                wrong.append(content(into))

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=lambda n=n: [store.write(name, value(n)) for _ in range(100)])
        for n in range(3)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong
    assert os.listdir(tmp_path / "fkv1" / "tmp") == []


def used(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*-*") if path.is_file())


@pytest.mark.parametrize("num_stores", [1, 3])
def test_a_directory_keeps_its_bound_and_what_was_used_last(tmp_path: Path, num_stores: int) -> None:
    bound = 64 * SIZE
    url = parse_remote_url(f"file://{tmp_path}?max_gb={bound / GIB}")
    stores = [DirectoryStore(url, 5.0) for _ in range(num_stores)]
    for store in stores:
        store.open()
    for i in range(300):
        name = f"fkv1/{'ab' * 16}/{i * 2654435761 % 2**32:08x}{'0' * 24}"
        stores[i % num_stores].write(name, value(i))
        os.utime(stores[0].path_of(name), (i, i))
        assert used(tmp_path) <= bound * (1 + num_stores / 16)
    assert used(tmp_path) >= bound // 2
    assert os.path.exists(stores[0].path_of(name))


def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path, what in (
        (tmp_path / "none", "create it or mount what belongs there"),
        (file, "is no directory"),
    ):
        with pytest.raises(ConfigError, match=what):
            DirectoryStore(parse_remote_url(f"file://{path}"), 5.0).open()


def test_a_mount_that_is_missing_is_not_stored_into(tmp_path: Path) -> None:
    shared = Path("/dev/shm")  # a mount that every machine has
    with tempfile.TemporaryDirectory(dir=shared) as mounted:
        DirectoryStore(parse_remote_url(f"file://{mounted}?mounted=yes&max_gb=1"), 5.0).open()
    if tmp_path.stat().st_dev != Path("/").stat().st_dev:
        pytest.skip("the directory for tests is a mount itself")
    with pytest.raises(AwayError, match="nothing is mounted"):
        DirectoryStore(parse_remote_url(f"file://{tmp_path}?mounted=yes"), 5.0).open()
    assert not list(tmp_path.iterdir())
    assert "?mounted=yes" in check(parse_remote_url(f"file://{tmp_path}")).notes[0]


def test_a_mount_that_hangs_keeps_nobody_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    statvfs = os.statvfs

    def hang(path: str) -> os.statvfs_result:
        goes_on.wait(60)
        return statvfs(path)

    monkeypatch.setattr(os, "statvfs", hang)
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 0.1)
    threads = threading.active_count()
    for _ in range(3):
        with pytest.raises(AwayError, match="does not answer"):
            store.open()
    assert threading.active_count() == threads + 1  # only one waits for it
    goes_on.set()
    store._opening.wait()
    store._timeout_s = 60
    store.open()


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_what_was_stored_and_is_replaced(tmp_path: Path) -> None:
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    store.open()
    session, into = store.session(), empty()
    for replace in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        session.put(NAMES[:1], [value(1)])
        os.unlink(store.path_of(NAMES[0]))
        replace(store.path_of(NAMES[0]))
        assert session.get(NAMES[:1], [into]) == [Outcome.CORRUPT]
        assert session.put(NAMES[:1], [value(2)]) == [Outcome.GOOD]
        assert session.get(NAMES[:1], [into]) == [Outcome.GOOD]
        assert content(into) == content(value(2))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_file_system_that_takes_nothing_is_full_and_nothing_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    store.open()

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(StoreFullError, match=os.strerror(number)):
            store.session().put(NAMES[:1], [value(1)])
    assert os.listdir(tmp_path / "fkv1" / "tmp") == []
    assert store.session().put(NAMES[:1], [value(1)]) == [Outcome.GOOD]


def test_without_o_direct_it_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    store.open()
    pwritev = os.pwritev

    def refuse(fd: int, *rest: object) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return pwritev(fd, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", refuse)
    session = store.session()
    assert store.direct
    assert session.put(NAMES[:1], [value(1, LARGE)]) == [Outcome.GOOD]
    into = empty(LARGE)
    assert session.get(NAMES[:1], [into]) == [Outcome.GOOD]
    assert content(into) == content(value(1, LARGE))


def test_large_values_alone_go_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For small ones it takes more of a core to wait for the disk than to copy."""
    store = DirectoryStore(parse_remote_url(f"file://{tmp_path}"), 5.0)
    store.open()
    session, seen = store.session(), []
    pwritev, preadv = os.pwritev, os.preadv

    def watching(call: Callable[..., int]) -> Callable[..., int]:
        def watch(fd: int, *rest: object) -> int:
            seen.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
            return call(fd, *rest)

        return watch

    monkeypatch.setattr(os, "pwritev", watching(pwritev))
    monkeypatch.setattr(os, "preadv", watching(preadv))
    memory = memoryview(mmap.mmap(-1, 2 * LARGE))  # on whole pages, as a CPU tier's is
    for size in (SIZE, LARGE):
        sent, into = [memory[:size]], [memory[LARGE : LARGE + size]]
        sent[0][:] = os.urandom(size)
        session.put(NAMES[:1], [sent])
        assert session.get(NAMES[:1], [into]) == [Outcome.GOOD]
        assert sent == into
    assert store.direct  # the file system has it
    assert seen == [False, False, True, True]


# ---- Redis ----


def test_a_password_is_needed_right_and_never_told(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--requirepass", "hunter2")
    try:
        for wrong in (server.url, server.url.replace("//", "//:hunter3@")):
            with pytest.raises(ConfigError) as error:
                redis_store(wrong).open()
            assert "hunter" not in str(error.value)
        right = parse_remote_url(server.url.replace("//", "//:hunter2@"))
        store = RedisStore(right, 5.0)
        store.open()
        assert store.session().put(NAMES[:1], [value(1)]) == [Outcome.GOOD]
        assert "hunter2" not in f"{right} {right!r} {store.name} {check(right)}"
        assert not check(right).problem
    finally:
        server.stop()


def test_a_full_server_is_full_and_is_still_read(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    try:
        store = redis_store(server.url)
        session = store.session()
        assert session.put(NAMES[:1], [value(1, 1 << 19)]) == [Outcome.GOOD]
        # As far as there is room; then nothing of a call, which is told.
        assert Outcome.GOOD in session.put(NAMES[:10], [value(1, 1 << 19)] * 10)
        with pytest.raises(StoreFullError):
            session.put(NAMES[20:24], [value(1, 1 << 19)] * 4)
        session = store.session()
        assert session.get(NAMES[:1], [empty(1 << 19)]) == [Outcome.GOOD]
        assert any("allkeys-lru" in note for note in store.notes())
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("REPLICAOF 127.0.0.1 1", "name the primary"),
        ("CONFIG SET min-replicas-to-write 1", "min-replicas-to-write"),
        ("ACL SETUSER default -set", "let it"),
    ],
)
def test_a_server_that_may_only_be_read_is_still_read(redis: RedisServer, command: str, told: str) -> None:
    store = redis_store(redis.url)
    session, into = store.session(), empty()
    session.put(NAMES[:1], [value(1)])
    with Redis(port=redis.port) as client:
        client.execute_command(*command.split())
    store.open()
    with pytest.raises(StoreFullError, match=told):
        session.put(NAMES[1:3], [value(2), value(3)])
    assert session.exists(NAMES[:2]) == [True, False]
    assert session.get(NAMES[:1], [into]) == [Outcome.GOOD]
    assert content(into) == content(value(1))


def test_a_server_that_stands_still_takes_no_longer_than_it_may(redis: RedisServer) -> None:
    store = redis_store(redis.url, timeout_s=0.3)
    session = store.session()
    redis.send(signal.SIGSTOP)
    try:
        for call in (
            lambda: session.exists(NAMES),
            lambda: store.session().get(NAMES[:1], [empty()]),
            lambda: store.session().put(NAMES[:1], [value(1, 64 << 20)]),
        ):
            with pytest.raises(StoreError):
                call()
        with pytest.raises(AwayError):
            store.open()
    finally:
        redis.send(signal.SIGCONT)
    redis_store(redis.url).open()


def test_a_server_that_was_started_anew_is_a_temporary_fault(redis: RedisServer) -> None:
    session = redis_store(redis.url).session()
    redis.stop()
    with pytest.raises(AwayError):
        redis_store(redis.url).open()
    redis.start()
    with pytest.raises(StoreError) as error:
        session.get(NAMES, [empty() for _ in NAMES])
    assert error.value.temporary


def answering(answer: Callable[[socket.socket], None]) -> tuple[str, Callable[[], None]]:
    """A server of any kind; its URL, and what ends it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    connection.recv(1 << 16)
                    answer(connection)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    def end() -> None:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()

    return f"redis://127.0.0.1:{listening.getsockname()[1]}", end


NONSENSE = {
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "nothing": b"",
    "no line": b"\0" * (1 << 17),
    "no number": b"$x\r\n",
    "negative": b"$-7\r\n",
    "a value without an end": b"$8192\r\n" + b"x" * 8192 + b"yy",
    "half a value": b"$8192\r\n" + b"x" * 100,
    "a huge value": b"$9999999999\r\n" + b"x" * 100,
    "an error": b"-ERR something\r\n",
    "of a cluster": b"-MOVED 1 10.0.0.1:6379\r\n",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_what_does_not_answer_as_redis_does_brings_nothing(kind: str) -> None:
    url, end = answering(lambda connection: connection.sendall(NONSENSE[kind]))
    try:
        try:
            outcomes = redis_store(url, 1.0).session().get(NAMES[:1], [empty()])
        except StoreError:
            outcomes = [Outcome.FAILED]
        assert outcomes != [Outcome.GOOD]
        with pytest.raises(ConfigError):
            redis_store(url, 1.0).open()
        assert check(parse_remote_url(url), 1.0).problem
    finally:
        end()


@pytest.mark.timeout(60)  # not the 5,000 s in which all of it comes
def test_a_value_that_trickles_takes_no_longer_than_it_may() -> None:
    """Each byte comes in time, and all of them do not."""
    over = threading.Event()

    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"$8192\r\n")
        for _ in range(8192):
            if over.wait(0.05):
                return
            connection.sendall(b"x")

    url, end = answering(trickle)
    try:
        with pytest.raises(StoreError, match="has not answered"):
            redis_store(url, 0.3).session().get(NAMES[:1], [empty()])
    finally:
        over.set()
        end()


def test_values_do_not_wait_for_each_other_to_be_stored() -> None:
    """The server answers when it has all of them."""

    def answer(connection: socket.socket) -> None:
        received, data = 0, b""
        while received < 2.5 * LARGE or not data.endswith(b"\r\n"):
            data = connection.recv(1 << 16)
            if not data:
                return
            received += len(data)
        connection.sendall(b"+OK\r\n-OOM no room\r\n+OK\r\n")

    url, end = answering(answer)
    try:
        session = redis_store(url).session()
        outcomes = session.put(NAMES[:3], [value(7, LARGE)] * 3)
        assert outcomes == [Outcome.GOOD, Outcome.MISSING, Outcome.GOOD]
        session.close()
    finally:
        end()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """What comes on either goes to the other, until one of them has gone."""
    one.settimeout(0.02)
    other.settimeout(0.02)
    while True:
        for source, sink in ((one, other), (other, one)):
            try:
                data = source.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                return
            sink.sendall(data)


def test_what_a_server_says_is_not_repeated() -> None:
    """It may be what it was sent, or what somebody else has told it."""
    url, end = answering(lambda connection: connection.sendall(b"-ODD the password is hunter2\r\n"))
    with pytest.raises(AwayError, match="says ODD") as error:
        redis_store(url).open()
    assert "hunter" not in str(error.value)
    end()


def test_tls_is_spoken_to_those_whose_certificate_is_trusted(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    server = RedisServer(tmp_path)
    proxy = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    proxy.load_cert_chain(made.certificate, made.key)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        """Takes TLS off: Debian's server may be built without it."""
        while True:
            try:
                connection, _ = listening.accept()
                with (
                    proxy.wrap_socket(connection, server_side=True) as ours,
                    socket.create_connection(("127.0.0.1", server.port)) as theirs,
                ):
                    pass_on(ours, theirs)
            except ssl.SSLError:
                continue  # somebody who does not trust it
            except OSError:
                return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"rediss://localhost:{listening.getsockname()[1]}"
    with pytest.raises(ConfigError, match="certificate is not trusted"):
        redis_store(url).open()
    store = redis_store(f"{url}?ca_file={made.ca}")
    store.open()
    session = store.session()
    assert session.put(NAMES[:2], [value(1, 1 << 17), value(2, 1 << 17)]) == [Outcome.GOOD] * 2
    into = [empty(1 << 17), empty(1 << 17)]
    assert session.get(NAMES[:2], into) == [Outcome.GOOD] * 2
    assert content(into[1]) == content(value(2, 1 << 17))
    session.close()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    server.stop()


# ---- URLs ----


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://HOST", "redis://host:6379"),
        ("redis://user:secret@10.0.0.1:7000/3", "redis://10.0.0.1:7000"),
        ("rediss://[::1]:7000", "rediss://[::1]:7000"),
        ("file:///mnt/a%20b?max_gb=2.5", "file:///mnt/a b"),
        ("file://localhost/mnt", "file:///mnt"),
        ("mooncake://host?protocol=rdma&device=mlx5_0", "mooncake://host:50051"),
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/some/where/?endpoint=https://h:1&region=eu", "s3://bucket/some/where"),
    ],
)
def test_urls(url: str, told: str) -> None:
    assert str(parse_remote_url(url)) == told
    assert "secret" not in repr(parse_remote_url(url))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("/mnt/cache", "names no kind of store"),
        ("mooncake://:secret@host", "has none"),
        ("mooncake://host/secret", "nothing behind"),
        ("mooncake://host?max_gb=1", "no option"),
        ("s3:///prefix", "names no bucket"),
        ("s3://host:9000/bucket", "names no bucket"),
        ("s3://key:secret@bucket", "takes no credentials"),
        ("s3://bucket?endpoint=http://key:secret@h", "without credentials"),
        ("s3://bucket?endpoint=host:9000", "endpoint must be"),
        ("s3://bucket?max_gb=1", "no option 'max_gb'"),
        ("file://host/mnt", "from the root"),
        ("file:", "from the root"),
        ("redis://", "names no host"),
        ("redis://secret@h:99999", "is no URL"),
        ("redis://:secret@h/x", "is a number"),
        ("redis://:sec#ret@h", "'#'"),
        ("redis://h?max_gb=1", "no option 'max_gb'"),
        ("file:///mnt?max_gb=0", "above 0"),
        ("file:///mnt?max_gb=nan", "above 0"),
        ("file:///mnt?mounted=no", "can only be yes"),
    ],
)
def test_urls_that_cannot_be_meant(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        parse_remote_url(url)
    assert "secret" not in str(error.value)


def test_a_check_says_what_is_slow_and_what_is_wrong(tmp_path: Path, redis: RedisServer) -> None:
    for url in (f"file://{tmp_path}?max_gb=1", redis.url):
        found = check(parse_remote_url(url))
        assert not found.problem
        assert min(found.put_mb_s, found.get_mb_s, found.round_trip_s, found.look_up_s) > 0
        assert found.notes
    redis.stop()
    start_s = time.monotonic()
    assert "cannot be reached" in check(parse_remote_url(redis.url)).problem
    assert time.monotonic() - start_s < 30
