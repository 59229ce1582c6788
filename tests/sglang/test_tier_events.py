"""What routers are told of the tiers, on SGLang's own kit: the view of a router that believes every event is
compared with what the index holds."""

from __future__ import annotations

import errno
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from kit import CORES, TIMEOUT_S, KitConfig, Rig, build_kit_cache, radix_key
from linker_steps import invalidate_cpu_tier, sequence, store_on_ssd_alone
from router import PLACES, Router, hashes_of, names_of
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang_flexkv_testing import FaultyDisk
from slot_files import damage

from sglang_flexkv import tierlife
from sglang_flexkv.common.block import BlockKeys, keys_from_page_hashes
from sglang_flexkv.common.config import WritePolicy
from sglang_flexkv.integration import tier_events
from sglang_flexkv.integration.compat import kv_events
from sglang_flexkv.integration.tier_events import TierEvents

PAGES = 4
on_both_cores = pytest.mark.parametrize("core", CORES)


class Told:
    """A rig whose events go to a router."""

    def __init__(self, core: str, page_size: int = 16, *, pairs: bool = False, **options: Any) -> None:
        cfg = KitConfig(page_size=page_size, kv_size=64 * page_size, is_eagle=pairs)
        self.rig = Rig(build_kit_cache(cfg, core, enable_kv_cache_events=True), **options)
        self.pairs = pairs
        self.prompts: list[list[int]] = []
        leaves_first = options.get("policy") is WritePolicy.WRITE_BACK
        self.router = Router(page_size, in_order=not leaves_first)

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.rig.__exit__(*exception)

    @property
    def events(self) -> TierEvents:
        assert self.rig.linker.tier_events is not None
        return self.rig.linker.tier_events

    def prompt(self, start: int, pages: int = PAGES) -> list[int]:
        """Whole pages; where a page has the token behind it in it, with that one."""
        tokens = sequence(start, pages, self.rig.page_size)
        self.prompts.append([*tokens, 7] if self.pairs else tokens)
        return self.prompts[-1]

    def names(self, tokens: list[int]) -> list[int]:
        return names_of(tokens, self.rig.page_size, pairs=self.pairs)

    def listen(self) -> None:
        """Takes in what was told, and compares what the router believes with what is so."""
        self.rig.settle()
        assert self.rig.engine.flush_spills(TIMEOUT_S)  # or a look-up would take in what ended meanwhile
        self.router.take(self.rig.cache.take_events())
        for tier, (name, place) in enumerate(zip(self.rig.engine.tier_names, PLACES[1:], strict=False)):
            believed = self.router.pages[place]
            assert believed >= self.found(tier)
            assert len(believed) == self.rig.stats(name)["ready"]

    def found(self, tier: int) -> set[int]:
        """Names of the blocks that a look-up finds in a tier."""
        found: set[int] = set()
        for tokens in self.prompts:
            names = self.names(tokens)
            in_tiers = self.rig.engine.match(self.keys(tokens)).tiers
            found |= {name for name, tiers in zip(names, in_tiers, strict=False) if tiers >> tier & 1}
        return found

    def keys(self, tokens: list[int]) -> BlockKeys:
        hashes = hashes_of(tokens, self.rig.page_size, pairs=self.pairs)
        return keys_from_page_hashes(hashes, self.rig.linker.namespace)


@on_both_cores
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pairs", [False, True], ids=["tokens", "pairs"])
def test_a_router_knows_what_each_tier_holds(core: str, page_size: int, pairs: bool, tmp_path: Path) -> None:
    with Told(core, page_size, pairs=pairs, ssd_dir=tmp_path) as told:
        rig, router = told.rig, told.router
        tokens = told.prompt(1)
        names = told.names(tokens)
        slots = rig.allocate(len(tokens) - pairs)
        rig.write(slots, seed=1)
        rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots))
        told.listen()
        assert router.places(names) == ["GPU"] * PAGES
        # The words of the device's events, also for what is told of the tiers.
        expected = list(pairwise(tokens)) if pairs else tokens
        assert router.tokens_up_to(names[-1]) == expected

        rig.evict_all()
        assert rig.engine.flush_spills(TIMEOUT_S)
        told.listen()
        assert router.places(names) == ["CPU_PINNED"] * PAGES
        assert router.pages["DISK"] == set(names)

        invalidate_cpu_tier(rig)
        told.listen()
        assert router.places(names) == ["DISK"] * PAGES

        req = rig.request(tokens)
        (slots,) = rig.restore(req)
        told.listen()
        assert router.places(names) == ["CPU_PINNED"] * PAGES  # the device's part is its request's yet
        if pairs:  # the last one would lack its second token
            rig.abort(req, slots)
            return
        rig.finish(req, slots)
        told.listen()
        assert router.places(names) == ["GPU"] * PAGES


@on_both_cores
def test_a_longer_prompt_is_told_of_behind_what_it_shares(core: str) -> None:
    with Told(core) as told:
        first = told.prompt(1, 2)
        told.rig.insert(first, seed=1)
        told.listen()
        longer = first + told.prompt(900, 2)
        told.rig.evict_all()
        req = told.rig.request(longer)
        slots = told.rig.admit(req)
        told.rig.start_batch()
        told.rig.forward()
        assert not told.rig.cache.finish_external_linker_loads([req])
        told.rig.finish(req, slots)
        told.rig.insert(longer, seed=2)
        told.listen()
        assert told.router.tokens_up_to(told.names(longer)[-1]) == longer
        assert len(told.router.pages["CPU_PINNED"]) == 4


def test_no_event_is_longer_than_routers_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_events, "_BLOCKS_MAX", 3)
    with Told("python", ssd_dir=tmp_path) as told:
        longest = {"BlockStored": 0, "BlockRemoved": 0}
        take = told.router.take

        def measure(events: list[Any]) -> None:
            for event in events:
                if getattr(event, "medium", None) in (kv_events.IN_MEMORY, kv_events.ON_DISK):
                    kind = type(event).__name__
                    longest[kind] = max(longest[kind], len(event.block_hashes))
            take(events)

        told.router.take = measure  # type: ignore[method-assign]
        tokens = told.prompt(1, 8)
        told.rig.insert(tokens, seed=1)
        told.listen()
        assert told.router.tokens_up_to(told.names(tokens)[-1]) == tokens
        told.rig.engine.clear_tiers()
        told.listen()
        assert longest == {"BlockStored": 3, "BlockRemoved": 3}


@on_both_cores
def test_what_makes_room_is_told_to_be_gone(core: str, tmp_path: Path) -> None:
    with Told(core, num_cpu_blocks=6, num_ssd_blocks=10, ssd_dir=tmp_path) as told:
        for number in range(8):
            told.rig.insert(told.prompt(1 + 1000 * number), seed=number)
            told.rig.evict_all()
            assert told.rig.engine.flush_spills(TIMEOUT_S)
            told.listen()
        assert told.rig.stats("CPU")["evicted"] > 0
        assert told.rig.stats("SSD")["evicted"] > 0
        # Nothing is kept of blocks that are in no tier any more.
        left = sum(run.num_watched for run in told.events._runs.values())
        assert left == len(told.router.pages["CPU_PINNED"] | told.router.pages["DISK"])


@on_both_cores
def test_what_leaves_the_device_is_told_of_as_it_goes_under_write_back(core: str) -> None:
    with Told(core, policy=WritePolicy.WRITE_BACK) as told:
        tokens = told.prompt(1)
        told.rig.insert(tokens, seed=1)
        told.listen()
        assert not told.router.pages["CPU_PINNED"]
        told.rig.evict_all()
        told.listen()
        assert told.router.places(told.names(tokens)) == ["CPU_PINNED"] * PAGES


@on_both_cores
def test_what_is_cleared_on_its_way_is_never_told_of(core: str) -> None:
    with Told(core) as told:
        told.rig.insert(told.prompt(1), seed=1)
        told.rig.engine.clear_tiers()
        told.listen()
        assert not told.router.pages["CPU_PINNED"]
        assert not told.events._runs


@on_both_cores
def test_a_flush_leaves_nothing_to_tell(core: str, tmp_path: Path) -> None:
    with Told(core, ssd_dir=tmp_path) as told:
        told.rig.insert(told.prompt(1), seed=1)
        told.rig.evict_all()
        told.rig.insert(told.prompt(1000), seed=2)
        told.rig.settle()
        told.rig.cache.reset()
        told.rig.allocator.clear()
        events = told.rig.cache.take_events()
        assert type(events[-1]).__name__ == "AllBlocksCleared"
        told.router.take(events)
        told.listen()
        assert not any(told.router.pages.values())
        assert not told.events._runs
        # And the same prompt is told of again.
        told.rig.insert(told.prompt(1), seed=1)
        told.listen()
        assert len(told.router.pages["CPU_PINNED"]) == PAGES


@on_both_cores
def test_clearing_the_storage_is_told_and_the_device_keeps_its_part(core: str, tmp_path: Path) -> None:
    with Told(core, ssd_dir=tmp_path) as told:
        tokens = told.prompt(1)
        told.rig.insert(tokens, seed=1)
        told.rig.settle()
        assert told.rig.engine.flush_spills(TIMEOUT_S)
        told.listen()
        assert told.rig.cache.clear_storage_backend()
        told.listen()
        assert not told.router.pages["CPU_PINNED"]
        assert not told.router.pages["DISK"]
        assert told.router.places(told.names(tokens)) == ["GPU"] * PAGES


@on_both_cores
def test_what_survived_a_restart_is_told_of_when_a_request_has_used_it(core: str, tmp_path: Path) -> None:
    with Told(core, ssd_dir=tmp_path) as told:
        tokens = told.prompt(1)
        store_on_ssd_alone(told.rig, tokens)
    with Told(core, ssd_dir=tmp_path) as told:
        told.router.take(told.rig.cache.take_events())
        told.prompts.append(tokens)
        assert told.found(1) == set(told.names(tokens))
        assert not told.router.pages["DISK"]
        req = told.rig.request(tokens)
        (slots,) = told.rig.restore(req)
        told.rig.finish(req, slots)
        told.listen()
        assert told.router.pages["DISK"] == set(told.names(tokens))


@on_both_cores
def test_damaged_blocks_are_told_to_be_gone(core: str, tmp_path: Path) -> None:
    with Told(core, ssd_dir=tmp_path) as told:
        tokens = told.prompt(1)
        store_on_ssd_alone(told.rig, tokens)
        told.listen()
        assert told.router.places(told.names(tokens)) == ["DISK"] * PAGES
        (file,) = tmp_path.glob("*.slots")
        assert damage(file, 1)
        fetch = told.rig.engine.start_prefetch(told.keys(tokens))
        assert fetch is not None
        assert told.rig.engine.wait(fetch.tasks, TIMEOUT_S)
        told.rig.engine.forget_fetch(fetch)
        told.listen()
        assert not told.router.pages["DISK"]
        assert not told.router.pages["CPU_PINNED"]


@on_both_cores
def test_a_disk_that_fails_is_told_to_be_empty_until_it_is_back(
    core: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tierlife, "_RETRY_S", 0.05)
    monkeypatch.setattr(tierlife, "_RETRY_MAX_S", 0.2)
    monkeypatch.setattr(tierlife, "_CHECK_EVERY_S", 0.0)
    disk = FaultyDisk(1)
    with Told(core, ssd_dir=tmp_path, disk=disk) as told:
        tokens = told.prompt(1)
        told.rig.insert(tokens, seed=1)
        told.listen()
        assert told.router.pages["DISK"] == set(told.names(tokens))
        assert told.rig.engine.sync(TIMEOUT_S)
        disk.set_fault("write", 1.0, errno.EIO)
        disk.set_fault("open", 1.0, errno.EIO)  # or it would be back before we look
        for number in range(1, 6):
            told.rig.insert(told.prompt(1 + 1000 * number, 1), seed=number)
            told.rig.settle()
            told.rig.engine.flush_spills(0.5)
        told.router.take(told.rig.cache.take_events())
        assert told.rig.stats("SSD")["times_out"] >= 1
        assert not told.router.pages["DISK"]
        assert len(told.router.pages["CPU_PINNED"]) == PAGES + 5
        disk.clear_faults()
        deadline_s = time.monotonic() + TIMEOUT_S
        while not told.rig.stats("SSD")["online"]:
            assert time.monotonic() < deadline_s, "the disk does not come back"
            told.rig.engine.poll()
            time.sleep(0.01)
        told.listen()
        assert told.router.pages["DISK"] >= set(told.names(tokens))


@on_both_cores
@pytest.mark.parametrize("salt", [{"cache_salt": "tenant"}, {"extra_key": "adapter"}], ids=["salt", "key"])
def test_prompts_with_a_salt_or_an_adapter_are_told_of_on_the_device_alone(
    core: str, salt: dict[str, str]
) -> None:
    with Told(core) as told:
        told.rig.insert(told.prompt(1), seed=1, **salt)
        told.rig.evict_all()
        assert told.rig.stats("CPU")["ready"] == PAGES
        told.router.take(told.rig.cache.take_events())
        assert told.router.known
        assert not told.router.pages["CPU_PINNED"]
        assert not told.events._runs


def test_nothing_is_watched_where_nobody_listens() -> None:
    cfg = KitConfig(page_size=16, kv_size=1024)
    with Rig(build_kit_cache(cfg, "rust")) as rig:
        rig.insert(sequence(1), seed=1)
        rig.evict_all()
        assert rig.linker.tier_events is None
        assert not rig.cache.take_events()
