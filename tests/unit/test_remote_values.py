"""What a value in a remote store looks like, and what is not taken for one."""

from __future__ import annotations

import struct

import pytest
from dict_store import LAYERS, Server, Values

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.storage.remote import tier as remote_tier

PAGE = _core.VALUE_HEADER_BYTES


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
