"""What a value in a remote store looks like, and what is not taken for one."""

from __future__ import annotations

import itertools
import os
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from dict_store import BLOCK, LAYERS, NAMESPACE, Server, Values

from sglang_flexkv import _core
from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import RemoteCompression
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.storage.remote import compression
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


def compressed(values: Values, dtype: torch.dtype = torch.bfloat16) -> tuple[str, bytes]:
    server = Server(heads=8, dtype=dtype, compression="always")
    server.put()
    server.engine.close()
    ((name, value),) = values.held.items()
    return name, value


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


# ---- compressed ----

BF16 = torch.bfloat16
BF16_BYTES = LAYERS * 2 * BLOCK * 8 * 64 * 2


@pytest.mark.parametrize(
    ("dtype", "flags", "at_most"), [(BF16, 1, 0.75), (torch.float16, 1, 0.95), (torch.float32, 2, 0.9)]
)
@pytest.mark.parametrize("reader", ["none", "always"])
def test_what_one_compressed_everybody_reads(
    values: Values, dtype: torch.dtype, flags: int, at_most: float, reader: str
) -> None:
    _, value = compressed(values, dtype)
    block_bytes = BF16_BYTES * dtype.itemsize // 2
    found = struct.unpack_from("<QQII", value, 48)
    assert (found[0], *found[2:]) == (block_bytes, flags, LAYERS)
    assert PAGE + found[1] <= len(value) < PAGE + found[1] + PAGE
    assert len(value) % PAGE == 0
    assert found[1] < at_most * block_bytes
    server = Server(heads=8, dtype=dtype, compression=reader)
    assert server.get()
    assert server.engine.stats()["REMOTE"]["expanded_bytes"] == block_bytes
    server.engine.close()


def test_who_compresses_reads_what_is_not(values: Values, stored: tuple[str, bytes]) -> None:
    server = Server(compression="always")
    assert server.get()
    stats = server.engine.stats()["REMOTE"]
    assert stats["expanded_bytes"] == stats["compressed_bytes"] == 0
    server.engine.close()


def test_what_it_brings_is_counted(values: Values) -> None:
    server = Server(heads=8, dtype=BF16, compression="always")
    server.put()
    (value,) = values.held.values()
    stats = server.engine.stats()["REMOTE"]
    assert stats["compressed_bytes"] == BF16_BYTES
    assert stats["compressed_to_bytes"] == len(value) - PAGE
    server.engine.close()


def test_numbers_of_several_sizes_are_none_that_shrink() -> None:
    for dtypes, number_bytes in (((BF16, BF16), 2), ((BF16, torch.float32), 0), ((torch.uint8,) * 2, 0)):
        buffers = [torch.zeros(1, 2, dtype=dtype) for dtype in dtypes]
        assert DeviceBuffers([buffers], 1).number_bytes == number_bytes


@pytest.mark.parametrize("what", ["noise", "fp8"])
def test_what_does_not_shrink_is_stored_as_it_is(
    values: Values, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    dtype = torch.float8_e4m3fn if what == "fp8" else BF16
    server = Server(heads=8, dtype=dtype, compression="always")
    if what == "noise":
        generator = torch.Generator().manual_seed(2)
        shape = server.content.view(torch.uint8).shape
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        server.content = noise.view(BF16)
    server.put()
    (value,) = values.held.values()
    block_bytes, stored_bytes, flags, _ = struct.unpack_from("<QQII", value, 48)
    assert block_bytes == stored_bytes == len(value) - PAGE
    assert flags == 0
    assert server.get()
    assert server.engine.stats()["REMOTE"]["compressed_bytes"] == 0
    assert ("changes nothing here" in caplog.text) == (what == "fp8")
    server.engine.close()


def test_damage_anywhere_is_a_miss(values: Values) -> None:
    name, value = compressed(values)
    server = Server(heads=8, dtype=BF16)
    random_ = random.Random(1)
    places = [*range(0, 110, 3), *random_.sample(range(110, len(value)), 60), PAGE - 1, PAGE, -1]
    for at in places:
        changed = bytearray(value)
        changed[at] ^= 1 << random_.randrange(8)
        values.held[name] = bytes(changed)
        assert not server.get(), at
    for size in (0, 1, PAGE, PAGE + 1, 2 * PAGE, len(value) - PAGE, len(value) - 1):
        values.held[name] = value[:size]
        assert not server.get(), size
    for more in (1, PAGE, 10 * PAGE):
        values.held[name] = value + bytes(more)
        assert not server.get(), more
    values.held[name] = value
    assert server.get()
    server.engine.close()


def sealed(value: bytes, **changes: int) -> bytes:
    """A compressed value with all sums right, of whatever is stored in it: for the block's own."""
    import xxhash

    page, body = bytearray(value[:PAGE]), value[PAGE:]
    for field, number in changes.items():
        layout, at = {"stored_bytes": ("<Q", 56), "flags": ("<I", 64)}[field]
        struct.pack_into(layout, page, at, number)
    identity = bytes(page[16:48]) + struct.pack("<Q", LAYERS)
    seed = xxhash.xxh3_64_intdigest(identity)
    struct.pack_into("<Q", page, 72 + 8 * LAYERS, xxhash.xxh3_64_intdigest(body, seed))
    return reseal(page) + body


def test_what_cannot_be_expanded_to_the_block_is_a_miss(values: Values) -> None:
    """By somebody who knows how it is summed up: what is expanded is not what anybody would have stored."""
    pytest.importorskip("xxhash")
    name, value = compressed(values)
    _, stored_bytes = struct.unpack_from("<QQ", value, 48)
    server = Server(heads=8, dtype=BF16)
    values.held[name] = sealed(value)
    assert server.get()
    random_ = random.Random(2)
    coded = PAGE + BF16_BYTES // 2
    for turn in range(150):
        changed = bytearray(value)
        for _ in range(1 + turn % 4):
            # Often in the first bytes, which have the code and sizes.
            at = coded + random_.randrange(144 if turn % 2 else len(value) - coded)
            changed[at] = random_.randrange(256)
        if bytes(changed[: PAGE + stored_bytes]) != value[: PAGE + stored_bytes]:
            values.held[name] = sealed(bytes(changed))
            assert not server.get()
    for at in (128, 132, 136, 140):  # where the sizes of streams are
        for size in (0, 2**32 - 1, 2**31):
            wrong_size = bytearray(value)
            struct.pack_into("<I", wrong_size, coded + at, size)
            values.held[name] = sealed(bytes(wrong_size))
            assert not server.get(), (at, size)
    for lengths in (b"\0", b"\x11", b"\xbb", b"\xff"):  # of codes: none, too many, too few bits, too many
        wrong_code = bytearray(value)
        wrong_code[coded : coded + 128] = 128 * lengths
        values.held[name] = sealed(bytes(wrong_code))
        assert not server.get(), lengths
    for wrong in (0, 1, BF16_BYTES // 2, stored_bytes - 1, stored_bytes + PAGE, BF16_BYTES, 2**64 - 1):
        values.held[name] = sealed(value, stored_bytes=wrong)
        assert not server.get(), wrong
    for flags in (0, 2, 3, 5, 2**32 - 1):
        values.held[name] = sealed(value, flags=flags)
        assert not server.get(), flags
    server.engine.close()


def test_a_backend_of_one_size_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"remote_compression: HiCache backend file brings values of one size"
    ):
        remote_tier.RemoteTier(
            parse_remote_url("hicache://file"),
            8,
            namespace=NAMESPACE,
            compression=RemoteCompression.ALWAYS,
            number_bytes=2,
        )


def test_auto_begins_when_the_link_is_known_to_be_slow(
    values: Values, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(compression, "_LINK_CALL_MIN", 1)
    monkeypatch.setattr(compression, "_LINK_KNOWN", 1)
    monkeypatch.setattr(compression.Costs, "pays", lambda *_: True)
    server = Server(heads=8, dtype=BF16, compression="auto")
    sizes = []
    for _ in range(3):
        server.put()
        (value,) = (held for name, held in values.held.items() if not name.endswith("generation"))
        sizes.append(len(value))
        assert server.get()
        values.held = {}
        server.engine.clear_tiers(0, 1)
    assert sizes[0] == PAGE + BF16_BYTES
    assert sizes[1] == sizes[2] < 0.8 * BF16_BYTES
    assert caplog.text.count("blocks are compressed while that pays") == 1
    server.engine.close()


# ---- whether it pays ----

MB_S = 1e-6  # seconds of a byte, at 1 MB/s


@pytest.mark.parametrize(
    ("store_mb_s", "load_mb_s", "pays"),
    [
        (100, 100, True),
        (100, 0, True),  # not known yet
        (0, 100, True),
        (400, 400, True),
        (1000, 1000, False),  # the cores have better to do
        (100, 5000, False),  # loads, for which requests wait, would be slower
        (5000, 100, True),
        (5000, 5000, False),
    ],
)
def test_it_pays_where_the_link_is_slower_than_the_cores(
    store_mb_s: float, load_mb_s: float, pays: bool
) -> None:
    costs = compression.Costs(0.7, MB_S / 1500, MB_S / 3000)
    links = [MB_S / speed if speed else 0 for speed in (store_mb_s, load_mb_s)]
    assert costs.pays(*links) == pays
    assert not compression.Costs(1.0, MB_S / 1500, MB_S / 3000).pays(*links)  # it does not shrink


def test_a_link_is_as_fast_as_all_that_is_on_its_way() -> None:
    now_s = iter(itertools.count())
    link = compression.Link(lambda: float(next(now_s)))
    half = compression._LINK_KNOWN // 2
    first, second = link.begin(), link.begin()  # at 0 and 1 s
    link.end(first, half)
    assert link.byte_s == 0  # not known
    link.end(second, half)  # at 3 s
    assert link.byte_s == pytest.approx(3 / (2 * half))


def test_a_call_that_fails_takes_nothing_from_what_is_known_of_a_link() -> None:
    now_s = 0.0
    link = compression.Link(lambda: now_s)
    size = compression._LINK_KNOWN
    for _ in range(3):
        began = link.begin()
        now_s += 2.0
        link.end(began, size)
        link.begin()
        now_s += 60.0  # a time limit, say
        link.fail()
        assert link.byte_s == pytest.approx(2.0 / size)


@pytest.mark.parametrize(("mb_s", "wants"), [(1.0, True), (1e9, False)])
def test_auto_goes_by_what_it_measures(mb_s: float, wants: bool) -> None:
    clock = iter((0.0, compression._LINK_KNOWN * MB_S / mb_s, *[1e9] * 9))
    compressor = compression.Compressor(RemoteCompression.AUTO, 2, "a store")
    compressor.to_store = compression.Link(lambda: next(clock))
    block = memoryview(torch.randn(1 << 16).to(BF16).view(torch.uint8).numpy())
    assert not compressor.wants(block)
    began = compressor.to_store.begin()
    compressor.to_store.end(began, compression._LINK_KNOWN)
    assert compressor.wants(block) == wants
    assert compressor.costs is not None
    assert 0.5 < compressor.costs.stored < 0.75


def test_a_trial_counts_what_its_thread_has_of_a_core() -> None:
    """While the cores do something else the code is no slower."""
    block = memoryview(torch.randn(1 << 21).to(BF16).view(torch.uint8).numpy())
    core = {min(os.sched_getaffinity(0))}

    def trial() -> tuple[float, float]:
        os.sched_setaffinity(0, core)  # of this thread
        began_s = time.thread_time()
        seen = _core.try_compression(block, 2)
        return seen.compress_s + seen.expand_s, time.thread_time() - began_s

    with ThreadPoolExecutor(4) as threads:
        for told_s, used_s in [future.result() for future in [threads.submit(trial) for _ in range(4)]]:
            assert 0 < told_s <= used_s
