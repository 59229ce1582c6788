"""What a router does with a server's KV events: it keeps, for each place, which pages are there."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str, hash_str_to_int64

# From near to far: where a router would look for a page first.
PLACES = ("GPU", "CPU_PINNED", "DISK")


def hashes_of(tokens: Sequence[int], page_size: int, *, pairs: bool = False) -> list[str]:
    """SGLang's own hashes of the whole pages of a prompt."""
    key, _ = RadixKey(array("q", tokens)).maybe_to_bigram_view(pairs)
    key = key[: len(key) // page_size * page_size]
    hashes: list[str] = get_storage_hash_str(key, None, page_size=page_size)
    return hashes


def names_of(tokens: Sequence[int], page_size: int, *, pairs: bool = False) -> list[int]:
    """What these are called in events."""
    return [hash_str_to_int64(page) for page in hashes_of(tokens, page_size, pairs=pairs)]


class Router:
    """Takes events in, which may be SGLang's objects or what msgpack made of them. Raises AssertionError if
    one makes no sense: a page that comes to where it is (some routers count, and would believe in it for
    ever), goes from where it is not, comes to the device before the one before it, or has other tokens or
    another parent than before.

    Args:
        in_order: to the tiers, too, no page comes before the one before it. It does where that one was pushed
            out before, or was not worth a write to SSD, which is no fault.
    """

    def __init__(self, page_size: int, *, in_order: bool = False) -> None:
        self.page_size = page_size
        self._in_order = {"GPU"} if not in_order else set(PLACES)
        self.pages: dict[str, set[int]] = defaultdict(set)
        self.known: dict[int, tuple[int | None, list[Any]]] = {}  # parent and tokens of each page ever named
        self.num_cleared = 0

    def take(self, events: Iterable[Any]) -> None:
        for event in events:
            fields = (
                event
                if isinstance(event, Mapping)
                else {"type": type(event).__name__, **{f: getattr(event, f) for f in event.__struct_fields__}}
            )
            getattr(self, f"_{fields['type']}")(fields)

    def _BlockStored(self, event: Mapping[str, Any]) -> None:
        assert event["block_size"] == self.page_size
        assert len(event["token_ids"]) == len(event["block_hashes"]) * self.page_size
        parent, here = event.get("parent_block_hash"), self.pages[medium_of(event)]
        if parent is not None and medium_of(event) in self._in_order:
            assert parent in here, f"the page before {event['block_hashes'][0]} is not in {event['medium']}"
        for number, name in enumerate(event["block_hashes"]):
            tokens = list(
                map(plain, event["token_ids"][number * self.page_size : (number + 1) * self.page_size])
            )
            assert self.known.setdefault(name, (parent, tokens)) == (parent, tokens)
            assert name not in here, f"page {name} comes to {event['medium']}, where it is"
            here.add(name)
            parent = name

    def _BlockRemoved(self, event: Mapping[str, Any]) -> None:
        here = self.pages[medium_of(event)]
        for name in event["block_hashes"]:
            assert name in here, f"page {name} goes from {event['medium']}, where it is not"
            here.remove(name)

    def _AllBlocksCleared(self, _event: Mapping[str, Any]) -> None:
        self.pages.clear()
        self.num_cleared += 1

    def places(self, names: Sequence[int]) -> list[str | None]:
        """Of each page the nearest place that has it."""
        return [next((place for place in PLACES if name in self.pages[place]), None) for name in names]

    def tokens_up_to(self, name: int) -> list[Any]:
        """All tokens of the prompt that ends with this page, as the events told them."""
        at: int | None = name
        pages = []
        while at is not None:
            at, tokens = self.known[at]
            pages.append(tokens)
        return [token for page in reversed(pages) for token in page]


def medium_of(event: Mapping[str, Any]) -> str:
    medium = event["medium"]
    return str(getattr(medium, "value", medium))


def plain(token: Any) -> Any:
    """Pairs come as lists over the wire."""
    return tuple(token) if isinstance(token, (list, tuple)) else token
