"""S3 by itself, on a real server, and on one that answers what no server should."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from certificates import Certificates, make_certificates
from s3_server import S3Server
from store_suite import *  # noqa: F403
from store_suite import SIZE, content, empty, some_names, value

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.kv_group import boundaries
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage.remote.check import check
from sglang_flexkv.storage.remote.s3 import S3Store
from sglang_flexkv.storage.remote.store import (
    Outcome,
    StoreError,
    StoreFullError,
    search_leading,
    search_windows,
)

NAMES = some_names()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[S3Server]:
    made = S3Server(tmp_path_factory.mktemp("s3"), certificates)
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, text in S3Server.environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HOME", str(tmp_path))
    # Where a machine of Amazon's would be asked for credentials.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1/latest")


def s3_store(url: str, timeout_s: float = 20.0) -> S3Store:
    made = S3Store(parse_remote_url(url), timeout_s)
    made.open()
    return made


@pytest.fixture
def store(server: S3Server) -> Iterator[S3Store]:
    made = s3_store(server.url)
    yield made
    made.close()


def test_a_prefix_is_a_place_of_its_own(server: S3Server, store: S3Store) -> None:
    store.session().put(NAMES[:1], [value(1)])
    other = s3_store(server.url.replace("some/where", "some"))
    assert other.session().exists(NAMES[:1]) == [False]
    other.close()


def test_credentials_are_found_and_never_told(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opens() -> str:
        store = S3Store(parse_remote_url(server.url), 5.0)
        try:
            store.open()
        except ConfigError as error:
            return str(error)
        finally:
            store.close()
        return ""

    key, secret = (server.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert "correct AWS_SECRET_ACCESS_KEY" in opens()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "hunter2")
    assert "correct AWS_ACCESS_KEY_ID" in opens()
    assert "hunter" not in opens()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials were found" in opens()
    file = tmp_path / ".aws" / "credentials"
    file.parent.mkdir()
    file.write_text(f"[some]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    assert "no credentials were found" in opens()
    monkeypatch.setenv("AWS_PROFILE", "some")
    assert not opens()
    file.write_text("hunter2\n")
    assert "no file of AWS credentials" in opens()
    assert "hunter" not in opens()


def test_tls_is_spoken_to_those_whose_certificate_is_trusted(
    server: S3Server, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"s3://cache/tls?endpoint=https://127.0.0.1:{server.tls_port}"
    other = tmp_path / "other"
    other.mkdir()
    trusting = f"{url}&ca_file={certificates.ca}"
    for wrong, why in (
        (url, "UnknownIssuer"),
        (f"{url}&ca_file={make_certificates(other).ca}", "BadSignature"),
    ):
        with pytest.raises(ConfigError, match=rf"certificate is not trusted \({why}\); name its CA"):
            s3_store(wrong)
    # With credentials from the file, as a server in production has them.
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    lines = ["[some]", *(f"{name.lower()} = {server.environment[name]}" for name in names)]
    (tmp_path / "credentials").write_text("\n".join(lines) + "\n")
    for name in server.environment:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "some")
    store = s3_store(trusting)
    session, into = store.session(), [empty(1 << 20), empty(1 << 20)]
    assert session.put(NAMES[:2], [value(1, 1 << 20), value(2, 1 << 20)]) == [Outcome.GOOD] * 2
    assert session.exists(NAMES[:3]) == [True, True, False]
    assert session.get(NAMES[:2], into) == [Outcome.GOOD] * 2
    assert [content(each) for each in into] == [content(value(i, 1 << 20)) for i in (1, 2)]
    store.close()
    assert not check(parse_remote_url(trusting)).problem


def test_what_somebody_has_to_change_is_said(server: S3Server) -> None:
    with pytest.raises(ConfigError, match="no such bucket; create it"):
        s3_store(server.url.replace("cache", "catch"))
    with pytest.raises(ConfigError, match="ca_file cannot be read"):
        s3_store(f"{server.url}&ca_file=/nowhere")


def test_without_its_client_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'sglang-flexkv\[s3\]'"):
        s3_store("s3://bucket")


def test_a_server_that_stands_still_takes_no_longer_than_it_may(server: S3Server) -> None:
    store = s3_store(server.url, 0.5)
    session = store.session()
    server.send(signal.SIGSTOP)
    try:
        for call in (
            lambda: session.exists(NAMES),
            lambda: session.get(NAMES, [empty() for _ in NAMES]),
            lambda: session.put(NAMES[:1], [value(1, 64 << 20)]),
        ):
            with pytest.raises(StoreError, match="has not answered") as error:
                call()
            assert not error.value.temporary
        with pytest.raises(AwayError):
            store.open()
    finally:
        server.send(signal.SIGCONT)
    store.close()


def test_a_server_that_is_gone_is_away_and_comes_back(server: S3Server) -> None:
    store = s3_store(server.url, 2.0)
    session = store.session()
    assert session.put(NAMES[:1], [value(1)]) == [Outcome.GOOD]
    server.stop()
    with pytest.raises(StoreError):
        session.get(NAMES, [empty() for _ in NAMES])
    with pytest.raises(AwayError, match="cannot be reached"):
        s3_store(server.url)
    server.start()  # empty
    store.open()
    assert store.session().exists(NAMES[:1]) == [False]
    assert store.session().put(NAMES[:1], [value(1)]) == [Outcome.GOOD]
    store.close()


def test_a_check_says_what_is_slow_and_what_is_wrong(server: S3Server) -> None:
    found = check(parse_remote_url(server.url), 20.0)
    assert not found.problem
    assert min(found.put_mb_s, found.get_mb_s, found.round_trip_s, found.look_up_s) > 0
    assert any("lifecycle rule" in note for note in found.notes)
    assert "no such bucket" in check(parse_remote_url(server.url.replace("cache", "catch"))).problem


@pytest.mark.parametrize("num", [0, 1, 2, 3, 17, 300, 2048])
def test_the_last_that_is_there_is_searched_for_with_few_requests(num: int) -> None:
    for leading in {0, 1, num // 2, num - 1, num} - {-1} if num > 1 else set(range(num + 1)):
        asked: list[int] = []

        def are_there(
            positions: Sequence[int], leading: int = leading, asked: list[int] = asked
        ) -> list[bool]:
            asked += positions
            return [position < leading for position in positions]

        assert search_leading(num, are_there) == leading
        assert len(asked) <= min(2 + num, 40)
        if leading in (0, num):
            assert len(asked) <= 2


def test_windows_are_searched_for_from_the_end_with_few_requests() -> None:
    rng = random.Random(3)
    for _ in range(400):
        num, window = rng.randrange(1, 300), rng.choice([1, 2, 3, 8, 40])
        there = [False] * num
        for _ in range(rng.randrange(5)):  # what is stored of a window is a block more, mostly
            end = rng.randrange(1, num + 1)
            first = max(0, end - window - rng.randrange(2))
            there[first:end] = [True] * (end - first)
        for _ in range(rng.randrange(3)):
            there[rng.randrange(num)] = rng.random() < 0.5
        rounds: list[int] = []

        def are_there(
            positions: Sequence[int], there: list[bool] = there, rounds: list[int] = rounds
        ) -> list[bool]:
            rounds.append(len(positions))
            return [there[position] for position in positions]

        found = search_windows(num, window, are_there)
        whole = np.flatnonzero(boundaries(np.array(there), window))[-1]
        best = np.flatnonzero(boundaries(np.array(found), window))[-1]
        assert not [i for i in range(num) if found[i] and not there[i]]
        assert sum(rounds) <= 64 + 16 + 2 * window
        assert best == whole or (best == 0 and sum(rounds) >= 64)
        if whole == num:
            assert sum(rounds) == min(num, window)


# ---- answers that no server should give ----

Answer = Callable[[BaseHTTPRequestHandler], None]
Answering = Callable[..., S3Store]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """A store whose server gives this answer to everything; it is not opened, which would ask."""
    ends: list[Callable[[], None]] = []

    def make(answer: Answer, certificates: Certificates | None = None) -> S3Store:
        class Listening(ThreadingHTTPServer):
            request_queue_size = 64

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _all(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                answer(self)

            do_GET = do_HEAD = do_PUT = _all

            def log_message(self, *_: object) -> None:
                pass

        server = Listening(("127.0.0.1", 0), Handler)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates.certificate, certificates.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            endpoint = f"https{endpoint[4:]}&ca_file={certificates.ca}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        store = S3Store(parse_remote_url(f"s3://b?endpoint={endpoint}"), 1.0)

        def end() -> None:
            store.close()
            server.shutdown()
            thread.join()
            server.server_close()

        ends.append(end)
        return store

    yield make
    for end in ends:
        end()


def text(status: int, body: bytes, length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("content-length", str(len(body) if length is None else length))
        request.send_header("last-modified", "Fri, 27 Nov 2026 00:00:00 GMT")
        request.send_header("etag", '"x"')
        request.end_headers()
        request.wfile.write(body)
        request.close_connection = length is not None

    return answer


@pytest.mark.parametrize("tls", [False, True])
def test_what_is_stored_is_signed_where_nothing_else_protects_it(
    answering: Answering, certificates: Certificates, tls: bool
) -> None:
    told: dict[str, str] = {}

    def note(request: BaseHTTPRequestHandler) -> None:
        told[request.command] = request.headers["x-amz-content-sha256"]
        text(200, b"")(request)

    store = answering(note, certificates if tls else None)
    store.open()
    assert store.session().put(NAMES[:1], [value(1)]) == [Outcome.GOOD]
    signed = hashlib.sha256(content(value(1))).hexdigest()
    assert told["PUT"] == ("UNSIGNED-PAYLOAD" if tls else signed)


def coded(status: int, code: str) -> Answer:
    return text(status, f"<Error><Code>{code}</Code><Message>hunter2</Message></Error>".encode())


NONSENSE = {
    "a value that ends too soon": text(200, b"x" * 100, SIZE),
    "a longer value": text(200, b"x" * (SIZE + 1)),
    "a shorter value": text(200, b"x" * (SIZE - 1)),
    "nothing": text(200, b""),
    "a page of somebody else": text(200, b"<html>log in first</html>"),
    "no HTTP": lambda request: request.wfile.write(b"\0" * 1000),
    "a status that there is not": text(799, b""),
    "an error without a text": text(418, b""),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_what_does_not_answer_as_s3_does_brings_nothing(answering: Answering, kind: str) -> None:
    store = answering(NONSENSE[kind])
    told, outcomes = "", [Outcome.FAILED]
    try:
        store.open()
        outcomes = store.session().get(NAMES[:1], [empty()])
    except (AwayError, StoreError) as error:
        told = str(error)
    assert outcomes != [Outcome.GOOD]
    assert "xxx" not in told


@pytest.mark.timeout(60)  # not the 400 s in which all of it comes
def test_a_value_that_trickles_takes_no_longer_than_it_may(answering: Answering) -> None:
    """Each byte comes in time, and all of them do not."""
    over = threading.Event()

    def trickle(request: BaseHTTPRequestHandler) -> None:
        text(200, b"x", SIZE)(request)
        for _ in range(SIZE):
            if over.wait(0.05):
                return
            request.wfile.write(b"x")

    held = text(200, b"".join(value(7)))
    store = answering(lambda request: (trickle if request.path.endswith(NAMES[0]) else held)(request))
    store.open()
    try:
        with pytest.raises(StoreError):
            store.session().get(NAMES[:1], [empty()])
    finally:
        over.set()


@pytest.mark.timeout(60)  # not the 40 s and more of so many requests after each other
def test_many_requests_take_no_longer_than_two(answering: Answering) -> None:
    """Each of them may take the whole time; those that have not begun when it is over do not begin."""
    count, lock, over = 0, threading.Lock(), threading.Event()

    def late(request: BaseHTTPRequestHandler) -> None:
        nonlocal count
        with lock:
            count += 1
        over.wait(0.7)
        text(200, b"".join(value(7)))(request)

    held = text(200, b"".join(value(7)))
    store = answering(lambda request: (late if "fkv1/0/0" not in request.path else held)(request))
    store.open()
    with pytest.raises(StoreError, match="has not answered"):
        store.session().get(some_names(200), [empty() for _ in range(200)])
    over.set()
    assert count <= 3 * 16


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (coded(403, "AccessDenied"), "let them use GetObject"),
        (text(403, b""), "let them use GetObject"),
        (coded(301, "PermanentRedirect"), "region=REGION"),
        (coded(400, "ExpiredToken"), "renew them"),
        (coded(403, "RequestTimeTooSkewed"), "set it"),
    ],
)
def test_what_the_server_refuses_says_what_to_do(answering: Answering, answer: Answer, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as error:
        answering(answer).open()
    assert "hunter" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (500, "InternalError", "InternalError"),
        (503, "SlowDown", "SlowDown"),
        (507, "QuotaExceeded", "QuotaExceeded"),
        (403, "AccessDenied", "may not read, write or list"),
        (403, "", "may not read, write or list"),
    ],
)
def test_a_server_that_takes_nothing_more_is_full_and_is_still_read(
    answering: Answering, status: int, code: str, told: str
) -> None:
    held = text(200, b"".join(value(7)))
    refuse = coded(status, code)
    store = answering(lambda request: (refuse if request.command == "PUT" else held)(request))
    store.open()
    session = store.session()
    with pytest.raises(StoreFullError, match=told) as error:
        session.put(NAMES[:2], [value(1), value(2)])
    assert "hunter" not in str(error.value)
    into = empty()
    assert session.get(NAMES[:1], [into]) == [Outcome.GOOD]
    assert content(into) == content(value(7))
