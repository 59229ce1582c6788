"""A naive model of _core.PrefixIndex, run side by side with it: every call is made on both and compared.

The model is dicts and lists and says exactly what each call returns, which slots are free, what is kept
of a block's tokens and parent, and which blocks may be evicted. Driven by Hypothesis (test_index_model.py)
and by a seeded random loop (scripts/model_check.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from sglang_flexkv import _core

Policy = _core.EvictionPolicy
CPU, LOWER, LOWEST = TIERS = range(3)

# Policies that are specified to the point: level, then rank, then nothing. Of the others the model checks
# what every policy owes: leaf first, nothing that is held, no more than needed.
EXACT = (Policy.FIFO, Policy.LRU, Policy.LFU)
# Policies that may leave newcomers outside: the others store whatever there is room for.
MAY_REFUSE = (Policy.ADAPTIVE,)
LFU_USES_MAX = 31
# Up to this time a queue's buckets are one tick wide: rank is kept exactly.
EXACT_TICKS_MAX = 2047


class Divergence(AssertionError):
    """Index and model do not agree."""


def expect(actual: object, wanted: object, what: str) -> None:
    if actual != wanted:
        raise Divergence(f"{what}: the index says {actual!r}, the model {wanted!r}")


class Lookup(Enum):
    """What a lookup by keys says about tokens."""

    KEYS = auto()
    NARROW = auto()  # int32
    WIDE = auto()  # int64
    DIFFERENT = auto()  # as if the keys had collided


@dataclass(frozen=True)
class Setup:
    """Of an index and of the blocks that are stored in it.

    Blocks form a tree, so that prefixes share and branch: block n comes after block n // 3. The second half
    of the blocks has the tokens of the first, in another namespace.
    """

    slots: tuple[int, ...] = (7, 11, 5)  # by tier
    policies: tuple[_core.EvictionPolicy, ...] = (Policy.LRU,) * 3
    tokens_kept: int = 0  # per block; 0: none are
    blocks_per_namespace: int = 30


class Blocks:
    """Keys and tokens of the blocks of a setup, which are numbered from 1."""

    NAMESPACES = (b"one namespace ..", b"another one ....")
    _DIFFERENT = 1_000_000  # no block has tokens from here on

    def __init__(self, setup: Setup) -> None:
        self.half = setup.blocks_per_namespace
        self.count = 2 * self.half
        self.per_block = setup.tokens_kept
        self._keys = np.array([(n, n * 7919 + 1) for n in range(self.count + 1)], dtype=np.uint64)
        if self.per_block:
            for n in range(1, self.count + 1):
                path = self.path(n)
                self._keys[n] = _core.hash_tokens(self.tokens(path), self.per_block, self.namespace(n))[-1]
        self.number = {tuple(map(int, key)): n for n, key in enumerate(self._keys)}

    def parent(self, block: int) -> int:
        """0: it has none."""
        root = self.half if block > self.half else 0
        above = (block - root) // 3
        return above and root + above

    def path(self, leaf: int) -> list[int]:
        out = []
        while leaf:
            out.append(leaf)
            leaf = self.parent(leaf)
        return out[::-1]

    def namespace(self, block: int) -> bytes:
        return self.NAMESPACES[block > self.half]

    def keys(self, blocks: Sequence[int]) -> np.ndarray:
        return self._keys[np.array(blocks, dtype=np.int64)]

    def content(self, block: int, different: bool = False) -> tuple[int, ...]:
        first = (block - 1) % self.half * self.per_block
        # Only the last token differs: all of a block must be compared.
        last = first + self.per_block - 1 + (self._DIFFERENT if different else 0)
        return (*range(first, first + self.per_block - 1), last)

    def tokens(self, blocks: Iterable[int], wide: bool = False, different: bool = False) -> np.ndarray:
        ids = [token for block in blocks for token in self.content(block, different)]
        return np.array(ids, dtype=np.int64 if wide else np.int32)


class State(Enum):
    WRITING = auto()
    READY = auto()
    DYING = auto()  # dropped, but somebody reads it


@dataclass
class Residency:
    slot: int
    state: State
    stamp: int
    uses: int = 0
    pins: int = 0


@dataclass
class Entry:
    """A block that some tier holds, or the place of one that others come after."""

    parent: int = 0
    children: set[int] = field(default_factory=set)
    importance: int = 0
    number: int = 0  # of one that is watched
    content: tuple[int, ...] | None = None
    tiers: dict[int, Residency] = field(default_factory=dict)


@dataclass(frozen=True)
class Transaction:
    id: int
    tier: int
    blocks: list[int]


@dataclass(frozen=True)
class Lease:
    id: int
    pins: list[tuple[int, int]]


class IndexModel:
    """An index and its model. A call that the two do not agree on raises Divergence."""

    def __init__(self, setup: Setup) -> None:
        self.blocks = Blocks(setup)
        self.index = _core.PrefixIndex(
            setup.slots,
            setup.policies,
            tokens_per_block=setup.tokens_kept or 16,
            keep_tokens=setup.tokens_kept > 0,
            watched=True,
        )
        self.sighted: dict[int, set[int]] = {}  # tiers of watched blocks, as the index has told
        self._next_number = 1
        self.policy, self.slots = setup.policies, setup.slots
        self.entries: dict[int, Entry] = {}
        self.evicted = dict.fromkeys(TIERS, 0)
        self.now = 0
        self.leases: list[Lease] = []
        self.transactions: list[Transaction] = []

    # ---- what the model knows ----

    def residency(self, tier: int, block: int) -> Residency | None:
        entry = self.entries.get(block)
        return entry.tiers.get(tier) if entry else None

    def is_ready(self, tier: int, block: int) -> bool:
        residency = self.residency(tier, block)
        return residency is not None and residency.state is State.READY

    def mask(self, block: int) -> int:
        return sum(1 << tier for tier in TIERS if self.is_ready(tier, block))

    def held(self, tier: int) -> dict[int, Residency]:
        return {n: entry.tiers[tier] for n, entry in self.entries.items() if tier in entry.tiers}

    def ready(self, tier: int) -> dict[int, int]:
        return {n: r.slot for n, r in self.held(tier).items() if r.state is State.READY}

    def free_slots(self, tier: int) -> list[int]:
        used = {r.slot for r in self.held(tier).values()}
        return [slot for slot in range(self.slots[tier]) if slot not in used]

    def num_pinned(self, tier: int) -> int:
        return sum(r.pins > 0 for r in self.held(tier).values())

    def evictable(self, tier: int, without: frozenset[int] = frozenset()) -> list[int]:
        """Leaves that nobody holds, when the blocks `without` are gone."""
        held = self.held(tier)
        return [
            n
            for n, r in held.items()
            if n not in without
            and r.state is State.READY
            and r.pins == 0
            and all(child in without or child not in held for child in self.entries[n].children)
        ]

    def num_evictable(self, tier: int) -> int:
        """Blocks that could go one after the other."""
        gone: frozenset[int] = frozenset()
        while leaves := self.evictable(tier, gone):
            gone |= frozenset(leaves)
        return len(gone)

    def rank(self, tier: int, block: int) -> tuple[int, ...]:
        """The lowest goes first."""
        entry = self.entries[block]
        residency = entry.tiers[tier]
        level = residency.uses if self.policy[tier] == Policy.LFU else 0
        return entry.importance, level, residency.stamp

    def may_go(self, tier: int, gone: frozenset[int]) -> list[int]:
        leaves = self.evictable(tier, gone)
        if not leaves or self.policy[tier] not in EXACT or self.now > EXACT_TICKS_MAX:
            return leaves
        lowest = min(self.rank(tier, n) for n in leaves)
        return [n for n in leaves if self.rank(tier, n) == lowest]

    def explains(self, tier: int, victims: frozenset[int]) -> bool:
        """Whether these blocks can have gone in some order. Of a tie any may go first, which decides what
        is laid bare next, so all orders are tried."""
        seen: set[frozenset[int]] = set()
        left = [frozenset[int]()]
        while left:
            gone = left.pop()
            if gone == victims:
                return True
            if gone in seen:
                continue
            seen.add(gone)
            left.extend(gone | {n} for n in self.may_go(tier, gone) if n in victims)
        return False

    # ---- what the model does ----

    def _entry(self, block: int) -> Entry:
        return self.entries.setdefault(block, Entry())

    def _free_if_unused(self, block: int) -> None:
        while block:
            entry = self.entries[block]
            if entry.children or entry.tiers:
                return
            del self.entries[block]
            if entry.parent:
                self.entries[entry.parent].children.remove(block)
            block = entry.parent

    def _link(self, child: int, parent: int) -> None:
        if parent not in (0, child) and not self.entries[child].parent:
            self.entries[child].parent = parent
            self.entries[parent].children.add(child)

    def _vacate(self, tier: int, block: int) -> None:
        del self.entries[block].tiers[tier]
        self._free_if_unused(block)

    def _unpin(self, tier: int, block: int) -> None:
        residency = self.entries[block].tiers[tier]
        residency.pins -= 1
        if residency.pins == 0 and residency.state is State.DYING:
            self._vacate(tier, block)

    def _drop(self, tier: int, block: int) -> bool:
        if not self.is_ready(tier, block):
            return False
        residency = self.entries[block].tiers[tier]
        residency.state = State.DYING
        if residency.pins == 0:
            self._vacate(tier, block)
        return True

    def _touch(self, block: int, use: bool) -> None:
        for tier, residency in self.entries[block].tiers.items():
            if self.policy[tier] == Policy.FIFO:
                continue
            residency.stamp = self.now
            residency.uses = min(residency.uses + use, LFU_USES_MAX)

    def _find(self, block: int, content: tuple[int, ...] | None) -> bool:
        """Whether a lookup finds the entry. One whose tokens are not known takes over the caller's."""
        entry = self.entries.get(block)
        if entry is None:
            return False
        if content is None:
            return True
        if entry.content is None:
            entry.content = content
        return entry.content == content

    def _take_evicted(self, tier: int, wanted: range) -> int:
        """Finds out what the index evicted, checks that it could go, and lets it go here as well.

        Returns:
            How many blocks went, which must be in `wanted`.
        """
        left = {self.blocks.number[tuple(map(int, key))] for key in self.index.blocks(tier)[0]}
        victims = frozenset(self.ready(tier)) - left
        if len(victims) not in wanted:
            raise Divergence(f"{len(victims)} blocks were evicted, not {wanted}: {sorted(victims)}")
        if not self.explains(tier, victims):
            ranks = {n: self.rank(tier, n) for n in sorted(self.ready(tier))}
            raise Divergence(
                f"{sorted(victims)} were evicted; could go: {self.may_go(tier, frozenset())}, {ranks=}"
            )
        for block in victims:
            self._vacate(tier, block)
        self.evicted[tier] += len(victims)
        return len(victims)

    # ---- calls on both ----

    def _lookup_tokens(
        self, blocks: Sequence[int], lookup: Lookup
    ) -> tuple[np.ndarray | None, list[tuple[int, ...] | None]]:
        if lookup is Lookup.KEYS or not self.blocks.per_block:
            return None, [None] * len(blocks)
        different = lookup is Lookup.DIFFERENT
        tokens = self.blocks.tokens(blocks, lookup is Lookup.WIDE, different)
        return tokens, [self.blocks.content(n, different) for n in blocks]

    def _match(self, blocks: Sequence[int], contents: Sequence[tuple[int, ...] | None]) -> list[int]:
        self.now += 1
        masks: list[int] = []
        for block, content in zip(blocks, contents, strict=True):
            if not self._find(block, content) or not self.mask(block):
                break
            self._touch(block, use=False)
            masks.append(self.mask(block))
        return masks

    def _acquire(
        self,
        blocks: Sequence[int],
        contents: Sequence[tuple[int, ...] | None],
        wanted: Sequence[int],
        use: bool,
    ) -> list[tuple[int, int]]:
        self.now += 1
        pins = []
        for block, content in zip(blocks, contents, strict=True):
            if not self._find(block, content):
                break
            tier = next((t for t in wanted if self.is_ready(t, block)), None)
            if tier is None:
                break
            cpu = self.entries[block].tiers.get(CPU)
            if tier != CPU and len(wanted) > 1 and cpu is not None:
                break  # on its way to where it will be read
            self.entries[block].tiers[tier].pins += 1
            self._touch(block, use)
            pins.append((tier, block))
        return pins

    def _take_lease(
        self, lease: int, tiers: np.ndarray, slots: np.ndarray, pins: list[tuple[int, int]]
    ) -> None:
        expect(tiers.tolist(), [int(t) for t, _ in pins], "tiers of a lease")
        expect(slots.tolist(), [self.entries[n].tiers[t].slot for t, n in pins], "slots of a lease")
        expect(bool(lease), bool(pins), "a lease")
        if lease:
            self.leases.append(Lease(lease, pins))

    def match(self, blocks: Sequence[int], lookup: Lookup = Lookup.KEYS) -> None:
        tokens, contents = self._lookup_tokens(blocks, lookup)
        masks = self.index.match(self.blocks.keys(blocks), tokens)
        expect(masks.tolist(), self._match(blocks, contents), f"match of {blocks}")

    def acquire(
        self,
        blocks: Sequence[int],
        tier: int | None = None,
        use: bool = False,
        lookup: Lookup = Lookup.KEYS,
    ) -> None:
        tokens, contents = self._lookup_tokens(blocks, lookup)
        lease, tiers, slots = self.index.acquire(self.blocks.keys(blocks), tier, use, tokens)
        pins = self._acquire(blocks, contents, TIERS if tier is None else (tier,), use)
        self._take_lease(lease, tiers, slots, pins)

    def _sequence(self, leaf: int, wide: bool, rest: int) -> tuple[list[int], np.ndarray]:
        """A path, and its tokens with the beginning of one more block behind them."""
        path = self.blocks.path(leaf)
        tokens = self.blocks.tokens(path, wide)
        return path, np.concatenate([tokens, tokens[: min(rest, self.blocks.per_block - 1)]])

    def match_tokens(self, leaf: int, wide: bool = False, rest: int = 0) -> None:
        path, tokens = self._sequence(leaf, wide, rest)
        keys, masks = self.index.match_tokens(tokens, self.blocks.namespace(leaf))
        expect(keys.tolist(), self.blocks.keys(path).tolist(), "names of a sequence")
        expected = self._match(path, [self.blocks.content(n) for n in path])
        expect(masks.tolist(), expected, f"match by tokens of {path}")

    def acquire_tokens(self, leaf: int, use: bool = False, wide: bool = False, rest: int = 0) -> None:
        path, tokens = self._sequence(leaf, wide, rest)
        lease, keys, tiers, slots = self.index.acquire_tokens(tokens, self.blocks.namespace(leaf), use)
        expect(keys.tolist(), self.blocks.keys(path).tolist(), "names of a sequence")
        pins = self._acquire(path, [self.blocks.content(n) for n in path], TIERS, use)
        self._take_lease(lease, tiers, slots, pins)

    def release(self, position: int) -> None:
        lease = self.leases.pop(position % len(self.leases))
        expect(self.index.release(lease.id), True, "release")
        expect(self.index.release(lease.id), False, "second release")
        for tier, block in lease.pins:
            self._unpin(tier, block)

    def reserve(
        self,
        tier: int,
        blocks: Sequence[int],
        parent: int = 0,
        lookup: Lookup = Lookup.KEYS,
        importance: int = 0,
        staging: bool = False,
        required: bool = False,
    ) -> None:
        """`parent`: 0 if the caller does not say."""
        tokens, contents = self._lookup_tokens(blocks, lookup)
        parent_key = self.blocks.keys([parent])[0] if parent else None
        result = self.index.reserve(
            tier, parent_key, self.blocks.keys(blocks), tokens, importance, staging, required
        )
        self.now += 1
        may_refuse = self.policy[tier] in MAY_REFUSE and not required

        # Blocks of the request, and its parent, do not make room for it. A block that comes twice is counted
        # twice as long as it is not there: what is evicted may be more than needed by that.
        missing = [n for n in blocks if self.residency(tier, n) is None]
        room = len(self.free_slots(tier))
        present = [n for n in {*blocks, parent} if self.residency(tier, n) is not None]
        evicted = 0
        fits = pins_allow = True
        if room < len(blocks):
            for block in present:
                self.entries[block].tiers[tier].pins += 1
            pins_allow = len(missing) <= self.slots[tier] - self.num_pinned(tier)
            # What may be refused may be stored in part, too.
            needed = max(0, len(missing) - room) if pins_allow or may_refuse else 0
            possible = self.num_evictable(tier)
            fits = pins_allow and needed <= possible
            wanted = min(needed, possible)
            evicted = self._take_evicted(tier, range(0 if may_refuse else wanted, wanted + 1))
            for block in present:
                self.entries[block].tiers[tier].pins -= 1

        if not may_refuse:
            expect(result is not None, fits, f"whether {blocks} can be reserved")
        if result is None:
            if may_refuse:
                expect(evicted, 0, "blocks evicted for nothing")
            expect(fits, False, f"whether {blocks} can be reserved")
            return
        txn, positions, slots = result
        granted = [blocks[position] for position in positions]
        distinct = list(dict.fromkeys(missing))
        if may_refuse:
            expect(granted, distinct[: len(granted)], "blocks that were reserved: a leading part")
            if evicted and distinct == missing:
                expect(len(granted), room + evicted, "blocks reserved where others had to go")
        else:
            expect(granted, distinct, "blocks that were reserved")
        expect(positions.tolist(), [list(blocks).index(n) for n in granted], "first positions of blocks")
        lowest = self.free_slots(tier)[: len(granted)]
        expect(sorted(slots.tolist()), lowest, "slots that were handed out, the lowest")
        expect(bool(txn), bool(granted), "a transaction")

        # What was left outside leaves no trace, nor does what comes after it.
        end = next((i for i, n in enumerate(blocks) if n in distinct and n not in granted), len(blocks))
        slot_of = dict(zip(granted, slots.tolist(), strict=True))
        previous = parent
        if parent and end:
            self._entry(parent)
        for block, content in zip(blocks[:end], contents, strict=False):
            entry = self._entry(block)
            self._link(block, previous)
            entry.content = entry.content or content
            entry.importance = max(entry.importance, importance)
            if tier not in entry.tiers:
                entry.tiers[tier] = Residency(slot_of[block], State.WRITING, self.now, pins=1)
            self._touch(block, use=False)
            previous = block
        if txn:
            self.transactions.append(Transaction(txn, tier, granted))

    def writer(self, tier: int, block: int) -> None:
        wanted = next((t.id for t in self.transactions if t.tier == tier and block in t.blocks), 0)
        expect(self.index.writer(tier, self.blocks.keys([block])[0]), wanted, f"writer of {block}")

    def commit(self, position: int, good: Callable[[int], Sequence[bool]] | None = None) -> None:
        """`good`: given a number of blocks, which of them were written; all if there is none."""
        txn = self.transactions.pop(position % len(self.transactions))
        ok = [True] * len(txn.blocks) if good is None else list(good(len(txn.blocks)))
        published = self.index.commit(txn.id, None if good is None else np.array(ok, dtype=np.uint8))
        expect(published, sum(ok), "blocks published")
        for block, written in reversed(list(zip(txn.blocks, ok, strict=True))):
            self.entries[block].tiers[txn.tier].state = State.READY if written else State.DYING
            self._unpin(txn.tier, block)

    def abort(self, position: int) -> None:
        txn = self.transactions.pop(position % len(self.transactions))
        expect(self.index.abort(txn.id), True, "abort")
        expect(self.index.abort(txn.id), False, "second abort")
        for block in reversed(txn.blocks):
            self.entries[block].tiers[txn.tier].state = State.DYING
            self._unpin(txn.tier, block)

    def invalidate(self, tier: int, blocks: Sequence[int]) -> None:
        dropped = self.index.invalidate(tier, self.blocks.keys(blocks))
        expect(dropped, sum(self._drop(tier, n) for n in reversed(blocks)), f"blocks invalidated of {blocks}")

    def invalidate_tier(self, tier: int) -> None:
        dropped = self.index.invalidate_tier(tier)
        expect(dropped, sum(self._drop(tier, n) for n in list(self.entries)), "blocks of a tier invalidated")

    def evict(self, tier: int, count: int) -> None:
        evicted = self.index.evict(tier, count)
        self.now += 1
        wanted = min(count, self.num_evictable(tier))
        expect(evicted, wanted, "blocks evicted")
        self._take_evicted(tier, range(wanted, wanted + 1))

    def restore(self, tier: int, records: Sequence[tuple[int, bool, int]]) -> None:
        """Each record is (block, whether it names its parent, slot), the last written last."""
        blocks = [block for block, _, _ in records]
        parents = [self.blocks.parent(block) if named else 0 for block, named, _ in records]
        slots = [slot for _, _, slot in records]
        parent_keys = self.blocks.keys(parents)
        parent_keys[np.array(parents, dtype=np.int64) == 0] = 0
        try:
            taken = self.index.restore(
                tier, self.blocks.keys(blocks), parent_keys, np.array(slots, dtype=np.int32)
            ).tolist()
        except ValueError:
            expect(False, not self.held(tier), "a tier that can be restored")
            return
        expect(True, not self.held(tier), "a tier that can be restored")
        believed: dict[int, int] = {}  # slot of each block
        wanted = [0] * len(records)
        for i in reversed(range(len(records))):
            usable = 0 <= slots[i] < self.slots[tier] and slots[i] not in believed.values()
            if usable and blocks[i] not in believed:
                believed[blocks[i]] = slots[i]
                wanted[i] = 1
        expect(taken, wanted, "records that were restored")
        for i in range(len(records)):
            if wanted[i]:
                entry = self._entry(blocks[i])
                if parents[i] and not entry.parent:
                    self._entry(parents[i])
                    self._link(blocks[i], parents[i])
                self.now += 1
                entry.tiers[tier] = Residency(slots[i], State.READY, self.now)

    def watch(self, blocks: Sequence[int]) -> None:
        first, self._next_number = self._next_number, self._next_number + len(blocks)
        watched = self.index.watch(self.blocks.keys(blocks), first)
        new = 0
        for number, block in enumerate(blocks, first):
            entry = self.entries.get(block)
            if entry is not None and not entry.number:
                entry.number = number
                self.sighted[number] = set()
                new += 1
        expect(watched, new, f"blocks of {blocks} that are watched now")

    def check_sightings(self) -> None:
        """What the index tells, taken one by one, makes sense, and ends at what is so."""
        for number, tier, what in zip(*(told.tolist() for told in self.index.take_sightings()), strict=True):
            tiers = self.sighted.get(number)
            if tiers is None:
                raise Divergence(f"block {number} is not watched")
            if what == _core.FORGOTTEN:
                expect(tiers, set(), f"tiers of block {number}, which is forgotten")
                del self.sighted[number]
            elif what == _core.CAME:
                expect(tier in tiers, False, f"whether block {number} that comes was in {tier}")
                tiers.add(tier)
            else:
                expect(tier in tiers, True, f"whether block {number} that goes was in {tier}")
                tiers.remove(tier)
        wanted = {
            entry.number: {t for t in TIERS if self.is_ready(t, block)}
            for block, entry in self.entries.items()
            if entry.number
        }
        expect(self.sighted, wanted, "watched blocks and their tiers")

    def check(self) -> None:
        """Compares everything that can be seen without a lookup."""
        self.check_sightings()
        problem = self.index.check_integrity()
        if problem:
            raise Divergence(f"the index is broken: {problem}")
        expect(self.index.num_leases, len(self.leases), "leases")
        expect(self.index.num_transactions, len(self.transactions), "transactions")
        expect(self.index.num_entries, len(self.entries), "entries")
        for tier in TIERS:
            held = self.held(tier)
            stats = self.index.stats(tier)
            seen = (stats.slots, stats.free, stats.ready, stats.writing, stats.pinned, stats.evicted)
            count = [sum(r.state is state for r in held.values()) for state in (State.READY, State.WRITING)]
            free = self.slots[tier] - len(held)
            expect(
                seen,
                (self.slots[tier], free, *count, self.num_pinned(tier), self.evicted[tier]),
                f"statistics of {tier}",
            )

    def check_blocks(self) -> None:
        """Compares all readable blocks with their parents and slots."""
        for tier in TIERS:
            keys, parents, slots = self.index.blocks(tier)
            name = self.blocks.number
            seen = {
                name[tuple(key)]: (name[tuple(parent)] if any(parent) else 0, slot)
                for key, parent, slot in zip(keys.tolist(), parents.tolist(), slots.tolist(), strict=True)
            }
            wanted = {n: (self.entries[n].parent, slot) for n, slot in self.ready(tier).items()}
            expect(seen, wanted, f"blocks of {tier}")


class RandomDriver:
    """Operations at random, the same for the same seed."""

    LOOKUPS = (Lookup.KEYS, Lookup.NARROW, Lookup.WIDE)
    IMPORTANCES = (0, 0, 0, 1, _core.IMPORTANCE_MAX)

    def __init__(self, setup: Setup, rng: random.Random) -> None:
        self.model = IndexModel(setup)
        self.rng = rng
        self._rules = (
            [self._match, self._acquire, self._acquire, self._release, self._release, self._end, self._end]
            + [self._reserve] * 4
            + [self._evict, self._invalidate, self._writer, self._watch]
            + ([self._match_tokens, self._acquire_tokens] if setup.tokens_kept else [])
        )

    def step(self) -> None:
        if self.rng.random() < 0.01:
            self.rng.choice((self._invalidate_tier, self._restore))()
        elif len(self.model.leases) + len(self.model.transactions) > 5 and self.rng.random() < 0.5:
            self.rng.choice((self._release, self._end))()  # or soon nothing is left that could go
        else:
            self.rng.choice(self._rules)()
        self.model.check()

    def _leaf(self) -> int:
        # The first namespace, and of it what is near the root, is asked for more often.
        half = self.model.blocks.half
        leaf = 1 + int(half * self.rng.random() ** 1.5)
        return leaf + half * (self.rng.random() < 0.2)

    def _lookup(self) -> Lookup:
        return self.rng.choice(self.LOOKUPS) if self.rng.random() < 0.93 else Lookup.DIFFERENT

    def _path(self) -> tuple[int, list[int]]:
        """A part of a path, and the block before it; some of it may come twice."""
        path = self.model.blocks.path(self._leaf())
        skip = self.rng.randrange(len(path)) if self.rng.random() < 0.3 else 0
        path, parent = path[skip:], (path[skip - 1] if skip else 0)
        return parent, path

    def _match(self) -> None:
        self.model.match(self._path()[1], self._lookup())

    def _match_tokens(self) -> None:
        self.model.match_tokens(self._leaf(), self.rng.random() < 0.5, self.rng.randrange(3))

    def _acquire(self) -> None:
        path = self._path()[1]
        if self.rng.random() < 0.05:
            path += path
        tier = self.rng.choice((None, None, None, *TIERS))
        self.model.acquire(path, tier, self.rng.random() < 0.5, self._lookup())

    def _acquire_tokens(self) -> None:
        use, wide = self.rng.random() < 0.5, self.rng.random() < 0.5
        self.model.acquire_tokens(self._leaf(), use, wide, self.rng.randrange(3))

    def _release(self) -> None:
        if self.model.leases:
            self.model.release(self.rng.randrange(len(self.model.leases)))

    def _reserve(self) -> None:
        parent, path = self._path()
        if self.rng.random() < 0.2:
            parent = 0
        if self.rng.random() < 0.05:
            path.append(path[-1])
        lookup = self.rng.choice(self.LOOKUPS)
        tier, importance = self.rng.choice(TIERS), self.rng.choice(self.IMPORTANCES)
        staging, required = self.rng.random() < 0.2, self.rng.random() < 0.3
        self.model.reserve(tier, path, parent, lookup, importance, staging, required)

    def _writer(self) -> None:
        self.model.writer(self.rng.choice(TIERS), self._leaf())

    def _watch(self) -> None:
        self.model.watch(self._path()[1])

    def _end(self) -> None:
        if not self.model.transactions:
            return
        position = self.rng.randrange(len(self.model.transactions))
        kind = self.rng.random()
        if kind < 0.6:
            self.model.commit(position)
        elif kind < 0.8:
            self.model.commit(position, lambda count: [self.rng.random() < 0.7 for _ in range(count)])
        else:
            self.model.abort(position)

    def _evict(self) -> None:
        self.model.evict(self.rng.choice(TIERS), self.rng.randrange(4))

    def _invalidate(self) -> None:
        self.model.invalidate(self.rng.choice(TIERS), self._path()[1])

    def _invalidate_tier(self) -> None:
        self.model.invalidate_tier(self.rng.choice(TIERS))

    def _restore(self) -> None:
        # A tier must be empty: let go of everything first, or have it refused.
        tier = self.rng.choice(TIERS)
        if self.rng.random() < 0.8:
            while self.model.leases:
                self.model.release(0)
            while self.model.transactions:
                self.model.abort(0)
            self.model.invalidate_tier(tier)
        slots = self.model.slots[tier]
        count = self.rng.randrange(slots + 3)
        self.model.restore(
            tier, [(self._leaf(), self.rng.random() < 0.8, self.rng.randint(-1, slots)) for _ in range(count)]
        )


def run_random(setup: Setup, seed: int, operations: int) -> None:
    """Raises Divergence, with the number of the operation that showed it."""
    driver = RandomDriver(setup, random.Random(seed))
    for number in range(operations):
        try:
            driver.step()
            if number % 16 == 0:
                driver.model.check_blocks()
        except Divergence as divergence:
            raise Divergence(f"operation {number} of seed {seed}, {setup}: {divergence}") from None


def random_setup(policy: _core.EvictionPolicy, rng: random.Random) -> Setup:
    """A small index with this policy in one tier at least."""
    slots = (rng.randint(1, 9), rng.randrange(15), rng.randrange(8))
    policies = (policy, *(rng.choice((policy, *Policy.__members__.values())) for _ in TIERS[1:]))
    tokens_kept, blocks = rng.choice((0, 1, 9)), rng.choice((12, 30))
    return Setup(slots, policies, tokens_kept, blocks)


def run_episodes(policy: _core.EvictionPolicy, seed: int, operations: int) -> None:
    """That many operations on one small index after the other; the first has this seed, the next one more.

    Raises:
        Divergence: Its text has the seed of the index, which alone brings it back.
    """
    while operations > 0:
        rng = random.Random(seed)
        # Some are so long that queues outgrow the span in which they are exact.
        length = min(rng.randint(100, 3000), operations)
        run_random(random_setup(policy, rng), seed, length)
        operations -= length
        seed += 1
