"""SGLang's own kit for its unified radix cache, run against our cache with our real engine under it.

Every configuration of the kit is here, from insert to load back, with a draft model as well. The kit's steps
for SGLang's own host tier (`hicache.py`, `load_back.py`, `storage.py`) have no place here, since a cache has
either that tier or a linker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import chain
from types import SimpleNamespace
from unittest import TestCase, mock

import pytest
import torch
from dict_store import Values
from kit import (
    CORES,
    TIMEOUT_S,
    KitSteps,
    Rig,
    as_bytes,
    assert_same,
    build_kit_cache,
    cut,
    make_draft_pool,
    radix_key,
)
from linker_steps import invalidate_cpu_tier, wait_in_queue
from remote_faults import Faults, FaultyStore, try_again_soon
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InitLoadBackParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.session.streaming_session import is_virtual_node
from sglang.test.kits.unified_radix_cache import fixtures
from sglang.test.kits.unified_radix_cache.config import CONFIGS
from sglang.test.kits.unified_radix_cache.config import CacheConfig as KitConfig
from sglang.test.kits.unified_radix_cache.fixtures import (
    build_fixture,
    match_prefix,
    node_children,
    node_token_ids,
)
from sglang.test.kits.unified_radix_cache.insert_walk import StreamingSessionLockLifecycleFixtures
from sglang.test.kits.unified_radix_cache.kv_events import UnifiedRadixCacheKVEventsFixtures
from sglang.test.mem_cache_utils import finish_req

from sglang_flexkv import kvtask
from sglang_flexkv.common.config import WritePolicy
from sglang_flexkv.common.errors import IncompatibleError
from sglang_flexkv.integration.compat.kv_pool import device_buffers
from sglang_flexkv.integration.compat.requests import name_of
from sglang_flexkv.storage.remote import tier as remote_tier

FULL = [cfg for cfg in CONFIGS if not cfg.has_swa and not cfg.has_mamba and not cfg.is_eagle]
WINDOWS = [cfg for cfg in CONFIGS if cfg.has_swa and not cfg.has_mamba]
STATES = [cfg for cfg in CONFIGS if cfg.has_mamba]
# The kit makes its EAGLE configurations from the full-attention ones in the same way.
EAGLE = [dataclasses.replace(cfg, is_eagle=True) for cfg in FULL]
# Here from the others as well.
EAGLE_WITH_MORE = [dataclasses.replace(cfg, is_eagle=True) for cfg in [*WINDOWS, *STATES]]

on_both_cores = pytest.mark.parametrize("core", CORES)
with_each_full_config = pytest.mark.parametrize("cfg", FULL, ids=lambda cfg: cfg.label)


@pytest.fixture
def rig(cfg: KitConfig, core: str) -> Iterator[Rig]:
    with Rig(build_kit_cache(cfg, core)) as rig:
        yield rig


def pages_of_a_prompt(cfg: KitConfig) -> int:
    """Of one that is longer than its window."""
    return (cfg.sliding_window_size or 0) // cfg.page_size + 3


def drive_out(rig: Rig) -> None:
    """Evicts everything and spoils the device pool."""
    rig.evict_all()
    assert rig.allocator.available_size() == rig.pool.size


# ---- every configuration ----


def test_the_kit_has_the_configurations_that_are_accounted_for_here() -> None:
    # Not to be adapted without looking: a new kind of configuration needs a test of its own.
    assert len(CONFIGS) == 19
    assert [cfg.page_size for cfg in FULL] == [1, 4, 16, 64, 128]
    assert len(WINDOWS) == 8
    assert len(STATES) == 6
    assert not any(cfg.is_eagle for cfg in CONFIGS)


@on_both_cores
@with_each_full_config
def test_full_attention_goes_from_insert_to_load_back_byte_for_byte(
    rig: Rig, cfg: KitConfig, core: str
) -> None:
    steps = KitSteps(cfg)
    tokens = steps._make_seq(1, 3)
    rig.fill(seed=1)
    steps._insert(rig.cache, rig.allocator, rig.requests, tokens)
    old = rig.cache.path_device_indices(match_prefix(rig.cache, tokens).last_device_node)
    expected = rig.read(old)
    drive_out(rig)
    assert rig.stats("CPU")["ready"] == 3

    req = steps._make_req(rig.requests)
    match = rig.cache.match_prefix(MatchPrefixParams(key=radix_key(tokens), req=req))
    assert (match.device_prefix_len, match.host_hit_length) == (0, len(tokens))
    steps._apply_match_to_req(req, match)
    loaded, node = rig.cache.init_load_back(
        InitLoadBackParams(best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req)
    )
    assert (loaded, node) == (len(tokens), rig.cache.root_node_handle())
    req.prefix_len = loaded
    slots = rig.cache.prefix_device_indices(req)
    assert set(slots.tolist()).isdisjoint(old.tolist())
    rig.start_batch()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads([req])
    assert_same(rig.read(slots), expected)

    rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots))
    match = match_prefix(rig.cache, tokens)
    assert match.device_prefix_len == len(tokens)
    assert rig.cache.path_device_indices(match.last_device_node).tolist() == slots.tolist()
    rig.cache.on_release(req, checkpointed=True)


def test_prefixes_that_are_found_without_their_windows_are_refused() -> None:
    params = fixtures.CacheInitParams
    for gates in (True, False):
        with (
            mock.patch.object(fixtures, "CacheInitParams", partial(params, swa_gates_prefix_match=gates)),
            nullcontext() if gates else pytest.raises(IncompatibleError, match="prefixes without them"),
        ):
            build_kit_cache(WINDOWS[0], "python")


@pytest.mark.parametrize("cfg", [WINDOWS[0], *STATES], ids=lambda cfg: cfg.label)
def test_the_pool_of_such_a_model_is_refused_as_well(cfg: KitConfig) -> None:
    # The second line of defence, for a pool whose tree looks plain. Built by the kit with SGLang's own class.
    _, allocator, _ = build_fixture(cfg, tree_core_backend="python")
    assert type(allocator.get_kvcache()) is not MHATokenToKVPool
    with pytest.raises(IncompatibleError, match=type(allocator.get_kvcache()).__name__):
        device_buffers(allocator.get_kvcache())


@on_both_cores
@pytest.mark.parametrize("cfg", EAGLE, ids=lambda cfg: cfg.label)
def test_a_tree_with_bigram_keys_restores_the_target_models_kv(rig: Rig, cfg: KitConfig, core: str) -> None:
    # A bigram key is one shorter than its tokens, so three pages need one token more.
    tokens = [*KitSteps(cfg)._make_seq(1, 3), 7777]
    slots = rig.allocator.alloc(len(tokens))
    expected = rig.write(slots, seed=1)
    rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots))
    rig.allocator.free(slots[3 * cfg.page_size :])
    drive_out(rig)
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert len(slots) == 3 * cfg.page_size
    assert_same(rig.read(slots), cut(expected, 0, len(slots)))
    rig.abort(req, slots)


@on_both_cores
@pytest.mark.parametrize("behind", range(3))
@pytest.mark.parametrize("cfg", EAGLE[1:3], ids=lambda cfg: cfg.label)
def test_pages_of_a_bigram_key_are_hashed_as_the_tree_hashes_them(
    rig: Rig, cfg: KitConfig, core: str, behind: int
) -> None:
    """However many tokens follow the last whole page. A page depends on the first token behind it, too."""
    tokens = [*KitSteps(cfg)._make_seq(1, 3), *KitSteps(cfg)._make_seq(7000, 1)[:behind]]
    slots = rig.allocator.alloc(len(tokens))
    rig.write(slots, seed=1)
    rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots))
    pages = 3 if behind else 2
    rig.allocator.free(slots[pages * cfg.page_size :])
    asked: list[list[str]] = []
    tail_hashes = rig.cache.linker._tail_hashes

    def listen(*args: object) -> list[str]:
        asked.append(tail_hashes(*args))
        return asked[-1]

    stored = rig.cache.get_last_hash_value(match_prefix(rig.cache, tokens).last_device_node)
    drive_out(rig)
    other = [*tokens[: pages * cfg.page_size], 9999]
    with mock.patch.object(rig.cache.linker, "_tail_hashes", listen):
        for _ in range(2):
            req = rig.request(tokens)
            assert rig.match(req).host_hit_length == pages * cfg.page_size
            assert asked.pop()[-1] == stored
            assert len(rig.linker.states.known(name_of(req)).found.keys) == pages
            # The same request, had its prompt another token behind its last page: another page.
            req.origin_input_ids = array("q", other)
            assert rig.match(req).host_hit_length == (pages - 1) * cfg.page_size
            key = radix_key(other)
            key.is_bigram = True
            assert asked.pop() == get_storage_hash_str(
                key[: pages * cfg.page_size], None, page_size=cfg.page_size
            )
            rig.abort(req)


# ---- sliding windows beside full attention ----


@on_both_cores
@pytest.mark.parametrize("cfg", WINDOWS, ids=lambda cfg: cfg.label)
def test_a_window_comes_back_with_the_prefix_before_it(rig: Rig, cfg: KitConfig, core: str) -> None:
    tokens = KitSteps(cfg)._make_seq(1, pages_of_a_prompt(cfg))
    expected = rig.insert(tokens, seed=1)
    node = match_prefix(rig.cache, tokens).last_device_node
    window = (cfg.sliding_window_size or 0) // cfg.page_size * cfg.page_size
    window = max(window, cfg.page_size)
    there = rig.read_window(rig.cache.path_device_indices(node)[-window:])
    rig.evict_all()
    req = rig.request([*tokens, 7])
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    assert_same(rig.read_window(slots[-window:]), there)
    rig.finish(req, slots)
    match = match_prefix(rig.cache, tokens)
    assert match.device_prefix_len == len(tokens)
    # The same prompt again is taken up a page before its end.
    rig.evict_all()
    again = rig.request(tokens[:-1])
    (slots,) = rig.restore(again)
    assert len(slots) == len(tokens) - cfg.page_size
    assert_same(rig.read(slots), cut(expected, 0, len(slots)))
    rig.abort(again, slots)


@on_both_cores
@pytest.mark.parametrize("cfg", WINDOWS[:4], ids=lambda cfg: cfg.label)
def test_a_window_that_comes_later_is_stored_later(rig: Rig, cfg: KitConfig, core: str) -> None:
    tokens = KitSteps(cfg)._make_seq(1, pages_of_a_prompt(cfg))
    slots = rig.allocate(len(tokens))
    assert slots is not None
    rig.write(slots, seed=1)
    # As for a request that has gone on for so long that its window is elsewhere.
    gone = {ComponentType.SWA: len(tokens)}
    rig.cache.insert(InsertParams(key=radix_key(tokens), value=slots, component_evicted_seqlens=gone))
    rig.allocator.free_swa(slots)
    rig.settle()
    assert rig.stats("CPU")["ready"] == len(tokens) // cfg.page_size
    assert rig.stats("CPU swa")["ready"] == 0
    req = rig.request([*tokens, 7])
    assert rig.match(req).host_hit_length == 0
    rig.abort(req)
    expected = rig.insert(tokens, seed=1)  # computed once more
    rig.settle()
    assert rig.stats("CPU swa")["ready"] > 0
    rig.evict_all()
    req = rig.request([*tokens, 7])
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


# ---- recurrent states beside full attention ----


@on_both_cores
@pytest.mark.parametrize("cfg", STATES, ids=lambda cfg: cfg.label)
def test_a_state_comes_back_with_the_prefix_it_ends(rig: Rig, cfg: KitConfig, core: str) -> None:
    tokens = KitSteps(cfg)._make_seq(1, 4)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.stats("CPU mamba")["ready"] == 1
    # In the middle of the prompt there is none, so nothing of it is of use.
    shorter = rig.request([*tokens[: -cfg.page_size], 7])
    assert rig.match(shorter).host_hit_length == 0
    rig.abort(shorter)
    req = rig.request([*tokens, 7])
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    assert_same(rig.read_state(req), rig.random_state(1))
    rig.finish(req, slots)
    assert match_prefix(rig.cache, tokens).device_prefix_len == len(tokens)


@on_both_cores
@pytest.mark.parametrize("cfg", STATES, ids=lambda cfg: cfg.label)
def test_a_state_that_comes_later_is_stored_later(rig: Rig, cfg: KitConfig, core: str) -> None:
    """A node that two prompts were split at has none, until a prompt ends there."""
    steps = KitSteps(cfg)
    common = steps._make_seq(1, 2)
    for number in (1, 2):
        rig.insert([*common, *steps._make_seq(1000 * number, 1)], seed=number)
        rig.settle()
    assert rig.stats("CPU mamba")["ready"] == 2
    # Not with KV that is there already: with what a prompt of its own computes.
    rig.insert(common, seed=3)
    rig.settle()
    assert rig.stats("CPU mamba")["ready"] == 3
    rig.evict_all()
    req = rig.request([*common, 7])
    (slots,) = rig.restore(req)
    assert len(slots) == len(common)
    assert_same(rig.read_state(req), rig.random_state(3))
    rig.abort(req, slots)


@on_both_cores
@pytest.mark.parametrize("cfg", STATES, ids=lambda cfg: cfg.label)
def test_a_state_that_left_by_itself_comes_back(rig: Rig, cfg: KitConfig, core: str) -> None:
    """SGLang takes the state of a node in the middle of a prompt, and leaves its KV."""
    steps = KitSteps(cfg)
    shorter, longer = steps._make_seq(1, 2), steps._make_seq(1, 4)
    expected = rig.insert(shorter, seed=1)
    rig.insert(longer, seed=2)
    rig.settle()
    rig.cache.evict(EvictParams(num_tokens=0, mamba_num=1))
    assert rig.cache.mamba_evictable_size() == 1
    req = rig.request([*shorter, 7])
    match = rig.match(req)
    assert (match.device_prefix_len, match.host_hit_length) == (0, len(shorter))
    slots = rig.admit(req, match)
    rig.start_batch()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads([req])
    assert_same(rig.read(slots), expected)
    assert_same(rig.read_state(req), rig.random_state(1))
    rig.finish(req, slots)
    assert rig.cache.mamba_evictable_size() == 2


@on_both_cores
@pytest.mark.parametrize("cfg", STATES[:2], ids=lambda cfg: cfg.label)
def test_where_no_state_is_free_a_hit_is_computed(rig: Rig, cfg: KitConfig, core: str) -> None:
    """SGLang takes a slot for granted, and its scheduler ends where there is none."""
    tokens = KitSteps(cfg)._make_seq(1, 4)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    taken = rig.requests.mamba_allocator.alloc(cfg.mamba_cache_size)
    req = rig.request([*tokens, 7])
    match = rig.match(req)
    assert match.host_hit_length == len(tokens)
    assert len(rig.admit(req, match)) == 0
    assert rig.start_batch() == -1
    assert len(rig.cache.path_device_indices(req.last_node)) == 0
    rig.abort(req)
    rig.requests.mamba_allocator.free(taken)
    req = rig.request([*tokens, 7])
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    rig.abort(req, slots)


@on_both_cores
@pytest.mark.parametrize("cfg", STATES[:2], ids=lambda cfg: cfg.label)
def test_states_on_their_way_to_a_tier_are_no_reason_to_have_none(
    rig: Rig, cfg: KitConfig, core: str
) -> None:
    """Until its copy has ended a state is locked. Who needs one waits for the copies."""
    for number in range(cfg.mamba_cache_size):
        rig.insert(KitSteps(cfg)._make_seq(1000 * number, 1), seed=number)
    assert len(rig.cache.linker.pending_offloads) == cfg.mamba_cache_size
    assert rig.cache.num_free_states() == 0
    assert rig.cache.mamba_evictable_size() == 0
    rig.cache.evict_for_alloc(EvictParams(num_tokens=0, mamba_num=3))
    assert rig.cache.num_free_states() == 3


@on_both_cores
@pytest.mark.parametrize("cfg", [cfg for cfg in STATES if cfg.has_swa], ids=lambda cfg: cfg.label)
def test_a_state_is_not_stored_for_a_place_before_its_own(rig: Rig, cfg: KitConfig, core: str) -> None:
    """A window may ask that less of a prompt be inserted than the state at its end stands for. SGLang must
    not listen where there is a state: its tree, and we, would keep it for the shorter prefix."""
    req = rig.request(KitSteps(cfg)._make_seq(1, 4))
    req.swa_branching_seqlen = 2 * cfg.page_size
    asks = {
        component.component_type: component.prepare_for_caching_req(
            req=req,
            insert_params=InsertParams(),
            token_ids_len=len(req.origin_input_ids),
            is_finished=False,
        )
        for component in rig.cache._components_tuple
        if component.component_type is not ComponentType.MAMBA
    }
    assert asks == {ComponentType.FULL: None, ComponentType.SWA: None}


# ---- a draft model beside windows and states ----


@on_both_cores
@pytest.mark.parametrize("cfg", EAGLE_WITH_MORE, ids=lambda cfg: cfg.label)
def test_a_drafts_kv_comes_back_with_the_targets_windows_and_states(cfg: KitConfig, core: str) -> None:
    parts = build_kit_cache(cfg, core)
    with Rig(parts, drafts=[make_draft_pool(parts, torch.bfloat16)]) as rig:
        # Beside states SGLang does not make keys of pairs.
        assert rig.tokens_behind == (not cfg.has_mamba)
        pages = KitSteps(cfg)._make_seq(1, max(4, pages_of_a_prompt(cfg)))
        expected = rig.insert([*pages, 7777][: len(pages) + rig.tokens_behind], seed=1)
        assert len(expected) == 2 * len(cfg.full_attention_layer_ids) + 2
        rig.evict_all()
        # With pairs the last page is another one before another token.
        other = rig.request([*pages, 8888])
        without = rig.tokens_behind * cfg.page_size
        assert rig.match(other).host_hit_length == len(pages) - without
        rig.abort(other)
        req = rig.request([*pages, 7777])
        (slots,) = rig.restore(req)
        assert len(slots) == len(pages)
        assert_same(rig.read(slots), expected)
        if cfg.has_mamba:
            assert_same(rig.read_state(req), rig.random_state(1))
        rig.finish(req, slots)


# ---- the kit's steps: chains, splits, requests in flight ----


@pytest.mark.parametrize("core", ["python"])  # looks into the tree
@with_each_full_config
def test_a_chain_of_nodes_comes_back_as_one_prefix(rig: Rig, cfg: KitConfig, core: str) -> None:
    steps = KitSteps(cfg)
    rig.fill(seed=1)
    chain = steps._build_chain_pages(rig.cache, rig.allocator, rig.requests, 5)
    assert len(chain) == 5
    tokens = steps._match_tokens_for_chain(rig.cache, chain)
    slots = rig.cache.path_device_indices(chain[-1])
    rig.settle()
    assert all(rig.cache.tree_core.is_external_cache_stored(node) for node in chain)
    expected = rig.read(slots)
    drive_out(rig)
    assert not node_children(rig.cache, rig.cache.root_node_handle())
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)
    # One node now where there were five, and nothing left to store about it.
    (node,) = node_children(rig.cache, rig.cache.root_node_handle())
    assert node_token_ids(rig.cache, node) == tokens
    rig.settle()
    assert rig.cache.tree_core.is_external_cache_stored(node)


@on_both_cores
@with_each_full_config
def test_a_node_that_is_split_while_it_is_copied_is_stored_in_both_halves(
    rig: Rig, cfg: KitConfig, core: str
) -> None:
    steps = KitSteps(cfg)
    trunk = steps._make_seq(1, 2)
    left, right = trunk + steps._make_seq(5000, 1), trunk + steps._make_seq(9000, 1)
    expected = {0: rig.insert(left, seed=0)}
    pending = len(rig.cache.linker.pending_offloads)
    expected[1] = rig.insert(
        right, seed=1
    )  # splits the first node, which the tree still counts as on its way
    assert len(rig.cache.linker.pending_offloads) == pending + 1
    rig.settle()
    assert not rig.cache.linker.pending_offloads
    assert rig.stats("CPU")["ready"] == 4
    for tokens in (trunk, left, right):
        node = match_prefix(rig.cache, tokens).last_device_node
        assert not rig.cache.tree_core.build_external_linker_offload_transfers(node)
    drive_out(rig)
    for number, tokens in enumerate((left, right)):
        req = rig.request(tokens)
        (slots,) = rig.restore(req)
        assert_same(cut(rig.read(slots), len(trunk)), cut(expected[number], len(trunk)))
        assert_same(cut(rig.read(slots), 0, len(trunk)), cut(expected[0], 0, len(trunk)))
        rig.finish(req, slots)


@on_both_cores
@with_each_full_config
def test_a_request_that_finishes_is_stored_and_its_next_turn_is_loaded(
    rig: Rig, cfg: KitConfig, core: str
) -> None:
    steps = KitSteps(cfg)
    prompt, answer = steps._make_seq(1, 2), steps._make_seq(5000, 1)
    req, slots = steps._make_inflight_req(
        rig.cache, rig.allocator, rig.requests, prompt, answer, allocated=True
    )
    expected = rig.write(slots, seed=1)
    req.cache_salt = None
    finish_req(rig.cache, req, req.extend_end)
    rig.requests.free(req)
    drive_out(rig)
    turn = rig.request([*prompt, *answer, *steps._make_seq(9000, 1)])
    (slots,) = rig.restore(turn)
    assert len(slots) == len(prompt) + len(answer)
    assert_same(rig.read(slots), expected)
    rig.finish(turn, slots)


# ---- the kit's KV events ----


class EventSteps(UnifiedRadixCacheKVEventsFixtures, TestCase):
    pass


@on_both_cores
@pytest.mark.parametrize("cfg", FULL[:3], ids=lambda cfg: cfg.label)
def test_kv_events_report_the_same_blocks_again_after_a_restore(cfg: KitConfig, core: str) -> None:
    with Rig(build_kit_cache(cfg, core, enable_kv_cache_events=True)) as rig:
        steps, tokens = EventSteps(), KitSteps(cfg)._make_seq(1, 3)
        rig.cache.take_events()
        steps._insert(rig.cache, rig.allocator, tokens, cache_salt="tenant")
        stored = steps._stored_events(rig.cache)
        assert {event.medium for event in stored} == {"GPU"}
        assert len(steps._event_hashes(stored)) == 3
        drive_out(rig)
        removed = steps._removed_events(rig.cache)
        assert sorted(steps._event_hashes(removed)) == sorted(steps._event_hashes(stored))

        req = rig.request(tokens, cache_salt="tenant")
        (slots,) = rig.restore(req)
        assert not steps._stored_events(rig.cache)  # private to its request until that inserts it
        rig.finish(req, slots)
        assert steps._event_hashes(steps._stored_events(rig.cache)) == steps._event_hashes(stored)


# ---- the kit's streaming sessions ----


class SessionSteps(StreamingSessionLockLifecycleFixtures, TestCase):
    pass


@on_both_cores
def test_a_streaming_session_keeps_its_turns_to_itself_beside_a_linker(core: str) -> None:
    with Rig(build_kit_cache(FULL[0], core)) as rig:
        steps = SessionSteps()
        slot, _ = steps._later_turn(rig.cache, rig.allocator, rig.requests)
        # The slot holds the session's KV, so no lookup is made for it and nothing is pinned.
        rig.linker.states.check_empty()
        assert rig.engine.stats()["H2D"]["ops_done"] == 0
        assert slot is rig.cache.session.slots["s"]
        rig.cache.release_session("s")
        assert "s" not in rig.cache.session.slots
        rig.settle()
        assert rig.cache.full_protected_size() == 0
        rig.linker.check_idle()


@on_both_cores
def test_a_node_that_is_a_sessions_is_none_of_the_trees(core: str) -> None:
    """What SGLang's scheduler asks about the node of a request that enters its queue."""
    with Rig(build_kit_cache(FULL[0], core)) as rig:
        _, req = SessionSteps()._later_turn(rig.cache, rig.allocator, rig.requests)
        node = req.last_node
        assert is_virtual_node(node)
        assert not rig.cache.is_backuped(node)
        assert not rig.cache.is_root(node)
        assert rig.cache.get_last_hash_value(node) is None
        # Of the tree's own it knows what it did.
        root = rig.cache.root_node_handle()
        assert rig.cache.is_backuped(root)
        assert rig.cache.is_root(root)
        # What a queue of both is sorted by: its turn first, the rest as the tree has it.
        nodes = [match_prefix(rig.cache, [*range(1, 9)]).last_device_node, node, root]
        order = rig.cache.dfs_weight_order(nodes)
        assert order[0] == 1
        assert [nodes[i] for i in order[1:]] == [
            [nodes[0], root][i] for i in rig.cache.tree_core.dfs_weight_order([nodes[0], root])
        ]
        rig.cache.release_session("s")


@on_both_cores
def test_a_turn_that_waits_while_the_cache_is_flushed_holds_nothing(core: str) -> None:
    """SGLang refuses to flush while a request in the queue holds memory."""
    with Rig(build_kit_cache(FULL[0], core)) as rig:
        _, turn = SessionSteps()._later_turn(rig.cache, rig.allocator, rig.requests)
        other = rig.request([*range(50, 60)])
        scheduler = SimpleNamespace(
            waiting_queue=[other, turn], is_mixed_chunk=True, enable_overlap=False, _engine_paused=True
        )
        rig.cache.attach_scheduler(scheduler)
        assert turn.kv.holds_kv
        rig.cache.settle(scheduler)
        assert not turn.kv.holds_kv
        rig.cache.reset()
        rig.requests.clear()
        rig.allocator.clear()


# ---- random histories against an oracle ----


class Oracle:
    """What a correct cache may answer: the KV of a page is a function of all tokens up to its end, so any
    slot of any prefix can be checked without remembering who wrote it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.page = rig.page_size

    def _page_bytes(self, owner: str, tokens: list[int]) -> list[torch.Tensor]:
        """``tokens``: up to the end of the page; where keys are of pairs, and the one behind it."""
        digest = hashlib.blake2b(repr((owner, tokens)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        buffers = (*self.rig.buffers, *self.rig.window_buffers)
        return [
            torch.randint(256, (self.page, as_bytes(part).shape[1]), dtype=torch.uint8, generator=generator)
            for part in buffers
        ]

    def expected(self, owner: str, tokens: list[int]) -> list[torch.Tensor]:
        behind = self.rig.tokens_behind
        ends = range(self.page, len(tokens) - behind + 1, self.page)
        pages = [self._page_bytes(owner, tokens[: end + behind]) for end in ends]
        return [torch.cat(parts) for parts in zip(*pages, strict=True)]

    def state(self, owner: str, tokens: list[int]) -> list[torch.Tensor]:
        """What a request goes on from behind these tokens."""
        digest = hashlib.blake2b(repr((owner, tokens, "state")).encode(), digest_size=8).digest()
        return self.rig.random_state(int.from_bytes(digest, "big") >> 1)

    def compute(self, owner: str, tokens: list[int], slots: torch.Tensor, first: int) -> None:
        """A forward: writes the KV of tokens[first:] into its slots."""
        expected = self.expected(owner, tokens)
        for buffer, part in zip(self.rig.buffers, expected, strict=False):
            as_bytes(buffer)[slots[first:].long()] = part[first:]
        if self.rig.window_buffers and len(slots) > first:
            where = self.rig.in_window(slots[first:])
            for buffer, part in zip(self.rig.window_buffers, expected[len(self.rig.buffers) :], strict=True):
                as_bytes(buffer)[where] = part[first:]

    def check(self, owner: str, tokens: list[int], slots: torch.Tensor) -> None:
        """What a request found of these tokens: all of full attention, and the window at its end."""
        expected = self.expected(owner, tokens)
        assert_same(self.rig.read(slots), expected[: len(self.rig.buffers)])
        if self.rig.window_buffers:
            window = min(len(slots), self.rig.cache.window_tokens)
            there = self.rig.read_window(slots[-window:])
            assert_same(there, [part[-window:] for part in expected[len(self.rig.buffers) :]])

    def take_state(self, owner: str, tokens: list[int], req: Req) -> None:
        """The state that a request found behind these tokens: a copy of what the tree has, or a load."""
        if not self.rig.state_buffers:
            return
        if req.kv.mamba_cow_src_index is not None:
            source, req.kv.mamba_cow_src_index = req.kv.mamba_cow_src_index, None
            self.rig.requests.mamba_pool.copy_from(source, req.kv.mamba_pool_idx.unsqueeze(0))
        assert_same(self.rig.read_state(req), self.state(owner, tokens))

    def leave_state(self, owner: str, tokens: list[int], req: Req) -> None:
        """A forward over these tokens has ended."""
        if self.rig.state_buffers:
            if not req.kv.holds_mamba:
                req.kv.mamba_pool_idx = self.rig.allocate_state()[0]
            self.rig.write_state(req.kv.mamba_pool_idx.unsqueeze(0), self.state(owner, tokens))


@on_both_cores
@pytest.mark.parametrize(
    ("cfg", "policy"),
    [(cfg, policy) for cfg in FULL[:3] for policy in WritePolicy]
    + [(cfg, WritePolicy.WRITE_THROUGH) for cfg in [*WINDOWS[:4], *STATES[:2], STATES[-2]]]
    + [(cfg, WritePolicy.WRITE_THROUGH_SELECTIVE) for cfg in [*WINDOWS[:2], *STATES[:2]]]
    + [(cfg, WritePolicy.WRITE_THROUGH) for cfg in [*EAGLE[:2], *EAGLE_WITH_MORE]],
    ids=lambda value: value.label if isinstance(value, KitConfig) else value.value,
)
def test_no_history_makes_it_serve_anything_but_the_right_bytes(
    cfg: KitConfig, core: str, policy: WritePolicy
) -> None:
    # Smaller than what the policy stores in the end: blocks leave the CPU tier all the time as well.
    is_small = policy is WritePolicy.WRITE_THROUGH_SELECTIVE or cfg.has_swa or cfg.has_mamba
    num_cpu_blocks = 8 if is_small else 20
    cfg = small(cfg)
    parts = build_kit_cache(cfg, core)
    drafts = [make_draft_pool(parts, torch.bfloat16)] if cfg.is_eagle else []
    with Rig(parts, policy=policy, num_cpu_blocks=num_cpu_blocks, drafts=drafts) as rig:
        restored, aborted = run_history(rig, cfg, random.Random(f"{cfg.label} {core} {policy}"))
        # The history is worth something: it restored, aborted and lost blocks.
        assert restored > 0
        assert aborted > 0
        assert rig.stats("CPU")["evicted"] > 0


@pytest.mark.parametrize(
    ("cfg", "seed"),
    [(cfg, seed) for seed, cfg in enumerate([WINDOWS[0], WINDOWS[3], STATES[0], STATES[1], STATES[-2]])],
    ids=lambda value: value.label if isinstance(value, KitConfig) else str(value),
)
def test_no_history_makes_a_store_that_fails_serve_anything_but_the_right_bytes(
    cfg: KitConfig, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers over one store, which has faults of every kind."""
    faults, values, cfg = Faults(seed), Values(), small(cfg)
    monkeypatch.setattr(remote_tier, "STORES", {"file": lambda *_: FaultyStore(values, faults)})
    try_again_soon(monkeypatch)
    monkeypatch.setattr(remote_tier, "_FULL_MAX_S", 0.01)
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", 1)  # a task for each block
    rng = random.Random(seed)

    def wait_amid_faults(rig: Rig, req: Req) -> None:
        faults.mix(lambda: rng.random() < 0.3)
        if rng.random() < 0.3:
            invalidate_cpu_tier(rig)
        wait_in_queue(rig, req)

    with ExitStack() as stack:
        rigs = [
            stack.enter_context(Rig(build_kit_cache(cfg, core), num_cpu_blocks=12, remote="file:///tmp"))
            for core in CORES
        ]
        histories = [run_history(rig, cfg, rng, 15, wait_amid_faults) for _ in range(2) for rig in rigs]
        assert sum(restored for restored, _ in histories) > 0
        faults.heal()
        for rig in rigs:
            assert rig.stats("REMOTE2H")["bytes"] > 0
            assert rig.linker.metrics.total["failed"] == 0
        # Now that it works the other one finds all of what one stores, with all its parts.
        for number, (writer, reader) in enumerate([rigs, rigs[::-1]]):
            tokens = KitSteps(cfg)._make_seq(50_000 + 10_000 * number, 5)
            deadline = time.monotonic() + TIMEOUT_S
            while True:
                writer.evict_all()
                writer.insert(tokens, seed=number)
                writer.evict_all()
                writer.engine.flush_spills(TIMEOUT_S)
                invalidate_cpu_tier(writer)
                req = reader.request([*tokens, 7])
                wait_in_queue(reader, req)
                (slots,) = reader.restore(req)
                reader.abort(req, slots)
                if len(slots) == len(tokens):
                    break
                assert time.monotonic() < deadline, "the store is not used again"
            further = [name for name in reader.engine.stats() if name.startswith("REMOTE ")]
            assert len(further) == cfg.has_swa + cfg.has_mamba
            assert all(reader.stats(name)["found_blocks"] > 0 for name in further)


def small(cfg: KitConfig) -> KitConfig:
    """With less of everything, so that it does not last."""
    return dataclasses.replace(
        cfg,
        num_layers=2,
        full_attention_layer_ids=(1,),
        head_num=1,
        head_dim=8,
        kv_size=24 * cfg.page_size,
    )


def run_history(
    rig: Rig,
    cfg: KitConfig,
    rng: random.Random,
    num_steps: int = 80,
    wait: Callable[[Rig, Req], None] = lambda _rig, _req: None,
) -> tuple[int, int]:
    """Requests that a seed draws, each of which waits before it is admitted. Returns how many tokens came
    back from below the device, and how many requests were given up."""
    steps, oracle = KitSteps(cfg), Oracle(rig)
    restored = aborted = 0

    def prompt() -> list[int]:
        # Few distinct pages, so that prompts share prefixes and split nodes.
        pages = [steps._make_seq(1000 * rng.randrange(3), 1) for _ in range(rng.randrange(1, 6))]
        behind = [rng.choice([1, 1001, 5555]) for _ in range(rig.tokens_behind)]
        return [*chain(*pages), *behind]

    for _ in range(num_steps):
        batch = []
        for _ in range(rng.randrange(1, 3)):
            owner, tokens = rng.choice(["", "tenant"]), prompt()
            req = rig.request(tokens, cache_salt=owner or None)
            wait(rig, req)
            hit = rig.admit(req)
            restored += len(hit) - req.kv.cache_protected_len
            if rng.random() < 0.15:
                rig.abort(req, hit)
                aborted += 1
                continue
            batch.append((owner, tokens, req, hit))
        rig.start_batch()
        rig.forward()
        assert not rig.cache.finish_external_linker_loads([req for _, _, req, _ in batch])
        for owner, tokens, req, hit in batch:
            if len(hit):
                found = tokens[: len(hit) + rig.tokens_behind]
                oracle.check(owner, found, hit)
                oracle.take_state(owner, found, req)
            missing = len(tokens) - rig.tokens_behind - len(hit)
            if missing > rig.allocator.available_size():
                short = missing - rig.allocator.available_size()
                rig.cache.evict(EvictParams(num_tokens=short, swa_num_tokens=short if cfg.has_swa else 0))
            new = rig.allocate(missing) if missing else hit[:0]
            if new is None:
                rig.abort(req, hit)
                continue
            slots = torch.cat([hit, new])
            oracle.compute(owner, tokens, slots, len(hit))
            oracle.leave_state(owner, tokens, req)
            rig.finish(req, slots)
        if rng.random() < 0.5:
            rig.settle()
        if rng.random() < 0.2:
            rig.evict_all()
        rig.cache.sanity_check()
    return restored, aborted


@on_both_cores
def test_the_copy_of_a_page_cannot_be_mistaken_for_that_of_its_neighbour(core: str) -> None:
    """The oracle itself: a load into the wrong slots must not pass."""
    with Rig(build_kit_cache(FULL[1], core)) as rig:
        tokens = KitSteps(FULL[1])._make_seq(1, 3)
        expected = rig.insert(tokens, seed=1)
        drive_out(rig)
        req = rig.request(tokens)
        slots = rig.admit(req)
        (load,) = rig.linker._next_batch.values()
        with mock.patch.object(load, "token_slots", load.token_slots[::-1].copy()):
            rig.start_batch()
            rig.forward()
            rig.cache.finish_external_linker_loads([req])
        with pytest.raises(AssertionError, match="tokens differ"):
            assert_same(rig.read(slots), expected)
        rig.abort(req, slots)
