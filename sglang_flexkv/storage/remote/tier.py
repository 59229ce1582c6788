"""The remote tier: a store that many servers read and write, as a tier below all others.

Threads of its own talk to the store, each through a session: some load, some store, one looks up. They take
their work from ``core`` and settle it there; the scheduler's thread leaves questions and never waits.

What this process does not know of the store it asks for. What it does know is worth remembering for a
while: what was there goes to the index, what was not (or did not come back as it was) is not asked for
again for some seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import queue
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sglang_flexkv import _core
from sglang_flexkv.common.block import KEY_BYTES, BlockKeys, Namespace, make_namespace
from sglang_flexkv.common.config import Admission, EvictionPolicy, RemoteCompression
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.lower_tier import (
    AwayError,
    HeldBlocks,
    LowerTier,
    Question,
    SharedBlocks,
    TierSlots,
)
from sglang_flexkv.common.patience import Patience
from sglang_flexkv.common.remote_url import RemoteUrl
from sglang_flexkv.storage.remote.compression import Compressor, Link
from sglang_flexkv.storage.remote.directory import DirectoryStore
from sglang_flexkv.storage.remote.hicache import HiCacheStore
from sglang_flexkv.storage.remote.mooncake import MooncakeStore
from sglang_flexkv.storage.remote.redis import RedisStore
from sglang_flexkv.storage.remote.s3 import S3Store
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    StoreError,
    StoreFullError,
    Value,
    value_bytes,
)

logger = logging.getLogger(__name__)

STORES: dict[str, Callable[[RemoteUrl, float], Store]] = {
    "file": DirectoryStore,
    "hicache": HiCacheStore,
    "mooncake": MooncakeStore,
    "redis": RedisStore,
    "rediss": RedisStore,
    "s3": S3Store,
}

# Bytes that one call moves. With the threads they bound what is in flight, also of calls whose request has
# given up on them.
_CALL_BYTES = 8 << 20
_LOAD_THREADS, _STORE_THREADS = 4, 2
# How long a thread waits for work before it looks whether it should end.
_IDLE_S = 0.2
# What may take as long as it likes otherwise, for instance on a mount that answers to names and not to bytes.
_OPEN_S = 30.0
# Threads that a medium holds are left behind: they hold no slot, and end when it lets go of them.
_JOIN_S = 2.0
# What was not there is not asked for again for so long; what did not come, or was damaged, longer.
_ABSENT_S, _SPOILT_S = 2.0, 10.0
_REMEMBERED_MAX = 1 << 16
# Look-ups in a row that failed or came too late, after which the store is of no use.
_LOOKUPS_FAILED_MAX = 3
_LOOKUP_STALL_S = 3.0
# A store that is full is left alone for so long, then twice as long, up to the second.
_FULL_S, _FULL_MAX_S = 1.0, 60.0
# Another server may have flushed the cache: how often that is looked at. One's own flush is told again after
# so long if the store took no note of it.
_GENERATION_S, _TELL_AGAIN_S = 10.0, 2.0
# Generations that were left behind are remembered, so many: who was slow may still tell one of them.
_LEFT_BEHIND_MAX = 64

_GENERATION_MAGIC = b"FLEXKVGN"
_GENERATION_BYTES = len(_GENERATION_MAGIC) + KEY_BYTES
_GENERATION_RECORD = _GENERATION_BYTES + KEY_BYTES  # and a digest of it

NO_GENERATION = bytes(KEY_BYTES)


class WritePace:
    """Bounds what the tiers of a rank store together, one for each group of its blocks.

    Args:
        bytes_per_s: 0: no limit.
    """

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock
        self._lock = threading.Lock()
        self._may_go_on_s = 0.0

    def seconds_after(self, num_bytes: int) -> float:
        """How long to store nothing, for a thread that has just stored so many bytes."""
        if not self._bytes_per_s or not num_bytes:
            return 0.0
        with self._lock:
            now_s = self._clock()
            self._may_go_on_s = max(now_s, self._may_go_on_s) + num_bytes / self._bytes_per_s
            return self._may_go_on_s - now_s


class RemoteTier(LowerTier):
    """The blocks of one rank, their parts in one group.

    Args:
        num_slots: blocks of the store that this process remembers.
        namespace: of the keys that it is given.
        shared: whose values these are, and of which group; what is found under another namespace is not ours.
            None: those of ``namespace``.
        pace: of what is stored; None: no limit.
        timeout_s: that a call may take, and a look-up of all of a prompt.
        compression: whether blocks are compressed that are stored.
        number_bytes: of the floating-point numbers that they consist of; 0: of several sizes, or others.
    """

    is_asked = True

    def __init__(
        self,
        url: RemoteUrl,
        num_slots: int,
        *,
        namespace: Namespace,
        shared: SharedBlocks | None = None,
        admission: Admission = Admission.ALL,
        pace: WritePace | None = None,
        timeout_s: float = 1.0,
        compression: RemoteCompression = RemoteCompression.NONE,
        number_bytes: int = 0,
    ) -> None:
        super().__init__(
            "REMOTE", "REMOTE", num_slots, eviction_policy=EvictionPolicy.LRU, admission=admission
        )
        self._shared = shared or SharedBlocks(namespace)
        self._namespace = self._shared.namespace
        # Keys are folded with a namespace by XOR. This makes those of the store of them.
        self._refold = _core.keys_of_page_hashes([namespace.hex()], self._namespace)
        self._kind = url.scheme
        self.pace, self._timeout_s = pace or WritePace(0.0), timeout_s
        self.store = STORES[url.scheme](url, timeout_s)
        self._opening = Patience()
        if compression is not RemoteCompression.NONE and not self.store.any_size:
            raise ConfigError(
                f"remote_compression: {self.store.name} brings values of one size only; leave "
                f"{compression.value} out"
            )
        self.compressor = Compressor(compression, number_bytes, self.store.name)
        self._generation = NO_GENERATION
        self._left_behind: deque[bytes] = deque(maxlen=_LEFT_BEHIND_MAX)  # what was flushed here
        self._is_anothers = False  # it was drawn by somebody else while this was closed
        self._untold_generation = False  # the store does not know it yet
        self._is_flush_lost = False  # and somebody was warned
        self._private = False  # no other process is to find what is stored
        self._read_generation_s = self._tell_generation_s = 0.0
        self._core = self._make_core()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._questions: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over what follows, for several threads write it
        self._not_there: OrderedDict[bytes, float] = OrderedDict()  # keys (or windows), and until when
        self._spoilt: OrderedDict[bytes, None] = OrderedDict()  # keys whose values are to be replaced
        self._full_until_s = self._full_s = 0.0
        self._why_broken = ""
        self._lookups_failed = 0
        self._asking_since_s = 0.0
        self._count: Counter[str] = Counter()
        self._lookup_s = 0.0

    # ---- the contract ----

    def open(self) -> None:
        if not self._opening.call(self._open_store, _OPEN_S, undo=self.store.close):
            raise AwayError(f"remote: {self.store.name} does not answer; check what serves it")
        self._read_generation_s = time.monotonic()
        self._why_broken = ""
        self._lookups_failed = 0
        self._asking_since_s = 0.0
        self._not_there.clear()  # what did not come may come now
        self._core = self._make_core()
        self._stop = threading.Event()
        self._questions = queue.SimpleQueue()
        loops: list[tuple[str, Callable[[], None]]] = [("ask", _Asker(self).run)]
        loops += [(f"load-{n}", _Mover(self, store=False).run) for n in range(_LOAD_THREADS)]
        loops += [(f"store-{n}", _Mover(self, store=True).run) for n in range(_STORE_THREADS)]
        self._threads = [
            threading.Thread(target=run, name=f"flexkv-remote-{name}", daemon=True) for name, run in loops
        ]
        for thread in self._threads:
            thread.start()
        # A thread that waits in C++ when the interpreter goes would take the process down with an abort.
        atexit.register(self.close)

    def _open_store(self) -> None:
        self.store.open()
        try:
            session = self.store.session()
            try:
                if not (self._untold_generation or self._private):
                    told = self._told_generation(session)
                    self._is_anothers = told not in (None, self._generation)
                    self._generation = told or self._generation
                    self._untold_generation = told is None and self._generation != NO_GENERATION
                if self._untold_generation:
                    self._tell_generation(session)
            finally:
                session.close()
        except StoreError as error:
            raise AwayError(f"remote: {error}") from None
        except ConfigError:
            raise
        except Exception as error:  # of a client that we do not know to the last line
            logger.exception("%s cannot be opened", self.store.name)
            raise AwayError(f"remote: {self.store.name}: {error!r}") from None

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def core(self) -> _core.RemoteTier:
        return self._core

    def take_held(self) -> HeldBlocks:
        return HeldBlocks()  # what it holds is asked for

    def stored(self, keys: BlockKeys, parents: BlockKeys, slots: TierSlots) -> None:
        del keys, parents, slots  # the store knows

    def lost(self, slots: TierSlots) -> None:
        del slots  # who tried to load it has made a note of the key

    def why_broken(self) -> str:
        since_s = self._asking_since_s
        if since_s and (waited_s := time.monotonic() - since_s) > _LOOKUP_STALL_S:
            return f"no answer to a look-up for {waited_s:.1f} s"
        return self._why_broken

    def to_store(self, keys: BlockKeys) -> BlockKeys:
        """By the names that the keys have in the store: these are the same on all ranks. What is damaged is
        replaced by who has found that."""
        if self._shared.ranks == 1:
            return keys
        stored_keys = keys ^ self._refold
        ours = stored_keys[:, 0] % np.uint64(self._shared.ranks) == self._shared.rank
        with self._lock:
            for i in np.flatnonzero(~ours) if self._spoilt else ():
                ours[i] = stored_keys[i].tobytes() in self._spoilt
        return keys[ours]

    def clear(self, *, keep: bool, flush: bytes, late: bool = False) -> None:
        """What was stored so far keeps its place in the store, under a name that nobody asks for any more: it
        may be somebody else's as well, and goes as the store's own rules say.

        All ranks go on with one generation, which is the flush. Not if that is late and another server has
        flushed meanwhile: nobody knows which came first, so what has either name may have been flushed."""
        self._private = self._private or not keep
        if late and self._is_anothers and not self._private and self._generation != flush:
            flush = secrets.token_bytes(KEY_BYTES)
        with self._lock:
            if self._generation != flush:
                self._left_behind.append(self._generation)
            self._generation = flush
            self._untold_generation = not self._private
            self._tell_generation_s = 0.0
        self._core.set_namespace(self.values_namespace())
        with self._lock:
            self._not_there.clear()
            self._spoilt.clear()
        if self._untold_generation:
            self._questions.put(None)

    def look_up(self, keys: BlockKeys, window: int = 0) -> Question:
        question = Question(keys, time.monotonic() + self._timeout_s, window)
        self._count["lookups"] += 1
        stored_keys = keys ^ self._refold
        absent = self.has_no_window(stored_keys) if window else self.first_absent(stored_keys[:1]) == 0
        if absent:
            question.answer(())
        else:
            self._questions.put(question)
        return question

    def stats(self) -> Mapping[str, float]:
        """Beside those of every tier: lookups, lookups_failed (or too late), lookup_s (in all), asked_blocks,
        found_blocks, there_already (blocks that were not stored because somebody else had), full (times),
        compressed_bytes and compressed_to_bytes (of what was stored compressed, before and after),
        expanded_bytes (of what was loaded and had been compressed, afterwards)."""
        names = (
            *("lookups", "lookups_failed", "asked_blocks", "found_blocks", "there_already", "full"),
            *("compressed_bytes", "compressed_to_bytes", "expanded_bytes"),
        )
        return {**{name: self._count[name] for name in names}, "lookup_s": self._lookup_s}

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stop.set()
        self._questions.put(None)
        deadline_s = time.monotonic() + _JOIN_S + self._timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            self.store.close()
        self._threads = []

    # ---- names ----

    def values_namespace(self) -> Namespace:
        """Whose values these are: of the keys' namespace, since it was flushed last."""
        return make_namespace({"keys": self._namespace.hex(), "generation": self._generation.hex()})

    def _make_core(self) -> _core.RemoteTier:
        return _core.RemoteTier(
            self.values_namespace(), self._refold.tobytes(), self.num_slots, _CALL_BYTES, self.store.name
        )

    # ---- generations: what a flush leaves behind is not found again ----

    def _generation_name(self) -> str:
        return f"fkv1/{self._namespace.hex()}/generation"

    def _read_generation(self, session: Session) -> bytes | None:
        """What was told last; None if that is not there. Stores evict: who still knows it tells it again
        then, or what was flushed would be found again."""
        record = bytearray(_GENERATION_RECORD)
        (outcome,) = session.get([self._generation_name()], [[memoryview(record)]])
        if outcome == Outcome.GOOD and record == _generation_record(bytes(record[8:_GENERATION_BYTES])):
            return bytes(record[8:_GENERATION_BYTES])
        return None

    def _told_generation(self, session: Session) -> bytes | None:
        """The same without what was left behind here: a rank or a server that is late may have told that."""
        told = self._read_generation(session)
        return None if told in self._left_behind else told

    def _tell_generation(self, session: Session) -> None:
        """Writes it where the others see it. A store that takes no note of it is told again later, and is of
        use meanwhile: what was flushed is not found by this server in any case. Raises StoreError."""
        generation = self._generation
        self._tell_generation_s = time.monotonic() + _TELL_AGAIN_S
        why = "it has no room"
        if self.store.replaces or self._read_generation(session) in (None, generation):
            with contextlib.suppress(StoreFullError):
                record = memoryview(_generation_record(generation))
                if session.put([self._generation_name()], [[record]]) == [Outcome.GOOD]:
                    with self._lock:
                        self._untold_generation = self._generation != generation  # flushed again
                    return
        else:
            why = "it replaces nothing"
            self._private, self._untold_generation = True, False
        if not self._is_flush_lost:
            self._is_flush_lost = True
            logger.warning(
                "%s cannot be told that the cache was flushed: %s. Other servers go on finding what was "
                "stored before; this one does not.",
                self.store.name,
                why,
            )

    def _look_at_generation(self, session: Session) -> None:
        """By the thread that asks, before it does."""
        now_s = time.monotonic()
        if self._untold_generation:
            if now_s >= self._tell_generation_s:
                self._tell_generation(session)
        elif not self._private and now_s - self._read_generation_s > _GENERATION_S:
            self._read_generation_s = now_s
            told = self._told_generation(session)
            with self._lock:
                if self._untold_generation:  # flushed meanwhile
                    return
                if told is None:
                    self._untold_generation = self._generation != NO_GENERATION
                elif told != self._generation:
                    self._why_broken = "another server has flushed the cache"

    def note_use(self) -> None:
        """Values are moved, for which nobody need have asked: has somebody flushed them?"""
        if time.monotonic() - self._read_generation_s > _GENERATION_S:
            self._questions.put(None)

    # ---- what is not there ----

    def first_absent(self, keys: BlockKeys) -> int:
        """Position of the first that is not to be asked for now; their number if all are."""
        now_s = time.monotonic()
        with self._lock:
            if self._not_there:
                for position, key in enumerate(keys):
                    if self._not_there.get(key.tobytes(), 0.0) > now_s:
                        return position
        return len(keys)

    def without_absent(self, keys: BlockKeys, positions: Sequence[int]) -> Sequence[int]:
        """Those positions whose keys may be asked for now."""
        now_s = time.monotonic()
        with self._lock:
            if not self._not_there:
                return positions
            return [i for i in positions if self._not_there.get(keys[i].tobytes(), 0.0) <= now_s]

    def has_no_window(self, keys: BlockKeys) -> bool:
        """Whether there was none at the end of these a moment ago."""
        with self._lock:
            return self._not_there.get(_window_at_end(keys), 0.0) > time.monotonic()

    def note_no_window(self, keys: BlockKeys) -> None:
        self.note_absent(_window_at_end(keys))

    def note_absent(self, key: bytes, *, spoilt: bool = False) -> None:
        """Nobody asks for it for a while; what is there although it is not what was stored is replaced by who
        stores it next."""
        with self._lock:
            self._not_there[key] = time.monotonic() + (_SPOILT_S if spoilt else _ABSENT_S)
            self._not_there.move_to_end(key)
            if spoilt:
                self._spoilt[key] = None
            for kept in (self._not_there, self._spoilt):
                if len(kept) > _REMEMBERED_MAX:
                    kept.popitem(last=False)

    def take_spoilt(self, key: bytes) -> bool:
        with self._lock:
            return self._spoilt.pop(key, False) is None

    def note_stored(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._not_there.pop(key, None)

    # ---- full ----

    @property
    def is_full(self) -> bool:
        return time.monotonic() < self._full_until_s

    def note_full(self, error: StoreFullError) -> None:
        with self._lock:
            self._full_s = min(max(_FULL_S, 2 * self._full_s), _FULL_MAX_S)
            self._full_until_s = time.monotonic() + self._full_s
            self._count["full"] += 1
            first = self._count["full"] == 1
        if first:
            logger.warning("%s. What is there is served; blocks are stored again when it takes them.", error)

    def note_room(self) -> None:
        self._full_s = 0.0


class _Thread:
    """What the threads have in common: a session that is made anew after an error."""

    def __init__(self, tier: RemoteTier) -> None:
        # Those of this opening: the tier may be closed, and opened again, while this hangs.
        self.tier, self.core = tier, tier.core
        self.stop = tier._stop
        self._session: Session | None = None

    def try_with_session(self, call: Callable[[Session], object]) -> None:
        """Makes a call, a second time if what went wrong may be gone at once. Raises StoreError."""
        for attempt in (1, 2):
            try:
                if self._session is None:
                    self._session = self.tier.store.session()
                call(self._session)
                return
            except StoreError as error:
                self.end_session()
                if isinstance(error, StoreFullError) or not error.temporary or attempt == 2:
                    raise

    def end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class _Asker(_Thread):
    """Looks up."""

    def run(self) -> None:
        tier, questions = self.tier, self.tier._questions
        while True:
            question = None
            with contextlib.suppress(queue.Empty):
                question = questions.get(timeout=_TELL_AGAIN_S if tier._untold_generation else None)
            if question is None and self.stop.is_set():
                break
            if question is not None and question.is_over:  # nobody waits for it any more
                continue
            tier._asking_since_s = start_s = time.monotonic()
            found: Sequence[int] = ()
            try:
                self.try_with_session(tier._look_at_generation)
                if question is not None:
                    found = self._find(question)
                tier._lookups_failed = 0
            except StoreError as error:
                self._failed(str(error))
            except Exception as error:  # of a client that we do not know to the last line
                logger.exception("a look-up failed")
                self._failed(repr(error))
            finally:
                if tier._asking_since_s == start_s:
                    tier._asking_since_s = 0.0
                tier._lookup_s += time.monotonic() - start_s
            if question is None:
                continue
            if question.is_over:
                self._failed("an answer came too late")
            question.answer(found)
            tier._count["asked_blocks"] += len(question.keys)
            tier._count["found_blocks"] += len(found)
        if tier._untold_generation and tier._stop is self.stop:
            with contextlib.suppress(StoreError):  # told at the next opening, if there is one
                self.try_with_session(tier._tell_generation)
        self.end_session()

    def _find(self, question: Question) -> Sequence[int]:
        """Positions of what is there. What is there, and is not what was stored, is left out."""
        keys, window = question.keys ^ self.tier._refold, question.window
        names = _names_of(keys, self.tier.values_namespace())
        found: Sequence[int] = ()

        def find(session: Session) -> None:
            nonlocal found
            if window:
                found = np.flatnonzero(session.find_windows(names, window)).tolist()
            else:
                found = range(session.count_leading(names))

        self.try_with_session(find)
        if not window:
            if len(found) < len(keys):
                self.tier.note_absent(keys[len(found)].tobytes())
            return found[: self.tier.first_absent(keys[: len(found)])]
        found = self.tier.without_absent(keys, found)
        at_end = range(max(0, len(keys) - window), len(keys))
        if list(found[-len(at_end) :]) != list(at_end):
            self.tier.note_no_window(keys)
        return found

    def _failed(self, why: str) -> None:
        tier = self.tier
        tier._count["lookups_failed"] += 1
        tier._lookups_failed += 1
        if tier._lookups_failed >= _LOOKUPS_FAILED_MAX and tier._stop is self.stop:
            tier._why_broken = f"{tier._lookups_failed} look-ups failed in a row, the last one: {why}"


class _Mover(_Thread):
    """Loads, or stores."""

    def __init__(self, tier: RemoteTier, *, store: bool) -> None:
        super().__init__(tier)
        self._store = store

    def run(self) -> None:
        while not self.stop.is_set():
            call = self.core.take(self._store, _IDLE_S)
            if call is not None:
                self._move(call)
        self.end_session()

    def _move(self, call: _core.RemoteCall) -> None:
        keys, values = call.keys, call.values()
        names = _names_of(keys, call.namespace)
        outcomes = [Outcome.FAILED] * len(names)
        sizes = [0] * len(names)
        why = ""
        try:
            self.tier.store.lend(call.pool)
            if self._store:
                outcomes = self._put(call, keys, names)
            else:
                self.try_with_session(
                    lambda session: _set(outcomes, self._get(session, names, values, sizes))
                )
        except StoreFullError as error:
            self.tier.note_full(error)
            outcomes = [Outcome.MISSING] * len(names)
        except StoreError as error:
            why = str(error)
        except Exception as error:  # of a client that we do not know to the last line
            logger.exception("a call of %s failed", self.tier.store.name)
            why = f"{self.tier.store.name}: {error!r}"
        if not why and Outcome.CORRUPT in outcomes:
            why = f"{self.tier.store.name}: a value has another size than was stored"
        self.tier.note_use()
        outcomes, why_corrupt = self.core.verify(call, outcomes, sizes)
        self._count_expanded(values, sizes, outcomes)
        # Before anybody learns of it, and asks again.
        self._remember(keys, outcomes)
        self.core.settle(call, outcomes, why or why_corrupt)

    def _get(
        self, session: Session, names: list[str], values: Sequence[Value], sizes: list[int]
    ) -> list[Outcome]:
        with _timed(self.tier.compressor.from_store, sum(map(value_bytes, values))) as moved:
            outcomes = session.get(names, values, sizes)
            moved += [s for s, outcome in zip(sizes, outcomes, strict=True) if outcome == Outcome.GOOD]
        return outcomes

    def _count_expanded(
        self, values: Sequence[Value], sizes: Sequence[int], outcomes: Sequence[Outcome]
    ) -> None:
        if self._store:
            return
        for (_, body), size, outcome in zip(values, sizes, outcomes, strict=True):
            if outcome == Outcome.GOOD and size < _core.VALUE_HEADER_BYTES + len(body):
                self.tier._count["expanded_bytes"] += len(body)

    def _put(self, call: _core.RemoteCall, keys: BlockKeys, names: list[str]) -> list[Outcome]:
        """Stores what nobody has stored yet. A value is megabytes, and to ask is a few bytes."""
        tier = self.tier
        if tier.is_full:
            return [Outcome.MISSING] * len(names)
        outcomes = [Outcome.GOOD] * len(names)
        spoilt = [tier.take_spoilt(key.tobytes()) for key in keys]

        def put(session: Session) -> None:
            there = session.exists(names)
            missing = [i for i in range(len(names)) if spoilt[i] or not there[i]]
            values = self._compressed(call, missing)
            if missing:
                with _timed(tier.compressor.to_store, sum(value_bytes(values[i]) for i in missing)) as moved:
                    done = session.put([names[i] for i in missing], [values[i] for i in missing])
                    moved += [value_bytes(values[i]) for i in missing]
                for i, outcome in zip(missing, done, strict=True):
                    outcomes[i] = outcome
            tier._count["there_already"] += len(names) - len(missing)
            self.stop.wait(tier.pace.seconds_after(sum(value_bytes(values[i]) for i in missing)))

        self.try_with_session(put)
        if Outcome.GOOD in outcomes:
            tier.note_room()
        return outcomes

    def _compressed(self, call: _core.RemoteCall, missing: list[int]) -> list[tuple[memoryview, memoryview]]:
        """The values of a call, those at these positions compressed if that is wanted."""
        values, compressor = call.values(), self.tier.compressor
        if not missing or not compressor.wants(values[missing[0]][1]):
            return values
        call.compress(missing, compressor.number_bytes)
        before, values = values, call.values()
        for i in missing:
            if len(values[i][1]) < len(before[i][1]):
                self.tier._count["compressed_bytes"] += len(before[i][1])
                self.tier._count["compressed_to_bytes"] += len(values[i][1])
        return values

    def _remember(self, keys: BlockKeys, outcomes: Sequence[Outcome]) -> None:
        if self._store:
            self.tier.note_stored(
                [k.tobytes() for k, o in zip(keys, outcomes, strict=True) if o == Outcome.GOOD]
            )
            return
        for key, outcome in zip(keys, outcomes, strict=True):
            if outcome != Outcome.GOOD and outcome != Outcome.DROPPED:
                self.tier.note_absent(key.tobytes(), spoilt=outcome == Outcome.CORRUPT)


def _names_of(keys: BlockKeys, namespace: bytes) -> list[str]:
    """Hashes of hashes: they show neither tokens nor whose they are."""
    prefix = f"fkv1/{namespace.hex()}/"
    text = keys.tobytes().hex()
    digits = 2 * KEY_BYTES
    return [prefix + text[at : at + digits] for at in range(0, len(text), digits)]


def _window_at_end(keys: BlockKeys) -> bytes:
    """In place of a key: of what is missing at a place some may be there."""
    return keys[-1].tobytes() + b"window"


def _generation_record(generation: bytes) -> bytes:
    content = _GENERATION_MAGIC + generation
    return content + hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


@contextlib.contextmanager
def _timed(link: Link, room: int) -> Iterator[list[int]]:
    """What is done meanwhile is a call that moves so many bytes at most; it adds what it did move."""
    moved: list[int] = []
    if not link.counts(room):
        yield moved
        return
    began = link.begin()
    try:
        yield moved
    except BaseException:
        link.fail()
        raise
    link.end(began, sum(moved))


def _set(outcomes: list[Outcome], to: list[Outcome]) -> None:
    outcomes[:] = to
