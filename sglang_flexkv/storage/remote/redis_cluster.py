"""A Redis or Valkey cluster: which node has a value is the client library's to know (redis-py), the bytes go
by the same path as to a single server.

A server that says that it is one of a cluster is taken as one: the URL names any of its nodes. Each session
has a connection to each node. When a value has moved, or a node is gone, the map of slots is asked for again
before the next call.

A node that fails is no fault of the cluster as long as another one works: what it has counts as not there,
and it is left alone for a while. If none works, calls fail.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    StoreError,
    StoreFullError,
    Value,
    import_client,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A node that failed is left alone for so long, then twice as long, up to the second.
_AWAY_S, _AWAY_MAX_S = 1.0, 60.0

Node = tuple[str, int]  # host and port


class SlotMap:
    """Which node has which slot, and which nodes fail, for all sessions of a store.

    Raises:
        ConfigError: the client library is missing.
        StoreError: no node answers with a map.
    """

    def __init__(self, url: RemoteUrl, name: str, timeout_s: float) -> None:
        self.name = name
        self._slot_of: Callable[[bytes], int] = import_client("redis.crc", name, "redis").key_slot
        options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        if url.password:
            options.update(username=url.username or None, password=url.password)
        if url.scheme == "rediss":
            options.update(ssl=True, ssl_ca_certs=url.options.get("ca_file"))
        make = import_client("redis.cluster", name, "redis").RedisCluster
        self._lock = threading.Lock()
        self._cluster: Any = self._try(lambda: make(host=url.host, port=url.port, **options))
        self._nodes: dict[int, Node] = {}
        self._is_current = False
        self._failing: dict[Node, tuple[float, float]] = {}  # until when each is left alone, and for how long

    def forget(self) -> None:
        """It is not right any more."""
        self._is_current = False

    def nodes_of(self, names: Sequence[str]) -> list[Node | None]:
        """None: no node has its slot. Raises StoreError."""
        with self._lock:
            if not self._is_current:
                if self._nodes:  # it has just been asked for, otherwise
                    self._try(self._cluster.nodes_manager.initialize)
                slots = self._cluster.nodes_manager.slots_cache
                self._nodes = {slot: (nodes[0].host, nodes[0].port) for slot, nodes in slots.items()}
                self._is_current = True
            nodes = self._nodes
        return [nodes.get(self._slot_of(name.encode())) for name in names]

    def may_call(self, node: Node) -> bool:
        """Of one that fails by one call at a time, and that not often: others need not wait for it, too."""
        with self._lock:
            if node not in self._failing:
                return True
            until_s, pause_s = self._failing[node]
            now_s = time.monotonic()
            if now_s < until_s:
                return False
            pause_s = min(2 * pause_s, _AWAY_MAX_S)
            self._failing[node] = (now_s + pause_s, pause_s)
            return True

    def note(self, node: Node, error: StoreError | None) -> None:
        """How a call of it has ended."""
        with self._lock:
            was_failing = node in self._failing
            if error is None:
                self._failing.pop(node, None)
            elif not was_failing:
                self._failing[node] = (time.monotonic() + _AWAY_S, _AWAY_S)
        if was_failing == (error is None):
            why = f"{str(error).removeprefix(self.name)}; what it has counts as not there"
            logger.warning("%s: node %s:%d%s.", self.name, *node, why if error else " works again")

    def any_works(self) -> bool:
        """Whether there is a node that has not failed."""
        with self._lock:
            return any(node not in self._failing for node in set(self._nodes.values()))

    def close(self) -> None:
        self._cluster.close()

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # the library's, which may say more than anybody should see
            raise StoreError(
                f"{self.name}: the cluster cannot be asked for its nodes ({type(error).__name__})"
            ) from None


class ClusterSession(Session):
    """
    Args:
        connect: to one node.
    """

    def __init__(self, slots: SlotMap, connect: Callable[[Node], Session]) -> None:
        self._slots, self._connect = slots, connect
        self._sessions: dict[Node, Session] = {}

    def exists(self, names: Sequence[str]) -> list[bool]:
        return self._call(names, lambda session, part: session.exists([names[i] for i in part]), False)[0]

    def count_leading(self, names: Sequence[str]) -> int:
        # Several values can be counted by one command only if they are in one slot.
        there = self.exists(names)
        return there.index(False) if False in there else len(there)

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        def get(session: Session, part: list[int]) -> list[Outcome]:
            came = [0] * len(part)
            outcomes = session.get(
                [names[i] for i in part], [values[i] for i in part], came if sizes is not None else None
            )
            for i, size in zip(part, came, strict=True):
                if sizes is not None:
                    sizes[i] = size
            return outcomes

        return self._move(names, get)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        return self._move(
            names, lambda session, part: session.put([names[i] for i in part], [values[i] for i in part])
        )

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _move(
        self, names: Sequence[str], call: Callable[[Session, list[int]], list[Outcome]]
    ) -> list[Outcome]:
        outcomes, errors = self._call(names, call, Outcome.MISSING)
        full = [error for error in errors if isinstance(error, StoreFullError)]
        if full and Outcome.GOOD not in outcomes:  # where some had room, the others' values are not stored
            raise full[-1]
        return outcomes

    def _call(
        self, names: Sequence[str], call: Callable[[Session, list[int]], list[T]], otherwise: T
    ) -> tuple[list[T], list[StoreError]]:
        """What one node cannot do does not spoil what the others did. What may be gone at once, a slot that
        has moved or a connection that was lost, is tried again."""
        results = [otherwise] * len(names)
        errors: list[StoreError] = []
        left = list(range(len(names)))
        for is_last in (False, True):
            again: list[int] = []
            for error, part in self._each(names, left, call, results, is_last):
                if error.temporary and not is_last:
                    again += part
                else:
                    errors.append(error)
            if not again:
                break
            left = sorted(again)
        if errors and not self._slots.any_works():
            raise errors[-1]
        return results, errors

    def _each(
        self,
        names: Sequence[str],
        positions: Sequence[int],
        call: Callable[[Session, list[int]], list[T]],
        results: list[T],
        is_last: bool,
    ) -> list[tuple[StoreError, list[int]]]:
        """Makes a call to each node that has some of the names at these positions, and says what went wrong
        with which."""
        parts: dict[Node | None, list[int]] = {}
        nodes = self._slots.nodes_of([names[i] for i in positions])
        for position, node in zip(positions, nodes, strict=True):
            parts.setdefault(node, []).append(position)
        failed: list[tuple[StoreError, list[int]]] = []
        for node, part in parts.items():
            if node is None or not self._slots.may_call(node):
                failed.append((StoreError(f"{self._slots.name}: some nodes of the cluster fail"), part))
                continue
            problem: StoreError | None = None
            try:
                if node not in self._sessions:
                    self._sessions[node] = self._connect(node)
                for position, result in zip(part, call(self._sessions[node], part), strict=True):
                    results[position] = result
            except StoreError as error:
                failed.append((error, part))
                if (session := self._sessions.pop(node, None)) is not None:
                    session.close()
                if not isinstance(error, StoreFullError):
                    problem = error
                    self._slots.forget()  # a replica may have taken its place
            if problem is None or is_last or not problem.temporary:
                self._slots.note(node, problem)
        return failed
