"""Hashes of the pages of waiting prompts: computed once, however often SGLang asks what is cached.

SGLang matches a waiting request against the cache at every scheduling attempt, and each time hashes what is
not on the device: SHA-256 over every page. For a prompt of 128 k tokens that is more than ten milliseconds of
the scheduler's time, over and over, for a prompt that does not change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_flexkv.common.block import BlockKeys, Namespace, keys_from_page_hashes

# Hashes the pages from a page to another one of a prompt; given is the hash of the page before, if any.
HashPages = Callable[[int, int, str | None], list[str]]

# Tokens of prompts that are remembered, about 30 bytes each with small pages. Requests that were scheduled
# long ago are the first to be forgotten.
_TOKENS_MAX = 4 << 20


@dataclass
class _Prompt:
    tokens: npt.NDArray[np.int64]  # all that the hashes are of
    salts: tuple[str | None, ...]  # what else goes into the hash of the first page
    anchor: str | None  # hash of the page before ``first``
    first: int  # page
    hashes: list[str]  # of the pages from ``first`` on
    keys: BlockKeys  # of the same
    asked: int  # page from which on it was asked for last


class PageHashes:
    """Hashes and keys of the prompts of waiting requests, by request id."""

    def __init__(self, page_size: int, namespace: Namespace) -> None:
        self._page_size = page_size
        self._namespace = namespace
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()  # the last to be asked for last
        self._num_tokens = 0

    def tail(
        self,
        rid: str,
        tokens: Sequence[int],
        length: int,
        salts: tuple[str | None, ...],
        first: int,
        anchor: str | None,
        hash_pages: HashPages,
    ) -> list[str]:
        """Hashes of the whole pages of a prompt from page ``first`` on.

        Args:
            tokens: token ids of the prompt; anything with the buffer protocol is not copied.
            length: of the key that SGLang makes of them: as long, or one shorter where each of its elements
                is a token and the one behind it. A page then depends on the first token behind it, too.
            salts: what distinguishes prompts of the same tokens.
            anchor: hash of the page before ``first``; None at the start of the prompt.
            hash_pages: computes what is not known yet.
        """
        end = length // self._page_size
        behind = len(tokens) - length
        ids = np.asarray(tokens, dtype=np.int64)[: end * self._page_size + behind]
        known = self._prompts.get(rid)
        if known is None or not self._is_start_of(known, ids, salts, first, anchor):
            known = _Prompt(ids[:0], salts, anchor, first, [], np.empty((0, 2), np.uint64), first)
        known_end = known.first + len(known.hashes)
        if known_end < end:
            new = hash_pages(known_end, end, known.hashes[-1] if known.hashes else known.anchor)
            known.hashes += new
            known.keys = np.concatenate([known.keys, keys_from_page_hashes(new, self._namespace)])
        self._remember(rid, known, ids)
        known.asked = first
        return known.hashes[first - known.first :]

    def _remember(self, rid: str, prompt: _Prompt, ids: npt.NDArray[np.int64]) -> None:
        self.forget(rid)
        if len(prompt.tokens) < len(ids):
            prompt.tokens = ids.copy()
        self._prompts[rid] = prompt
        self._num_tokens += len(prompt.tokens)
        while self._num_tokens > _TOKENS_MAX and len(self._prompts) > 1:
            self.forget(next(iter(self._prompts)))

    def _is_start_of(
        self,
        known: _Prompt,
        ids: npt.NDArray[np.int64],
        salts: tuple[str | None, ...],
        first: int,
        anchor: str | None,
    ) -> bool:
        """Whether the pages from ``first`` on are among what is known, or go on where that ends."""
        at = first - known.first
        return (
            0 <= at <= len(known.hashes)
            and (known.hashes[at - 1] if at else known.anchor) == anchor
            and known.salts == salts
            and len(known.tokens) <= len(ids)
            and np.array_equal(known.tokens, ids[: len(known.tokens)])
        )

    def keys(self, rid: str, hashes: Sequence[str]) -> BlockKeys:
        """Keys of pages, given their hashes; at no cost for the pages that ``tail`` has just named."""
        known = self._prompts.get(rid)
        if known is not None and hashes:
            start = known.asked - known.first
            stop = start + len(hashes)
            # Hashes are chained: where the last one is the same, all before it are.
            if stop <= len(known.hashes) and known.hashes[stop - 1] == hashes[-1]:
                return known.keys[start:stop]
        return keys_from_page_hashes(hashes, self._namespace)

    def forget(self, rid: str) -> None:
        prompt = self._prompts.pop(rid, None)
        if prompt is not None:
            self._num_tokens -= len(prompt.tokens)

    def clear(self) -> None:
        self._prompts.clear()
        self._num_tokens = 0
