"""Every kind of remote store under the real flow: hits, faults of its server, faults of all kinds by a seed.

``--remote-runs=1000`` has so many seeds, shared out among the stores, in place of one each.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import torch
from kit import TIMEOUT_S, KitSteps, Rig, assert_same, build_kit_cache, cut
from linker_steps import PAGE, PAGES, MakeRig, invalidate_cpu_tier, sequence, wait_in_queue
from redis_server import RedisServer
from remote_faults import Faults, faulty_stores, try_again_soon
from remote_services import KINDS, SERVERS, Services, go_on, set_environment, stand_still
from sglang.test.kits.unified_radix_cache.config import CONFIGS

from sglang_flexkv import kvtask
from sglang_flexkv.common.config import PrefetchPolicy, RemoteCompression
from sglang_flexkv.storage.remote import tier as remote_tier


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        count = metafunc.config.getoption("--remote-runs") or len(KINDS)
        kinds = list(KINDS)
        metafunc.parametrize(
            ("kind", "seed"),
            [(kind, seed) for n, kind in enumerate(kinds) for seed in range(n, count, len(kinds))],
        )


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch.setenv, patch.delenv)
        made = Services(tmp_path_factory.mktemp)
        yield made
        made.end()


@pytest.fixture(autouse=True)
def _soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    try_again_soon(monkeypatch)


def store(rig: Rig, tokens: list[int], seed: int) -> list:
    """Computes a prompt and stores it remotely."""
    expected = rig.insert(tokens, seed=seed)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    return expected


def run(rig: Rig, tokens: list[int]) -> tuple[list, int]:
    """A request from the queue to its end: what it has of its prompt, and how much the store brought."""
    req = rig.request(tokens)
    wait_in_queue(rig, req)
    brought = rig.cache.pop_prefetch_loaded_tokens(req.cache_request_handle)
    (slots,) = rig.restore(req)
    got = rig.read(slots)
    rig.finish(req, slots)
    return got, brought


def check_that_it_is_of_use(rig: Rig, tokens: list[int], expected: list, seed: int) -> None:
    """Until all of a prompt comes from the store; computed and stored again if that is what it takes: stores
    evict."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        rig.evict_all()
        invalidate_cpu_tier(rig)
        got, brought = run(rig, tokens)
        assert_same(got, cut(expected, 0, len(got[0])))
        if brought == PAGES * PAGE:
            return
        rig.insert(tokens, seed=seed)
        rig.evict_all()
        rig.engine.flush_spills(TIMEOUT_S)
        assert time.monotonic() < deadline, "the store is not used again"


def at_rest(rig: Rig) -> dict[str, object]:
    """What a server holds while nothing is on its way."""
    assert rig.engine.flush_spills(TIMEOUT_S)
    assert rig.engine.drain(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while not rig.stats("REMOTE")["online"]:  # opened again: its threads are there once more
        assert time.monotonic() < deadline
        rig.cache.check_hicache_events()
        time.sleep(0.001)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    stats = rig.engine.stats()
    return {
        "threads": Counter(
            re.sub(r"\d+", "", thread.name)
            for thread in threading.enumerate()
            if thread.name.startswith("flexkv-remote")
        ),
        "slots": {what: stats["CPU"][what] for what in ("writing", "pinned")},
        "tasks": stats["tasks"]["running"],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_server_stored_another_finds(make_rig: MakeRig, services: Services, kind: str) -> None:
    url = services.get(kind).url
    first, second = make_rig(remote=url), make_rig(remote=url)
    expected = store(first, sequence(1), 1)
    got, brought = run(second, sequence(1))
    assert_same(got, expected)
    assert brought == PAGES * PAGE


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_states_of_one_server_another_finds(services: Services, kind: str) -> None:
    url = services.get(kind).url
    cfg = next(cfg for cfg in CONFIGS if cfg.has_swa and cfg.has_mamba and cfg.page_size == 64)
    page = cfg.page_size
    cfg = replace(cfg, num_layers=2, full_attention_layer_ids=(1,), kv_size=24 * page)
    tokens = KitSteps(cfg)._make_seq(1, 6)
    with ExitStack() as stack:
        first, second = (stack.enter_context(Rig(build_kit_cache(cfg, "python"), remote=url)) for _ in "ab")
        # Two places to go on from: the second prompt begins as the first one.
        half, whole = store(first, tokens[: 3 * page], 1), store(first, tokens, 2)
        for asked, brought in ((2, 0), (6, 6), (5, 3)):
            req = second.request([*tokens[: asked * page], 7])
            wait_in_queue(second, req)
            assert second.cache.pop_prefetch_loaded_tokens(req.cache_request_handle) == brought * page
            (slots,) = second.restore(req)
            assert len(slots) == brought * page
            expected = [torch.cat([a, b[3 * page :]]) for a, b in zip(half, whole, strict=True)]
            assert_same(second.read(slots), cut(expected, 0, len(slots)))
            if brought:
                assert_same(second.read_state(req), second.random_state(brought // 3))
            second.abort(req, slots)
            second.evict_all()
            if asked == 6:
                # No forward waits for a state: all else of the shorter prefix is in memory.
                req = second.request([*tokens[: 5 * page], 7])
                assert second.match(req).host_hit_length == 0
                second.abort(req)
            invalidate_cpu_tier(second)
        assert all(second.stats(f"REMOTE {group}")["found_blocks"] for group in second.engine.group_names)


@pytest.mark.parametrize("kind", SERVERS)
def test_nobody_notices_when_a_store_stands_still_and_dies(
    make_rig: MakeRig, services: Services, kind: str
) -> None:
    service = services.get(kind)
    rig = make_rig(
        remote=service.url,
        remote_timeout_s=2.0,
        prefetch_policy=PrefetchPolicy.TIMEOUT,
        prefetch_timeout_s=0.2,
    )
    prompts = [sequence(1000 * number) for number in range(50, 54)]
    expected = [store(rig, prompt, number) for number, prompt in enumerate(prompts)]
    check_that_it_is_of_use(rig, prompts[0], expected[0], 0)

    def requests() -> None:
        for _ in range(2):
            for prompt, right in zip(prompts, expected, strict=True):
                rig.evict_all()
                invalidate_cpu_tier(rig)
                got, _ = run(rig, prompt)
                assert_same(got, cut(right, 0, len(got[0])))

    stand_still(service)
    try:
        requests()
    finally:
        go_on(service)
    check_that_it_is_of_use(rig, prompts[0], expected[0], 0)
    service.stop()
    requests()
    rig.cache.check_hicache_events()
    assert rig.stats("REMOTE")["times_out"] > 0
    service.start()
    check_that_it_is_of_use(rig, prompts[0], expected[0], 0)


def test_nothing_that_is_told_has_the_password(
    make_rig: MakeRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever becomes of the server, and however much of it is logged."""
    caplog.set_level("DEBUG")
    service = RedisServer(tmp_path, "--requirepass", "hunter2")
    try:
        url = service.url.replace("//", "//:hunter2@")
        rig = make_rig(remote=url, remote_timeout_s=0.5)
        expected = store(rig, sequence(1), 1)
        check_that_it_is_of_use(rig, sequence(1), expected, 1)
        service.stop()
        rig.evict_all()
        invalidate_cpu_tier(rig)
        for number in range(2, 6):  # it is lost to look-ups, loads and stores
            run(rig, sequence(1))
            store(rig, sequence(1000 * number), number)
        service.start()
        check_that_it_is_of_use(rig, sequence(1), expected, 1)
        with redis.Redis(port=service.port, password="hunter2") as client:
            client.config_set("requirepass", "hunter3")
            client.client_kill_filter(_type="normal", skipme=True)
            rig.evict_all()
            invalidate_cpu_tier(rig)
            run(rig, sequence(1))  # it knows what it has brought, and cannot have it
            store(rig, sequence(7000), 7)
        deadline = time.monotonic() + TIMEOUT_S
        while rig.stats("REMOTE")["times_out"] == 0:  # who finds out is a thread of the tier's
            assert time.monotonic() < deadline, "another password is as good"
            run(rig, sequence(8000))
    finally:
        service.stop()
    assert "hunter" not in caplog.text + repr(rig.engine.stats())
    assert "Redis at 127.0.0.1" in caplog.text


def test_a_flush_on_a_store_that_is_full_holds_at_once_and_for_all_when_there_is_room(
    make_rig: MakeRig, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_tier, "_GENERATION_S", 0.0)
    monkeypatch.setattr(remote_tier, "_TELL_AGAIN_S", 0.01)
    service = services.get("redis")
    first, second = make_rig(remote=service.url), make_rig(remote=service.url)
    prompt = sequence(70_000)
    expected = store(first, prompt, 1)
    with redis.Redis(port=service.port) as client:
        client.config_set("maxmemory", 1)  # noeviction: it stores nothing more
        first.cache.reset()
        first.allocator.clear()
        for _ in range(4):
            assert run(first, prompt)[1] == 0
        stats = first.stats("REMOTE")
        assert (stats["lookups_failed"], stats["times_out"]) == (0, 0)
        got, brought = run(second, prompt)  # it cannot know
        assert_same(got, expected)
        assert brought == PAGES * PAGE
        client.config_set("maxmemory", 0)
    # It learns of it also where it need not ask: it knows what it has brought once.
    deadline = time.monotonic() + TIMEOUT_S
    while second.stats("REMOTE")["times_out"] == 0 or not second.stats("REMOTE")["online"]:
        assert time.monotonic() < deadline, "a flush is not told when there is room"
        second.evict_all()
        invalidate_cpu_tier(second)
        run(second, prompt)
    assert second.stats("REMOTE")["times_out"] == 1
    assert run(second, sequence(70_000))[1] == 0
    check_that_it_is_of_use(first, prompt, expected, 1)


def test_a_store_that_does_what_it_likes_changes_no_request(
    make_rig: MakeRig, services: Services, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    """Every kind of fault, mixed by a seed, half of them on values that are compressed: what is loaded is
    right, nothing is left."""
    faults = Faults(seed)
    monkeypatch.setattr(remote_tier, "STORES", faulty_stores(faults))
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", 1)  # a task for each block
    compressed = seed % 2 == 1 and kind != "hicache"  # which brings values of one size only
    settings = {
        "num_layers": 6,  # blocks that shrink by a page
        "remote": services.get(kind).url,
        "remote_compression": RemoteCompression.ALWAYS if compressed else RemoteCompression.NONE,
    }
    first, second = make_rig(**settings), make_rig(**settings)
    first.byte_values = second.byte_values = 4 if compressed else 256
    prompts = [sequence(100_000 * (seed + 1) + 1000 * number) for number in range(4)]
    expected = [store(first, prompt, number) for number, prompt in enumerate(prompts)]
    # A value is a page and a block; a call moves one, or as many as go into its bytes.
    in_flight = (remote_tier._LOAD_THREADS + remote_tier._STORE_THREADS) * remote_tier._CALL_BYTES
    quiet = at_rest(second)
    kinds = ("flip", "garbage", "missing", "wrong_size", "error", "lost", "full", "lies")
    for step in range(40):
        faults.heal()
        for each in kinds:
            setattr(faults, each, 0.3 if faults.draw(0.3) else 0.0)
        number = faults.below(4)
        got, _ = run(second, prompts[number])
        assert_same(got, cut(expected[number], 0, len(got[0])))
        if step % 2:
            second.evict_all()
            invalidate_cpu_tier(second)
    faults.heal()
    check_that_it_is_of_use(second, prompts[1], expected[1], 1)
    assert bool(first.stats("REMOTE")["compressed_bytes"]) == compressed
    assert bool(second.stats("REMOTE")["expanded_bytes"]) == compressed
    # What was on its way was bounded, and nothing has stayed behind: no slot, no thread, no record.
    assert at_rest(second) == quiet
    assert 0 < faults.num_bytes_max <= 2 * in_flight  # of both servers
    assert faults.num_bytes == 0
