"""Ranks that have the same blocks, over one store: each block is stored once, found by all, replaced by who
finds it damaged, and a flush is one for all of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from dict_store import NAMESPACE, PATIENCE_S, Server, Values

from sglang_flexkv.common.block import make_namespace
from sglang_flexkv.common.config import Admission
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.common.remote_url import parse_remote_url
from sglang_flexkv.storage import storage_engine
from sglang_flexkv.storage.remote import tier as remote_tier
from sglang_flexkv.storage.remote.store import Outcome, Value
from sglang_flexkv.storage.remote.tier import RemoteTier

# Not a power of two: of numbers that are XORed with something the remainders would still be shared out.
BLOCKS, RANKS = 32, 3
SHARED = make_namespace({"of": "all ranks"})
URL = parse_remote_url("file:///tmp")
KEYS = np.random.default_rng(1).integers(0, 2**64, (1000, 2), np.uint64)
FLUSHES = [bytes([n]) * 16 for n in range(1, 6)]


class Counted(Values):
    """Counts how often each value is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: Counter[str] = Counter()
        self.tiers: list[RemoteTier] = []  # over it, in the order in which they were made

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        self.puts.update(name for name in names if not name.endswith("generation"))
        return super().put(names, values)

    @property
    def record(self) -> bytes | None:
        """The generation that was told last."""
        return next((value for name, value in self.held.items() if name.endswith("generation")), None)


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Counted:
    made = Counted()

    class Seen(RemoteTier):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.tiers.append(self)

    monkeypatch.setattr(storage_engine, "RemoteTier", Seen)
    monkeypatch.setattr(remote_tier, "STORES", {"file": lambda url, timeout_s: made})
    monkeypatch.setattr(remote_tier, "_ABSENT_S", 0.0)
    monkeypatch.setattr(remote_tier, "_SPOILT_S", 0.0)
    return made


class Rank(Server):
    tier: RemoteTier


MakeRanks = Callable[..., list[Rank]]


@pytest.fixture
def make_ranks(values: Counted) -> Iterator[MakeRanks]:
    """Makes the ranks of one server, which name blocks differently, as long as they do not share them."""
    made: list[Rank] = []

    def make(num: int = RANKS, seed: bytes = b"of a server".ljust(16), **options: Any) -> list[Rank]:
        for number in range(num):
            shared = SharedBlocks(SHARED, number, num, seed)
            rank = Rank(make_namespace({"rank": number}), blocks=BLOCKS, shared=shared, **options)
            rank.tier = values.tiers[-1]
            made.append(rank)
        return made[-num:]

    yield make
    for rank in made:
        rank.engine.check_integrity()
        rank.engine.close()


def tier(rank: int = 0, ranks: int = RANKS, namespace: bytes = NAMESPACE) -> RemoteTier:
    return RemoteTier(URL, 8, namespace=namespace, shared=SharedBlocks(SHARED, rank, ranks))


def stats(server: Rank) -> dict[str, float]:
    return server.engine.stats()["REMOTE"]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


# ---- who stores what ----


def test_each_block_is_for_one_rank_to_store_whatever_the_ranks_call_it(values: Counted) -> None:
    parts = []
    for rank in range(RANKS):
        namespace = make_namespace({"rank": rank})
        of_rank = tier(rank, namespace=namespace)
        named = KEYS ^ np.frombuffer(namespace, np.uint64)
        parts.append(of_rank.to_store(named) ^ np.frombuffer(namespace, np.uint64))
    assert sorted(map(bytes, np.concatenate(parts))) == sorted(map(bytes, KEYS))
    assert all(0.7 < RANKS * len(part) / len(KEYS) < 1.3 for part in parts)
    assert len(tier(ranks=1).to_store(KEYS)) == len(KEYS)


def test_what_is_damaged_is_for_who_found_it_to_store(values: Counted) -> None:
    of_rank = tier(0)
    ours = {key.tobytes() for key in of_rank.to_store(KEYS)}
    at = next(i for i, key in enumerate(KEYS) if key.tobytes() not in ours)
    stored_key = (KEYS[at] ^ of_rank._refold).tobytes()
    of_rank.note_absent(stored_key)
    assert len(of_rank.to_store(KEYS)) == len(ours)
    of_rank.note_absent(stored_key, spoilt=True)
    assert {key.tobytes() for key in of_rank.to_store(KEYS)} == ours | {KEYS[at].tobytes()}
    assert of_rank.take_spoilt(stored_key)
    assert len(of_rank.to_store(KEYS)) == len(ours)


@pytest.mark.parametrize("num", [1, 2, RANKS])
def test_ranks_store_one_copy_together_and_each_finds_all_of_it(
    values: Counted, make_ranks: MakeRanks, num: int
) -> None:
    ranks = make_ranks(num)
    for rank in ranks:
        rank.put()
    assert len(values.held) == BLOCKS
    assert set(values.puts.values()) == {1}
    shares = [stats(rank) for rank in ranks]
    assert sum(of["offered"] for of in shares) == sum(of["admitted"] for of in shares) == BLOCKS
    # Nothing is taken for lost, or for stored by somebody else, because another rank has stored it.
    assert [(of["dropped"], of["there_already"]) for of in shares] == [(0, 0)] * num
    assert [of["ready"] for of in shares] == [of["admitted"] for of in shares]  # what it knows is there
    assert all(rank.get() for rank in ranks)
    assert [stats(rank)["ready"] for rank in ranks] == [BLOCKS] * num


def test_another_server_finds_what_ranks_stored_together(values: Counted, make_ranks: MakeRanks) -> None:
    for rank in make_ranks():
        rank.put()
    other = make_ranks(seed=b"of another one".ljust(16))
    assert all(rank.get() for rank in other)
    for rank in other:
        rank.put()
    assert set(values.puts.values()) == {1}


def test_what_its_rank_did_not_store_is_a_miss_for_all_and_nobody_takes_it_for_held(
    values: Counted, make_ranks: MakeRanks
) -> None:
    ranks = make_ranks()
    for rank in ranks[1:]:
        rank.put()
    missing = BLOCKS - len(values.held)
    assert missing == len(ranks[0].tier.to_store(ranks[0].keys)) > 0
    assert [rank.get() for rank in ranks] == [False] * RANKS
    assert all(stats(rank)["ready"] < BLOCKS for rank in ranks)
    assert [rank.engine.stats()["REMOTE2H"]["missing_blocks"] for rank in ranks] == [0] * RANKS
    # It is there when that one has computed it again.
    for rank in ranks:
        rank.put()
    assert set(values.puts.values()) == {1}
    assert all(rank.get() for rank in ranks)


def test_every_rank_gets_replaced_what_is_damaged(values: Counted, make_ranks: MakeRanks) -> None:
    ranks = make_ranks()
    for rank in ranks:
        rank.put()
    good = dict(values.held)
    for finder in ranks:
        name = next(iter(values.held))  # one rank's: mostly not the finder's own
        values.held[name] = values.held[name][:-1] + b"\x55"
        assert not finder.get()
        finder.put()
        assert values.held == good
        assert finder.get()
    assert values.puts.total() == BLOCKS + RANKS


def test_of_what_comes_once_each_rank_counts_its_own(
    values: Counted, make_ranks: MakeRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = make_ranks(admission=Admission.REUSE)
    for rank in ranks:
        rank.put()
    assert not values.held
    saved = [stats(rank)["saved_write_bytes"] for rank in ranks]
    assert sum(saved) == BLOCKS * ranks[0].engine.slot_bytes
    assert all(saved)
    # Loaded from the CPU tier: worth storing, by its rank.
    for rank in ranks:
        rank.launch(rank.engine.create_get(rank.keys))
        assert rank.engine.flush_spills(PATIENCE_S)
    assert set(values.puts.values()) == {1}
    assert len(values.held) == BLOCKS
    of_ranks = [stats(rank) for rank in ranks]
    assert [(of["saved_write_bytes"], of["there_already"]) for of in of_ranks] == [(0, 0)] * RANKS


# ---- flushes ----


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tier, "_GENERATION_S", 0.0)
    monkeypatch.setattr(remote_tier, "_TELL_AGAIN_S", 0.001)


def values_namespaces(ranks: Sequence[Rank]) -> set[bytes]:
    return {rank.tier.values_namespace() for rank in ranks}


@pytest.mark.usefixtures("often")
def test_a_flush_is_one_for_all_ranks(values: Counted, make_ranks: MakeRanks) -> None:
    """Each of them draws its generation alone, and none takes another's for that of another server."""
    ranks = make_ranks()
    seen = values_namespaces(ranks)
    for number in range(1, 4):
        for rank in ranks:
            rank.put()
        assert len(values.puts) == number * BLOCKS
        for rank in ranks:
            rank.engine.clear()
        (namespace,) = values_namespaces(ranks)
        assert namespace not in seen
        seen.add(namespace)
        assert [rank.get() for rank in ranks] == [False] * RANKS
        assert len(set(values.puts.values())) == 1
    for rank in ranks:
        rank.put()
    assert all(rank.get() for rank in ranks)
    assert [stats(rank)["times_out"] for rank in ranks] == [0] * RANKS


@pytest.mark.usefixtures("often")
def test_after_the_weights_changed_ranks_find_each_others_blocks_and_nobody_else_does(
    values: Counted, make_ranks: MakeRanks
) -> None:
    ranks = make_ranks()
    for rank in ranks:
        rank.engine.stop_persisting()
    for rank in ranks:
        rank.put()
    assert set(values.puts.values()) == {1}
    assert values.record is None
    assert all(rank.get() for rank in ranks)
    assert not any(rank.get() for rank in make_ranks(seed=b"of another one".ljust(16)))


@pytest.mark.usefixtures("often")
def test_two_servers_that_are_flushed_at_once_end_up_with_one_generation(
    values: Counted, make_ranks: MakeRanks
) -> None:
    first, second = make_ranks(2), make_ranks(2, seed=b"of another one".ljust(16))
    everybody = [*first, *second]
    for rank in everybody:
        rank.put()
    old = values_namespaces(everybody)
    for rank in everybody:
        rank.engine.clear()
    assert len(values_namespaces(everybody)) == 2

    def is_one() -> bool:
        for rank in everybody:
            assert not (values_namespaces([rank]) & old)
            rank.engine.poll()
            assert not (rank.engine.can_ask and rank.get())
        return len(values_namespaces(everybody)) == 1 and all(stats(rank)["online"] for rank in everybody)

    until(is_one, "servers that were flushed do not find together again")
    for rank in first:
        rank.put()
    assert all(rank.get() for rank in everybody)


@pytest.mark.usefixtures("often")
def test_who_is_late_to_tell_does_not_bring_back_what_was_flushed(values: Counted) -> None:
    """A rank that tells its flush when the others have been flushed again, or a server that does not know of
    it and tells what the store has forgotten."""
    of_rank = tier()
    of_rank.open()
    for flush in FLUSHES[:2]:
        of_rank.clear(keep=True, flush=flush)
    kept, record = of_rank.values_namespace(), remote_tier._generation_record(FLUSHES[1])
    until(lambda: values.record == record, "a flush is not told")
    tell(of_rank, FLUSHES[0])
    until(
        lambda: of_rank.look_up(KEYS[:1]) and values.record == record,
        "what was flushed is what others go by",
    )
    assert (of_rank.why_broken(), of_rank.values_namespace()) == ("", kept)
    of_rank.close()
    tell(of_rank, FLUSHES[0])
    of_rank.open()
    assert (values.record, of_rank.values_namespace()) == (record, kept)
    of_rank.close()


def tell(of_rank: RemoteTier, generation: bytes) -> None:
    """As another rank or server does."""
    record = memoryview(remote_tier._generation_record(generation))
    of_rank.store.session().put([of_rank._generation_name()], [[record]])


def generation_after(of_rank: RemoteTier, told: bytes | None, flush: bytes) -> bytes:
    """What a tier goes on with that was closed when a flush came, and opened when this was told."""
    of_rank.close()
    if told is not None:
        tell(of_rank, told)
    of_rank.open()
    of_rank.clear(keep=True, flush=flush, late=True)
    return of_rank._generation


def test_a_rank_whose_tier_was_away_when_the_flush_came_finds_the_others_again(values: Counted) -> None:
    of_rank = tier()
    of_rank.open()
    # Nobody has told it yet; another rank has.
    assert generation_after(of_rank, None, FLUSHES[0]) == FLUSHES[0]
    assert generation_after(of_rank, FLUSHES[1], FLUSHES[1]) == FLUSHES[1]
    # Another server was flushed meanwhile, before or after: neither what that one nor what other ranks stored
    # may be found for sure.
    fresh = generation_after(of_rank, FLUSHES[2], FLUSHES[3])
    assert fresh not in FLUSHES
    until(lambda: values.record == remote_tier._generation_record(fresh), "a flush is not told")
    # An ordinary one afterwards is the same for all again.
    of_rank.clear(keep=True, flush=FLUSHES[4])
    assert of_rank._generation == FLUSHES[4]
    of_rank.close()
