"""Every byte of every pool that SGLang can build on a CPU comes back from the CPU tier and from SSD, whatever
its layers are made of; copied by the CPU, and by the GPU's code on the stand-in of the driver."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sglang")

import torch
from fake_cuda import FakeCuda, build
from pools import PLAIN, WITH_MORE, dsa, mha, mla
from pretended_gpu import engines_on

from sglang_flexkv import CacheConfig
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.integration.compat.kv_pool import device_buffers
from sglang_flexkv.kvtask import KVTaskEngine, TaskStatus

BLOCKS = 5
NAMESPACE = make_namespace({"test": "bytes of pools"})
PATIENCE_S = 60.0
# A pool, or one with those of its draft models.
POOLS: dict[str, Callable[[], Any]] = {
    "bf16": PLAIN["bf16"],
    "mla": PLAIN["mla"],
    "drafts": lambda: (mha(), mha(layer_num=1), mla(layer_num=1)),
    "drafts with index keys": lambda: (dsa(), dsa(layer_num=1), dsa(layer_num=1)),
    "a draft with scales": lambda: (mha(), WITH_MORE["fp4"][0]()),
    **{name: build for name, (build, _, _) in WITH_MORE.items()},
}


@pytest.fixture(scope="module")
def library() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++, which builds the driver, is missing")
    return build(13)


class Cache:
    """An engine over a pool that is full of noise, with an SSD tier that outlives it."""

    def __init__(self, pools: Any, directory: Path, cuda: FakeCuda | None) -> None:
        pool, *drafts = pools if isinstance(pools, tuple) else (pools,)
        self._random, self._cuda = np.random.default_rng(7), cuda
        self.pool, self.page = pool, pool.page_size
        self.device = device_buffers(pool, drafts)
        # All rows of each buffer, as bytes.
        self.buffers = [t.view(torch.uint8).flatten(1).numpy() for t in itertools.chain(*self.device.tensors)]
        self.tokens_per_row = list(itertools.chain(*self.device.tokens_per_row))
        self.make_noise()
        with contextlib.ExitStack() as stack:
            if cuda is not None:
                for buffer in self.buffers:
                    cuda.adopt(buffer.ctypes.data, buffer.nbytes)
                stack.enter_context(engines_on(cuda))
            self.engine = KVTaskEngine(
                CacheConfig(
                    tokens_per_block=self.page,
                    num_cpu_blocks=2 * BLOCKS,
                    enable_ssd=True,
                    num_ssd_blocks=4 * BLOCKS,
                    ssd_cache_dir=(directory,),
                ),
                self.device,
                namespace=NAMESPACE,
                keep_tokens=True,
            )

    def make_noise(self) -> None:
        for buffer in self.buffers:
            buffer[:] = self._random.integers(0, 256, buffer.shape, dtype=np.uint8)

    def sequence(self) -> SequenceMeta:
        return SequenceMeta(np.arange(BLOCKS * self.page), self.page, NAMESPACE)

    def random_slots(self) -> np.ndarray:
        """Of whole pages; of any tokens where no buffer has pages in rows."""
        num_slots = self.page * (self.pool.size // self.page + 1)
        if set(self.tokens_per_row) == {1}:
            return self._random.permutation(num_slots)[: BLOCKS * self.page]
        pages = self._random.permutation(num_slots // self.page)[:BLOCKS]
        return (pages[:, None] * self.page + np.arange(self.page)).ravel()

    def at(self, slots: np.ndarray) -> list[np.ndarray]:
        """What the pool holds there, buffer by buffer."""
        return [buffer[slots[::n] // n] for buffer, n in zip(self.buffers, self.tokens_per_row, strict=True)]

    def put(self, slots: np.ndarray) -> None:
        sequence = self.sequence()
        task = self.engine.create_put(None, sequence.block_keys, sequence.token_ids)
        self.engine.launch(task, slots)
        self._end(task)
        assert self.engine.flush_spills(PATIENCE_S)

    def get(self, slots: np.ndarray) -> int:
        """How many blocks came."""
        task = self.engine.create_get(self.sequence())
        assert task.plan is not None
        self.engine.launch(task, slots)
        self._end(task)
        return task.plan.num_blocks if task.status is TaskStatus.COMPLETED else 0

    def _end(self, task: Any) -> None:
        assert self.engine.wait([task], PATIENCE_S)
        self.engine.forget(task)

    def expect(self, want: list[np.ndarray]) -> None:
        """Loads into other slots what was stored, and compares the whole pool."""
        self.make_noise()
        slots = self.random_slots()
        expected = [buffer.copy() for buffer in self.buffers]
        for buffer, n, rows in zip(expected, self.tokens_per_row, want, strict=True):
            buffer[slots[::n] // n] = rows
        assert self.get(slots) == BLOCKS
        for number, (got, wanted) in enumerate(zip(self.buffers, expected, strict=True)):
            assert np.array_equal(got, wanted), f"buffer {number}"

    def close(self) -> None:
        self.engine.close()
        if self._cuda is not None:
            for buffer in self.buffers:
                self._cuda.let_go(buffer.ctypes.data)


@pytest.fixture(params=["cpu", "stand-in"])
def cuda(request: pytest.FixtureRequest) -> Iterator[FakeCuda | None]:
    if request.param == "cpu":
        yield None
        return
    cuda = FakeCuda(request.getfixturevalue("library"), 13)
    cuda.reset()
    yield cuda
    assert cuda.violations == ""


@pytest.mark.parametrize("name", POOLS)
def test_every_byte_comes_back(name: str, tmp_path: Path, cuda: FakeCuda | None) -> None:
    pool = POOLS[name]()
    cache = Cache(pool, tmp_path, cuda)
    slots = cache.random_slots()
    held = cache.at(slots)
    cache.put(slots)
    cache.expect(held)  # from the CPU tier
    cache.engine.clear_tiers(0)
    cache.expect(held)  # from SSD
    cache.close()
    cache = Cache(pool, tmp_path, cuda)
    cache.expect(held)  # after a restart
    cache.close()
    # A bit of the last buffer of the last block's last layer, of each of its rows.
    (files,) = tmp_path.glob("*.slots")
    data = bytearray(files.read_bytes())
    last = held[-1][-1].tobytes()
    at = data.rfind(last)
    assert at > 0
    data[at + len(last) - 1] ^= 1
    files.write_bytes(data)
    cache = Cache(pool, tmp_path, cuda)
    before = [buffer.copy() for buffer in cache.buffers]
    slots = cache.random_slots()
    assert cache.get(slots) == 0
    assert cache.engine.stats()["DISK2H"]["corrupt_blocks"] == 1
    # Of the damaged slice nothing has reached the pool: its last block's last row is as it was.
    last_row = slots[-1] // cache.tokens_per_row[-1]
    assert np.array_equal(cache.buffers[-1][last_row], before[-1][last_row])
    cache.close()
