"""A name of its own for every request.

SGLang's unified cache files what it knows of a request under the request's id. A client chooses that id, and
nothing keeps two requests that run at the same time from having the same one: each tokenizer worker knows its
own requests only. Here a request goes by the ``rid`` of its handle, which is made unlike any other's when the
cache first sees it; its own id stays what the client knows it by.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle

_numbers = itertools.count(1)


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
