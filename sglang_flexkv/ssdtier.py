"""The life of the SSD tier: there, taken out after faults, and back when the disk works again.

::

    ONLINE ──failures, a stall, a dead journal──▶ LEAVING ──last transfer ended──▶ AWAY
       ▲                                                                             │
       └──────────────────────── files opened and replayed again ────────────────────┘

A disk that fails or hangs costs hits, never requests: from the moment the tier is taken out nothing is looked
for there, and everything that can block on the disk (closing its files, opening and replaying them) happens
in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum

from sglang_flexkv.cache.cache_engine import GlobalCacheEngine
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.storage.ssd_store import SsdStore
from sglang_flexkv.storage.storage_engine import StorageEngine
from sglang_flexkv.transfer.transfer_engine import TransferEngine

logger = logging.getLogger(__name__)

# After this many failed transfers in a row the tier is taken out: a dead disk must not cost every request a
# failed read.
_FAILURES_MAX = 3
# A transfer that has been on its way for so long means a disk that hangs.
_STALL_S = 3.0
# Waits between attempts to open the files again; doubled from the first to the last.
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0
# A tier that has been back for so long is as good as new: the next fault starts with short waits again.
_HEALED_S = 60.0
_CHECK_EVERY_S = 0.05


class SsdState(Enum):
    ONLINE = "online"
    LEAVING = "leaving"
    AWAY = "away"


class SsdTier:
    """Watches over the SSD tier of one engine, whose lock its caller holds.

    Args:
        cancel_disk_tasks: cancels what is on its way from or to the disk.
        num_disk_tasks: how many such tasks have not ended.
    """

    def __init__(
        self,
        storage: StorageEngine,
        cache: GlobalCacheEngine,
        transfer: TransferEngine,
        cancel_disk_tasks: Callable[[], None],
        num_disk_tasks: Callable[[], int],
    ) -> None:
        self._storage, self._cache, self._transfer = storage, cache, transfer
        self._cancel_disk_tasks, self._num_disk_tasks = cancel_disk_tasks, num_disk_tasks
        self._keep = True  # what is stored may be found by the next process
        self._forget = False  # what the files hold when they come back is out of date
        self._retry_s = _RETRY_S
        self._online_since_s = 0.0
        self._next_check_s = 0.0
        self._reopened: SsdStore | None = None
        self._stop = threading.Event()
        self.times_out = 0
        self.num_recovered = 0
        self.state = SsdState.AWAY
        assert storage.ssd is not None
        self._bring_in(storage.ssd)

    def poll(self) -> None:
        """Looks after the tier. Cheap, and never waits."""
        now_s = time.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + _CHECK_EVERY_S
        if self.state is SsdState.ONLINE:
            reason = self._why_out()
            if reason:
                self._take_out(reason)
        if self.state is SsdState.LEAVING and self._num_disk_tasks() == 0:
            # Nothing in flight: nobody uses the files or the lanes any more.
            self._transfer.detach_ssd()
            store, self._storage.ssd = self._storage.ssd, None
            assert store is not None
            self._look_for_disk(store)
        # A plan that was made before and not launched yet may still hold a block.
        if self.state is SsdState.AWAY and self._reopened is not None and self._cache.ssd_is_empty:
            self._storage.ssd, self._reopened = self._reopened, None
            self._bring_in(self._storage.ssd)
            logger.warning("SSD tier is back: %d blocks found.", self.num_recovered)

    def _why_out(self) -> str:
        assert self._storage.ssd is not None
        if self._storage.ssd.core.error:
            return self._storage.ssd.core.error
        if self._cache.ssd_failures >= _FAILURES_MAX:
            return f"{self._cache.ssd_failures} failures in a row, the last one: {self._cache.ssd_error}"
        oldest_s = self._transfer.ssd_oldest_io_s
        return f"the disk has not answered for {oldest_s:.1f} s" if oldest_s > _STALL_S else ""

    def _take_out(self, reason: str) -> None:
        if time.monotonic() - self._online_since_s > _HEALED_S:
            self._retry_s = _RETRY_S
        self.state = SsdState.LEAVING
        self.times_out += 1
        blocks = self._cache.ssd_offline()
        self._cancel_disk_tasks()
        logger.error(
            "SSD tier taken out: %s. Its %d blocks count as misses, the CPU tier goes on; the tier comes "
            "back by itself when the disk works again.",
            reason,
            blocks,
        )

    def _look_for_disk(self, store: SsdStore) -> None:
        self.state = SsdState.AWAY
        threading.Thread(target=self._reopen, args=(store,), name="flexkv-ssd", daemon=True).start()

    def _reopen(self, store: SsdStore) -> None:
        store.close()  # may hang as long as the disk does
        del store
        while not self._stop.wait(self._retry_s):
            self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
            try:
                store = self._storage.open_ssd()
                if self._stop.is_set():
                    store.close()
                else:
                    self._reopened = store
                return
            except ConfigError as error:
                logger.warning("SSD tier still out: %s", error)

    def _bring_in(self, store: SsdStore) -> None:
        try:
            self._transfer.attach_ssd(store)
        except OSError as error:
            if self.times_out == 0:
                raise
            logger.warning("SSD tier still out: %s", error)
            self._storage.ssd = None
            self._look_for_disk(store)
            return
        if self._forget or not self._keep:
            store.core.take_recovered()
            store.core.clear(self._keep)
            self._forget = False
        self.num_recovered = self._cache.ssd_online(store.core)
        self.state = SsdState.ONLINE
        self._online_since_s = time.monotonic()

    def clear(self) -> None:
        """Forgets what the files hold; the caller sees to the index."""
        if self.state is SsdState.ONLINE and self._storage.ssd is not None:
            self._storage.ssd.core.clear(self._keep)
        else:
            self._forget = True

    def stop_persisting(self) -> None:
        """Forgets what the files hold, and has the next process forget what comes from now on."""
        self._keep = False
        self.clear()

    def sync(self, timeout_s: float) -> bool:
        """Waits until what was stored so far would survive a power failure. False if it does not come to
        it."""
        store = self._storage.ssd
        return self.state is SsdState.ONLINE and store is not None and store.core.sync(timeout_s)

    def stats(self) -> dict[str, float]:
        out: dict[str, float] = {
            "online": float(self.state is SsdState.ONLINE),
            "leaving": float(self.state is SsdState.LEAVING),  # out, and transfers of it have yet to end
            "times_out": self.times_out,
            "recovered": self.num_recovered,
        }
        if self._storage.ssd is not None:
            out.update({f"journal_{k}": v for k, v in self._storage.ssd.core.stats().items()})
        return out

    def close(self) -> None:
        """Stops looking for the disk. The caller closes the storage."""
        self._stop.set()
        reopened, self._reopened = self._reopened, None
        if reopened is not None:
            reopened.close()
