"""What another server stored remotely: looked up and brought while a request waits in the queue."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from kit import TIMEOUT_S, Rig, assert_same, cut
from linker_steps import (
    PAGE,
    PAGES,
    MakeRig,
    invalidate_cpu_tier,
    may_run,
    page_hashes,
    prefetch,
    sequence,
)
from remote_faults import Faults, faulty_stores

from sglang_flexkv import kvtask
from sglang_flexkv.common.block import keys_from_page_hashes
from sglang_flexkv.common.config import LoadPolicy, PrefetchPolicy
from sglang_flexkv.integration.compat.requests import storage_name
from sglang_flexkv.storage.remote import tier as remote_tier


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    made = Faults(seed=7)
    monkeypatch.setattr(remote_tier, "STORES", faulty_stores(made))
    return made


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}?max_gb=1"


def store(rig: Rig, tokens: list[int], seed: int = 1, **owner: str) -> list:
    """Computes a prompt and stores it remotely."""
    expected = rig.insert(tokens, seed=seed, **owner)
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    return expected


def wait_until_ready(rig: Rig, req: object) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not may_run(rig, req):
        assert time.monotonic() < deadline, "a request waits for ever"
        time.sleep(0.001)  # the store's threads go on meanwhile


def run(rig: Rig, tokens: list[int], **owner: str) -> tuple[list, int]:
    """A request from the queue to its end: what it has of its prompt, and how much the store brought."""
    req = rig.request(tokens, **owner)
    prefetch(rig, req)
    wait_until_ready(rig, req)
    brought = rig.cache.pop_prefetch_loaded_tokens(req.cache_request_handle)
    (slots,) = rig.restore(req)
    got = rig.read(slots)
    rig.finish(req, slots)
    return got, brought


def forget_locally(rig: Rig) -> None:
    rig.evict_all()
    invalidate_cpu_tier(rig)


def test_what_one_server_stored_another_finds(make_rig: MakeRig, url: str) -> None:
    first, second = make_rig(remote=url), make_rig(remote=url)
    expected = store(first, sequence(1))
    got, brought = run(second, sequence(1))
    assert_same(got, expected)
    assert brought == PAGES * PAGE
    assert second.linker.metrics.total["loaded cpu"] == PAGES * PAGE  # no forward waited for the store
    assert second.stats("REMOTE")["found_blocks"] == PAGES
    # It is known now, and what is known is not asked for.
    forget_locally(second)
    got, brought = run(second, sequence(1))
    assert_same(got, expected)
    assert (brought, second.stats("REMOTE")["lookups"]) == (PAGES * PAGE, 1)


def test_a_forward_takes_what_has_come_and_waits_for_nothing_remote(make_rig: MakeRig, url: str) -> None:
    rig = make_rig(remote=url)
    store(rig, sequence(1))
    forget_locally(rig)
    req = rig.request(sequence(1))
    assert rig.match(req).host_hit_length == 0
    assert rig.linker.states.known(req.cache_request_handle.rid).found.num_to_load == PAGES
    rig.abort(req, rig.admit(req))


def test_a_store_that_has_nothing_is_asked_once(make_rig: MakeRig, url: str) -> None:
    rig = make_rig(remote=url)
    for _ in range(3):
        req = rig.request(sequence(1))
        prefetch(rig, req)
        wait_until_ready(rig, req)
        rig.abort(req)
    assert rig.stats("REMOTE")["asked_blocks"] == PAGES
    assert rig.stats("REMOTE")["found_blocks"] == 0


def test_nothing_is_asked_for_that_is_computed_faster(make_rig: MakeRig, url: str) -> None:
    rig = make_rig(remote=url, load_policy=LoadPolicy.AUTO)
    costs = rig.linker.load_or_recompute
    for i in range(1, 10):
        costs.prefill.observe([(0, 1000)], 1e-6)
        costs.from_tier[1].observe(i * 1.0, float(i))
    req = rig.request(sequence(1))
    prefetch(rig, req)
    assert may_run(rig, req)
    assert rig.stats("REMOTE")["lookups"] == 0
    rig.abort(req)


def test_the_longest_prefix_that_came_is_loaded(
    make_rig: MakeRig, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_rig(remote=url), make_rig(remote=url)
    monkeypatch.setattr(kvtask, "_FETCH_BYTES", 1)  # a task for each block
    expected = store(first, sequence(1))
    # The last but one is cut short.
    names = remote_names(first, sequence(1))
    path = next(tmp_path.rglob(f"*-{names[PAGES - 2]}"))
    path.write_bytes(path.read_bytes()[:-1])
    got, brought = run(second, sequence(1))
    assert_same(got, cut(expected, 0, (PAGES - 2) * PAGE))
    assert brought >= (PAGES - 2) * PAGE
    # Who computes it again replaces it.
    rest = sequence(1)
    second.insert(rest, seed=1)
    forget_locally_after_spills(second)
    monkeypatch.setattr(remote_tier, "_SPOILT_S", 0.0)
    third = make_rig(remote=url)
    assert run(third, sequence(1))[1] == PAGES * PAGE


def forget_locally_after_spills(rig: Rig) -> None:
    rig.evict_all()
    assert rig.engine.flush_spills(TIMEOUT_S)
    invalidate_cpu_tier(rig)


def remote_names(rig: Rig, tokens: list[int]) -> list[str]:
    keys = keys_from_page_hashes(page_hashes(rig, tokens), rig.linker.namespace)
    return [key.tobytes().hex() for key in keys]


def test_what_another_request_brings_is_brought_once(make_rig: MakeRig, url: str, faults: Faults) -> None:
    first, second = make_rig(remote=url), make_rig(remote=url)
    expected = store(first, sequence(1))
    faults.stall()
    reqs = [second.request(sequence(1)) for _ in range(3)]
    for req in reqs:
        prefetch(second, req)
        deadline = time.monotonic() + TIMEOUT_S
        while second.engine.num_reads == 0:
            assert time.monotonic() < deadline
            second.cache.check_hicache_events()
            time.sleep(0.001)
    assert not any(may_run(second, req) for req in reqs)
    faults.heal()
    for req in reqs:
        wait_until_ready(second, req)
    assert second.stats("REMOTE2H")["ops_done"] == 1
    assert second.stats("REMOTE")["lookups"] == 1
    for req in reqs:
        (slots,) = second.restore(req)
        assert_same(second.read(slots), expected)
        second.finish(req, slots)


def test_a_request_goes_on_when_a_load_takes_too_long(make_rig: MakeRig, url: str, faults: Faults) -> None:
    first = make_rig(remote=url)
    second = make_rig(remote=url, prefetch_policy=PrefetchPolicy.TIMEOUT, prefetch_timeout_s=0.05)
    expected = store(first, sequence(1))
    faults.stall()
    got, brought = run(second, sequence(1))
    assert (brought, len(got[0])) == (0, 0)
    pinned = second.stats("CPU")["writing"]
    assert pinned == PAGES  # nobody else's while the call may still write there
    faults.heal()
    assert second.engine.drain(TIMEOUT_S)
    got, _ = run(second, sequence(1))
    assert_same(got, expected)


def test_a_flush_on_one_server_takes_nothing_from_the_others_files(
    make_rig: MakeRig, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_rig(remote=url), make_rig(remote=url)
    store(first, sequence(1))
    files = set(tmp_path.rglob("*-*"))
    first.cache.reset()
    first.allocator.clear()
    assert set(tmp_path.rglob("*-*")) >= files
    assert run(first, sequence(1))[1] == 0
    # The others learn of it, and leave what is out of date alone as well.
    monkeypatch.setattr(remote_tier, "_GENERATION_S", 0.0)
    deadline = time.monotonic() + TIMEOUT_S
    while second.stats("REMOTE")["times_out"] == 0 or not second.stats("REMOTE")["online"]:
        assert time.monotonic() < deadline
        run(second, sequence(9000))
        time.sleep(0.01)
    assert run(second, sequence(1))[1] == 0
    # And they share again.
    expected = store(second, sequence(500), seed=3)
    got, brought = run(first, sequence(500))
    assert_same(got, expected)
    assert brought == PAGES * PAGE


@pytest.mark.parametrize("device_pages", [0, 1])
def test_an_answer_says_how_much_came_from_ssd_and_how_much_from_the_store(
    make_rig: MakeRig, url: str, tmp_path: Path, device_pages: int
) -> None:
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    first, second = make_rig(remote=url), make_rig(remote=url, ssd_dir=ssd)
    expected = store(first, sequence(1))
    # The first two pages are on its own SSD as well.
    run(second, sequence(1)[: 2 * PAGE])
    forget_locally_after_spills(second)
    if device_pages:
        run(second, sequence(1)[:PAGE])
        invalidate_cpu_tier(second)
    req = second.request(sequence(1))
    prefetch(second, req)
    wait_until_ready(second, req)
    (slots,) = second.restore(req)
    assert_same(second.read(slots), expected)
    brought = (PAGES - device_pages) * PAGE
    told = f"FlexKV: SSD {(2 - device_pages) * PAGE}, file {(PAGES - 2) * PAGE}"
    assert storage_name(req, brought) == told
    second.finish(req, slots)


@pytest.mark.parametrize("what", ["cache_salt", "extra_key"])
def test_what_one_tenant_stored_no_other_one_finds(
    make_rig: MakeRig, url: str, tmp_path: Path, what: str
) -> None:
    first, second = make_rig(remote=url), make_rig(remote=url)
    other = "extra_key" if what == "cache_salt" else "cache_salt"
    expected = store(first, sequence(1), **{what: "alice"})
    asked: list[dict[str, str]] = [{}, {what: "bob"}, {other: "alice"}, {what: "alice", other: "alice"}]
    for owner in asked:
        assert run(second, sequence(1), **owner)[1] == 0, owner
    stats = second.stats("REMOTE")
    assert (stats["lookups"], stats["found_blocks"]) == (len(asked), 0)
    got, brought = run(second, sequence(1), **{what: "alice"})
    assert_same(got, expected)
    assert brought == PAGES * PAGE
    # Nor can anybody who sees the names tell whose they are.
    assert "alice" not in "".join(map(str, tmp_path.rglob("*")))


def test_fetched_blocks_go_to_ssd_as_well(make_rig: MakeRig, url: str, tmp_path: Path) -> None:
    ssd = tmp_path / "ssd"
    ssd.mkdir()
    first, second = make_rig(remote=url), make_rig(remote=url, ssd_dir=ssd)
    store(first, sequence(1))
    assert run(second, sequence(1))[1] == PAGES * PAGE
    assert second.engine.flush_spills(TIMEOUT_S)
    assert second.stats("SSD")["ready"] == PAGES
