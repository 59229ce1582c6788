"""What leaves the device comes back byte for byte, and only for whom it was stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kit import assert_same, cut
from linker_steps import PAGE, PAGES, MakeRig, device_node, nobody_else, page_hashes, sequence
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_flexkv import _core
from sglang_flexkv.common.block import keys_from_page_hashes, make_namespace
from sglang_flexkv.common.config import WritePolicy

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)


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


def test_a_written_back_node_is_copied_before_its_slots_are_free(make_rig: MakeRig) -> None:
    # On the CPU nothing orders the copy before the next forward's writes but the write-back itself. Large
    # enough for a copy that nobody waits for to be seen.
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
    write_back = rig.cache.linker.write_back

    def write_back_and_look(node_id: int) -> None:
        write_back(node_id)
        running.append(rig.stats("tasks")["running"])

    with mock.patch.object(rig.cache.linker, "write_back", write_back_and_look):
        rig.cache.evict(EvictParams(num_tokens=len(tokens)))
    assert running == [0]
    rig.scribble()
    req = rig.request(tokens)
    (slots,) = rig.restore(req)
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


@pytest.mark.parametrize("before", ["a forward", "loads", "a draft"])
@pytest.mark.parametrize("overlap", [True, False])
def test_on_a_gpu_the_forwards_stream_waits_for_a_write_back(
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
    scheduler = nobody_else()
    scheduler.enable_overlap, scheduler.forward_stream = overlap, SimpleNamespace(cuda_stream=77)
    rig.cache.attach_scheduler(scheduler)
    with (
        mock.patch.object(rig.linker, "on_gpu", True),
        mock.patch.object(rig.linker, "_has_draft", before == "a draft"),
        mock.patch.object(rig.linker, "record_offload_ready", list),
        mock.patch.object(rig.engine, "make_gate", Gate),
        mock.patch.object(rig.engine, "wait", side_effect=AssertionError("the host waits")),
    ):
        rig.settle()
        rig.cache.evict(EvictParams(num_tokens=rig.cache.full_evictable_size()))
        # Eviction waits for nothing, unless a draft model may write to slots before anything is announced.
        assert bool(told) is (before == "a draft")
        if before == "loads":
            rig.linker.start_layer_wise_loading()
        else:
            rig.linker.layer_done_counter.set_consumer(-1)
    assert told == [(0, 77 if overlap else 5)]
    rig.settle()  # the copy has been made; that it has is known a moment later
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
    rig = make_rig()
    rig.cache.attach_scheduler(scheduler)
    assert ran_on == [rig.linker.forward_stream or schedules]


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
