"""Steps that the tests of our linker and cache share: a small real pool, one scheduler's calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from kit import TIMEOUT_S, Rig, assert_same, radix_key
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_flexkv.common.block import keys_from_page_hashes
from sglang_flexkv.integration.compat.requests import name_of
from sglang_flexkv.transfer.transfer_engine import TransferEngine

PAGES = 4  # of the sequences below
PAGE = 16

MakeRig = Callable[..., Rig]


def sequence(start: int, pages: int = PAGES, page_size: int = PAGE) -> list[int]:
    return list(range(start, start + pages * page_size))


def device_node(rig: Rig, tokens: list[int]) -> Any:
    """The tree's node where the device's part of a sequence ends."""
    return rig.cache.match_prefix(MatchPrefixParams(key=radix_key(tokens))).last_device_node


def page_hashes(rig: Rig, tokens: list[int]) -> list[str]:
    return get_storage_hash_str(radix_key(tokens), None, page_size=rig.page_size)


def invalidate_cpu_tier(rig: Rig) -> None:
    """Forgets what the CPU tier holds, as if newer blocks had pushed it out."""
    rig.engine.clear_tiers(0)


def admit_without_its_lease(rig: Rig, req: Req) -> torch.Tensor:
    """Admits a request whose blocks went away after its match. No lease allows that; it stands for the day
    one fails, and for a rank that lost its blocks where the others did not."""
    match = rig.match(req)
    rig.linker.states.end_lease(name_of(req))
    invalidate_cpu_tier(rig)
    return rig.admit(req, match)


def forget_failed_loads(rig: Rig) -> None:
    """There is no scheduler that would run them again."""
    rig.cache.failed_loads._failed.clear()


def check_runs_again(rig: Rig, *reqs: Req) -> None:
    """That these requests run again, and no others."""
    assert len(rig.cache.failed_loads) == rig.linker.metrics.total["failed"] == len(reqs)
    assert all(req.discard_output_reason and req.skip_radix_cache_insert for req in reqs)
    for req in reqs:
        rig.cache.on_release(req, checkpointed=False)  # its memory; that it loads nothing more is remembered
    forget_failed_loads(rig)


def check_landed(rig: Rig, req: Req, slots: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """That a request has what was stored, and goes on as if it were alone."""
    assert not req.discard_output_reason
    assert not req.skip_radix_cache_insert
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


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


def forget_in_memory(rig: Rig, tokens: list[int], first_page: int) -> None:
    """The CPU tier loses the pages from this one on, which SSD holds as well."""
    invalidate_cpu_tier(rig)
    kept = keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace)[:first_page]
    fetch = rig.engine.start_prefetch(kept)
    if fetch is not None:
        assert rig.engine.wait(fetch.tasks, TIMEOUT_S)
        rig.engine.forget_fetch(fetch)


def store_on_ssd_alone(rig: Rig, tokens: list[int]) -> None:
    rig.insert(tokens, seed=1)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)


def may_run(rig: Rig, req: Req) -> bool:
    """What the scheduler asks when a request's turn comes."""
    return rig.cache.check_prefetch_progress(req.cache_request_handle)


def wait_in_queue(rig: Rig, req: Req) -> None:
    """A request that waits as it does where a store is asked: until it may run."""
    prefetch(rig, req)
    deadline = time.monotonic() + TIMEOUT_S
    while not may_run(rig, req):
        assert time.monotonic() < deadline, "a request waits for ever"
        time.sleep(0.001)  # the store's threads go on meanwhile


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


def collectives_of(rig: Rig, step: Callable[[], object]) -> int:
    """How often a step reduces something over the ranks."""
    with mock.patch.object(rig.cache, "_all_reduce_attn_groups") as reduce:
        step()
    return int(reduce.call_count)
