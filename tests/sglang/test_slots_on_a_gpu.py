"""The scheduler's thread never waits for the device to learn which slots it has given out.

SGLang's linker interface hands slots over as tensors on the device, behind a forward that runs. Here they are
in memory of the CUDA driver's stand-in, on a stream that is held up, and tensors that fail whoever asks for
their values; cache, linker and engine are the real ones.
"""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fake_cuda import Dam, FakeCuda, build
from kit import Rig, assert_same, build_small_cache, make_pool
from linker_steps import check_runs_again
from pretended_gpu import OnDevice, engines_on
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang.srt.mem_cache.hicache_storage import PoolTransfer

from sglang_flexkv.common.config import CacheConfig, WritePolicy
from sglang_flexkv.common.storage import KVCacheLayout, KVCacheLayoutType, ModelConfig
from sglang_flexkv.kvmanager import KVManager, KVResponseStatus

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="g++, which builds the driver, is missing"
)

PAGE, PAGES = 16, 4


@pytest.fixture(scope="module")
def library() -> Path:
    return build(13)


class Gpu:
    """The stand-in, and a stream that is the current one."""

    def __init__(self, library: Path) -> None:
        self.cuda = FakeCuda(library, 13)
        self.cuda.reset()
        self.stream = self.cuda.stream()

    def on_device(self, slots: torch.Tensor) -> torch.Tensor:
        """The same slots, computed by the stream when it gets there."""
        values = slots.numpy().astype(np.int64)
        address, view = self.cuda.allocate(values.nbytes)
        view[:] = 0xFF
        self.cuda.write(self.stream, address, values)
        memory = (ctypes.c_uint8 * values.nbytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.int64).as_subclass(OnDevice)


def in_time(call: Callable[[], Any]) -> Any:
    """What a call returns, that must not wait for a stream which is held up."""
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(call()), daemon=True)
    thread.start()
    thread.join(30.0)
    assert not thread.is_alive(), "it waits for the stream"
    assert outcome, "it failed"
    return outcome[0]


@pytest.fixture
def gpu(library: Path) -> Iterator[Gpu]:
    gpu = Gpu(library)
    current = SimpleNamespace(cuda_stream=gpu.stream)
    with mock.patch.object(torch.cuda, "current_stream", return_value=current), engines_on(gpu.cuda):
        yield gpu
        for dam in gpu.cuda.dams:
            dam.open()
    gpu.cuda.synchronize(gpu.stream)
    assert gpu.cuda.violations == ""


@pytest.fixture
def make_rig(gpu: Gpu) -> Iterator[Callable[[WritePolicy], Rig]]:
    """A rig whose slots are on the device by the time they reach the linker."""
    rigs: list[Rig] = []

    def make(policy: WritePolicy) -> Rig:
        pool = make_pool("mha", torch.bfloat16, PAGE, num_tokens=48 * PAGE)
        for buffer in [*pool.k_buffer, *pool.v_buffer]:
            gpu.cuda.adopt(buffer.data_ptr(), buffer.nbytes)
        rig = Rig(build_small_cache(pool, PAGE), policy=policy)
        linker: Any = rig.linker
        linker.on_gpu = True
        linker.record_offload_ready = lambda: [SimpleNamespace(cuda_event=gpu.cuda.record(gpu.stream))]
        for name in ("load", "offload", "write_back"):
            setattr(linker, name, over_device_slots(getattr(linker, name)))
        rigs.append(rig)
        return rig

    def over_device_slots(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            moved = [
                [replace(transfer, device_indices=gpu.on_device(transfer.device_indices)) for transfer in arg]
                if isinstance(arg, list) and arg and isinstance(arg[0], PoolTransfer)
                else arg
                for arg in args
            ]
            return method(*moved, **kwargs)

        return call

    yield make
    for dam in gpu.cuda.dams:
        dam.open()
    for rig in rigs:
        rig.check_nothing_is_left()
        rig.close()
        for buffer in rig.buffers:
            gpu.cuda.let_go(buffer.data_ptr())


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK], ids=lambda p: p.value)
def test_the_scheduler_goes_on_while_slots_are_behind_a_forward(
    make_rig: Callable[[WritePolicy], Rig], gpu: Gpu, policy: WritePolicy
) -> None:
    rig = make_rig(policy)
    tokens = list(range(PAGES * PAGE))
    dam = Dam(gpu.cuda, gpu.stream)
    if policy is WritePolicy.WRITE_THROUGH:
        expected = in_time(lambda: rig.insert(tokens, seed=1))
        assert rig.stats("CPU")["writing"] == PAGES  # accepted, and its bytes are to come
    else:
        expected = rig.insert(tokens, seed=1)
        assert in_time(lambda: rig.cache.evict(EvictParams(num_tokens=len(tokens)))) is not None
        assert rig.stats("CPU")["writing"] == PAGES
    assert rig.stats("D2H")["ops_done"] == 0
    dam.open()
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == PAGES

    req = rig.request(tokens)
    rig.linker.order_write_backs()
    dam = Dam(gpu.cuda, gpu.stream)
    slots = in_time(lambda: rig.admit(req))
    assert len(slots) == len(tokens)
    assert in_time(rig.start_batch) >= 0
    assert rig.stats("H2D")["ops_done"] == 0
    dam.open()
    rig.forward()
    assert not rig.cache.finish_external_linker_loads([req])
    assert_same(rig.read(slots), expected)
    rig.finish(req, slots)


def test_a_request_that_is_given_up_meanwhile_leaves_nothing(
    make_rig: Callable[[WritePolicy], Rig], gpu: Gpu
) -> None:
    rig = make_rig(WritePolicy.WRITE_THROUGH)
    tokens = list(range(PAGES * PAGE))
    rig.insert(tokens, seed=1)
    rig.evict_all()
    dam = Dam(gpu.cuda, gpu.stream)
    req = rig.request(tokens)
    slots = in_time(lambda: rig.admit(req))
    in_time(lambda: (rig.abort(req, slots),))
    assert in_time(rig.start_batch) == -1
    dam.open()
    gpu.cuda.synchronize(gpu.stream)
    assert rig.stats("H2D")["ops_done"] == 0


def test_slots_that_never_come_are_a_miss(make_rig: Callable[[WritePolicy], Rig], gpu: Gpu) -> None:
    """The driver cannot copy them: the load fails and its request is computed, the offload fails and is tried
    again at the next use."""
    rig = make_rig(WritePolicy.WRITE_THROUGH)
    tokens = list(range(PAGES * PAGE))
    gpu.cuda.fail("cuMemcpyDtoHAsync_v2", 0)
    rig.insert(tokens, seed=1)
    rig.settle()
    assert rig.stats("CPU")["ready"] == 0
    gpu.cuda.reset()
    rig.insert(tokens, seed=2)
    rig.evict_all()
    assert rig.stats("CPU")["ready"] == PAGES

    req = rig.request(tokens)
    gpu.cuda.fail("cuMemcpyDtoHAsync_v2", 0)
    slots = rig.admit(req)
    gpu.cuda.reset()
    rig.start_batch()
    rig.forward()
    assert rig.cache.finish_external_linker_loads([req]) == []
    check_runs_again(rig, req)
    assert rig.match(req).host_hit_length == 0  # and computes everything
    rig.abort(req, slots)


def test_the_library_takes_slots_from_the_device(gpu: Gpu) -> None:
    """Those of a whole sequence, whose tail is stored; and those of the part that the device lacks."""
    layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, 2, 16, PAGE, 2, 32)
    kv = torch.randn(layout.kv_shape)
    gpu.cuda.adopt(kv.data_ptr(), kv.nbytes)
    by_token = kv.flatten(2, 3)  # [layer, kv, token, head, width]
    manager = KVManager(
        ModelConfig(num_layers=2, num_kv_heads=2, head_size=32, use_mla=False, dtype=torch.float32),
        CacheConfig(tokens_per_block=PAGE, num_cpu_blocks=16),
    )
    manager.register_kv_caches(list(kv), layout)
    manager.start()
    tokens, slots, others = torch.arange(70), torch.arange(70), torch.arange(128, 128 + 70)
    expected = by_token[:, :, slots[:64]].clone()
    dam = Dam(gpu.cuda, gpu.stream)
    puts = [
        in_time(lambda n=n: manager.put_async(tokens[:n], gpu.on_device(slots[:n])))
        for n in (PAGE, len(slots))
    ]
    skipped = np.arange(70) >= 2 * PAGE
    assert not any(manager.try_wait(puts))
    dam.open()
    assert [manager.wait([put])[put].status for put in puts] == [KVResponseStatus.SUCCESS] * 2
    dam = Dam(gpu.cuda, gpu.stream)
    get, mask = manager.get_match(tokens, skipped)
    assert mask.sum() == 2 * PAGE
    in_time(lambda: (manager.launch([get], [gpu.on_device(others[2 * PAGE : 4 * PAGE])]),))
    dam.open()
    assert manager.wait([get])[get].status is KVResponseStatus.SUCCESS
    assert torch.equal(by_token[:, :, others[2 * PAGE : 4 * PAGE]], expected[:, :, 2 * PAGE :])
    manager.shutdown()
    gpu.cuda.let_go(kv.data_ptr())
