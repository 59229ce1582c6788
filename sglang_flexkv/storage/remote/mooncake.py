"""Mooncake Store: memory of many machines as one, reached by TCP or RDMA; a value is an object in it.

::

    mooncake://MASTER:PORT?protocol=rdma&device=mlx5_0

This process gives no memory to the store: it would be gone with it. Bytes go from and to the host pool where
they are (``lend``); what lies elsewhere, the headers of values, goes by way of memory of the session's own.
The client's library has its time limits in the environment alone; they are set there before it is loaded.

``health_check`` says that all is well while nothing works: whether it does is told by calls.
"""

from __future__ import annotations

import math
import mmap
import socket
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_flexkv.common.config import default_environment
from sglang_flexkv.common.lower_tier import AwayError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    fits,
    import_client,
    leading,
    value_bytes,
)

# What calls answer in place of a size.
_NO_ROOM, _TOO_SMALL, _TRANSFER_FAILED = -200, -600, -800
# Not stored; or being stored, or removed, at this moment.
_MISSING = (-702, -703, -704)
_SAYS = {
    _TRANSFER_FAILED: "the process that holds the memory does not answer",
    -900: "its master cannot be reached",
    -901: "its master does not answer",
}
_NO_SEGMENT = 0
# Of the client's own, which nothing of ours goes through.
_CLIENT_BUFFER = 1 << 20


class MooncakeStore(Store):
    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        self._url, self.timeout_s = url, timeout_s
        self.name = f"Mooncake Store at {url.host}:{url.port}"
        self.client: Any = None
        self._lock = threading.Lock()  # over what follows
        self._lent: set[tuple[int, int]] = set()  # addresses and sizes that the client knows

    def open(self) -> None:
        seconds = str(max(1, math.ceil(self.timeout_s)))
        milliseconds = str(max(1, int(self.timeout_s * 1000)))
        default_environment(
            MC_RPC_TIMEOUT_MS=milliseconds,
            MC_RPC_CONNECT_TIMEOUT_MS=milliseconds,
            MC_TCP_STATUS_TIMEOUT_SEC=seconds,
            MC_TCP_PROGRESS_TIMEOUT_SEC=seconds,
            MC_STORE_CLIENT_SETUP_RETRIES="1",
            MC_LOG_LEVEL="ERROR",
        )
        library = import_client("mooncake.store", "Mooncake Store", "mooncake")
        here = self._address_towards_the_master()
        url = self._url
        client = library.MooncakeDistributedStore()
        error = client.setup(
            url.options.get("host", here),
            url.options.get("metadata", "P2PHANDSHAKE"),
            _NO_SEGMENT,
            _CLIENT_BUFFER,
            url.options.get("protocol", "tcp"),
            url.options.get("device", ""),
            f"{url.host}:{url.port}",
        )
        if error or (error := client.batch_is_exist(["fkv1/0/0"])[0]) < 0:
            raise AwayError(
                f"remote: {self.name} lets nobody in ({_says(error)}); is this the port of a mooncake_master"
                " of the client's version?"
            )
        with self._lock:
            self._lent.clear()
            self.client = client

    def _address_towards_the_master(self) -> str:
        """Of this machine, as others see it. The client itself tries for minutes where there is nobody."""
        try:
            with socket.create_connection((self._url.host, self._url.port), self.timeout_s) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            raise AwayError(
                f"remote: {self.name} cannot be reached: {error.strerror or error}; start mooncake_master, "
                "or check host and port"
            ) from None

    def lend(self, memory: memoryview) -> None:
        address = (_address(memory), len(memory))
        with self._lock:
            if address not in self._lent:
                if error := self.client.register_buffer(*address):
                    raise StoreError(f"{self.name}: the host pool cannot be registered ({error})")
                self._lent.add(address)

    def is_lent(self, address: int, size: int) -> bool:
        return any(
            begin <= address and address + size <= begin + all_of_it for begin, all_of_it in self._lent
        )

    def session(self) -> Session:
        return _MooncakeSession(self)

    def notes(self) -> list[str]:
        return [
            "its clients listen on every address of their machine and ask nobody who he is: keep the network "
            "to yourself"
        ]

    def close(self) -> None:
        with self._lock:
            client, self.client = self.client, None
            self._lent.clear()
        if client is not None:
            client.close()


class _MooncakeSession(Session):
    """All sessions share one client, which may be called by many threads at once."""

    def __init__(self, store: MooncakeStore) -> None:
        if store.client is None:
            raise StoreError(f"{store.name} is not open")
        self._store, self._client = store, store.client
        self._own = memoryview(b"")
        self._some_are_smaller = False  # of the values that were got last

    def exists(self, names: Sequence[str]) -> list[bool]:
        return [there == 1 for there in self._find(names)]

    def count_leading(self, names: Sequence[str]) -> int:
        found = self._find(names)
        return found.index(0) if 0 in found else len(found)

    def _find(self, names: Sequence[str]) -> list[int]:
        """Of each value 1 or 0."""
        found: list[int] = self._client.batch_is_exist(list(names))
        if (lowest := min(found, default=0)) < 0:
            raise self._error(lowest)
        return found

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        if sizes is None:
            return self._get(names, values)
        # It brings a value only to memory of its very size.
        places = list(values)
        if self._some_are_smaller:
            places = [self._place(name, value) for name, value in zip(names, values, strict=True)]
        outcomes = self._get(names, places)
        if not self._some_are_smaller and Outcome.CORRUPT in outcomes:
            again = [i for i, outcome in enumerate(outcomes) if outcome == Outcome.CORRUPT]
            for i in again:
                places[i] = self._place(names[i], values[i])
            got = self._get([names[i] for i in again], [places[i] for i in again])
            for i, outcome in zip(again, got, strict=True):
                outcomes[i] = outcome
        sizes[:] = map(value_bytes, places)
        self._some_are_smaller = sum(sizes) < sum(map(value_bytes, values))
        return outcomes

    def _place(self, name: str, value: Value) -> Value:
        """As much of the memory as the value takes, if it is smaller."""
        size: int = self._client.get_size(name)
        return leading(value, size) if fits(size, value, []) and size != value_bytes(value) else value

    def _get(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        addresses, sizes, elsewhere = self._places(values)
        got: list[int] = self._client.batch_get_into_multi_buffers(list(names), addresses, sizes)
        outcomes = [
            self._outcome(name, value, moved) for name, value, moved in zip(names, values, got, strict=True)
        ]
        if got and all(outcome == Outcome.FAILED for outcome in outcomes):
            raise self._error(got[0])
        for piece, own in elsewhere:
            piece[:] = own
        return outcomes

    def _outcome(self, name: str, value: Value, moved: int) -> Outcome:
        if moved == value_bytes(value):
            return Outcome.GOOD
        if moved in _MISSING:
            return Outcome.MISSING
        if moved >= 0 or moved == _TOO_SMALL:
            return Outcome.CORRUPT
        if moved == _TRANSFER_FAILED:  # which is also said of a value that is shorter
            size = self._client.get_size(name)
            if size >= 0 and size != value_bytes(value):
                return Outcome.CORRUPT
        return Outcome.FAILED

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        addresses, sizes, elsewhere = self._places(values)
        for piece, own in elsewhere:
            own[:] = piece
        # What is there stays there otherwise, and its put is called a success.
        there = [name for name, found in zip(names, self.exists(names), strict=True) if found]
        if there:
            self._client.batch_remove(there, True)
        errors: list[int] = self._client.batch_put_from_multi_buffers(list(names), addresses, sizes)
        if errors and all(errors):
            if _NO_ROOM in errors:
                raise StoreFullError(f"{self._store.name} is full")
            raise self._error(errors[0])
        how = {0: Outcome.GOOD, _NO_ROOM: Outcome.MISSING}
        return [how.get(error, Outcome.FAILED) for error in errors]

    def close(self) -> None:
        self._give_up_own_memory()
        self._client = None

    def _places(
        self, values: Sequence[Value]
    ) -> tuple[list[list[int]], list[list[int]], list[tuple[memoryview, memoryview]]]:
        """Where the client is to read or write each piece, how much, and what is to be copied there or from
        there: pieces that are not in memory that the client knows."""
        addresses = [[_address(piece) for piece in value] for value in values]
        sizes = [[len(piece) for piece in value] for value in values]
        unknown = [
            (i, j)
            for i, value in enumerate(values)
            for j, piece in enumerate(value)
            if not self._store.is_lent(addresses[i][j], len(piece))
        ]
        own = self._own_memory(sum(sizes[i][j] for i, j in unknown))
        elsewhere, at = [], 0
        for i, j in unknown:
            place = own[at : at + sizes[i][j]]
            at += len(place)
            addresses[i][j] = _address(place)
            elsewhere.append((values[i][j], place))
        return addresses, sizes, elsewhere

    def _own_memory(self, size: int) -> memoryview:
        if len(self._own) < size:
            self._give_up_own_memory()
            own = mmap.mmap(-1, 1 << (size - 1).bit_length())
            if error := self._client.register_buffer(_address(own), len(own)):
                raise self._error(error)
            self._own = memoryview(own)
        return self._own

    def _give_up_own_memory(self) -> None:
        if self._own:
            self._client.unregister_buffer(_address(self._own))
            self._own = memoryview(b"")

    def _error(self, number: int) -> StoreError:
        return StoreError(f"{self._store.name}: {_says(number)}")


def _says(number: int) -> str:
    return _SAYS.get(number, f"error {number}")


def _address(memory: memoryview | mmap.mmap) -> int:
    address: int = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    return address
