"""The life of a lower tier: there, taken out after faults, and back when its medium works again.

::

    ONLINE ──failures, a stall, what it says itself──▶ LEAVING ──last transfer ended──▶ AWAY
       ▲                                                                                 │
       └──────────────────────────────────── opened again ───────────────────────────────┘

A medium that fails or hangs costs hits, never requests: from the moment the tier is taken out nothing is
looked for there, and everything that can block on the medium (closing and opening it) happens in a thread of
its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum

from sglang_flexkv.cache.cache_engine import CacheEngine
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import LowerTier
from sglang_flexkv.transfer.transfer_engine import TransferEngine

logger = logging.getLogger(__name__)

# After this many failed transfers in a row the tier is taken out: a dead medium must not cost every request a
# failed load.
_FAILURES_MAX = 3
# An access that has been on its way for so long means a medium that hangs.
_STALL_S = 3.0
# Waits between attempts to open it again; doubled from the first to the last.
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0
# A tier that has been back for so long is as good as new: the next fault starts with short waits again.
_HEALED_S = 60.0
_CHECK_EVERY_S = 0.05


class TierState(Enum):
    ONLINE = "online"
    LEAVING = "leaving"
    AWAY = "away"


class TierLife:
    """Watches over one lower tier of one group of an engine, whose lock its caller holds.

    Args:
        number: of the tier.
        tier: opened already. Closed by this.
        away: why it could not be opened; empty: it could.
        cache: of the group.
        cancel_tasks: cancels what is on its way from or to the tier.
        num_tasks: how many such tasks have not ended.

    Raises:
        OSError: something below the tier cannot be set up.
    """

    def __init__(
        self,
        number: int,
        tier: LowerTier,
        cache: CacheEngine,
        transfer: TransferEngine,
        cancel_tasks: Callable[[], None],
        num_tasks: Callable[[], int],
        away: str = "",
    ) -> None:
        self._number, self._tier = number, tier
        self._cache, self._transfer = cache, transfer
        self._cancel_tasks, self._num_tasks = cancel_tasks, num_tasks
        self._keep = True  # what is stored may be found by the next process
        self._forget = False  # what the tier holds when it comes back is out of date
        self._flush = b""  # the last one
        self._retry_s = _RETRY_S
        self._online_since_s = 0.0
        self._next_check_s = 0.0
        self._opening = threading.Lock()  # over the two that follow
        self._opened_again = False
        self._closed = False
        self._stop = threading.Event()
        self.times_out = 0
        self.num_recovered = 0
        self.state = TierState.AWAY
        if away:
            self.times_out += 1
            logger.error(
                "%s tier is not there: %s. The server goes on without it; it comes in by itself when it "
                "works.",
                tier.name,
                away,
            )
            self._close_and_open()
        else:
            self._bring_in()

    def poll(self) -> None:
        """Looks after the tier. Cheap, and never waits."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_EVERY_S
        if self.state is TierState.ONLINE:
            reason = self._why_out()
            if reason:
                self._take_out(reason)
        if self.state is TierState.LEAVING and self._num_tasks() == 0:
            # Nothing in flight: nobody uses the tier any more.
            self._transfer.detach(self._number, self._cache.group)
            self._close_and_open()
        # A plan that was made before and not launched yet may still hold a block.
        if self.state is TierState.AWAY and self._opened_again and self._cache.tier_is_empty(self._number):
            self._opened_again = False
            if self._bring_in():
                logger.warning("%s tier is back: %d blocks found.", self._tier.name, self.num_recovered)

    def _why_out(self) -> str:
        if why := self._tier.why_broken():
            return why
        failures, error = self._cache.failures(self._number)
        if failures >= _FAILURES_MAX:
            return f"{failures} failures in a row, the last one: {error}"
        oldest_s = self._tier.core.oldest_s
        return f"no answer for {oldest_s:.1f} s" if oldest_s > _STALL_S else ""

    def _take_out(self, reason: str) -> None:
        if time.monotonic() - self._online_since_s > _HEALED_S:
            self._retry_s = _RETRY_S
        self.state = TierState.LEAVING
        self.times_out += 1
        blocks = self._cache.take_out(self._number)
        self._cancel_tasks()
        logger.error(
            "%s tier taken out: %s. Its %d blocks count as misses, the tiers above it go on; the tier comes "
            "back by itself when it works again.",
            self._tier.name,
            reason,
            blocks,
        )

    def _close_and_open(self) -> None:
        self.state = TierState.AWAY
        name = f"flexkv-{self._tier.name.lower()}"
        threading.Thread(target=self._open_again, name=name, daemon=True).start()

    def _open_again(self) -> None:
        self._tier.close()  # may hang as long as the medium does
        said = ""
        while not self._stop.wait(self._retry_s):
            self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
            try:
                self._tier.open()
            except ConfigError as error:
                if str(error) != said:  # which may be so for days
                    said = str(error)
                    logger.warning("%s tier still out: %s", self._tier.name, error)
                continue
            with self._opening:
                self._opened_again = not self._closed
            if not self._opened_again:
                self._tier.close()
            return

    def _bring_in(self) -> bool:
        try:
            self._transfer.attach(self._number, self._tier.core, self._cache.group)
        except OSError as error:
            if self.times_out == 0:
                raise
            logger.warning("%s tier still out: %s", self._tier.name, error)
            self._close_and_open()
            return False
        if self._forget or not self._keep:
            self._tier.take_held()
            self._tier.clear(keep=self._keep, flush=self._flush, late=True)
            self._forget = False
        self.num_recovered = self._cache.take_in(self._number)
        self.state = TierState.ONLINE
        self._online_since_s = time.monotonic()
        return True

    def clear(self, flush: bytes) -> None:
        """Forgets what the tier holds; the caller sees to the index. See LowerTier.clear."""
        self._flush = flush
        if self.state is TierState.ONLINE:
            self._tier.clear(keep=self._keep, flush=flush)
        else:
            self._forget = True

    def stop_persisting(self, flush: bytes) -> None:
        """Forgets what the tier holds, and sees that no other process finds what comes from now on."""
        self._keep = False
        self.clear(flush)

    def sync(self, timeout_s: float) -> bool:
        """Waits until what was stored so far would survive a power failure. False if it does not come to
        it."""
        return self.state is TierState.ONLINE and self._tier.sync(timeout_s)

    def stats(self) -> dict[str, float]:
        out: dict[str, float] = {
            "online": float(self.state is TierState.ONLINE),
            "leaving": float(self.state is TierState.LEAVING),  # out, and transfers of it have yet to end
            "times_out": self.times_out,
            "recovered": self.num_recovered,
        }
        if self.state is not TierState.AWAY:
            out.update(self._tier.stats())
        return out

    def stop(self) -> None:
        """No more attempts to bring the tier back."""
        self._stop.set()

    def close(self) -> None:
        """Closes the tier. Its transfers have ended."""
        with self._opening:
            self._closed = True
            open_again, self._opened_again = self._opened_again, False
        if open_again or self.state is not TierState.AWAY:
            self.state = TierState.AWAY
            self._tier.close()
