"""Redis and Valkey, by their own protocol (RESP2): a value is a string.

Written here and not on a client library, because those join a value's pieces into one string before they
send it, and receive it into a string of their own: several copies of megabytes under the GIL. Here the
pieces go to the socket as they are, and come from it into the slot. The server evicts (``maxmemory``,
``allkeys-lru``) and knows nothing of us.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Sequence

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.redis_cluster import ClusterSession, SlotMap
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    fits,
    leading,
    outcomes_of,
    value_bytes,
)

_LINE_MAX = 64 << 10  # of a reply that is one line: more is no server of this kind
_SKIPPED_MAX = 64 << 20  # of a value that has another size: beyond that the connection goes
# That a connection asks for at once, and one value at least. More is slower, not faster: the server keeps
# what it has not sent yet, and large values leave its cache meanwhile. Round trips are hidden by the other
# connections. Also what is sent at once.
_AT_ONCE = 256 << 10
_COUNTED = 64  # values that are counted together
_PROBES = 64  # values that nobody has stored, on all nodes of a cluster
_PIECES_MAX = 512  # that one call of the system takes

# What a server answers while it starts, or to a client that came to the wrong one of several.
_TEMPORARY = ("LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "MOVED")
_TO_BE_CHANGED = {
    "NOAUTH": "it wants a password; put it into the URL, redis://:PASSWORD@HOST, in FLEXKV_REMOTE or a file",
    "WRONGPASS": "user or password are wrong; correct them in the URL",
    "NOPERM": "this user may not use GET, SET and EXISTS on fkv1/*; let it",
    "DENIED": "it is protected: only this machine may use it; set a password, or protected-mode no",
}
# It can be read all the same.
_TAKES_NOTHING = {
    "OOM": " is full (maxmemory)",
    "READONLY": " is a replica, which takes nothing; name the primary",
    "MISCONF": ' takes nothing while it cannot write its snapshot; turn that off (save "")',
    "NOREPLICAS": " takes nothing without its replicas; see its min-replicas-to-write",
}


class _OnItsWayError(StoreError):
    """The slot of the value moves to another node, and this one does not have it. Not followed: a miss for as
    long as the slot moves."""


class _Refused(StoreError):
    """The server says no, and will until somebody changes something."""


class _NotAllowed(_Refused):
    """To this user."""


class RedisStore(Store):
    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        self._url, self.timeout_s = url, timeout_s
        self.name = f"Redis at {url.host}:{url.port}"
        self._tls: ssl.SSLContext | None = None
        self._slots: SlotMap | None = None  # of a cluster

    def open(self) -> None:
        try:
            if self._url.scheme == "rediss" and self._tls is None:
                self._tls = ssl.create_default_context(cafile=self._url.options.get("ca_file"))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"remote: the certificates of ca_file cannot be read: {error}; correct it"
            ) from None
        try:
            self.close()
            first = _RedisSession(self)
            try:
                if first.is_of_a_cluster():
                    self._slots = SlotMap(self._url, self.name, self.timeout_s)
                else:
                    first.exists(["fkv1/0/0"])
            finally:
                first.close()
            if self.is_cluster:
                session = self.session()
                try:
                    session.exists([f"fkv1/0/{number}" for number in range(_PROBES)])
                finally:
                    session.close()
        except _Refused as error:
            raise ConfigError(f"remote: {error}") from None
        except StoreError as error:
            raise AwayError(f"remote: {error}; start it, or check host and port") from None

    def session(self) -> Session:
        if self._slots is not None:
            return ClusterSession(self._slots, lambda node: _RedisSession(self, *node))
        return _RedisSession(self)

    def close(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.close()

    def notes(self) -> list[str]:
        session = _RedisSession(self)
        try:
            found = session.configuration()
        except StoreError:
            return ["how it is set up cannot be asked (INFO is refused)"]
        finally:
            session.close()
        notes = [f"{found.get('redis_version', '?')}, {found.get('used_memory_human', '?')} used"]
        if self.is_cluster:
            notes.append("a cluster: what follows is of the node that the URL names")
        if found.get("maxmemory", "0") == "0":
            notes.append("maxmemory is not set: it grows until the machine has no memory; set it")
        elif "noeviction" in found.get("maxmemory_policy", ""):
            notes.append("maxmemory-policy is noeviction: full once is full for ever; set allkeys-lru")
        return notes

    # ---- for sessions ----

    @property
    def is_cluster(self) -> bool:
        return self._slots is not None

    def connect(self, host: str = "", port: int = 0) -> socket.socket:
        """To the server that the URL names, or to another one of its cluster. Raises StoreError."""
        host, port = host or self._url.host, port or self._url.port
        try:
            connection = socket.create_connection((host, port), self.timeout_s)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._tls is not None:
                return self._tls.wrap_socket(connection, server_hostname=host)
            # The system's own limits, on a socket that blocks: megabytes then come with one call, and not
            # with one for each piece that has arrived, each of which would take the GIL.
            connection.settimeout(None)
            limit = struct.pack("ll", int(self.timeout_s), int(self.timeout_s % 1 * 1e6))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            return connection
        except ssl.SSLCertVerificationError as error:
            raise _Refused(f"{self.name}: its certificate is not trusted ({error.verify_message})") from None
        except OSError as error:
            raise StoreError(f"{self.name} cannot be reached: {error.strerror or error}") from None

    def greeting(self) -> list[tuple[str | bytes, ...]]:
        """Commands that a connection begins with."""
        url = self._url
        commands: list[tuple[str | bytes, ...]] = []
        if url.password:
            commands.append(("AUTH", url.username, url.password) if url.username else ("AUTH", url.password))
        if url.options.get("db", "0") != "0":
            commands.append(("SELECT", url.options["db"]))
        return commands


class _RedisSession(Session):
    """One connection. Replies come in the order of the commands: many are sent before the first is read."""

    def __init__(self, store: RedisStore, host: str = "", port: int = 0) -> None:
        self._store = store
        self._deadline_s = time.monotonic() + store.timeout_s
        self._buffer = bytearray(4096)  # what was received and belongs to the next reply
        self._at = self._end = 0
        self._socket = store.connect(host, port)
        try:
            for command in store.greeting():
                self._send([_command(*command)])
                self._expect_simple(self._line())
        except BaseException:
            self.close()
            raise

    # ---- calls ----

    def exists(self, names: Sequence[str]) -> list[bool]:
        self._begin()
        self._send([b"".join(_command("EXISTS", name) for name in names)])
        return [self._is_there() for _ in names]

    def count_leading(self, names: Sequence[str]) -> int:
        # How many of some are there is one short answer; which of them only where it is not all.
        groups = [names[at : at + _COUNTED] for at in range(0, len(names), _COUNTED)]
        self._begin()
        self._send(["".join(map(_exists_of_all, groups)).encode()])
        counts = [self._integer() for _ in groups]
        for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
            if count < len(group):
                there = self.exists(group)
                return number * _COUNTED + (there.index(False) if False in there else len(there))
        return len(names)

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        self._begin()
        got: list[tuple[Outcome, int]] = []
        for part in _at_once(values):
            self._send([b"".join(_command("GET", name) for name in names[part])])
            got += [self._bulk_into(value, sizes) for value in values[part]]
        return outcomes_of(got, sizes)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        self._begin()
        full: StoreFullError | None = None
        outcomes = []
        # All of them before the first answer is read: the next value is on its way while the server puts one
        # where it belongs, and answers are short. Large ones by a call of the system each: one for several of
        # them is as slow as to wait.
        for part in _at_once(values):
            self._send_values(names[part], values[part])
        for _ in names:
            try:
                self._expect_simple(self._line())
                outcomes.append(Outcome.GOOD)
            except StoreFullError as error:
                full = error
                outcomes.append(Outcome.MISSING)
            except _NotAllowed as error:  # to store; who may not read is told when it loads
                full = StoreFullError(str(error))
                outcomes.append(Outcome.MISSING)
            except _OnItsWayError:
                outcomes.append(Outcome.MISSING)
        if full is not None and Outcome.GOOD not in outcomes:
            raise full
        return outcomes

    def is_of_a_cluster(self) -> bool:
        try:
            return self.configuration().get("cluster_enabled", "0").strip() == "1"
        except _Refused:
            return False  # one that does not tell is taken for a server by itself

    def configuration(self) -> dict[str, str]:
        """What INFO says."""
        self._begin()
        self._send([_command("INFO")])
        lines = self._bulk_bytes().decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    # ---- bytes out ----

    def _begin(self) -> None:
        self._deadline_s = time.monotonic() + self._store.timeout_s

    def _check_time(self) -> None:
        left = self._deadline_s - time.monotonic()
        if left <= 0:
            raise self._late()
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.settimeout(left)

    def _late(self) -> StoreError:
        return StoreError(f"{self._store.name} has not answered for {self._store.timeout_s:g} s")

    def _send_values(self, names: Sequence[str], values: Sequence[Value]) -> None:
        pieces: list[bytes | memoryview] = []
        for name, value in zip(names, values, strict=True):
            size = value_bytes(value)
            pieces.append(b"*3\r\n" + _bulk(b"SET") + _bulk(name.encode()) + b"$%d\r\n" % size)
            pieces += [*value, b"\r\n"]
        self._send(pieces)

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        rest: list[bytes | memoryview] = list(pieces)
        try:
            while rest:
                self._check_time()
                if isinstance(self._socket, ssl.SSLSocket):
                    self._socket.sendall(rest.pop(0))
                    continue
                sent = self._socket.sendmsg(rest[:_PIECES_MAX])
                while rest and sent >= len(rest[0]):
                    sent -= len(rest.pop(0))
                if sent:
                    rest[0] = memoryview(rest[0])[sent:]
        except OSError as error:
            raise self._lost(error) from None

    # ---- bytes in ----

    def _receive(self, into: memoryview, *, all_of_it: bool = False) -> int:
        self._check_time()
        wait_all = all_of_it and not isinstance(self._socket, ssl.SSLSocket)
        try:
            received = self._socket.recv_into(into, 0, socket.MSG_WAITALL if wait_all else 0)
        except OSError as error:
            raise self._lost(error) from None
        if received == 0:
            raise StoreError(f"{self._store.name} has closed the connection", temporary=True)
        return received

    def _lost(self, error: OSError) -> StoreError:
        if isinstance(error, (TimeoutError, BlockingIOError)):
            return self._late()
        # A server that was restarted, or closes what has been idle: the next connection may work.
        return StoreError(f"{self._store.name}: {error.strerror or error}", temporary=True)

    def _line(self) -> bytes:
        line = bytearray()
        while True:
            end = self._buffer.find(b"\n", self._at, self._end)
            if end >= 0:
                line += self._buffer[self._at : end + 1]
                self._at = end + 1
                break
            line += self._buffer[self._at : self._end]
            self._at, self._end = 0, self._receive(memoryview(self._buffer))
            if len(line) > _LINE_MAX:
                break
        if not line.endswith(b"\r\n") or len(line) < 3:
            raise self._nonsense()
        return bytes(line[:-2])

    def _fill(self, piece: memoryview) -> None:
        """A piece of memory with what comes next."""
        kept = min(self._end - self._at, len(piece))
        piece[:kept] = memoryview(self._buffer)[self._at : self._at + kept]
        self._at += kept
        done = kept
        while done < len(piece):
            done += self._receive(piece[done:], all_of_it=True)

    def _skip(self, count: int) -> None:
        if count > _SKIPPED_MAX:
            raise StoreError(f"{self._store.name}: a value has {count} bytes; it is none of ours")
        scratch = memoryview(bytearray(min(count, 1 << 20)))
        while count:
            piece = scratch[: min(count, len(scratch))]
            self._fill(piece)
            count -= len(piece)

    def _end_of_bulk(self) -> None:
        end = bytearray(2)
        self._fill(memoryview(end))
        if end != b"\r\n":
            raise self._nonsense()

    def _bulk_size(self) -> int:
        """Of the string that comes next; -1: there is none."""
        line = self._line()
        if line[:1] == b"-":
            raise self._refusal(line)
        if line[:1] != b"$":
            raise self._nonsense()
        return self._number(line)

    def _bulk_into(self, value: Value, sizes: list[int] | None) -> tuple[Outcome, int]:
        try:
            size = self._bulk_size()
        except _OnItsWayError:
            return Outcome.MISSING, 0
        if size < 0:
            return Outcome.MISSING, 0
        if not fits(size, value, sizes):
            self._skip(size)
            self._end_of_bulk()
            return Outcome.CORRUPT, 0
        for piece in leading(value, size):
            self._fill(piece)
        self._end_of_bulk()
        return Outcome.GOOD, size

    def _bulk_bytes(self) -> bytes:
        size = self._bulk_size()
        if not 0 <= size <= _SKIPPED_MAX:
            raise self._nonsense()
        text = bytearray(size)
        self._fill(memoryview(text))
        self._end_of_bulk()
        return bytes(text)

    def _is_there(self) -> bool:
        try:
            return self._integer() > 0
        except _OnItsWayError:
            return False

    def _integer(self) -> int:
        line = self._line()
        if line[:1] == b"-":
            raise self._refusal(line)
        if line[:1] != b":":
            raise self._nonsense()
        return self._number(line)

    def _number(self, line: bytes) -> int:
        try:
            return int(line[1:])
        except ValueError:
            raise self._nonsense() from None

    def _expect_simple(self, line: bytes) -> None:
        if line[:1] == b"-":
            raise self._refusal(line)
        if line[:1] != b"+":
            raise self._nonsense()

    def _refusal(self, line: bytes) -> StoreError:
        text = line[1:200].decode(errors="replace")
        kind = text.split(" ", 1)[0]
        # What the server says may repeat what it was sent: only its kind is passed on.
        if kind in _TAKES_NOTHING:
            return StoreFullError(f"{self._store.name}{_TAKES_NOTHING[kind]}")
        if kind in ("MOVED", "ASK") and not self._store.is_cluster:
            return _Refused(f"{self._store.name}: it is one of a cluster, and INFO is refused; allow it")
        if kind == "ASK":
            return _OnItsWayError(f"{self._store.name}: a slot is on its way", temporary=True)
        if kind in _TO_BE_CHANGED:
            how = _NotAllowed if kind == "NOPERM" else _Refused
            return how(f"{self._store.name}: {_TO_BE_CHANGED[kind]}")
        if kind == "ERR" and "AUTH" in text:
            return _Refused(
                f"{self._store.name}: it has no password, and one is given; take it out of the URL"
            )
        return StoreError(f"{self._store.name} says {kind}", temporary=kind in _TEMPORARY)

    def _nonsense(self) -> StoreError:
        return StoreError(f"{self._store.name} does not answer as Redis does")


def _at_once(values: Sequence[Value]) -> Iterator[slice]:
    """Parts of a call whose values are sent, or asked for, together."""
    first = num_bytes = 0
    for end, value in enumerate(values):
        num_bytes += value_bytes(value)
        if end > first and num_bytes > _AT_ONCE:
            yield slice(first, end)
            first, num_bytes = end, value_bytes(value)
    if len(values) > first:
        yield slice(first, len(values))


def _exists_of_all(names: Sequence[str]) -> str:
    bulks = "".join([f"${len(name)}\r\n{name}\r\n" for name in names])
    return f"*{len(names) + 1}\r\n$6\r\nEXISTS\r\n{bulks}"


def _bulk(text: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text)


def _command(*parts: str | bytes) -> bytes:
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"*%d\r\n" % len(encoded) + b"".join(map(_bulk, encoded))
