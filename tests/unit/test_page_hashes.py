"""Pages of a waiting prompt are hashed once, and what is remembered is never another prompt's."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import pytest
from sglang.srt.mem_cache.cpp_utils import native_hash
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_hash_str

from sglang_flexkv.common.block import Namespace, keys_from_page_hashes
from sglang_flexkv.integration import page_hashes
from sglang_flexkv.integration.compat.sglang_hashes import hash_tokens, native_works
from sglang_flexkv.integration.compat.version import is_0_5_22
from sglang_flexkv.integration.page_hashes import PageHashes

PAGE = 4
NAMESPACE = Namespace(bytes(range(16)))
NO_SALTS = (None, None)


class Hasher:
    """SGLang's chained SHA-256, counting the pages it hashes."""

    def __init__(self, tokens: list[int], seed: str = "") -> None:
        self.tokens = tokens
        self.seed = seed
        self.pages_hashed = 0

    def __call__(self, first: int, end: int, before: str | None) -> list[str]:
        out = []
        last = before or self.seed
        for page in range(first, end):
            text = f"{last}{self.tokens[page * PAGE : (page + 1) * PAGE]}"
            last = hashlib.sha256(text.encode()).hexdigest()
            out.append(last)
        self.pages_hashed += end - first
        return out

    def all(self) -> list[str]:
        hasher = Hasher(self.tokens, self.seed)
        return hasher(0, len(self.tokens) // PAGE, None)


@pytest.fixture
def hashes() -> PageHashes:
    return PageHashes(PAGE, NAMESPACE)


def ask(
    hashes: PageHashes,
    hasher: Hasher,
    first: int = 0,
    rid: str = "r",
    salts: tuple[str | None, ...] = NO_SALTS,
) -> list[str]:
    anchor = hasher.all()[first - 1] if first else None
    return hashes.tail(rid, array("q", hasher.tokens), len(hasher.tokens), salts, first, anchor, hasher)


def test_every_attempt_after_the_first_is_free(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(42)))
    for _ in range(3):
        assert ask(hashes, hasher) == hasher.all()
    assert hasher.pages_hashed == 10


def test_the_device_may_hold_more_at_the_next_attempt(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    ask(hashes, hasher)
    assert ask(hashes, hasher, first=3) == hasher.all()[3:]
    assert ask(hashes, hasher, first=10) == []
    assert ask(hashes, hasher, first=1) == hasher.all()[1:]
    assert hasher.pages_hashed == 10


def test_what_the_device_has_lost_is_hashed_again(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    assert ask(hashes, hasher, first=6) == hasher.all()[6:]
    assert hasher.pages_hashed == 4
    assert ask(hashes, hasher, first=2) == hasher.all()[2:]
    assert hasher.pages_hashed == 4 + 8


def test_a_prompt_that_grew_costs_its_new_pages(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    ask(hashes, hasher)
    hasher.tokens += range(40, 50)
    assert ask(hashes, hasher, first=1) == hasher.all()[1:]
    assert hasher.pages_hashed == 12


@pytest.mark.parametrize("place", [0, 17, 39])
def test_another_prompt_under_the_same_name_is_not_mistaken_for_the_first(
    hashes: PageHashes, place: int
) -> None:
    first = Hasher(list(range(40)))
    ask(hashes, first)
    other = Hasher(list(range(40)))
    other.tokens[place] += 1
    assert ask(hashes, other) == other.all()
    shorter = Hasher(first.tokens[:20])
    assert ask(hashes, shorter) == shorter.all()


def test_other_salts_are_other_prompts(hashes: PageHashes) -> None:
    plain = Hasher(list(range(40)))
    ask(hashes, plain)
    salted = Hasher(list(range(40)), seed="tenant")
    assert ask(hashes, salted, salts=("tenant", None)) == salted.all()
    assert salted.all() != plain.all()


def test_an_anchor_that_does_not_fit_is_believed_over_what_is_remembered(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    ask(hashes, hasher)
    answer = hashes.tail("r", array("q", hasher.tokens), len(hasher.tokens), NO_SALTS, 3, "another", hasher)
    assert answer == Hasher(hasher.tokens)(3, 10, "another")


def test_keys_of_named_pages_are_what_hashing_would_give(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    tail = ask(hashes, hasher, first=2)
    for asked in (tail, tail[:3], tail[:1], hasher.all(), ["ab" * 32], []):
        expected = keys_from_page_hashes(asked, NAMESPACE)
        np.testing.assert_array_equal(hashes.keys("r", asked), expected)
        np.testing.assert_array_equal(hashes.keys("nobody", asked), expected)
    assert np.shares_memory(hashes.keys("r", tail[:3]), hashes.keys("r", tail))


def test_forgotten_requests_leave_nothing(hashes: PageHashes) -> None:
    hasher = Hasher(list(range(40)))
    ask(hashes, hasher, rid="a")
    ask(hashes, hasher, rid="b")
    hashes.forget("a")
    hashes.forget("nobody")
    ask(hashes, hasher, rid="b")
    assert hasher.pages_hashed == 20
    ask(hashes, hasher, rid="a")
    assert hasher.pages_hashed == 30
    hashes.clear()
    assert hashes._num_tokens == 0


def test_what_was_asked_for_longest_ago_is_forgotten_first(
    hashes: PageHashes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_hashes, "_TOKENS_MAX", 100)
    hashers = {rid: Hasher([ord(rid)] * 40) for rid in "abc"}
    for rid in "aba":
        ask(hashes, hashers[rid], rid=rid)
    ask(hashes, hashers["c"], rid="c")  # 120 tokens: b goes
    for rid in "ac":
        ask(hashes, hashers[rid], rid=rid)
        assert hashers[rid].pages_hashed == 10
    ask(hashes, hashers["b"], rid="b")
    assert hashers["b"].pages_hashed == 20
    long = Hasher(list(range(400)))
    assert ask(hashes, long, rid="long") == long.all()  # one prompt is remembered however long it is
    ask(hashes, long, rid="long")
    assert long.pages_hashed == 100


@pytest.mark.parametrize("tokens", [39, 40, 41])
def test_elements_of_a_token_and_the_one_behind_it_make_one_less(hashes: PageHashes, tokens: int) -> None:
    """A page of such elements (SGLang's bigram keys) also is about the first token behind it."""
    pages = (tokens - 1) // PAGE
    hashed = []

    def hash_pages(first: int, end: int, before: str | None) -> list[str]:
        hashed.append((first, end))
        return [f"{page:064x}" for page in range(first, end)]

    def ask_for(ids: list[int]) -> list[str]:
        return hashes.tail("r", array("q", ids), len(ids) - 1, NO_SALTS, 0, None, hash_pages)

    ids = list(range(tokens))
    assert len(ask_for(ids)) == pages
    assert len(ask_for(ids)) == pages
    assert hashed == [(0, pages)]
    ids[pages * PAGE] += 1  # behind the last page
    ask_for(ids)
    assert hashed == [(0, pages)] * 2


PLAIN = [5, 7, 11, 0, 2**32 - 1, 3, 9, 1, 4, 4, 4]
WIDE = [*PLAIN[:5], 2**32, *PLAIN[6:], 2**40]


@pytest.mark.parametrize("page_size", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("before", [None, hashlib.sha256(b"before").hexdigest()])
@pytest.mark.parametrize(
    "key",
    [
        array("q", PLAIN),
        PLAIN,
        array("q", WIDE),
        list(zip(PLAIN, WIDE, strict=False)),
        RadixKey(array("q", PLAIN)),
        RadixKey(array("q", WIDE)),
        RadixKey(array("q", PLAIN), is_bigram=True),
        RadixKey(array("q", WIDE), is_bigram=True),
        array("q"),
    ],
    ids=lambda key: type(key).__name__,
)
def test_python_hashes_as_sglang_does(key: object, before: str | None, page_size: int | None) -> None:
    if not native_works():
        pytest.skip("SGLang cannot compile its own here")
    if is_0_5_22() and max(np.ravel(getattr(key, "token_ids", key)), default=0) >= 2**32:
        with pytest.raises((IndexError, OverflowError)):  # it computes nothing wrong: it refuses
            get_hash_str(key, before, page_size)
        return
    assert hash_tokens(key, before, page_size) == get_hash_str(key, before, page_size)


def test_what_sglang_cannot_compile_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(*_args: object) -> None:
        raise RuntimeError("Failed to load HiCache native hash extension") from OSError("not here")

    monkeypatch.setattr(native_hash, "get_native_hash", cannot)
    native_works.cache_clear()
    try:
        assert not native_works()
        assert not native_works()
    finally:
        native_works.cache_clear()
    (message,) = caplog.messages
    assert "OSError: not here" in message


def test_keys_are_the_first_128_bits_of_the_hashes() -> None:
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(5)]
    keys = keys_from_page_hashes(hashes, NAMESPACE)
    raw = np.frombuffer(bytes.fromhex("".join(each[:32] for each in hashes)), np.uint64).reshape(-1, 2)
    assert np.array_equal(keys, raw ^ np.frombuffer(NAMESPACE, np.uint64))
    assert np.array_equal(keys_from_page_hashes([each.upper() for each in hashes], NAMESPACE), keys)
    assert keys_from_page_hashes((), NAMESPACE).shape == (0, 2)


@pytest.mark.parametrize("name", ["", "a" * 31, "g" * 32, "a" * 31 + "-", "é" * 32])
def test_what_is_no_hash_has_no_key(name: str) -> None:
    with pytest.raises(ValueError, match="begins with 32 hexadecimal digits"):
        keys_from_page_hashes([name], NAMESPACE)
