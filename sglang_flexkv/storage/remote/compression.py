"""Whether blocks are compressed before they are stored, and what tells: the store's links, and trials.

How it is done is the core's (``csrc/remote/compression.hpp``): the exponents of floating-point numbers,
without loss. Who loads expands what was compressed, whatever its own setting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sglang_flexkv import _core
from sglang_flexkv.common.config import RemoteCompression

logger = logging.getLogger(__name__)

# What is moved at once has to be so large for its time to tell of the link, and not of a round trip.
_LINK_CALL_MIN = 1 << 20
# A link is known when so much has gone over it; what is older than the last of these counts ever less.
_LINK_KNOWN, _LINK_FADES = 16 << 20, 256 << 20
# Of so many calls that store one block is compressed on trial.
_TRIAL_EVERY = 32


class Link:
    """Bytes per second in one direction. Several threads share it: while some calls are on their way, each
    has its part of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._seen_s = 0.0  # up to when the time has been shared out
        self._share_s = 0.0  # that each call had which has been on its way since ever
        self._bytes = self._busy_s = 0.0

    def begin(self) -> float:
        """Returns what ``end`` takes."""
        with self._lock:
            self._pass()
            self._running += 1
            return self._share_s

    def end(self, began: float, num_bytes: int) -> None:
        """What began has come to its end, and moved so much."""
        with self._lock:
            self._pass()
            self._running -= 1
            self._bytes += num_bytes
            self._busy_s += self._share_s - began
            if self._bytes > _LINK_FADES:
                self._bytes, self._busy_s = self._bytes / 2, self._busy_s / 2

    def fail(self) -> None:
        """What began has come to nothing: the time that it had says nothing about the link."""
        with self._lock:
            self._pass()
            self._running -= 1

    def _pass(self) -> None:
        now_s = self._clock()
        if self._running:
            self._share_s += (now_s - self._seen_s) / self._running
        self._seen_s = now_s

    @property
    def byte_s(self) -> float:
        """Seconds for a byte; 0 as long as that is not known."""
        with self._lock:
            return self._busy_s / self._bytes if self._bytes >= _LINK_KNOWN else 0.0

    def counts(self, num_bytes: int) -> bool:
        return num_bytes >= _LINK_CALL_MIN


@dataclass(frozen=True)
class Costs:
    """Of a byte of a block: what is stored of it, and seconds of a core to compress and to expand it."""

    stored: float
    compress_s: float
    expand_s: float

    def pays(self, store_s: float, load_s: float) -> bool:
        """Whether links that take so long for a byte make it worth while: loads get faster, and what both
        links save is more than the cores take, which may have something else to do.

        Args:
            store_s, load_s: where one is not known (0) it is taken to be like the other.
        """
        store_s, load_s = store_s or load_s, load_s or store_s
        saved = 1 - self.stored
        loading, storing = saved * load_s - self.expand_s, saved * store_s - self.compress_s
        return loading > 0 and loading + storing > 0


class Compressor:
    """
    Args:
        number_bytes: of the numbers that blocks consist of; 0: of several sizes, or none that shrink.
        store: as people know it.
    """

    def __init__(self, mode: RemoteCompression, number_bytes: int, store: str) -> None:
        self._store = store
        self.number_bytes = number_bytes
        self.to_store, self.from_store = Link(), Link()
        self._lock = threading.Lock()  # over what follows
        self._calls = 0
        self._wants = mode is RemoteCompression.ALWAYS
        self._tries = mode is RemoteCompression.AUTO and number_bytes > 0
        self._told = False
        self.costs: Costs | None = None
        if mode is RemoteCompression.NONE:
            return
        if not number_bytes:
            self._wants = False
            logger.warning(
                "remote_compression: %s changes nothing here: only KV of 16 or 32 bits shrinks", mode.value
            )

    def wants(self, block: memoryview) -> bool:
        """Whether the blocks of a call are to be compressed, of which this is one."""
        if not self._tries:
            return self._wants
        with self._lock:
            is_trial = self._calls % _TRIAL_EVERY == 0
            self._calls += 1
        if is_trial:
            self._try(block)
        return self._decide()

    def _try(self, block: memoryview) -> None:
        trial = _core.try_compression(block, self.number_bytes)
        size = len(block)
        seen = Costs(trial.stored_bytes / size, trial.compress_s / size, trial.expand_s / size)
        with self._lock:
            before = self.costs or seen
            self.costs = Costs(
                (before.stored + seen.stored) / 2,
                (before.compress_s + seen.compress_s) / 2,
                (before.expand_s + seen.expand_s) / 2,
            )

    def _decide(self) -> bool:
        costs, store_s, load_s = self.costs, self.to_store.byte_s, self.from_store.byte_s
        if costs is None or not (store_s or load_s) or not costs.pays(store_s, load_s):
            return False
        with self._lock:
            first, self._told = not self._told, True
        if first:
            links = (("takes", store_s), ("gives", load_s))
            logger.info(
                "%s: blocks are compressed while that pays: it %s, and a core shrinks them to %.0f %% at "
                "%.0f MB/s and expands them at %.0f MB/s",
                self._store,
                " and ".join(f"{what} {1e-6 / byte_s:.0f} MB/s" for what, byte_s in links if byte_s),
                100 * costs.stored,
                1e-6 / costs.compress_s,
                1e-6 / costs.expand_s,
            )
        return True
