"""SGLang's requests: a name of its own for every one of them, and what they report.

SGLang's unified cache files what it knows of a request under the request's id. A client chooses that id, and
nothing keeps two requests that run at the same time from having the same one: each tokenizer worker knows its
own requests only. Here a request goes by the ``rid`` of its handle, which is made unlike any other's when the
cache first sees it; its own id stays what the client knows it by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

_numbers = itertools.count(1)

# What a request carries, of ours.
_SOURCES = "_sglang_flexkv_sources"


@dataclass(frozen=True)
class NamedHandle(CacheRequestHandle):
    """What SGLang names a request by to its cache, with a name that no other request has as ``rid``."""


def name_of(req: Any) -> str:
    """The name of a request; given to it at the first call. Alike on all ranks, to which requests come in the
    same order."""
    handle = req.cache_request_handle
    if not isinstance(handle, NamedHandle):
        handle = NamedHandle(f"{handle.rid}#{next(_numbers)}", handle.attempt_id)
        req.cache_request_handle = handle
    return handle.rid


@contextmanager
def by_name(*reqs: Any) -> Iterator[None]:
    """For the time of a call into SGLang's cache, requests have their name as id."""
    rids = [req.rid for req in reqs]
    for req in reqs:
        req.rid = name_of(req)
    try:
        yield
    finally:
        for req, rid in zip(reqs, rids, strict=True):
            req.rid = rid


def report_storage_part(req: Any, first_token: int, num_tokens: int) -> None:
    """For what a request reports about its cached tokens: a load of its own brings these from a lower tier,
    which SGLang calls storage."""
    if req.storage_hit_length and req.storage_hit_start is not None:
        first_token = min(first_token, req.storage_hit_start)
    req.storage_hit_length += num_tokens
    req.storage_hit_start = first_token
    req.host_hit_is_storage = False


def report_sources(req: Any, num_tokens: Mapping[str, int]) -> None:
    """What its storage is: the tokens that came from each lower tier, by the tier's name."""
    setattr(req, _SOURCES, dict(num_tokens))


def storage_name(req: Any, num_tokens: int) -> str:
    """What to call the storage that a request has so many tokens from. SGLang's answer has one number and one
    name: where several tiers are behind the number, the name tells how much each has given."""
    sources: dict[str, int] = getattr(req, _SOURCES, {}) if num_tokens else {}
    if not sources:
        return "FlexKV"
    # What a request does not use of what it was given SGLang takes off its number.
    tells = len(sources) > 1 and sum(sources.values()) == num_tokens
    return "FlexKV: " + ", ".join(f"{name} {count}" if tells else name for name, count in sources.items())


def release_borrowed_rows(waiting: Iterable[Any], sessions: Any) -> None:
    """Takes their sessions' records from turns that wait.

    A turn borrows its session's record when it enters the queue, and again when it is scheduled. In between
    SGLang may flush in a pause, but not while a request holds memory.

    Args:
        sessions: SGLang's, of the cache.
    """
    for req in waiting:
        if sessions.borrowed_slot(req) is not None:
            req.detach_kv()
