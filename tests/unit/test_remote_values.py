"""What a value in a remote store looks like, and what is not taken for one."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, _core
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.remote.store import Outcome, Session, Store, Value

BLOCK, LAYERS = 16, 3
PAGE = _core.VALUE_HEADER_BYTES
NAMESPACE = make_namespace({"test": "values"})
PATIENCE_S = 60.0


class Values(Store, Session):
    """A store in a dict."""

    def __init__(self) -> None:
        self.name = "dict"
        self.held: dict[str, bytes] = {}

    def open(self) -> None:
        pass

    def session(self) -> Session:
        return self

    def exists(self, names: list[str]) -> list[bool]:
        return [name in self.held for name in names]

    def get(self, names: list[str], values: list[Value]) -> list[Outcome]:
        outcomes = []
        for name, value in zip(names, values, strict=True):
            held = self.held.get(name)
            outcomes.append(Outcome.MISSING if held is None else Outcome.GOOD)
            if held is not None and len(held) != sum(map(len, value)):
                outcomes[-1] = Outcome.CORRUPT
            elif held is not None:
                for piece in value:
                    piece[:] = held[: len(piece)]
                    held = held[len(piece) :]
        return outcomes

    def put(self, names: list[str], values: list[Value]) -> list[Outcome]:
        for name, value in zip(names, values, strict=True):
            self.held[name] = b"".join(map(bytes, value))
        return [Outcome.GOOD] * len(names)

    def close(self) -> None:
        pass


class Server:
    """One engine over the store, with a prompt of one block."""

    def __init__(self, namespace: bytes = NAMESPACE, heads: int = 2) -> None:
        layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, LAYERS, 1, BLOCK, heads, 64)
        self.kv = torch.zeros(layout.kv_shape)
        self.engine = KVTaskEngine(
            CacheConfig(tokens_per_block=BLOCK, num_cpu_blocks=4, remote="file:///tmp"),
            layout.device_buffers(list(self.kv)),
            namespace=namespace,
        )
        self.keys = SequenceMeta(np.arange(BLOCK), BLOCK, NAMESPACE).block_keys
        self.content = torch.rand(self.kv.shape, generator=torch.Generator().manual_seed(1))

    def launch(self, task: KVTask) -> None:
        self.engine.launch(task, np.arange(BLOCK))
        assert self.engine.wait([task], PATIENCE_S)
        self.engine.forget(task)

    def put(self) -> None:
        self.kv[:] = self.content
        self.launch(self.engine.create_put(None, self.keys))
        assert self.engine.flush_spills(PATIENCE_S)

    def get(self) -> bool:
        """Whether it comes from the store."""
        self.engine.clear_tiers(0)
        question = self.engine.ask(self.keys)
        assert question is not None
        while not question.is_over:
            self.engine.poll()
        self.engine.learn(question, None)
        self.kv[:] = -1
        task = self.engine.create_get(self.keys)
        self.launch(task)
        if task.plan is None or task.status is not TaskStatus.COMPLETED:
            return False
        assert torch.equal(self.kv, self.content)
        return True


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    made = Values()
    monkeypatch.setattr(remote_tier, "STORES", {"file": lambda url, timeout_s: made})
    monkeypatch.setattr(remote_tier, "_ABSENT_S", 0.0)
    monkeypatch.setattr(remote_tier, "_SPOILT_S", 0.0)
    return made


@pytest.fixture
def stored(values: Values) -> tuple[str, bytes]:
    server = Server()
    server.put()
    server.engine.close()
    ((name, value),) = values.held.items()
    return name, value


def loads(**options: object) -> bool:
    server = Server(**options)
    try:
        return server.get()
    finally:
        server.engine.close()


def reseal(header: bytearray) -> bytes:
    """A header that was changed by somebody who knows how it is summed up."""
    import xxhash

    header[PAGE - 8 :] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(header[: PAGE - 8])))
    return bytes(header)


def test_a_value_is_a_page_and_the_block(stored: tuple[str, bytes]) -> None:
    name, value = stored
    prefix, namespace, key = name.split("/")
    assert prefix == "fkv1"
    assert (len(namespace), len(key)) == (32, 32)
    magic, version, header_bytes = struct.unpack_from("<8sII", value)
    assert (magic, version, header_bytes) == (b"FLEXKVAL", _core.VALUE_VERSION, PAGE)
    assert value[16:32].hex() == namespace
    assert value[32:48].hex() == key
    block_bytes, stored_bytes, flags, num_slices = struct.unpack_from("<QQII", value, 48)
    assert block_bytes == stored_bytes == len(value) - PAGE
    assert (flags, num_slices) == (0, LAYERS)
    assert loads()


@pytest.mark.parametrize("at", [0, 8, 12, 16, 32, 48, 56, 64, 68, 72, 500, PAGE - 8, PAGE - 1, PAGE, -1])
def test_one_bit_is_enough(values: Values, stored: tuple[str, bytes], at: int) -> None:
    name, value = stored
    changed = bytearray(value)
    changed[at] ^= 1
    values.held[name] = bytes(changed)
    assert not loads()


# Of these the header's own sum is right: each field is looked at for itself.
FIELDS = {
    "version": (8, struct.pack("<I", 2)),
    "size of the header": (12, struct.pack("<I", 8192)),
    "namespace": (16, b"\1" * 16),
    "key": (32, b"\1" * 16),
    "size of the block": (48, struct.pack("<Q", 1)),
    "size as it is stored": (56, struct.pack("<Q", 1)),
    "flags": (64, struct.pack("<I", 1)),
    "slices": (68, struct.pack("<I", LAYERS + 1)),
    "padding": (PAGE - 9, b"\1"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_looked_at(values: Values, stored: tuple[str, bytes], field: str) -> None:
    pytest.importorskip("xxhash")
    name, value = stored
    at, instead = FIELDS[field]
    header = bytearray(value[:PAGE])
    header[at : at + len(instead)] = instead
    values.held[name] = reseal(header) + value[PAGE:]
    assert not loads()
    values.held[name] = reseal(bytearray(value[:PAGE])) + value[PAGE:]
    assert loads()


@pytest.mark.parametrize("change", ["short", "long", "empty", "zeros", "text"])
def test_what_is_no_value_is_none(values: Values, stored: tuple[str, bytes], change: str) -> None:
    name, value = stored
    values.held[name] = {
        "short": value[:-1],
        "long": value + b"\0",
        "empty": b"",
        "zeros": bytes(len(value)),
        "text": (b"503 service unavailable" * len(value))[: len(value)],
    }[change]
    assert not loads()


def test_a_value_under_another_name_is_none(values: Values, stored: tuple[str, bytes]) -> None:
    _, value = stored
    other = Server(namespace=make_namespace({"test": "somebody else"}))
    other.put()
    (name,) = set(values.held) - {stored[0]}
    values.held[name] = value
    assert not other.get()
    other.engine.close()


def test_a_value_that_is_spoilt_is_replaced_by_who_stores_it_next(
    values: Values, stored: tuple[str, bytes]
) -> None:
    name, value = stored
    values.held[name] = bytes(len(value))
    server = Server()
    assert not server.get()
    server.put()
    assert values.held[name] == value
    assert server.get()
    server.engine.close()


def test_what_is_there_is_not_stored_again(values: Values, stored: tuple[str, bytes]) -> None:
    values.put = None  # type: ignore[method-assign, assignment]
    server = Server()
    server.put()
    assert server.engine.stats()["REMOTE"]["there_already"] == 1
    server.engine.close()
