"""What routers are told of the tiers: which blocks come to one, and which go.

A router that knows what each server holds sends a request to the one that has most of its prompt. SGLang
tells it about the device (``--kv-events-config``). Here the CPU tier and the SSD tier are added, in the same
words, so that a prompt that has left the device still finds its server.

A router goes by tokens, which no tier keeps. So what a block is called, and its tokens, are noted when the
tree offers it, and the index tells where blocks that were noted come and go. A block that survived a restart
is told of when a request has used it. What a store holds is not told: all servers can have it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys, Namespace, page_hash_numbers
from sglang_flexkv.common.lower_tier import CPU
from sglang_flexkv.integration.compat import kv_events
from sglang_flexkv.integration.compat.kv_events import NodeTokens
from sglang_flexkv.kvtask import KVTaskEngine

# A watched block's number: of its run, and its place in there.
_PLACE_BITS = 32
_PLACE = np.uint64((1 << _PLACE_BITS) - 1)
# Of one event. SGLang's sgl-router drops what comes with one of more than 65,536, and a disk that is taken
# out has more.
_BLOCKS_MAX = 16_384


@dataclass
class _Run:
    """Blocks that follow each other, noted together."""

    names: npt.NDArray[np.int64]  # in events: the first bits of page hashes
    parent: int | None
    tokens: npt.NDArray[np.int32]
    is_bigram: bool
    num_watched: int  # of its blocks; the index forgets them one by one

    def tokens_of(self, first: int, end: int, page_size: int) -> list[Any]:
        tokens = self.tokens[first * page_size : end * page_size + self.is_bigram].tolist()
        return list(pairwise(tokens)) if self.is_bigram else tokens


class TierEvents:
    """Events of one rank's tiers.

    Args:
        engine: whose blocks can be watched.
    """

    def __init__(self, engine: KVTaskEngine, namespace: Namespace) -> None:
        self._engine = engine
        self._namespace = namespace
        self._page_size = engine.config.tokens_per_block
        self._media = {
            number: kv_events.IN_MEMORY if number == CPU else kv_events.ON_DISK
            for number in range(len(engine.tier_names))
            if number not in engine.asked_tiers
        }
        self._runs: dict[int, _Run] = {}
        self._num_runs = 0

    def note(self, parent: BlockKeys | None, keys: BlockKeys, tokens: NodeTokens) -> None:
        """The tree has offered these. Those that a tier holds, or is about to, are told of from now on.

        Args:
            parent: key of the block before them, shape [2]; None at the start of a prompt.
        """
        self._num_runs += 1
        num_watched = self._engine.watch(keys, self._num_runs << _PLACE_BITS)
        if num_watched:
            self._runs[self._num_runs] = _Run(
                page_hash_numbers(keys, self._namespace),
                None if parent is None else int(page_hash_numbers(parent[None], self._namespace)[0]),
                np.asarray(tokens.ids).astype(np.int32),
                tokens.is_bigram,
                num_watched,
            )

    def take(self) -> list[Any]:
        """Events of what has happened since the last call, in order."""
        all_numbers, all_tiers, all_what = self._engine.take_sightings()
        moved = all_what != _core.FORGOTTEN
        numbers, tiers, what = all_numbers[moved], all_tiers[moved], all_what[moved]
        events: list[Any] = []
        for first, end in _stretches(tiers, what):
            medium = self._media.get(int(tiers[first]))
            if medium is None:
                continue
            came = what[first] == _core.CAME
            seen = numbers[first:end]
            if came:
                seen = np.sort(seen)  # a block after the one before it
            for at in range(0, len(seen), _BLOCKS_MAX):
                part = seen[at : at + _BLOCKS_MAX]
                if came:
                    events += self._stored(part, medium)
                elif names := self._names(part):
                    events.append(kv_events.removed(names, medium))
        self._forget(all_numbers[~moved])
        return events

    def clear(self) -> None:
        """The cache was flushed, and routers are told that nothing is left anywhere."""
        self._engine.take_sightings()
        self._runs.clear()

    def _stored(self, numbers: npt.NDArray[np.uint64], medium: Any) -> list[Any]:
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        events = []
        for stretch in np.split(numbers, breaks):
            run = self._runs.get(int(stretch[0]) >> _PLACE_BITS)
            if run is not None:
                first = int(stretch[0] & _PLACE)
                end = first + len(stretch)
                parent = int(run.names[first - 1]) if first else run.parent
                tokens = run.tokens_of(first, end, self._page_size)
                names = run.names[first:end].tolist()
                events.append(kv_events.stored(names, parent, tokens, self._page_size, medium))
        return events

    def _names(self, numbers: npt.NDArray[np.uint64]) -> list[int]:
        names: list[int] = []
        of_run = numbers >> np.uint64(_PLACE_BITS)
        for first, end in _stretches(of_run):
            run = self._runs.get(int(of_run[first]))
            if run is not None:
                names += run.names[numbers[first:end] & _PLACE].tolist()
        return names

    def _forget(self, numbers: npt.NDArray[np.uint64]) -> None:
        for number, count in Counter((numbers >> np.uint64(_PLACE_BITS)).tolist()).items():
            run = self._runs.get(number)
            if run is not None:
                run.num_watched -= count
                if not run.num_watched:
                    del self._runs[number]


def _stretches(*values: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Where all of these stay the same: begins and ends."""
    changes = [np.flatnonzero(np.diff(value)) + 1 for value in values]
    ends = [*np.unique(np.concatenate(changes)).tolist(), len(values[0])]
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends[-1] else []
