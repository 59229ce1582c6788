"""The linker that SGLang drives itself: against the interface in SGLang's wheel, and what it must not do."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang.srt.mem_cache.unified_cache.linker_factory")

from kit import build_small_cache, make_pool
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.linker_config import UnifiedCacheLinkerConfig
from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_flexkv.common.errors import ConfigError, IncompatibleError
from sglang_flexkv.integration.compat import server
from sglang_flexkv.integration.dynamic_linker import DynamicLinker

PAGE, TOKENS = 4, 256
NAMED = {"linker": "DynamicLinker", "linker_module_path": "sglang_flexkv.integration.dynamic_linker"}
Make = Callable[..., DynamicLinker]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes one as SGLang does, over a pool of its own."""
    made: list[DynamicLinker] = []
    monkeypatch.setattr(server, "place", lambda: server.Place(0, 1, 0, 1, 0, 1, 0, 1, 1))

    def make_linker(
        components: set[Any] = frozenset({ComponentType.FULL}),  # type: ignore[assignment]
        arguments: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        **settings: Any,
    ) -> DynamicLinker:
        pool = make_pool("mha", torch.float32, PAGE, num_tokens=TOKENS)
        cache, _, _ = build_small_cache(pool, PAGE, cache_class=UnifiedRadixCache)
        monkeypatch.setattr(server, "reader", lambda: lambda name: (arguments or {}).get(name))
        path = tmp_path / "flexkv.yaml"
        values = {"cpu_cache_gb": 0.001, **settings}
        path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
        config = {**NAMED, "linker_extra_config": {"flexkv_config_file": str(path), **(extra or {})}}
        UnifiedCacheLinkerConfig.from_dict(config)  # as SGLang's launcher looks at it
        linker = create_unified_cache_linker(
            None,
            SimpleNamespace(
                token_to_kv_pool_allocator=cache.token_to_kv_pool_allocator, page_size=cache.page_size
            ),
            backend="dynamic",
            config=config,
            components=set(components),
            forward_stream=None,
        )
        made.append(linker)
        return linker

    yield make_linker
    for linker in made:
        linker.close()


def until(so: Callable[[], bool]) -> None:
    """Waits for a copy or a disk."""
    deadline_s = time.monotonic() + 60
    while not so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def transfer(pages: range, slots: torch.Tensor | None = None) -> list[PoolTransfer]:
    keys = [hashlib.sha256(bytes([page])).hexdigest() for page in pages]
    return [PoolTransfer(name=PoolName.KV, keys=keys, device_indices=slots)]


def slots_of(pages: range) -> torch.Tensor:
    return torch.arange(pages.start * PAGE, pages.stop * PAGE)


def rows(linker: DynamicLinker, slots: torch.Tensor) -> list[torch.Tensor]:
    return [buffer[slots] for layer in linker.engine.device.tensors for buffer in layer]


def fill(linker: DynamicLinker, pages: range) -> list[torch.Tensor]:
    for layer in linker.engine.device.tensors:
        for buffer in layer:
            buffer[slots_of(pages)] = torch.randn_like(buffer[slots_of(pages)])
    return rows(linker, slots_of(pages))


def store(linker: DynamicLinker, pages: range) -> None:
    assert linker.offload(transfer(pages, slots_of(pages)), session_id=None)
    until(lambda: linker.num_completed_offloads() == 1)
    assert linker.pop_completed_offload()


def load(linker: DynamicLinker, rid: str, pages: range, slots: torch.Tensor) -> bool:
    assert linker.load(rid, transfer(pages, slots))
    index = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(index)
    return linker.finish_layer_wise_loading(index)


# ---- the interface ----


def test_it_takes_what_sglang_says_a_linker_is_called_with() -> None:
    abstract = UnifiedCacheLinker.__abstractmethods__
    assert len(abstract) >= 10
    assert not inspect.isabstract(DynamicLinker)
    for name in abstract:
        of_sglang = inspect.signature(getattr(UnifiedCacheLinker, name)).parameters.values()
        ours = inspect.signature(getattr(DynamicLinker, name))
        by_position = [p for p in of_sglang if p.name != "self"]
        ours.bind(None, *by_position)
        ours.bind(None, **{p.name: None for p in by_position})


def test_a_batch_whose_loads_land(make: Make) -> None:
    linker = make()
    before = fill(linker, range(1, 6))
    store(linker, range(1, 6))
    assert linker.lookup("r", transfer(range(1, 8))) == [1, 2, 3, 4, 5]
    there = slots_of(range(20, 25))
    assert load(linker, "r", range(1, 6), there)
    linker.check_idle()
    assert all(torch.equal(a, b) for a, b in zip(before, rows(linker, there), strict=True))
    assert linker.lookup("other", transfer(range(9, 12))) == []
    # A flush empties it, and what was under way then has no good end.
    assert linker.load("r", transfer(range(1, 6), there))
    index = linker.start_layer_wise_loading()
    linker.reset()
    assert not linker.finish_layer_wise_loading(index)
    assert linker.lookup("r", transfer(range(1, 6))) == []


def test_two_requests_of_one_id_in_a_batch(make: Make) -> None:
    linker = make()
    before = fill(linker, range(1, 4))
    store(linker, range(1, 4))
    there = slots_of(range(20, 23))
    assert linker.load("r", transfer(range(1, 4), there))
    assert not linker.load("r", transfer(range(1, 4), slots_of(range(30, 33))))
    assert linker.finish_layer_wise_loading(linker.start_layer_wise_loading())
    assert all(torch.equal(a, b) for a, b in zip(before, rows(linker, there), strict=True))


def test_what_lies_on_ssd_is_a_hit_when_it_is_in_memory(make: Make, tmp_path: Path) -> None:
    directory = tmp_path / "ssd"
    directory.mkdir()
    linker = make(ssd_cache_gb=0.01, ssd_cache_dir=directory, cpu_cache_gb=16 * 4096 / 2**30)
    before = fill(linker, range(1, 9))
    store(linker, range(1, 9))
    until(lambda: linker.num_completed_offloads() == 0 and linker.engine.stats()["SSD"]["ready"] == 8)
    for first in (10, 20, 30):  # they drive the first ones out of the CPU tier
        fill(linker, range(first, first + 8))
        store(linker, range(first, first + 8))
    assert len(linker.lookup("r", transfer(range(1, 9)))) < 8, "it said what it had not in memory"
    until(lambda: linker.num_completed_offloads() == 0 and not linker._fetches)
    assert linker.lookup("r", transfer(range(1, 9))) == list(range(1, 9))
    there = slots_of(range(50, 58))
    assert load(linker, "r", range(1, 9), there)
    assert all(torch.equal(a, b) for a, b in zip(before, rows(linker, there), strict=True))


# ---- refused ----


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"write_policy": "write_back"}, ConfigError, "write_policy: write_back needs a supported version"),
        ({"remote": "redis://localhost:1"}, ConfigError, "remote: a dynamic linker is not told"),
        ({"extra": {"cpu_gb": 1}}, ConfigError, "linker_extra_config: cpu_gb is not known"),
        ({"components": {ComponentType.FULL, ComponentType.SWA}}, IncompatibleError, "keeps SWA state"),
        ({"arguments": {"speculative_algorithm": "EAGLE"}}, IncompatibleError, "--speculative-algorithm"),
        ({"arguments": {"attn_cp_size": 2}}, IncompatibleError, "--attn-cp-size above 1; leave it at 1"),
        ({"arguments": {"pp_size": 2}}, IncompatibleError, "dynamic linker does not work with --pp-size"),
    ],
)
def test_what_it_cannot_do_ends_the_start(
    make: Make, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**how)


def test_it_takes_the_flag_that_selects_it(make: Make) -> None:
    make(arguments={"enable_unified_cache_external_linker": True, "pp_size": 1})
