"""Our linker and cache over small real KV pools: what comes back is what was stored, nothing stays held."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from closing_steps import StepFailedError, one_fails, steps_of
from kit import TIMEOUT_S, Rig, assert_same, build_small_cache, cut, make_pool, radix_key
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestOutcome, EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_flexkv import _core
from sglang_flexkv.common.block import keys_from_page_hashes, make_namespace
from sglang_flexkv.common.config import LoadPolicy, PrefetchPolicy, WritePolicy
from sglang_flexkv.integration.linker import FlexKVLinker
from sglang_flexkv.integration.request_names import name_of
from sglang_flexkv.kvtask import TaskStatus
from sglang_flexkv.transfer.transfer_engine import TransferEngine

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
PAGES = 4  # of the sequences below
PAGE = 16

MakeRig = Callable[..., Rig]


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """Makes rigs; each must be idle at the end of its test, whatever the test did with it."""
    rigs: list[Rig] = []

    def make(
        kind: str = "mha",
        dtype: torch.dtype = torch.bfloat16,
        page_size: int = PAGE,
        *,
        num_pages: int = 48,
        num_layers: int = 3,
        **options: Any,
    ) -> Rig:
        pool = make_pool(kind, dtype, page_size, num_tokens=num_pages * page_size, num_layers=num_layers)
        rigs.append(Rig(build_small_cache(pool, page_size), **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.check_nothing_is_left()
        rig.close()


def sequence(start: int, pages: int = PAGES, page_size: int = PAGE) -> list[int]:
    return list(range(start, start + pages * page_size))


def device_node(rig: Rig, tokens: list[int]) -> Any:
    """The tree's node where the device's part of a sequence ends."""
    return rig.cache.match_prefix(MatchPrefixParams(key=radix_key(tokens))).last_device_node


def page_hashes(rig: Rig, tokens: list[int]) -> list[str]:
    return get_storage_hash_str(radix_key(tokens), None, page_size=rig.page_size)


def invalidate_cpu_tier(rig: Rig) -> None:
    """Forgets what the CPU tier holds, as if newer blocks had pushed it out."""
    rig.engine.clear_tiers(_core.Tier.CPU)


# ---- the round trip ----


@pytest.mark.parametrize("policy", WritePolicy, ids=lambda p: p.value)
@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_an_evicted_prefix_comes_back_into_other_slots_byte_for_byte(
    make_rig: MakeRig, kind: str, dtype: torch.dtype, page_size: int, policy: WritePolicy
) -> None:
    rig = make_rig(kind, dtype, page_size, num_pages=12, policy=policy)
    tokens = sequence(1, page_size=page_size)
    expected = rig.insert(tokens, seed=1)
    first_slots = rig.cache.path_device_indices(device_node(rig, tokens))
    rig.settle()
    assert rig.stats("CPU")["ready"] == (PAGES if policy is WritePolicy.WRITE_THROUGH else 0)

    if policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
        rig.insert(tokens, seed=2)  # the second use: these duplicates are dropped, the first copy stays
        rig.settle()
        assert rig.stats("CPU")["ready"] == PAGES
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == PAGES

    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert set(slots.tolist()).isdisjoint(first_slots.tolist())
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize("policy", WritePolicy, ids=lambda p: p.value)
def test_only_the_part_that_the_device_lost_is_loaded(make_rig: MakeRig, policy: WritePolicy) -> None:
    rig = make_rig(policy=policy)
    trunk, tail = sequence(1), sequence(5000)
    expected = rig.insert(trunk + tail, seed=1)
    rig.insert(trunk + tail, seed=2)
    # A second branch makes the trunk a node of its own, and a request keeps it on the device.
    other = rig.insert(trunk + sequence(9000), seed=3)
    rig.insert(trunk + sequence(9000), seed=4)
    keeper = rig.request(trunk)
    rig.admit(keeper)
    rig.settle()
    rig.cache.evict(EvictParams(num_tokens=rig.cache.full_evictable_size()))
    before = rig.stats("H2D")["bytes"]

    req = rig.request(trunk + tail)
    (slots,) = rig.restore(req)
    assert rig.stats("H2D")["bytes"] - before == PAGES * rig.engine.device.block_layout(PAGE).block_bytes
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)

    req = rig.request(trunk + sequence(9000))
    (slots,) = rig.restore(req)
    # The trunk is the first insert's; the second one's copy of it was dropped as a duplicate.
    assert_same(cut(rig.read(slots), len(trunk)), cut(other, len(trunk)))
    assert_same(cut(rig.read(slots), 0, len(trunk)), cut(expected, 0, len(trunk)))
    rig.finish(req, slots)
    rig.finish(keeper, slots[: len(trunk)])


def test_a_prefix_of_what_is_stored_is_a_hit(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    # Half a page more than two of the stored pages, and then something else.
    req = rig.request(tokens[: 2 * PAGE + PAGE // 2] + sequence(7000, 2))
    (slots,) = rig.restore(req)
    assert len(slots) == 2 * PAGE
    assert_same(rig.read(slots), cut(expected, 0, 2 * PAGE))
    rig.finish(req, slots)


def test_a_restored_prefix_is_not_stored_a_second_time(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    stored = rig.stats("D2H")["bytes"]
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    rig.finish(req, slots)
    rig.settle()
    assert rig.stats("D2H")["bytes"] == stored
    # The tree was told that it is stored, or it would offer it again at every use.
    node = device_node(rig, tokens)
    assert not rig.cache.tree_core.build_external_linker_offload_transfers(node)


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_BACK, WritePolicy.WRITE_THROUGH_SELECTIVE])
def test_nothing_is_stored_before_the_policy_says_so(make_rig: MakeRig, policy: WritePolicy) -> None:
    rig = make_rig(policy=policy)
    rig.insert(sequence(1), seed=1)
    rig.settle()
    assert rig.stats("D2H")["ops_done"] == 0
    rig.evict_all()
    assert rig.stats("D2H")["ops_done"] == (1 if policy is WritePolicy.WRITE_BACK else 0)


def test_a_spilled_node_is_copied_before_its_slots_are_free(make_rig: MakeRig) -> None:
    # On the CPU nothing orders the copy before the next forward's writes but the spill itself. Large enough
    # for a copy that nobody waits for to be seen.
    rig = make_rig(
        dtype=torch.float32,
        policy=WritePolicy.WRITE_BACK,
        num_pages=1600,
        num_layers=32,
        num_cpu_blocks=800,
        copy_threads=1,
    )
    tokens = sequence(1, 700)
    expected = rig.insert(tokens, seed=1)
    running = []
    spill = rig.cache.linker.spill_node

    def spill_and_look(node_id: int) -> None:
        spill(node_id)
        running.append(rig.engine.num_running)

    with mock.patch.object(rig.cache.linker, "spill_node", spill_and_look):
        rig.cache.evict(EvictParams(num_tokens=len(tokens)))
    assert running == [0]
    rig.scribble()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize("before", ["a forward", "loads"])
@pytest.mark.parametrize("overlap", [True, False])
def test_on_a_gpu_the_forwards_stream_waits_for_a_spill(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, overlap: bool, before: str
) -> None:
    """The linker's side of it; what streams do is in tests/unit/test_cuda_path.py."""
    rig = make_rig(policy=WritePolicy.WRITE_BACK)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    told = []

    class Gate(_core.LayerGate):
        def stream_wait(self, layer: int, stream: int, timeout_s: float) -> bool:
            told.append((layer, stream))
            return super().stream_wait(layer, stream, timeout_s)  # which the host does, for a pool on the CPU

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    rig.linker.attach_scheduler(
        SimpleNamespace(enable_overlap=overlap, forward_stream=SimpleNamespace(cuda_stream=77))
    )
    with (
        mock.patch.object(rig.linker, "on_gpu", True),
        mock.patch.object(rig.linker, "record_offload_ready", list),
        mock.patch.object(rig.engine, "make_gate", Gate),
        mock.patch.object(rig.engine, "wait", side_effect=AssertionError("the host waits")),
    ):
        rig.settle()
        rig.cache.evict(EvictParams(num_tokens=rig.cache.full_evictable_size()))
        assert not told  # eviction waits for nothing
        if before == "loads":
            rig.linker.start_layer_wise_loading()
        else:
            rig.linker.layer_done_counter.set_consumer(-1)
    assert told == [(0, 77 if overlap else 5)]
    rig.scribble()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize("generates", [True, False], ids=["generates", "embeds"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_forwards_run_on_the_stream_that_the_linker_was_told(
    make_rig: MakeRig, overlap: bool, generates: bool
) -> None:
    """SGLang decides where forwards run: its own run_batch, over stand-ins for all that it calls."""
    schedules, forwards = mock.MagicMock(), mock.MagicMock()
    current = [schedules]
    ran_on: list[Any] = []

    @contextmanager
    def on_forward_stream() -> Iterator[None]:
        current.append(forwards)
        yield
        current.pop()

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        ran_on.append(current[-1])
        return mock.MagicMock() if generates else (mock.MagicMock(), False)

    scheduler = mock.MagicMock(
        enable_overlap=overlap,
        is_generation=generates,
        forward_stream=forwards,
        forward_stream_ctx=on_forward_stream(),
        forward_sleep_time=None,
        enable_pdmux=False,
        enable_unified_memory=False,
        enable_unified_cache_external_linker=False,
        forward_ct=0,
        processed_tokens_counter=0,
    )
    scheduler.model_worker.forward_batch_generation.side_effect = forward
    scheduler.tp_worker.forward_batch_embedding.side_effect = forward
    batch = mock.MagicMock(extend_num_tokens=0, return_logprob=False, return_hidden_states=False)
    batch.forward_mode.is_prebuilt.return_value = False
    batch.forward_mode.is_split_prefill.return_value = False
    with (
        mock.patch("sglang.srt.managers.scheduler.resolve_forward_inputs"),
        mock.patch("sglang.srt.managers.scheduler.EmbeddingBatchResult"),
    ):
        Scheduler.run_batch(scheduler, batch)
    linker = make_rig().linker
    linker.attach_scheduler(scheduler)
    assert ran_on == [linker.forward_stream or schedules]


def test_a_node_stays_on_the_device_until_its_copy_is_done(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    # However fast the copy is, the tree has not been told yet.
    assert rig.cache.evict(EvictParams(num_tokens=PAGES * PAGE)).num_tokens_evicted == 0
    assert rig.cache.has_pending_cache_operations()
    rig.settle()
    assert rig.cache.evict(EvictParams(num_tokens=PAGES * PAGE)).num_tokens_evicted == PAGES * PAGE


def test_a_scheduler_that_wants_to_be_idle_waits_for_no_step(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    assert rig.cache.has_pending_cache_operations()
    rig.cache.settle(SimpleNamespace(waiting_queue=[]))  # before a flush, before memory is released
    assert not rig.cache.has_pending_cache_operations()
    assert rig.cache.evict(EvictParams(num_tokens=PAGES * PAGE)).num_tokens_evicted == PAGES * PAGE
    assert rig.stats("CPU")["ready"] == PAGES


# ---- who may share ----


def test_tenants_and_adapters_never_share_a_block(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    owners: list[dict[str, str]] = [
        {},
        {"extra_key": "lora-a"},
        {"cache_salt": "lora-a"},  # the same text in the other field is another owner
        {"cache_salt": "tenant-b"},
        {"extra_key": "lora-a", "cache_salt": "tenant-b"},
    ]
    expected = [rig.insert(tokens, seed, **owner) for seed, owner in enumerate(owners)]
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == len(owners) * PAGES

    for stranger in ({"extra_key": "lora-c"}, {"cache_salt": "tenant-c"}, {"extra_key": "tenant-b"}):
        req = rig.request(tokens, **stranger)
        assert rig.match(req).host_hit_length == 0
        rig.abort(req)
    for owner, bytes_ in zip(owners, expected, strict=True):
        req = rig.request(tokens, **owner)
        (slots,) = rig.restore(req)
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)


def test_another_model_does_not_find_the_same_pages(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    hashes = page_hashes(rig, sequence(1))
    held = rig.engine.match(keys_from_page_hashes(hashes, rig.linker.namespace)).num_blocks
    assert held == PAGES
    other = make_namespace({"model": "another"})
    assert rig.engine.match(keys_from_page_hashes(hashes, other)).num_blocks == 0


# ---- requests that do not go the whole way ----


def test_matching_again_and_again_pins_once(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    for _ in range(3):
        assert rig.match(req).host_hit_length == PAGES * PAGE
        assert rig.stats("CPU")["pinned"] == PAGES
    rig.abort(req)


def test_an_abort_between_match_and_load_unpins(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    rig.match(req)
    assert rig.stats("CPU")["pinned"] == PAGES
    rig.abort(req)
    assert rig.stats("CPU")["pinned"] == 0
    assert rig.stats("CPU")["ready"] == PAGES


def test_a_match_that_the_device_answers_lets_go_of_the_promise(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    rig.insert(tokens, seed=2)  # somebody else computed it while this request waited
    match = rig.match(req)
    assert (match.device_prefix_len, match.host_hit_length) == (PAGES * PAGE, 0)
    assert rig.stats("CPU")["pinned"] == 0
    assert not rig.cache.linker.has_hit(name_of(req))
    rig.settle()
    rig.abort(req)


@pytest.mark.parametrize("end", ["released", "kept by a session"])
def test_a_request_that_has_ended_leaves_no_notes(
    make_rig: MakeRig, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found or not found: a server that runs for months sees many of them, and ids may come again."""
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    for req in (rig.request(tokens), rig.request(sequence(7000))):
        rig.match(req)
        assert rig.linker._lookups
        with pytest.raises(AssertionError, match="left"):
            rig.linker.check_idle()
        if end == "released":
            rig.cache.on_release(req, checkpointed=True)
        else:
            monkeypatch.setattr(UnifiedRadixCache, "claim_kv_row", lambda cache, req: True)
            assert rig.cache.claim_kv_row(req)
        rig.linker.check_idle()


def test_a_cancelled_load_writes_nothing_and_gives_everything_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    slots = rig.admit(req)
    assert len(slots) == PAGES * PAGE
    untouched = rig.read(slots)
    rig.abort(req, slots)
    assert rig.start_batch() == -1
    assert rig.engine.drain(TIMEOUT_S)
    assert_same(rig.read(slots), untouched)
    assert rig.stats("CPU")["pinned"] == 0


def test_one_cancelled_load_does_not_stop_the_others_of_its_batch(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = sequence(1), sequence(5000)
    rig.insert(first, seed=1)
    expected = rig.insert(second, seed=2)
    rig.evict_all()
    aborted, kept = rig.request(first), rig.request(second)
    aborted_slots, kept_slots = rig.admit(aborted), rig.admit(kept)
    untouched = rig.read(aborted_slots)
    rig.abort(aborted, aborted_slots)
    rig.start_batch()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads([kept])
    assert_same(rig.read(kept_slots), expected)
    assert_same(rig.read(aborted_slots), untouched)
    rig.finish(kept, kept_slots)


def test_a_promise_survives_pressure_on_the_cpu_tier(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    for number in range(1, 6):
        rig.insert(sequence(number * 10000), seed=number)
        rig.evict_all()
    assert rig.stats("CPU")["evicted"] > 0
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_what_the_cpu_tier_had_to_forget_is_a_miss(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    expected = {}
    for number in range(1, 6):
        expected[number] = rig.insert(sequence(number * 10000), seed=number)
        rig.evict_all()
    hits = {}
    for number, bytes_ in expected.items():
        req = rig.request(sequence(number * 10000))
        (slots,) = rig.restore(req)
        hits[number] = len(slots) // PAGE
        assert_same(rig.read(slots), cut(bytes_, 0, len(slots)))
        rig.finish(req, slots)
    assert hits == {1: 0, 2: 0, 3: 0, 4: PAGES, 5: PAGES}


def test_a_full_tier_refuses_and_the_tree_offers_the_node_again(make_rig: MakeRig) -> None:
    rig = make_rig(num_cpu_blocks=PAGES)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    pinning = rig.request(sequence(1))
    rig.match(pinning)
    tokens = sequence(5000)
    expected = rig.insert(tokens, seed=2)
    rig.settle()
    assert rig.stats("CPU")["ready"] == PAGES  # still the first sequence: it is promised
    rig.abort(pinning)
    rig.insert(tokens, seed=3)  # the next use
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def admit_with_a_broken_promise(rig: Rig, req: Req) -> torch.Tensor:
    """Admits a request whose blocks went away after its match. No lease allows that; it stands for the day
    one fails, and for a rank that lost its blocks where the others did not."""
    match = rig.match(req)
    rig.linker.release_hold(name_of(req))
    invalidate_cpu_tier(rig)
    return rig.admit(req, match)


def test_a_broken_promise_is_recomputed(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    free = rig.allocator.available_size()
    assert len(admit_with_a_broken_promise(rig, req)) == 0
    assert rig.allocator.available_size() == free
    rig.abort(req)


@pytest.mark.parametrize("with_another", [False, True], ids=["alone", "beside_a_good_load"])
def test_a_rank_that_cannot_load_what_the_others_load_fails_that_load_and_blocks_nobody(
    make_rig: MakeRig, with_another: bool
) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    slots = admit_with_a_broken_promise(rig, req)
    assert len(slots) == PAGES * PAGE  # the other ranks load, so this one goes along
    reqs = [req]
    if with_another:
        expected = rig.insert(sequence(5000), seed=2)
        rig.evict_all()
        other = rig.request(sequence(5000))
        other_slots = rig.admit(other)
        reqs.append(other)
    rig.start_batch()
    # Nobody opens the gate for it: a forward that waited for that would wait for every layer's time-out.
    forward = threading.Thread(target=rig.forward, daemon=True)
    forward.start()
    forward.join(TIMEOUT_S)
    assert not forward.is_alive()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, req)
    assert rig.match(req).host_hit_length == 0  # and computes everything
    rig.abort(req, slots)
    if with_another:
        check_landed(rig, other, other_slots, expected)


def check_runs_again(rig: Rig, *reqs: Req) -> None:
    """That these requests run again, and no others."""
    assert len(rig.cache.failed_loads) == rig.linker.metrics.total["failed"] == len(reqs)
    assert all(req.discard_output_reason and req.skip_radix_cache_insert for req in reqs)
    for req in reqs:
        rig.cache.on_release(req, checkpointed=False)  # its memory; that it loads nothing more is remembered
    rig.cache.failed_loads.clear()


def check_landed(rig: Rig, req: Req, slots: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """That a request has what was stored, and goes on as if it were alone."""
    assert not req.discard_output_reason
    assert not req.skip_radix_cache_insert
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_load_that_fails_on_another_rank_fails_here_and_no_other_does(
    make_rig: MakeRig, failing: int
) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(10000 * n, n) for n in (1, 2, 3)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    rig.start_batch()
    rig.forward()

    def with_another_rank(verdicts: torch.Tensor, op: Any) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        assert verdicts.tolist() == [1, 1, 1]
        verdicts[failing] = 0

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", with_another_rank):
        assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, reqs[failing])
    for i, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if i == failing:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[i])


def test_a_forward_that_went_on_without_a_layer_is_nobodys(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What landed after that may have been read before it did."""
    monkeypatch.setattr("sglang_flexkv.integration.layer_counter._LAYER_TIMEOUT_S", 0.2)
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    for seed, tokens in enumerate(prompts):
        rig.insert(tokens, seed)
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    held_back: list[Callable[[], None]] = []
    launch = rig.engine.launch

    def hold_the_second_back(task: Any, *args: Any, **kwargs: Any) -> None:
        if held_back or rig.engine.num_running:
            held_back.append(lambda: launch(task, *args, **kwargs))
        else:
            launch(task, *args, **kwargs)

    with mock.patch.object(rig.engine, "launch", hold_the_second_back):
        rig.start_batch()
    assert len(held_back) == 1
    rig.forward()
    held_back[0]()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, *reqs)
    for req, slots in zip(reqs, all_slots, strict=True):
        rig.abort(req, slots)


def test_what_cannot_run_again_is_left_to_sglang(make_rig: MakeRig) -> None:
    rig = make_rig(single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    slots = admit_with_a_broken_promise(rig, req)
    req.beam_group = mock.Mock()
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == [req]
    assert len(rig.cache.failed_loads) == 0
    rig.abort(req, slots)


def test_pressure_takes_the_end_of_a_conversation_before_its_start(make_rig: MakeRig) -> None:
    # The start is the older part, so plain LRU would take it and leave an end that nobody can reach.
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    start = sequence(1)
    rig.insert(start, seed=1)
    rig.insert(start + sequence(5000), seed=2)
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == 2 * PAGES
    rig.insert(sequence(9000, PAGES - 1), seed=3)
    rig.evict_all()
    req = rig.request(start + sequence(5000))
    assert rig.match(req).host_hit_length == (PAGES + 1) * PAGE
    rig.abort(req)


# ---- several loads in one batch, layer by layer ----


def test_every_load_of_a_batch_is_waited_for(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(10000 * n, n) for n in (1, 3, 6, 2)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = rig.restore(*reqs)
    for req, slots, bytes_ in zip(reqs, all_slots, expected, strict=True):
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)


def test_a_forward_waits_for_a_load_that_has_not_begun(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    slots = rig.admit(req)
    held_back: list[Callable[[], None]] = []
    launch = rig.engine.launch

    def hold_back(*args: Any, **kwargs: Any) -> None:
        held_back.append(lambda: launch(*args, **kwargs))

    with mock.patch.object(rig.engine, "launch", hold_back):
        rig.start_batch()
    seen: list[list[torch.Tensor]] = []
    forward = threading.Thread(target=lambda: seen.append(rig.read_layer(0, slots)), daemon=True)
    forward.start()
    forward.join(0.3)
    assert forward.is_alive()
    for start in held_back:
        start()
    forward.join(TIMEOUT_S)
    assert_same(seen[0], expected[: rig.buffers_per_layer])
    assert not rig.cache.finish_external_linker_loads([req])
    rig.finish(req, slots)


def test_a_gate_waits_for_the_second_load_even_if_the_first_has_landed_before_it(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = sequence(1), sequence(5000)
    for seed, tokens in enumerate((first, second)):
        rig.insert(tokens, seed)
    rig.evict_all()
    reqs = [rig.request(first), rig.request(second)]
    slots = [rig.admit(req) for req in reqs]
    open_before_launch = []
    launch = rig.engine.launch

    def launch_when_the_last_one_has_landed(*args: Any, gate: _core.LayerGate, **kwargs: Any) -> None:
        assert rig.engine.drain(TIMEOUT_S)
        open_before_launch.append(gate.open_layers)
        launch(*args, gate=gate, **kwargs)

    with mock.patch.object(rig.engine, "launch", launch_when_the_last_one_has_landed):
        rig.start_batch()
    assert open_before_launch == [0, 0]
    rig.forward()
    assert not rig.cache.finish_external_linker_loads(reqs)
    for req, own in zip(reqs, slots, strict=True):
        rig.finish(req, own)


def test_batches_that_overlap_have_gates_of_their_own(make_rig: MakeRig) -> None:
    # SGLang finishes one batch's loads before it starts the next one's; pipelines of batches would not.
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    loads = []
    for tokens in prompts:
        req = rig.request(tokens)
        loads.append((req, rig.admit(req), rig.linker.start_layer_wise_loading()))
    assert loads[0][2] != loads[1][2]
    for (req, slots, index), bytes_ in zip(loads, expected, strict=True):
        rig.linker.layer_done_counter.set_consumer(index)
        rig.forward()
        assert_same(rig.read(slots), bytes_)
        assert rig.linker.finish_layer_wise_loading(index) == {name_of(req)}
        rig.cache.linker.private_load_indices.pop(name_of(req))
        rig.cache.linker.inflight_load_rids.remove(name_of(req))
        rig.finish(req, slots)


def test_the_first_layer_is_usable_while_later_ones_are_still_copied(make_rig: MakeRig) -> None:
    num_layers = 32
    rig = make_rig(
        dtype=torch.float32, num_pages=1600, num_layers=num_layers, num_cpu_blocks=800, copy_threads=1
    )
    tokens = sequence(1, 700)
    expected = rig.insert(tokens, seed=1)
    overlapped = False
    # One look is enough; a machine that is busy with other things may make us look too late.
    for _ in range(20):
        rig.evict_all()
        req = rig.request(tokens)
        slots = rig.admit(req)
        index = rig.start_batch()
        gate = rig.linker.layer_done_counter._gates[index]
        first_layer = rig.read_layer(0, slots)
        open_layers = gate.open_layers
        assert open_layers >= 1
        assert_same(first_layer, expected[: rig.buffers_per_layer])
        rig.forward()
        assert gate.open_layers == num_layers
        assert_same(rig.read(slots), expected)
        assert not rig.cache.finish_external_linker_loads([req])
        rig.finish(req, slots)
        if open_layers < num_layers:
            overlapped = True
            break
    assert overlapped


# ---- two requests with the same id: each of several tokenizer workers knows its own only ----


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_requests_of_one_id_load_side_by_side(make_rig: MakeRig, failing: int | None) -> None:
    rig = make_rig()
    prompts = [sequence(1), sequence(5000, PAGES - 1)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    matches = [rig.match(req) for req in reqs]
    all_slots = [rig.admit(req, match) for req, match in zip(reqs, matches, strict=True)]
    assert [len(slots) for slots in all_slots] == [len(tokens) for tokens in prompts]
    assert [req.rid for req in reqs] == ["same", "same"]  # what the client knows them by
    rig.start_batch()
    rig.forward()

    def with_another_rank(verdicts: torch.Tensor, op: Any) -> None:
        assert verdicts.tolist() == [1, 1]
        if failing is not None:
            verdicts[failing] = 0

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", with_another_rank):
        assert rig.cache.finish_external_linker_loads(reqs) == []
    if failing is not None:
        check_runs_again(rig, reqs[failing])
    for number, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if number == failing:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[number])


@pytest.mark.parametrize("aborted", [0, 1])
@pytest.mark.parametrize("when", ["promised", "queued"])
def test_the_end_of_one_request_is_not_that_of_another_with_its_id(
    make_rig: MakeRig, aborted: int, when: str
) -> None:
    rig = make_rig()
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    matches = [rig.match(req) for req in reqs]
    stays = 1 - aborted
    if when == "queued":
        all_slots = [rig.admit(req, match) for req, match in zip(reqs, matches, strict=True)]
        rig.abort(reqs[aborted], all_slots[aborted])
        slots = all_slots[stays]
    else:
        rig.cache.finish(reqs[aborted].cache_request_handle, CacheRequestOutcome.ABORT)
        slots = rig.admit(reqs[stays], matches[stays])
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([reqs[stays]]) == []
    check_landed(rig, reqs[stays], slots, expected[stays])


def test_an_id_may_look_like_the_name_of_another_request(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req = rig.request(tokens)
    match = rig.match(req)
    refused = rig.request(tokens, rid=name_of(req))  # before it was matched, by a limit of the queue
    rig.cache.finish(refused.cache_request_handle, CacheRequestOutcome.ABORT)
    slots = rig.admit(req, match)
    assert len(slots) == len(tokens)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == []
    check_landed(rig, req, slots, expected)


def test_requests_of_one_id_wait_for_ssd_each_for_itself(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    prompts = [sequence(1), sequence(5000)]
    for tokens in prompts:
        store_on_ssd_alone(rig, tokens)
    reqs = [rig.request(tokens, rid="same") for tokens in prompts]
    for req in reqs:
        prefetch(rig, req)
    assert len(rig.cache._waiting) == 2
    rig.abort(reqs[0])
    assert len(rig.cache._waiting) == 1
    wait_until_ready(rig, reqs[1])
    (slots,) = rig.restore(reqs[1])
    assert len(slots) == len(prompts[1])
    rig.finish(reqs[1], slots)


def test_an_id_that_comes_again_starts_anew(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=64)
    prompts = [sequence(1), sequence(5000)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    for tokens, bytes_ in zip(prompts * 2, expected * 2, strict=True):
        req = rig.request(tokens, rid="same")
        (slots,) = rig.restore(req)
        assert_same(rig.read(slots), bytes_)
        rig.finish(req, slots)
        rig.evict_all()


# ---- SSD ----


def prefetch(rig: Rig, req: Req) -> None:
    """What the scheduler does when a request enters its queue."""
    match = rig.match(req)
    hit = match.device_prefix_len + match.host_hit_length
    rig.cache.prefetch_from_storage(
        req.cache_request_handle, match.last_host_node, [], matched_prefix_tokens=req.origin_input_ids[:hit]
    )


def wait_until_ready(rig: Rig, req: Req) -> None:
    while not rig.cache.check_prefetch_progress(req.cache_request_handle):
        assert rig.engine.drain(TIMEOUT_S)


def test_what_only_ssd_holds_comes_back_through_prefetch(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    assert (rig.stats("CPU")["ready"], rig.stats("SSD")["ready"]) == (0, PAGES)

    req = rig.request(tokens)
    prefetch(rig, req)
    assert rig.cache.has_pending_cache_operations()
    wait_until_ready(rig, req)
    assert rig.cache.pop_prefetch_loaded_tokens(req.cache_request_handle) == PAGES * PAGE
    # What has arrived is the request's until it is loaded.
    assert rig.stats("CPU")["pinned"] == PAGES
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_only_the_part_that_the_cpu_tier_lost_is_read_from_ssd(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, PAGES - 1)

    req = rig.request(tokens)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    prefetch(rig, req)
    wait_until_ready(rig, req)
    assert rig.cache.pop_prefetch_loaded_span(req.cache_request_handle) == (PAGE, (PAGES - 1) * PAGE)
    (slots,) = rig.restore(req)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


# ---- SSD under the forward ----


def forget_in_memory(rig: Rig, tokens: list[int], first_page: int) -> None:
    """The CPU tier loses the pages from this one on, which SSD holds as well."""
    invalidate_cpu_tier(rig)
    kept = keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace)[:first_page]
    task = rig.engine.start_prefetch(kept)
    if task is not None:
        assert rig.engine.wait([task], TIMEOUT_S)
        rig.engine.forget(task)


def store_on_ssd_alone(rig: Rig, tokens: list[int]) -> None:
    rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)


@pytest.mark.parametrize("in_memory", range(PAGES), ids=lambda n: f"{n}_pages_in_memory")
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_what_ssd_holds_is_read_under_the_forward(
    make_rig: MakeRig, tmp_path: Path, kind: str, in_memory: int
) -> None:
    rig = make_rig(kind, torch.bfloat16, 64, num_pages=12, ssd_dir=tmp_path)
    tokens = sequence(1, page_size=64)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, in_memory)

    req = rig.request(tokens)
    slots = rig.admit(req)
    assert len(slots) == len(tokens)
    # What the response will say about where its tokens came from.
    assert (req.storage_hit_start, req.storage_hit_length) == (in_memory * 64, (PAGES - in_memory) * 64)
    rig.start_batch()
    for layer in range(rig.pool.layer_num):
        rows = rig.read_layer(layer, slots)
        assert_same(rows, expected[layer * rig.buffers_per_layer : (layer + 1) * rig.buffers_per_layer])
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert rig.stats("DISK2H")["layers_per_read"] > 0
    assert rig.stats("CPU")["ready"] == PAGES  # in memory again
    assert rig.linker.metrics.total["loaded ssd"] == (PAGES - in_memory) * 64
    assert rig.linker.metrics.total["loaded cpu"] == in_memory * 64
    rig.finish(req, slots)


def test_a_block_that_is_damaged_on_ssd_is_not_used_and_not_looked_for_again(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(_core.SSD_SLOTS_OFFSET)
        file.write(bytes(rig.engine.slot_bytes))
    req = rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert len(rig.cache.failed_loads) == 1
    rig.cache.failed_loads.clear()
    rig.abort(req, slots)
    assert rig.stats("SSD")["ready"] < PAGES
    # Another request has what is left.
    again = rig.request(tokens)
    assert rig.match(again).host_hit_length < PAGES * PAGE
    rig.abort(again)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_of_a_batch_only_the_request_whose_blocks_are_damaged_runs_again(
    make_rig: MakeRig, tmp_path: Path, damaged: int
) -> None:
    rig = make_rig(ssd_dir=tmp_path, num_pages=64)
    prompts = [sequence(10000 * (n + 1)) for n in range(3)]
    expected = [rig.insert(tokens, seed) for seed, tokens in enumerate(prompts)]
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    second_page = b"".join(rows.numpy().tobytes() for rows in cut(expected[damaged], PAGE, 2 * PAGE))
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(slots_file.read_bytes().index(second_page))
        file.write(bytes(64))
    reqs = [rig.request(tokens) for tokens in prompts]
    all_slots = [rig.admit(req) for req in reqs]
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads(reqs) == []
    check_runs_again(rig, reqs[damaged])
    assert rig.linker.metrics.total["loaded ssd"] == 2 * PAGES * PAGE  # those of the others
    for i, (req, slots) in enumerate(zip(reqs, all_slots, strict=True)):
        if i == damaged:
            rig.abort(req, slots)
        else:
            check_landed(rig, req, slots, expected[i])


def test_a_disk_that_hangs_is_noticed_while_a_forward_waits(
    make_rig: MakeRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_flexkv.ssdtier._STALL_S", 0.3)
    disk = _core.FaultyDisk(1)
    rig = make_rig(ssd_dir=tmp_path, disk=disk)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    disk.set_fault("read", 1.0, delay_s=5.0)
    req = rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    started_s = time.monotonic()
    rig.forward()
    assert time.monotonic() - started_s < 4.0
    assert rig.cache.finish_external_linker_loads([req]) == []
    assert len(rig.cache.failed_loads) == 1
    rig.cache.failed_loads.clear()
    rig.abort(req, slots)
    disk.clear_faults()
    while rig.engine.num_running:
        rig.engine.poll()


@pytest.mark.parametrize(
    ("queued", "chunked", "running", "reads_hide", "waits"),
    [
        (False, False, "none", False, False),  # alone: nobody stands still while it waits for the disk
        (False, False, "ended", False, False),
        (False, False, "some", False, True),
        (False, False, "prefilled", False, True),  # and will decode from now on
        (False, False, "some", True, False),  # its own computing takes longer than the read
        (True, False, "none", True, True),  # it has to wait for others anyway
        (False, True, "none", True, True),
    ],
)
def test_who_waits_for_ssd_in_the_queue(
    make_rig: MakeRig,
    tmp_path: Path,
    queued: bool,
    chunked: bool,
    running: str,
    reads_hide: bool,
    waits: bool,
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    req = rig.request(tokens + sequence(7000))
    rig.cache.attach_scheduler(
        SimpleNamespace(
            waiting_queue=[req] if queued else [],
            chunked_req=req if chunked else None,
            running_batch=SimpleNamespace(is_empty=lambda: running != "some"),
            last_batch=None
            if running == "none"
            else SimpleNamespace(reqs=[SimpleNamespace(finished=lambda: running == "ended")]),
            enable_priority_preemption=False,
            is_mixed_chunk=False,
            enable_overlap=False,
            chunked_prefill_size=PAGE,
            _engine_paused=False,
        )
    )
    costs = rig.linker.load_or_recompute
    for i in range(1, 10):
        costs.prefill.observe([(0, 1000)], 10.0 if reads_hide else 1e-9)
        costs.from_ssd.observe(i * 1e9, float(i))
    prefetch(rig, req)
    assert bool(rig.cache._waiting) is waits
    rig.abort(req)


# ---- reads that several requests wait for ----


def may_run(rig: Rig, req: Req) -> bool:
    """What the scheduler asks when a request's turn comes."""
    return rig.cache.check_prefetch_progress(req.cache_request_handle)


def end_both(rig: Rig, first: Req, slots: torch.Tensor, second: Req) -> None:
    """The first, which was admitted, loads; then neither is wanted any more."""
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    rig.abort(first, slots)
    rig.abort(second)


def nobody_else() -> SimpleNamespace:
    """A scheduler with nothing to do."""
    return SimpleNamespace(
        waiting_queue=[],
        chunked_req=None,
        running_batch=SimpleNamespace(is_empty=lambda: True, reqs=[]),
        last_batch=None,
        enable_priority_preemption=False,
        is_mixed_chunk=False,
        enable_overlap=False,
        chunked_prefill_size=PAGE,
        _engine_paused=False,
    )


@contextmanager
def reads_do_not_end(rig: Rig) -> Iterator[None]:
    """Their outcome is kept from the engine."""
    with mock.patch.object(TransferEngine, "poll", return_value=[]):
        yield


@pytest.mark.parametrize("in_memory", [0, 1], ids=lambda n: f"{n}_pages_in_memory")
def test_of_one_batch_only_the_first_reads_what_several_want(
    make_rig: MakeRig, tmp_path: Path, in_memory: int
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    forget_in_memory(rig, tokens, in_memory)
    reads = rig.stats("DISK2H")["ops_done"]
    first, second = rig.request(tokens), rig.request(tokens + sequence(7000))
    for req in (first, second):
        assert rig.match(req).host_hit_length == len(tokens)
        assert may_run(rig, req)
    first_slots = rig.admit(first)
    assert not may_run(rig, second)  # it will read nothing: the other one's load does
    assert rig.cache.has_pending_cache_operations()
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    assert rig.linker.metrics.total["loaded ssd"] == (PAGES - in_memory) * PAGE
    (slots,) = rig.restore(second)
    assert len(slots) == len(tokens)
    assert_same(rig.read(slots), expected)
    assert rig.stats("DISK2H")["ops_done"] == reads + 1
    assert rig.linker.metrics.total["loaded cpu"] == (PAGES + in_memory) * PAGE
    rig.abort(first, first_slots)
    rig.finish(second, slots)


def test_who_comes_while_a_load_reads_waits_even_if_nobody_else_does(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.cache.attach_scheduler(nobody_else())
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    prefetch(rig, first)
    assert may_run(rig, first)
    first_slots = rig.admit(first)
    with reads_do_not_end(rig):
        rig.start_batch()
        prefetch(rig, second)
        for _ in range(3):
            assert not may_run(rig, second)
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    assert rig.match(second).host_hit_length == len(tokens)
    assert rig.stats("CPU")["pinned"] == PAGES
    # It did not bring them, so it does not say so.
    assert rig.cache.pop_prefetch_loaded_tokens(second.cache_request_handle) == 0
    rig.abort(first, first_slots)
    rig.abort(second)


@pytest.mark.parametrize("owner_leaves", [False, True])
def test_a_prefetch_serves_all_who_want_it(make_rig: MakeRig, tmp_path: Path, owner_leaves: bool) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    # The first of all would have read under its forward, had the others not come before its turn.
    alone, owner, another = rig.request(tokens), rig.request(tokens), rig.request(tokens)
    rig.match(alone)
    with reads_do_not_end(rig):
        prefetch(rig, owner)
        prefetch(rig, another)
        assert not may_run(rig, alone)
        assert not may_run(rig, another)
        if owner_leaves:
            rig.abort(owner)
            assert not may_run(rig, another)  # the read goes on by itself
    waiting = [alone, another] if owner_leaves else [alone, owner, another]
    for req in waiting:
        wait_until_ready(rig, req)
    assert rig.stats("DISK2H")["ops_done"] == 1
    for req in waiting:
        (slots,) = rig.restore(req)
        assert_same(rig.read(slots), expected)
        rig.finish(req, slots)
        rig.evict_all()


def test_what_the_others_read_leaves_is_prefetched_next(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    shared, tail = sequence(1), sequence(5000)
    expected = rig.insert(shared + tail, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    first, second = rig.request(shared), rig.request(shared + tail)
    with reads_do_not_end(rig):
        prefetch(rig, first)
        assert not may_run(rig, first)
        prefetch(rig, second)
        assert not may_run(rig, second)
    wait_until_ready(rig, second)
    assert rig.stats("DISK2H")["ops_done"] == 2
    assert rig.cache.pop_prefetch_loaded_span(second.cache_request_handle) == (len(tail), len(shared))
    (slots,) = rig.restore(second)
    assert_same(rig.read(slots), expected)
    rig.finish(second, slots)
    wait_until_ready(rig, first)
    rig.abort(first)


def test_who_runs_alone_reads_what_is_left_under_its_forward(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.cache.attach_scheduler(nobody_else())
    shared, tail = sequence(1), sequence(5000)
    store_on_ssd_alone(rig, shared + tail)
    first, second = rig.request(shared), rig.request(shared + tail)
    first_slots = rig.admit(first)
    rig.match(second)
    assert not may_run(rig, second)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert may_run(rig, second)
    assert rig.match(second).host_hit_length == 2 * PAGES * PAGE
    assert rig.stats("DISK2H")["ops_done"] == 1
    rig.abort(first, first_slots)
    rig.abort(second)


def test_who_waits_for_a_read_that_fails_computes(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    (slots_file,) = tmp_path.glob("*.slots")
    with slots_file.open("r+b") as file:
        file.seek(_core.SSD_SLOTS_OFFSET)
        file.write(bytes(rig.engine.slot_bytes))
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert not may_run(rig, second)
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert len(rig.cache.failed_loads) == 1
    rig.cache.failed_loads.clear()
    assert may_run(rig, second)
    assert rig.match(second).host_hit_length < len(tokens)
    assert not rig.linker.may_wait(name_of(first), None)  # the one that failed loads nothing any more
    rig.abort(first, slots)
    rig.abort(second)


def test_who_waits_for_a_load_that_is_cancelled_reads_itself(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert not may_run(rig, second)
    rig.abort(first, slots)
    wait_until_ready(rig, second)
    assert rig.cache.pop_prefetch_loaded_tokens(second.cache_request_handle) == len(tokens)
    rig.abort(second)


@pytest.mark.parametrize(
    ("policy", "timeout_s", "waits"),
    [
        (PrefetchPolicy.BEST_EFFORT, 0.0, [True]),
        (PrefetchPolicy.TIMEOUT, 0.0, [False, True]),
        (PrefetchPolicy.TIMEOUT, TIMEOUT_S, [False, False, False]),
        (PrefetchPolicy.WAIT_COMPLETE, 0.0, [False, False, False]),
    ],
)
def test_how_long_a_request_waits_for_others_is_the_policys_choice(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy, timeout_s: float, waits: list[bool]
) -> None:
    rig = make_rig(ssd_dir=tmp_path, prefetch_policy=policy)
    rig.linker.config = rig.linker.config.model_copy(update={"prefetch_timeout_s": timeout_s})
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    assert [may_run(rig, second) for _ in waits] == waits
    end_both(rig, first, slots, second)


def test_nobody_waits_for_others_for_ever(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    req = rig.request(tokens)
    rig.match(req)
    # Whenever its turn comes somebody has just read it again, and it is gone again.
    ended = rig.engine.create_get(keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace))
    rig.engine.cancel(ended)
    rig.engine.forget(ended)
    rig.cache.reads_may_run = True
    with (
        mock.patch.object(rig.linker, "read_to_join", return_value=ended),
        mock.patch.object(rig.engine, "start_prefetch", return_value=None),
    ):
        turns = [may_run(rig, req) for _ in range(20)]
    assert turns[0] is False
    assert turns[-1] is True
    rig.abort(req)
    assert not rig.linker._waits


def test_nobody_waits_for_what_is_computed_faster(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path, load_policy=LoadPolicy.AUTO)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    first, second = rig.request(tokens), rig.request(tokens)
    rig.match(second)
    slots = rig.admit(first)
    costs = rig.linker.load_or_recompute
    for i in range(1, 10):
        costs.prefill.observe([(0, 1000)], 1e-6)
        costs.from_ssd.observe(i * 1.0, float(i))
    assert may_run(rig, second)
    end_both(rig, first, slots, second)


def test_a_flush_leaves_nothing_to_wait_for(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    tokens = sequence(1)
    store_on_ssd_alone(rig, tokens)
    key = keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace)[0]
    req = rig.request(tokens)
    with reads_do_not_end(rig):
        prefetch(rig, req)
        assert rig.engine.find_read(key) is not None
        rig.abort(req)
        assert rig.engine.find_read(key) is not None
        rig.engine.clear()
        assert rig.engine.find_read(key) is None


def test_ranks_wait_for_others_together(make_rig: MakeRig, tmp_path: Path) -> None:
    """A read that one rank has to wait for, and this one has not, or not any more."""
    rig = make_rig(ssd_dir=tmp_path, single_rank=False)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    rig.cache.reads_may_run = True
    req = rig.request(sequence(1))
    rig.match(req)

    def another_rank_reads(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MAX
        tensor.fill_(1)

    def another_rank_is_not_ready(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        tensor.fill_(0)

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", another_rank_reads):
        assert not may_run(rig, req)
    assert rig.stats("CPU")["pinned"] == PAGES  # what it found stays its own
    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", another_rank_is_not_ready):
        assert not may_run(rig, req)
    assert may_run(rig, req)
    assert rig.match(req).host_hit_length == PAGES * PAGE
    rig.abort(req)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_ranks_ask_each_other_only_while_one_may_be_reading(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    store_on_ssd_alone(rig, sequence(1))
    first, second = rig.request(sequence(1)), rig.request(sequence(9000))
    rig.match(second)
    ask = partial(may_run, rig, second)
    assert collectives_of(rig, ask) == 0
    slots = rig.admit(first)
    assert collectives_of(rig, ask) == 1
    assert collectives_of(rig, ask) == 1
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([first]) == []
    assert collectives_of(rig, ask) == 1  # which says that nobody reads any more
    assert collectives_of(rig, ask) == 0
    rig.abort(first, slots)
    rig.abort(second)


# ---- load or recompute ----


@pytest.mark.parametrize("policy", LoadPolicy, ids=lambda policy: policy.value)
def test_how_much_is_loaded_can_be_forced(make_rig: MakeRig, policy: LoadPolicy) -> None:
    rig = make_rig(load_policy=policy)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    decision = rig.linker.load_or_recompute
    for _ in range(10):  # computing takes nothing, copying takes for ever
        decision.prefill.observe([(0, 1000)], 1e-6)
        decision.to_device.observe(decision.to_device._bytes + 1, decision.to_device._busy_s + 1.0)
    req = rig.request(sequence(1))
    match = rig.match(req)
    assert match.host_hit_length == (PAGES * PAGE if policy is LoadPolicy.LOAD else 0)
    rig.abort(req)
    held = 0 if policy is LoadPolicy.LOAD else PAGES * PAGE
    assert rig.linker.metrics.total["recomputed"] == held


def test_speeds_are_measured_as_the_server_runs(make_rig: MakeRig) -> None:
    rig = make_rig(num_pages=600, num_layers=8, num_cpu_blocks=600)
    rig.cache.attach_scheduler(nobody_else())
    tokens = sequence(1, 500)
    rig.insert(tokens, seed=1)
    rig.evict_all()
    decision = rig.linker.load_or_recompute
    assert not decision.prefill.known
    for _ in range(5):
        # A batch that loads nothing, of a request that computes everything.
        req = rig.request(sequence(50_000))
        req.prefix_len, req.extend_end = 0, len(req.origin_input_ids)
        rig.start_batch()
        assert rig.cache.finish_external_linker_loads([req]) == []
        # And one that loads: it says nothing about the model.
        req = rig.request(tokens)
        (slots,) = rig.restore(req)
        rig.abort(req, slots)
    assert decision.prefill.known
    assert decision.prefill._fit.num_observed == 5
    assert decision.to_device.bytes_per_s > 0


def test_a_request_without_anything_on_ssd_does_not_wait(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    for tokens in (sequence(1), sequence(5000)):  # in the CPU tier, and nowhere
        req = rig.request(tokens)
        prefetch(rig, req)
        assert not rig.cache._waiting
        assert rig.cache.check_prefetch_progress(req.cache_request_handle)
        rig.abort(req)
    assert rig.stats("DISK2H")["ops_done"] == 0
    assert rig.engine.flush_spills(TIMEOUT_S)


@pytest.mark.parametrize("policy", [PrefetchPolicy.BEST_EFFORT, PrefetchPolicy.WAIT_COMPLETE])
def test_how_long_a_request_waits_for_ssd_is_the_policys_choice(
    make_rig: MakeRig, tmp_path: Path, policy: PrefetchPolicy
) -> None:
    rig = make_rig(ssd_dir=tmp_path, prefetch_policy=policy)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    # A prefetch that does not end by itself: the outcome is kept from the engine.
    with mock.patch.object(TransferEngine, "poll", return_value=[]):
        prefetch(rig, req)
        ready = rig.cache.check_prefetch_progress(req.cache_request_handle)
    assert ready is (policy is PrefetchPolicy.BEST_EFFORT)
    wait_until_ready(rig, req)
    rig.abort(req)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_an_abort_while_ssd_is_read_leaves_nothing(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    prefetch(rig, req)
    rig.abort(req)
    assert not rig.cache._waiting
    rig.settle()
    assert rig.stats("CPU")["pinned"] == 0


# ---- flush ----


def test_a_flush_empties_every_tier_and_ends_everything_under_way(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    for number in range(3):
        rig.insert(sequence(10000 * number), seed=number)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    assert rig.stats("SSD")["ready"] == 3 * PAGES
    promised, queued = rig.request(sequence(0)), rig.request(sequence(10000))
    rig.match(promised)
    slots = rig.admit(queued)
    rig.insert(sequence(50000), seed=7)  # its copy is under way

    rig.cache.unlock(queued.lock)
    rig.cache.reset()
    rig.allocator.clear()

    assert len(slots) == PAGES * PAGE
    for tier in ("CPU", "SSD"):
        stats = rig.stats(tier)
        assert (stats["ready"], stats["writing"], stats["pinned"]) == (0, 0, 0), tier
        assert stats["free"] == stats["slots"], tier
    rig.check_nothing_is_left()
    for start in (0, 10000, 20000, 50000):
        req = rig.request(sequence(start))
        assert rig.match(req).host_hit_length == 0
        rig.abort(req)

    tokens = sequence(0)
    expected = rig.insert(tokens, seed=8)  # and it goes on, with other bytes for the same tokens
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)
    assert rig.engine.flush_spills(TIMEOUT_S)


def test_a_flush_while_a_request_waits_for_ssd_leaves_no_task(make_rig: MakeRig, tmp_path: Path) -> None:
    rig = make_rig(ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)
    req = rig.request(sequence(1))
    prefetch(rig, req)
    task = rig.cache._waiting[req.cache_request_handle].prefetch.task
    assert task is not None
    rig.cache.reset()
    rig.allocator.clear()
    # A flush does not wait for the disk; what the read brings is thrown away.
    assert rig.engine.wait([task], TIMEOUT_S)
    assert task.status in (TaskStatus.COMPLETED, TaskStatus.CANCELLED)
    assert rig.cache.check_prefetch_progress(req.cache_request_handle)
    assert (rig.stats("CPU")["ready"], rig.stats("SSD")["ready"]) == (0, 0)


def test_a_pause_does_not_hold_up_a_flush(make_rig: MakeRig, tmp_path: Path) -> None:
    """SGLang may pause at any time, plans no batches then, and flushes if nothing but its queue is left."""
    rig = make_rig(ssd_dir=tmp_path)
    scheduler = nobody_else()
    rig.cache.attach_scheduler(scheduler)
    store_on_ssd_alone(rig, sequence(1))
    waiting, failed = rig.request(sequence(1)), rig.request(sequence(5000))
    rig.cache.attach_scheduler(SimpleNamespace(**{**vars(scheduler), "waiting_queue": [waiting]}))
    prefetch(rig, waiting)
    assert rig.cache._waiting
    rig.insert(sequence(9000), seed=1)
    failed.finished_reason = FINISH_ABORT("External KV cache load failed", 503)
    rig.cache.failed_loads.take(failed, skip_insert=False)
    assert rig.engine.drain(TIMEOUT_S)
    assert rig.cache.has_pending_cache_operations()
    rig.cache._scheduler._engine_paused = True
    assert not rig.cache.has_pending_cache_operations()
    assert rig.cache._scheduler.waiting_queue == [failed, waiting]
    rig.cache.reset()
    rig.allocator.clear()


def test_clearing_the_storage_keeps_what_the_device_holds(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.settle()
    assert rig.cache.clear_storage_backend()
    assert rig.stats("CPU")["ready"] == 0
    req = rig.request(tokens)
    assert rig.match(req).device_prefix_len == len(tokens)
    rig.abort(req)


def test_clearing_the_storage_while_a_node_is_copied_to_it_unlocks_the_node(make_rig: MakeRig) -> None:
    # The endpoint can be called at any time, not only when the server is idle as a flush is.
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    assert rig.cache.clear_storage_backend()
    rig.settle()
    assert rig.cache.full_protected_size() == 0
    tokens = sequence(5000)
    expected = rig.insert(tokens, seed=2)
    rig.evict_all()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_clearing_the_storage_never_passes_off_an_unfinished_load_as_finished(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(dtype=torch.float32, num_pages=1600, num_layers=32, num_cpu_blocks=800, copy_threads=1)
    tokens = sequence(1, 700)
    expected = rig.insert(tokens, seed=1)
    rig.evict_all()
    req, late = rig.request(tokens), rig.request(tokens)
    slots = rig.admit(req)
    rig.start_batch()
    assert rig.match(late).host_hit_length == len(tokens)
    rig.cache.clear_storage_backend()
    assert rig.stats("CPU")["ready"] == 0
    rig.forward()
    if not rig.cache.finish_external_linker_loads([req]):
        assert_same(rig.read(slots), expected)
        rig.finish(req, slots)
    else:
        rig.abort(req, slots)
    # What the other request was promised is gone, so it must not be counted on.
    assert not rig.cache.linker.has_hit(name_of(late))
    rig.abort(late)


# ---- new weights ----


def test_new_weights_end_persistence_and_nothing_else(make_rig: MakeRig) -> None:
    rig = make_rig()
    tokens = sequence(1)
    rig.insert(tokens, seed=1)
    rig.settle()
    with mock.patch.object(rig.engine, "stop_persisting", create=True) as stop:
        rig.cache.reset()
        assert not stop.called  # a plain flush is no reason
        rig.allocator.clear()
        rig.insert(tokens, seed=2)
        rig.settle()
        rig.cache.weights_changed()
        stop.assert_called_once_with()
    # Whether old KV may be used on is SGLang's to say: it flushes, or was told not to.
    assert rig.stats("CPU")["ready"] == PAGES
    req = rig.request(tokens)
    assert rig.match(req).device_prefix_len == len(tokens)
    rig.abort(req)


def test_new_weights_before_there_are_tiers(make_rig: MakeRig) -> None:
    rig = make_rig()
    with mock.patch.object(rig.cache, "linker", None):
        rig.cache.weights_changed()


# ---- what it costs the scheduler ----


def test_pages_are_hashed_once_however_often_a_request_is_matched(make_rig: MakeRig) -> None:
    rig = make_rig()
    expected = rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1, pages=PAGES + 3))
    hashed = mock.Mock(wraps=get_storage_hash_str)
    with mock.patch("sglang_flexkv.integration.radix_cache.get_storage_hash_str", hashed):
        for _ in range(3):
            assert rig.match(req).host_hit_length == PAGES * PAGE
        slots = rig.admit(req)
    assert hashed.call_count == 1
    rig.start_batch()
    rig.forward()
    assert_same(rig.read(slots), expected)
    assert not rig.cache.finish_external_linker_loads([req])
    rig.finish(req, slots)


def collectives_of(rig: Rig, step: Callable[[], object]) -> int:
    """How often a step reduces something over the ranks."""
    with mock.patch.object(rig.cache, "_all_reduce_attn_groups") as reduce:
        step()
    return int(reduce.call_count)


def test_a_step_without_anything_under_way_needs_no_collective(make_rig: MakeRig) -> None:
    rig = make_rig()
    assert collectives_of(rig, rig.cache.check_hicache_events) == 0
    rig.insert(sequence(1), seed=1)
    assert rig.cache.linker.pending_offloads
    assert collectives_of(rig, rig.cache.check_hicache_events) > 0  # whatever this rank knows by then
    rig.settle()
    assert collectives_of(rig, rig.cache.check_hicache_events) == 0


def test_ranks_agree_on_a_hit_with_one_number(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.insert(sequence(1), seed=1)
    rig.evict_all()
    req = rig.request(sequence(1))
    sizes = []

    def other_rank_has_less(tensor: torch.Tensor, op: object) -> None:
        assert op is torch.distributed.ReduceOp.MIN
        sizes.append(tensor.numel())
        tensor.clamp_(max=PAGES - 1)

    with mock.patch.object(rig.cache, "_all_reduce_attn_groups", other_rank_has_less):
        assert rig.match(req).host_hit_length == (PAGES - 1) * PAGE
    assert sizes == [1]
    rig.cache.finish(req.cache_request_handle, CacheRequestOutcome.ABORT)


@pytest.mark.parametrize("honoured", [False, True])
def test_priorities_decide_what_goes_first_where_sglang_takes_them_so(
    make_rig: MakeRig, honoured: bool
) -> None:
    rig = make_rig(num_cpu_blocks=2 * PAGES)
    rig.cache._by_priority = honoured
    for number, priority in ((1, 5), (2, 0), (3, 5)):
        rig.insert(sequence(1000 * number), seed=number, priority=priority)
        rig.evict_all()
    kept = [number for number in (1, 2, 3) if rig.match(rig.request(sequence(1000 * number))).host_hit_length]
    assert (1 in kept) is honoured
    assert (2 in kept) is not honoured
    assert 3 in kept
    rig.linker.reset()


# ---- the end ----


@pytest.mark.parametrize("failing", steps_of(FlexKVLinker.close))
def test_closing_goes_on_whatever_one_step_raises(tmp_path: Path, failing: str) -> None:
    pool = make_pool("mha", torch.bfloat16, PAGE, num_tokens=48 * PAGE, num_layers=3)
    rig = Rig(build_small_cache(pool, PAGE), ssd_dir=tmp_path)
    rig.insert(sequence(1), seed=1)
    rig.settle()
    steps = steps_of(FlexKVLinker.close)
    with one_fails(rig.linker, steps, failing, at_once=False) as called:
        with pytest.raises(StepFailedError, match=failing):
            rig.linker.close()
        rig.linker.close()
        assert called == dict.fromkeys(steps, 1)
