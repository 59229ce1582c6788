"""A Redis or Valkey cluster: which node has a value is the client library's to know (redis-py), the bytes go
by the same path as to a single server.

A server that says that it is one of a cluster is taken as one: the URL names any of its nodes. Each session
has a connection to each node. When a value has moved, or a node is gone, the map of slots is asked for again
before the next call.
"""

from __future__ import annotations

import threading
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

T = TypeVar("T")

Node = tuple[str, int]  # host and port


class SlotMap:
    """Which node has which slot, for all sessions of a store.

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

    def forget(self) -> None:
        """It is not right any more."""
        self._is_current = False

    def nodes_of(self, names: Sequence[str]) -> list[Node]:
        """Raises StoreError."""
        with self._lock:
            if not self._is_current:
                if self._nodes:  # it has just been asked for, otherwise
                    self._try(self._cluster.nodes_manager.initialize)
                slots = self._cluster.nodes_manager.slots_cache
                self._nodes = {slot: (nodes[0].host, nodes[0].port) for slot, nodes in slots.items()}
                self._is_current = True
            nodes = self._nodes
        try:
            return [nodes[self._slot_of(name.encode())] for name in names]
        except KeyError:
            self.forget()
            raise StoreError(f"{self.name}: no node of the cluster has some of the slots") from None

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
        there, errors = self._each(
            names, lambda session, part: session.exists([names[i] for i in part]), False
        )
        if errors:
            raise errors[-1][0]
        return there

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
        """What one node cannot do does not spoil what the others did. What may be gone at once, a slot that
        has moved or a connection that was lost, is tried again: whoever made the call would try again only
        what failed as a whole."""
        outcomes, errors = self._each(names, call, Outcome.FAILED)
        if any(error.temporary for error, _ in errors) and Outcome.GOOD in outcomes:
            again = [position for error, part in errors if error.temporary for position in part]
            errors = [(error, part) for error, part in errors if not error.temporary]
            repeated, still = self._each(
                [names[i] for i in again],
                lambda session, part: call(session, [again[i] for i in part]),
                Outcome.FAILED,
            )
            for position, outcome in zip(again, repeated, strict=True):
                outcomes[position] = outcome
            errors += [(error, [again[i] for i in part]) for error, part in still]
        if errors and Outcome.GOOD not in outcomes:
            raise errors[-1][0]
        for error, part in errors:
            if isinstance(error, StoreFullError):  # this node
                for position in part:
                    outcomes[position] = Outcome.MISSING
        return outcomes

    def _each(
        self, names: Sequence[str], call: Callable[[Session, list[int]], list[T]], otherwise: T
    ) -> tuple[list[T], list[tuple[StoreError, list[int]]]]:
        """Makes a call to each node that has some of the names, and says what went wrong with which."""
        parts: dict[Node, list[int]] = {}
        for position, node in enumerate(self._slots.nodes_of(names)):
            parts.setdefault(node, []).append(position)
        results = [otherwise] * len(names)
        failed: list[tuple[StoreError, list[int]]] = []
        for node, part in parts.items():
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
                    self._slots.forget()  # a replica may have taken its place
        return results, failed
