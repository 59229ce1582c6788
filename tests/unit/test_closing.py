"""Closing closes everything, whatever fails meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from closing_steps import StepFailedError, one_fails, steps_of

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType, KVManager, ModelConfig
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.kvtask import KVTaskEngine

STEPS = steps_of(KVTaskEngine.close)


def make_manager(directory: Path) -> KVManager:
    """A manager whose cache holds four blocks, on SSD as well."""
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, 1, 8, 16, 1, 64)
    config = CacheConfig(
        num_cpu_blocks=8,
        enable_ssd=True,
        num_ssd_blocks=8,
        ssd_cache_dir=(directory,),
        trace_file=directory / "trace.json",
    )
    manager = KVManager(ModelConfig(num_layers=1, num_kv_heads=1, head_size=64, dtype=torch.float32), config)
    manager.register_kv_caches(torch.zeros(layout.kv_shape, dtype=torch.float32), layout)
    task = manager.put_async(np.arange(64), np.arange(64))
    manager.wait([task])
    return manager


@pytest.mark.parametrize("at_once", [True, False], ids=["at_once", "at_its_end"])
@pytest.mark.parametrize("failing", STEPS)
def test_every_step_runs_whatever_one_of_them_raises(tmp_path: Path, failing: str, at_once: bool) -> None:
    manager = make_manager(tmp_path)
    engine = manager.engine
    with one_fails(engine, STEPS, failing, at_once=at_once) as called:
        with pytest.raises(StepFailedError, match=failing):
            manager.shutdown()
        assert called == dict.fromkeys(STEPS, 1)
        manager.shutdown()
        assert called == dict.fromkeys(STEPS, 1), "closed twice"
    if at_once:
        return  # what that step should have done was not done
    # Locks, threads and files are given back: the next one starts, and finds what was stored.
    assert (tmp_path / "trace-rank0.json").is_file()
    del engine
    gc.collect()
    again = make_manager(tmp_path)
    assert again.engine.stats()["SSD"]["recovered"] == 4
    again.shutdown()


def test_the_first_of_several_errors_is_raised_and_the_others_are_told() -> None:
    ran = []

    def fail(name: str) -> None:
        ran.append(name)
        raise OSError(name)

    with pytest.raises(OSError, match="one") as caught:
        run_all(lambda: fail("one"), lambda: fail("two"), lambda: ran.append("three"))
    assert ran == ["one", "two", "three"]
    assert caught.value.__notes__ == ["then failed, too: OSError('two')"]
