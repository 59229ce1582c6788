"""A prefix that several requests want: loaded once, into one place on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kit import (
    CORES,
    TIMEOUT_S,
    Rig,
    assert_same,
    build_kit_cache,
    build_small_cache,
    cut,
    make_pool,
    radix_key,
)
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    admit_without_its_lease,
    check_landed,
    check_runs_again,
    invalidate_cpu_tier,
    prefetch,
    reads_do_not_end,
    sequence,
    wait_until_ready,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.session.streaming_session import SessionSlot
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from sglang_flexkv import _core
from sglang_flexkv.common.config import LoadPolicy, WritePolicy
from sglang_flexkv.integration.compat.requests import name_of

TOKENS = PAGES * PAGE


def admit_all(rig: Rig, *reqs: Req) -> list[torch.Tensor]:
    """As SGLang does it: one is admitted before the next one is matched. Returns their prefixes' slots."""
    for req in reqs:
        rig.admit(req)
    return [rig.cache.prefix_device_indices(req) for req in reqs]


def run(rig: Rig, *reqs: Req) -> None:
    """The batch of these requests, to the end of its forward and of its loads."""
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads(list(reqs)) == []


def loaded(rig: Rig) -> int:
    total = rig.linker.metrics.total
    return total["loaded cpu"] + total["loaded ssd"]


def shared(rig: Rig) -> int:
    return rig.linker.metrics.total["shared"]


def store_on_ssd(rig: Rig, *prompts: list[int]) -> list[list[torch.Tensor]]:
    """In this order; a prompt may begin with one before it. Nothing else has them then."""
    expected = []
    for seed, tokens in enumerate(prompts):
        req = rig.request(tokens)
        match = rig.match(req)
        rig.abort(req)
        held = match.device_prefix_len
        slots = rig.cache.path_device_indices(match.last_device_node)
        own = rig.allocator.alloc(len(tokens) - held)
        assert own is not None
        rig.write(own, seed)
        rig.cache.insert(
            InsertParams(key=radix_key(tokens), value=torch.cat([slots, own]), prev_prefix_len=held)
        )
        expected.append(rig.read(torch.cat([slots, own])))
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    return expected


def damage(directory: Path, page: list[torch.Tensor]) -> None:
    """Spoils the block on SSD that holds the bytes of this page."""
    content = b"".join(rows.numpy().tobytes() for rows in page)
    (slots_file,) = directory.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(slots_file.read_bytes().index(content))
        file.write(bytes(64))


def on_device(rig: Rig, tokens: list[int]) -> int:
    """Tokens of a sequence that the device has."""
    req = rig.request(tokens)
    found: int = rig.match(req).device_prefix_len
    rig.abort(req)
    return found


# ---- who shares what ----


@pytest.mark.parametrize("policy", WritePolicy, ids=lambda p: p.value)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("core", CORES)
def test_what_all_of_a_batch_want_is_loaded_once(core: str, page_size: int, policy: WritePolicy) -> None:
    pool = make_pool("mha", torch.bfloat16, page_size, num_tokens=2 * PAGES * page_size)
    with Rig(build_small_cache(pool, page_size, core), policy=policy) as rig:
        tokens = sequence(1, PAGES, page_size)
        expected = rig.insert(tokens, seed=1)
        if policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
            rig.insert(tokens, seed=1)  # its second use
        rig.evict_all()
        reqs = [rig.request(tokens + [9000 + n] * page_size) for n in range(16)]
        matches = [rig.match(reqs[0])]
        rig.admit(reqs[0], matches[0])
        for req in reqs[1:]:
            matches.append(rig.match(req))
            rig.admit(req, matches[-1])
        assert [match.host_hit_length for match in matches] == [len(tokens), *[0] * 15]
        assert [match.device_prefix_len for match in matches] == [0, *[len(tokens)] * 15]
        all_slots = [rig.cache.prefix_device_indices(req) for req in reqs]
        run(rig, *reqs)
        assert loaded(rig) == len(tokens)
        assert shared(rig) == 15 * len(tokens)
        assert rig.cache.full_protected_size() == len(tokens)
        for req, slots in zip(reqs, all_slots, strict=True):
            assert torch.equal(slots, all_slots[0])
            assert_same(rig.read(slots), expected)
            rig.finish(req, slots)


def test_who_wants_a_part_of_it_shares_that_part(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=64)
    trunk, first_tail, second_tail, third_tail = (sequence(10000 * n, n) for n in (2, 3, 4, 5))
    prompts = [trunk + first_tail, trunk + second_tail, trunk + second_tail + third_tail]
    expected = [rig.insert(prompts[0], seed=1)]
    rig.evict_all()
    expected.append(rig.insert(prompts[2], seed=2))
    # The pages of the trunk are those of the first one: that is what was stored.
    expected[1] = [
        torch.cat([a, b]) for a, b in zip(cut(expected[0], 0, 32), cut(expected[1], 32), strict=True)
    ]
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in (prompts[0], prompts[1], prompts[2], prompts[0][:48])]
    all_slots = admit_all(rig, *reqs)
    run(rig, *reqs)
    pages_of_all = sum(map(len, (trunk, first_tail, second_tail, third_tail)))
    assert loaded(rig) == pages_of_all
    assert shared(rig) == len(trunk) + len(prompts[1]) + 48
    for req, slots, bytes_ in zip(
        reqs,
        all_slots,
        [expected[0], cut(expected[1], 0, len(prompts[1])), expected[1], cut(expected[0], 0, 48)],
        strict=True,
    ):
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)
    rig.settle()
    assert rig.cache.full_evictable_size() == pages_of_all  # and held once


def test_a_request_that_is_alone_has_it_to_itself_until_it_has_run(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.insert(sequence(5000), seed=2)
    rig.evict_all()
    reqs = [rig.request(sequence(1)), rig.request(sequence(5000))]
    all_slots = admit_all(rig, *reqs)
    run(rig, *reqs)
    assert rig.cache.full_protected_size() == rig.cache.full_evictable_size() == 0  # the tree has nothing yet
    assert shared(rig) == 0
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.finish(req, slots)


def test_who_comes_before_it_is_inserted_shares_it_too(make_rig: MakeRig) -> None:
    """With overlap SGLang chooses the next batch before it looks at the results of the last one."""
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    first = rig.request(sequence(1))
    (first_slots,) = admit_all(rig, first)
    run(rig, first)
    second = rig.request(sequence(1) + sequence(5000))
    assert rig.match(second).host_hit_length == 0
    (second_slots,) = admit_all(rig, second)
    assert torch.equal(first_slots, second_slots)
    assert rig.start_batch() == -1
    assert_same(rig.read(second_slots), expected)
    rig.finish(first, first_slots)
    rig.finish(second, second_slots)
    assert loaded(rig) == TOKENS


def test_nobody_shares_a_load_that_runs_under_a_batch_without_him(make_rig: MakeRig) -> None:
    """SGLang ends a batch's loads before it chooses the next one; who was in that would not wait for them."""
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    first, second = rig.request(sequence(1)), rig.request(sequence(1))
    (slots,) = admit_all(rig, first)
    rig.start_batch()
    match = rig.match(second)
    assert (match.device_prefix_len, match.host_hit_length) == (0, TOKENS)
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert rig.match(second).device_prefix_len == TOKENS
    rig.finish(first, slots)
    rig.abort(second)


@pytest.mark.parametrize("how", ["inserted", "released", "flushed"])
def test_what_has_been_loaded_is_shared_only_as_long_as_its_request_has_it(
    make_rig: MakeRig, how: str
) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    (slots,) = admit_all(rig, req)
    run(rig, req)
    assert rig.cache.linker is not None
    assert rig.cache.linker.loads
    if how == "inserted":
        req.kv.req_pool_idx = 1
        rig.requests.req_to_token[1, :TOKENS] = slots
        rig.cache.checkpoint(req, up_to=TOKENS)
    else:
        rig.allocator.free(slots)
        rig.cache.unlock(req.lock)
        rig.cache.on_release(req, checkpointed=False) if how == "released" else rig.cache.reset()
    assert not rig.cache.linker.loads
    assert on_device(rig, sequence(1)) == (TOKENS if how == "inserted" else 0)
    if how == "inserted":
        rig.cache.unlock(req.lock)
        rig.cache.on_release(req, checkpointed=True)


@pytest.mark.parametrize("salt", ["extra_key", "cache_salt"])
def test_who_has_another_key_shares_nothing(make_rig: MakeRig, salt: str) -> None:
    rig = make_rig()
    mine, yours, nobodys = {salt: "mine"}, {salt: "yours"}, {salt: None}
    expected = []
    for seed, fields in enumerate((mine, yours, nobodys)):
        expected.append(rig.insert(sequence(1), seed, **fields))
        rig.evict_all()
    reqs = [rig.request(sequence(1), **fields) for fields in (yours, yours, mine, nobodys)]
    all_slots = admit_all(rig, *reqs)
    run(rig, *reqs)
    assert loaded(rig) == 3 * TOKENS
    assert shared(rig) == TOKENS
    for req, slots, bytes_ in zip(reqs, all_slots, [expected[1], *expected[1::-1], expected[2]], strict=True):
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)


def test_what_is_loaded_for_several_is_not_stored_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    copies = rig.stats("D2H")["ops_done"]
    reqs = [rig.request(sequence(1)) for _ in range(3)]
    all_slots = admit_all(rig, *reqs)
    assert rig.cache.linker is not None
    assert not rig.cache.linker.pending_offloads  # nor offered while it is not there
    run(rig, *reqs)
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.finish(req, slots)
    rig.settle()
    assert rig.stats("D2H")["ops_done"] == copies


def test_every_layer_of_it_is_waited_for_by_all(make_rig: MakeRig) -> None:
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    reqs = [rig.request(sequence(1)), rig.request(sequence(1))]
    all_slots = admit_all(rig, *reqs)
    assert rig.start_batch() >= 0
    for layer in range(rig.pool.layer_num):
        first = layer * rig.buffers_per_layer
        assert_same(rig.read_layer(layer, all_slots[1]), expected[first : first + rig.buffers_per_layer])
    assert rig.cache.finish_external_linker_loads(reqs) == []
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.finish(req, slots)


def test_what_is_on_its_way_for_several_is_not_evicted(make_rig: MakeRig) -> None:
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    leader, another = rig.request(sequence(1)), rig.request(sequence(1)[:PAGE])
    admit_all(rig, leader, another)
    rig.cache.evict(EvictParams(num_tokens=rig.pool.size))
    # Not even if who asked for it has gone, and who stays wants but a part.
    rig.abort(leader)
    rig.cache.evict(EvictParams(num_tokens=rig.pool.size))
    assert on_device(rig, sequence(1)) == TOKENS
    run(rig, another)
    third = rig.request(sequence(1))
    (slots,) = admit_all(rig, third)
    assert_same(rig.read(slots), expected)
    rig.finish(another, slots[:PAGE])
    rig.finish(third, slots)
    assert loaded(rig) == TOKENS


# ---- its request ends before the others ----


@pytest.mark.parametrize("when", ["before the batch", "after it"])
def test_the_others_have_it_whatever_becomes_of_who_asked_for_it(make_rig: MakeRig, when: str) -> None:
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    leader, another = rig.request(sequence(1)), rig.request(sequence(1))
    leaders_slots, slots = admit_all(rig, leader, another)
    if when == "before the batch":
        rig.abort(leader, leaders_slots)
        run(rig, another)
    else:
        run(rig, leader, another)
        rig.abort(leader, leaders_slots)
    check_landed(rig, another, slots, expected)
    assert on_device(rig, sequence(1)) == TOKENS
    assert loaded(rig) == TOKENS


# ---- it fails ----


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK], ids=lambda p: p.value)
@pytest.mark.parametrize("core", CORES)
def test_when_it_fails_all_who_relied_on_it_compute(tmp_path: Path, core: str, policy: WritePolicy) -> None:
    pool = make_pool("mha", torch.bfloat16, PAGE, num_tokens=64 * PAGE)
    with Rig(build_small_cache(pool, PAGE, core), policy=policy, ssd_dir=tmp_path) as rig:
        trunk, below, other, deeper = sequence(1), sequence(5000), sequence(20000), sequence(30000)
        prompts = [trunk, trunk + below, other, trunk + below + deeper]
        expected = store_on_ssd(rig, *prompts)
        damage(tmp_path, cut(expected[0], 2 * PAGE, 3 * PAGE))
        wanted = [
            trunk,  # loads it
            trunk[: 3 * PAGE],  # a part, with what is damaged
            other,  # loads something else
            trunk + below,  # more
            trunk + below + deeper,  # and shares what that one loads as well
            other,
        ]
        reqs = [rig.request(tokens) for tokens in wanted]
        all_slots = admit_all(rig, *reqs)
        stored = rig.stats("D2H")["ops_done"]
        run(rig, *reqs)
        good = [reqs[2], reqs[5]]
        lost = [req for req in reqs if req not in good]
        # Nobody finds anything of it any more, and nothing that was not loaded is stored.
        assert on_device(rig, prompts[3]) == 0
        assert on_device(rig, other) == TOKENS
        check_runs_again(rig, *lost)
        assert rig.linker.metrics.total["failed"] == len(lost)
        assert shared(rig) == TOKENS
        for req, slots in zip(reqs, all_slots, strict=True):
            if req in good:
                check_landed(rig, req, slots, expected[2])
            else:
                assert rig.linker.states.of(name_of(req)).gave_up
                rig.abort(req, slots)
        rig.settle()
        assert rig.stats("D2H")["ops_done"] == stored


def test_who_shared_only_what_is_before_the_failed_load_goes_on(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path, num_pages=64)
    trunk, below = sequence(1), sequence(5000)
    expected = store_on_ssd(rig, trunk, trunk + below)
    damage(tmp_path, cut(expected[1], TOKENS + PAGE, TOKENS + 2 * PAGE))
    reqs = [rig.request(tokens) for tokens in (trunk, trunk + below, trunk + below, trunk)]
    all_slots = admit_all(rig, *reqs)
    run(rig, *reqs)
    assert on_device(rig, trunk + below) == TOKENS
    check_runs_again(rig, reqs[1], reqs[2])
    for i in (1, 2):
        rig.abort(reqs[i], all_slots[i])
    for i in (0, 3):
        check_landed(rig, reqs[i], all_slots[i], expected[0])


def test_who_was_matched_but_not_admitted_is_not_among_them(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    (expected,) = store_on_ssd(rig, sequence(1))
    damage(tmp_path, cut(expected, 0, PAGE))
    leader, waiting = rig.request(sequence(1)), rig.request(sequence(1))
    (slots,) = admit_all(rig, leader)
    assert rig.match(waiting).device_prefix_len == TOKENS  # and then there is no room for what it computes
    run(rig, leader)
    check_runs_again(rig, leader)
    rig.abort(leader, slots)
    assert not rig.linker.states.of(name_of(waiting)).gave_up
    assert rig.match(waiting).device_prefix_len == 0
    rig.abort(waiting)


def test_nobody_shares_what_has_failed(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    (expected,) = store_on_ssd(rig, sequence(1))
    damage(tmp_path, cut(expected, 2 * PAGE, 3 * PAGE))
    alone, late = rig.request(sequence(1)), rig.request(sequence(1))
    (slots,) = admit_all(rig, alone)
    run(rig, alone)
    match = rig.match(late)
    assert (match.device_prefix_len, match.host_hit_length) == (0, 2 * PAGE)
    check_runs_again(rig, alone)
    rig.abort(alone, slots)
    rig.abort(late)


def test_who_has_given_up_does_not_rely_on_the_load_of_another(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    leader, gave_up = rig.request(sequence(1)), rig.request(sequence(1))
    rig.linker.give_up(name_of(gave_up))
    leaders_slots, slots = admit_all(rig, leader, gave_up)
    assert len(slots) == 0
    run(rig, leader, gave_up)
    rig.finish(leader, leaders_slots)
    rig.abort(gave_up, slots)


def test_a_load_that_fails_on_another_rank_is_nobodys_here(make_rig: MakeRig) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.insert(sequence(5000), seed=2)
    rig.evict_all()
    prompts = [sequence(1), sequence(5000), sequence(1), sequence(5000)]
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = admit_all(rig, *reqs)
    rig.start_batch()
    rig.forward()

    def with_another_rank(verdicts: torch.Tensor, op: Any) -> None:
        assert verdicts.tolist() == [1, 1]  # of the loads, of which there are two
        verdicts[0] = 0

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", with_another_rank):
        assert rig.cache.finish_external_linker_loads(reqs) == []
    assert on_device(rig, sequence(1)) == 0
    check_runs_again(rig, reqs[0], reqs[2])
    for i in (0, 2):
        rig.abort(reqs[i], all_slots[i])
    for i in (1, 3):
        rig.finish(reqs[i], all_slots[i])


def test_a_rank_that_cannot_load_it_fails_all_who_share_it(make_rig: MakeRig) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    reqs = [rig.request(sequence(1)), rig.request(sequence(1))]
    all_slots = [admit_without_its_lease(rig, reqs[0]), rig.admit(reqs[1])]
    assert len(all_slots[1]) == TOKENS  # as on the other ranks
    run(rig, *reqs)
    check_runs_again(rig, *reqs)
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.abort(req, slots)


def test_a_session_lets_go_of_what_did_not_land(make_rig: MakeRig) -> None:
    """The first turn of a streaming session, whose lock its session keeps once it runs."""
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    turn, another = rig.request(sequence(1)), rig.request(sequence(1))
    all_slots = [admit_without_its_lease(rig, turn), rig.admit(another)]
    turn.session = SimpleNamespace(session_id="s", streaming=True, abort_req=lambda: None)
    slot = SessionSlot(kv=turn.kv, lock=turn.lock)
    rig.cache.session.slots["s"], turn.lock, turn.last_node = slot, None, slot.virtual_node
    run(rig, turn, another)
    assert on_device(rig, sequence(1)) == 0
    assert slot.lock is None
    turn.finished_reason = FINISH_ABORT()
    assert not rig.cache.claim_kv_row(turn)
    turn.session = None
    check_runs_again(rig, turn, another)
    for req, slots in zip((turn, another), all_slots, strict=True):
        rig.abort(req, slots)


def test_what_a_sessions_turn_has_loaded_is_its_sessions(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    turn, another = rig.request(sequence(1)), rig.request(sequence(1))
    (slots,) = admit_all(rig, turn)
    run(rig, turn)
    node, turn.last_node = turn.last_node, SessionSlot().virtual_node
    (others_slots,) = admit_all(rig, another)
    assert set(slots.tolist()).isdisjoint(others_slots.tolist())
    run(rig, another)
    turn.last_node = node
    rig.finish(another, others_slots)
    rig.finish(turn, slots)


# ---- beside sliding windows ----

WINDOW = CacheConfig(
    page_size=4,
    components=(ComponentType.FULL, ComponentType.SWA),
    sliding_window_size=8,
    num_layers=3,
    full_attention_layer_ids=(1,),
    kv_size=160,
)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_with_windows_what_all_of_a_batch_want_is_loaded_once_or_fails_for_all(
    tmp_path: Path, core: str, fails: bool
) -> None:
    with Rig(build_kit_cache(WINDOW, core), ssd_dir=tmp_path, load_policy=LoadPolicy.LOAD) as rig:
        tokens = sequence(1, 8, 4)
        expected = rig.insert(tokens, seed=1)
        req = rig.request(tokens)
        node = rig.match(req).last_device_node
        rig.abort(req)
        window = rig.read_window(rig.cache.path_device_indices(node)[-8:])
        rig.evict_all()
        assert rig.engine.flush_spills(TIMEOUT_S)
        invalidate_cpu_tier(rig)
        if fails:
            (slots_file,) = tmp_path.glob("*-swa.slots")
            data = bytearray(slots_file.read_bytes())
            for at in range(_core.SSD_SLOTS_OFFSET, len(data), 64):
                data[at] ^= 1
            slots_file.write_bytes(data)
        reqs = [rig.request([*tokens, 9000 + n]) for n in range(3)]
        all_slots = admit_all(rig, *reqs)
        assert all(len(slots) == len(tokens) for slots in all_slots)
        assert all(torch.equal(slots, all_slots[0]) for slots in all_slots)
        run(rig, *reqs)
        if fails:
            # Nothing of it is left in the tree, not even what has no window.
            assert rig.cache.tree_core.match_full_device_prefix(radix_key(tokens))[0] == 0
            check_runs_again(rig, *reqs)
            for req, slots in zip(reqs, all_slots, strict=True):
                rig.abort(req, slots)
            return
        assert loaded(rig) == len(tokens)
        assert shared(rig) == 2 * len(tokens)
        for req, slots in zip(reqs, all_slots, strict=True):
            assert_same(rig.read_window(slots[-8:]), window)
            check_landed(rig, req, slots, expected)


@pytest.mark.parametrize("pages", [1, 8])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_what_the_tree_has_without_its_window_is_not_shared(core: str, pairs: bool, pages: int) -> None:
    """It keeps its own slots of these tokens, and would give back those that are being loaded."""
    with Rig(build_kit_cache(replace(WINDOW, is_eagle=pairs), core), load_policy=LoadPolicy.LOAD) as rig:
        tokens = [*sequence(1, pages, 4), 7777]
        count = 4 * pages
        expected = rig.insert(tokens[: count + pairs], seed=1)
        rig.evict_all()
        slots = rig.allocate(count)
        assert slots is not None
        gone = {ComponentType.SWA: count}
        key = radix_key(tokens[: count + pairs])
        rig.cache.insert(InsertParams(key=key, value=slots, component_evicted_seqlens=gone))
        rig.allocator.free_swa(slots)
        reqs = [rig.request([*tokens, n]) for n in range(3)]
        all_slots = admit_all(rig, *reqs)
        assert [len(slots) for slots in all_slots] == [count] * 3
        in_use = torch.cat(all_slots).tolist()
        assert len(set(in_use)) == len(in_use)  # each its own
        run(rig, *reqs)
        for req, slots in zip(reqs, all_slots, strict=True):
            check_landed(rig, req, slots, expected)


@pytest.mark.parametrize("core", CORES)
def test_windows_that_ssd_alone_has_are_waited_for_and_their_read_is_everybodys(
    tmp_path: Path, core: str
) -> None:
    with Rig(build_kit_cache(WINDOW, core), ssd_dir=tmp_path, load_policy=LoadPolicy.LOAD) as rig:
        tokens, more = sequence(1, 8, 4), sequence(5000, 8, 4)
        expected = rig.insert(tokens, seed=1)
        slots = rig.allocate(len(tokens) + len(more))
        assert slots is not None
        rig.write(slots, seed=2)
        rig.cache.insert(InsertParams(key=radix_key(tokens + more), value=slots))
        rig.evict_all()
        assert rig.engine.flush_spills(TIMEOUT_S)
        invalidate_cpu_tier(rig)
        # Who wants more brings these tokens as well, and the window at its own end alone.
        longer = rig.request([*tokens, *more, 9000])
        (slots,) = rig.restore(longer)
        rig.finish(longer, slots)
        rig.evict_all()
        read = rig.stats("DISK2H")["ops_done"]
        first, second = (rig.request([*tokens, 9000 + n]) for n in range(2))
        with reads_do_not_end(rig):
            prefetch(rig, first)
            found = rig.linker.states.known(name_of(first)).found
            assert found.num_lower_blocks == 2
            assert rig.engine.find_read(found.keys) is not None
            # Nobody finds them until they are there; the one that comes waits for the same read.
            assert rig.match(second).host_hit_length < len(tokens)
            assert not rig.cache.check_prefetch_progress(second.cache_request_handle)
        for req in (first, second):
            wait_until_ready(rig, req)
        # The window of the first, and that of the shorter prefix which the second found meanwhile.
        assert rig.stats("DISK2H")["ops_done"] == read + 2
        for req in (first, second):
            (slots,) = rig.restore(req)
            assert len(slots) == len(tokens)
            assert_same(rig.read(slots), expected)
            rig.finish(req, slots)
