"""Any storage backend of SGLang's own (``HiCacheStorage``), made by SGLang's factory.

::

    hicache://<backend>?<name>=<value>&…        what is behind the ? is the backend's extra_config
    hicache://dynamic?backend_name=…&module_path=…&class_name=…

A value is one tensor of bytes under one key. Backends that store nothing but pages of SGLang's host pool, by
index, refuse that, and are refused in turn when the store is opened: what it does with a value is tried then.

SGLang calls a backend from one thread that loads and from one that stores, and so does this. A backend has no
call that removes or replaces a value: one that was damaged is a miss for as long as the backend keeps it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    import_client,
    search_windows,
    value_bytes,
)

T = TypeVar("T")

_SGLANG = "sglang.srt.mem_cache"
_PROBE_BYTES = 4096


class HiCacheStore(Store):
    def __init__(self, url: RemoteUrl, timeout_s: float) -> None:
        del timeout_s  # backends have their own
        self.any_size = False  # a tensor is of the size that is asked for
        self.replaces = False  # what is there is left there, and said to be stored
        self._url = url
        self._settings = {name: _parsed(text) for name, text in url.options.items()}
        self.name = f"HiCache backend {url.host}"
        self.backend: Any = None
        self.loads, self.stores = threading.Lock(), threading.Lock()

    def open(self) -> None:
        storage = import_client(f"{_SGLANG}.hicache_storage", self.name, "")
        factory = import_client(f"{_SGLANG}.storage.backend_factory", self.name, "")
        config = storage.HiCacheStorageConfig(
            tp_rank=0,  # ours is in the name of a value
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name="flexkv",
            extra_config=self._settings,
        )
        try:
            self.backend = factory.StorageBackendFactory.create_backend(self._url.host, config, None)
            session = _HiCacheSession(self)
            name = f"fkv1/{secrets.token_hex(16)}/{secrets.token_hex(16)}"
            sent = [memoryview(bytearray(secrets.token_bytes(_PROBE_BYTES)))]
            received = [memoryview(bytearray(_PROBE_BYTES))]
            session.put([name], [sent])
            works = session.exists([name]) == [True] and session.get([name], [received]) == [Outcome.GOOD]
        except Exception as error:  # a backend's own
            raise ConfigError(
                f"remote: {self.name} cannot be used ({type(error).__name__}: {self._told(error)}); give "
                "what it needs behind the ?, or name another store"
            ) from None
        if not works or sent != received:
            raise ConfigError(
                f"remote: {self.name} does not bring back what it was given by set(); name another store"
            )

    def _told(self, error: Exception) -> str:
        """Of what it says the first line, without what it was given to log in somewhere."""
        line = (str(error).splitlines() or [""])[0][:200]
        for secret in self._url.options.values():
            line = line.replace(secret, "…") if secret else line
        return line

    def session(self) -> Session:
        return _HiCacheSession(self)

    def notes(self) -> list[str]:
        return ["what bounds its size, and how it is reached, is the backend's own affair"]

    def close(self) -> None:
        backend, self.backend = self.backend, None
        with contextlib.suppress(Exception):
            if hasattr(backend, "close"):
                backend.close()


class _HiCacheSession(Session):
    def __init__(self, store: HiCacheStore) -> None:
        self._store, self._backend = store, store.backend
        self._received = torch.empty(0, dtype=torch.uint8)

    def exists(self, names: Sequence[str]) -> list[bool]:
        with self._store.loads:
            return self._try(lambda: [bool(self._backend.exists(_key(name))) for name in names])

    def count_leading(self, names: Sequence[str]) -> int:
        with self._store.loads:
            return self._try(lambda: int(self._backend.batch_exists([_key(name) for name in names])))

    def find_windows(self, names: Sequence[str], window: int) -> list[bool]:
        # Of those that are not the leading ones each is a call of its own.
        return search_windows(
            len(names), window, lambda positions: self.exists([names[i] for i in positions])
        )

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        failed: Exception | None = None
        outcomes = []
        if sizes is not None:
            sizes[:] = map(value_bytes, values)
        for name, value in zip(names, values, strict=True):
            try:
                with self._store.loads:
                    outcomes.append(self._get(_key(name), value))
            except Exception as error:  # of one value: for instance that it is shorter
                failed = error
                outcomes.append(Outcome.FAILED)
        if failed is not None and all(outcome == Outcome.FAILED for outcome in outcomes):
            raise self._error(failed)
        return outcomes

    def _get(self, key: str, value: Value) -> Outcome:
        size = value_bytes(value)
        if self._received.numel() != size:
            self._received = torch.empty(size, dtype=torch.uint8)
        # Some warn of what is not there.
        found = self._backend.get(key, self._received) if self._backend.exists(key) else None
        if found is None:
            return Outcome.MISSING
        content = memoryview(found.contiguous().view(torch.uint8).flatten().numpy())
        if len(content) != size:
            return Outcome.CORRUPT
        at = 0
        for piece in value:
            piece[:] = content[at : at + len(piece)]
            at += len(piece)
        return Outcome.GOOD

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        done = [self._put(_key(name), value) for name, value in zip(names, values, strict=True)]
        if done and not any(done):
            raise StoreFullError(f"{self._store.name} stores nothing")
        return [Outcome.GOOD if each else Outcome.MISSING for each in done]

    def _put(self, key: str, value: Value) -> bool:
        content = torch.frombuffer(bytearray().join(value), dtype=torch.uint8)  # which the backend may keep
        with self._store.stores:
            return self._try(lambda: bool(self._backend.set(key, content)))

    def close(self) -> None:
        pass

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # a backend's own
            raise self._error(error) from None

    def _error(self, error: Exception) -> StoreError:
        # What it says may hold whatever it was given to log in.
        return StoreError(f"{self._store.name}: {type(error).__name__}")


def _key(name: str) -> str:
    """Backends make files and paths of it."""
    return name.replace("/", "-")


def _parsed(text: str) -> object:
    """``extra_config`` is JSON elsewhere: numbers and booleans are meant as such."""
    try:
        return json.loads(text)
    except ValueError:
        return text
