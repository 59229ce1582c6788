"""Blocks with parts in two pools of different layout: one that keeps all, and one that keeps a window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from group_cache import BLOCK, NAMESPACE, PATIENCE_S, SEQUENCE, GroupCache
from remote_groups import *  # noqa: F403
from sglang_flexkv_testing import FaultyDisk

from sglang_flexkv import _core, tierlife
from sglang_flexkv.common.kv_group import KVGroup, boundaries
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.kvtask import KVTask, TaskStatus

WINDOW = 3
ALL_LAYERS, WINDOW_LAYERS = (0, 2, 3), (1, 4)  # of a model with five


class Cache(GroupCache):
    """An engine over two pools. What sequence i has in each is drawn from i.

    The pool of the window has K and V of other widths, another dtype, and room for the window alone.
    """

    def __init__(
        self,
        directory: Path | None,
        disk: FaultyDisk | None = None,
        share: float = 0.5,
        write_limit_mb_s: float = 0.0,
    ) -> None:
        self.window = [
            [torch.zeros(WINDOW * BLOCK, 1, width, dtype=torch.float16) for width in (96, 32)]
            for _ in WINDOW_LAYERS
        ]
        group = KVGroup("window", DeviceBuffers(self.window, 1), WINDOW_LAYERS, WINDOW, share)
        super().__init__(directory, len(ALL_LAYERS), group, write_limit_mb_s, keep_tokens=True, disk=disk)
        self.window_slots = np.arange(WINDOW * BLOCK)

    def content(self, number: int, block: int, buffer: torch.Tensor, which: int) -> torch.Tensor:
        """What a buffer holds of a block: the same wherever the block is."""
        generator = torch.Generator().manual_seed(number * 1_000_000 + block * 1000 + which)
        return torch.rand((BLOCK, *buffer.shape[1:]), generator=generator).to(buffer.dtype)

    def buffers(self, group: int) -> list[torch.Tensor]:
        return [buffer for layer in (self.full, self.window)[group] for buffer in layer]

    def write(self, number: int, blocks: int) -> None:
        for group, first in ((0, 0), (1, max(0, blocks - WINDOW))):
            for which, buffer in enumerate(self.buffers(group)):
                for block in range(first, blocks):
                    at = (block - first) * BLOCK
                    buffer[at : at + BLOCK] = self.content(number, block, buffer, 100 * group + which)

    def is_right(self, number: int, blocks: int) -> bool:
        return all(
            torch.equal(
                buffer[(block - first) * BLOCK :][:BLOCK],
                self.content(number, block, buffer, 100 * group + which),
            )
            for group, first in ((0, 0), (1, max(0, blocks - WINDOW)))
            for which, buffer in enumerate(self.buffers(group))
            for block in range(first, blocks)
        )

    def put(self, number: int, blocks: int = SEQUENCE) -> None:
        """Stores a sequence up to here, and what a window holds at its end, all the way to SSD."""
        self.write(number, blocks)
        sequence = self.sequence(number, blocks)
        task = self.engine.create_put(
            None, sequence.block_keys, sequence.token_ids, on_device={1: min(WINDOW, blocks)}
        )
        assert task.plan is not None
        self.run(task, self.more_slots(task))
        assert self.engine.flush_spills(PATIENCE_S)

    def more_slots(self, task: KVTask) -> dict[int, np.ndarray]:
        blocks = task.plan.num_blocks if task.plan is not None else 0
        return {1: self.window_slots[: min(WINDOW, blocks) * BLOCK]}

    def get(self, number: int, blocks: int = SEQUENCE) -> int:
        """How many leading blocks came, with the right bytes in both pools."""
        for buffer in (*self.buffers(0), *self.buffers(1)):
            buffer.fill_(-1)
        task = self.engine.create_get(self.sequence(number, blocks))
        self.run(task, self.more_slots(task))
        if task.status is not TaskStatus.COMPLETED or task.plan is None:
            return 0
        assert self.is_right(number, task.plan.num_blocks)
        return task.plan.num_blocks


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path)
    yield made
    made.close()


def test_which_prefixes_a_window_lets_a_prompt_go_on_from() -> None:
    held = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    assert boundaries(held, 1).tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert boundaries(held, 2).tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0]
    assert boundaries(held, 3).tolist() == [1, 1, 1, 0, 0, 0, 1, 0, 0]
    assert boundaries(np.ones(4, bool), 9).all()
    assert boundaries(np.zeros(2, bool), 1).tolist() == [1, 0, 0]
    assert boundaries(np.zeros(0, bool), 1).tolist() == [1]
    rng = np.random.default_rng(1)
    for _ in range(200):
        held, window = rng.random(rng.integers(0, 20)) < 0.7, int(rng.integers(1, 6))
        wanted = [held[max(0, n - window) : n].all() for n in range(len(held) + 1)]
        assert boundaries(held, window).tolist() == wanted


def test_what_is_kept_of_a_long_run(cache: Cache) -> None:
    group = replace(cache.group, every_blocks=10)
    assert group.kept(0) == []
    assert group.kept(2) == [(0, 2)]
    assert group.kept(12) == [(6, 12)]  # the windows before 10 and 12 are one
    assert group.kept(25) == [(6, 10), (16, 20), (21, 25)]


def test_both_parts_come_back_from_the_cpu_tier(cache: Cache) -> None:
    cache.put(1)
    assert cache.get(1) == SEQUENCE
    stats = cache.engine.stats()
    assert stats["CPU"]["ready"] == SEQUENCE
    assert stats["CPU window"]["ready"] == WINDOW


def test_both_parts_come_back_from_ssd(cache: Cache) -> None:
    cache.put(1)
    cache.engine.clear_tiers(0)
    assert cache.get(1) == SEQUENCE
    stats = cache.engine.stats()
    assert stats["SSD"]["ready"] == SEQUENCE
    assert stats["SSD window"]["ready"] == WINDOW
    assert stats["DISK2H"]["ops_done"] == 2


def test_both_parts_come_back_after_a_restart(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    first.put(1)
    first.put(2, SEQUENCE // 2)
    first.close()
    second = Cache(tmp_path)
    assert second.get(1) == SEQUENCE
    assert second.get(2) == SEQUENCE // 2
    second.close()


def test_a_hit_ends_where_a_window_was_stored(cache: Cache) -> None:
    cache.put(1, 5)
    assert cache.get(1) == 5
    assert cache.boundaries(1) == [5]
    cache.put(1, 9)  # a turn more
    assert cache.boundaries(1) == [5, 9]
    assert cache.get(1, 12) == 9
    assert cache.get(1, 8) == 5
    assert cache.get(1, 4) == 0
    cache.put(1, 2)  # which with the window before 5 is all that there is
    assert cache.boundaries(1) == [1, 2, 3, 4, 5, 9]
    assert cache.get(1, 4) == 4


def test_a_window_that_had_to_go_is_no_hit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, share=0.1)  # room for six windows on SSD, and for sixteen sequences
    for number in range(12):
        cache.put(number)
    assert cache.engine.stats()["SSD"]["evicted"] == 0
    assert cache.boundaries(11) == [SEQUENCE]
    assert cache.boundaries(0) == []
    assert cache.get(0) == 0
    assert cache.engine.pin(cache.sequence(0).block_keys)[0] == 0
    cache.close()


def test_what_is_pinned_of_both_parts_stays(cache: Cache) -> None:
    cache.put(1)
    lease, pinned = cache.engine.pin(cache.sequence(1).block_keys)
    assert pinned.ends is not None
    assert pinned.ends.tolist() == [SEQUENCE]
    assert len(pinned.tiers) == SEQUENCE
    cache.engine.clear_tiers(1)
    for number in range(2, 8):
        cache.put(number, SEQUENCE // 2)
    stats = cache.engine.stats()
    assert stats["CPU"]["evicted"] > 0
    assert stats["CPU window"]["evicted"] > 0
    assert cache.get(1) == SEQUENCE
    cache.engine.unpin(lease)


def test_each_part_has_a_quota_of_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path, share=0.1)
    stats = cache.engine.stats()
    assert stats["CPU"]["slots"] == 2 * SEQUENCE
    assert stats["CPU window"]["slots"] == 3  # a tenth, rounded up
    assert stats["SSD window"]["slots"] == 20
    for number in range(4):
        cache.put(number)
    assert cache.get(3) == SEQUENCE
    assert cache.get(0) == SEQUENCE  # its window from SSD
    cache.close()


def test_a_put_stores_each_part(cache: Cache) -> None:
    """Whoever waits for its gate waits for all of them."""
    sequence = cache.sequence(0)
    task = cache.engine.create_put(None, sequence.block_keys, sequence.token_ids, on_device={1: WINDOW})
    assert task.num_stores == 2
    cache.engine.cancel(task)


def test_the_limit_on_writes_to_ssd_is_of_all_parts_together(tmp_path: Path) -> None:
    cache = Cache(tmp_path, write_limit_mb_s=0.5)
    begin_s = time.monotonic()
    for number in range(4):
        cache.put(number, WINDOW)
    took_s = time.monotonic() - begin_s
    written = cache.engine.stats()["H2DISK"]["bytes"]
    largest = cache.engine.slot_bytes
    assert written > 1.1 * 4 * WINDOW * largest  # both parts
    # A short burst is free, and the last block may go into debt.
    assert took_s > (written - largest) / 0.5e6 - 0.1
    cache.close()


def test_a_forward_gets_the_layers_of_both_pools_in_their_order(cache: Cache) -> None:
    cache.put(1)
    for tier in ((), (0,)):  # from the CPU tier, then from SSD
        if tier:
            cache.engine.clear_tiers(*tier)
        for buffer in (*cache.buffers(0), *cache.buffers(1)):
            buffer.fill_(-1)
        gate = cache.engine.make_gate(len(ALL_LAYERS) + len(WINDOW_LAYERS))
        task = cache.engine.create_get(cache.sequence(1))
        assert task.num_loads == 2
        gate.expect(task.num_loads)
        cache.engine.launch(task, cache.slots, gate=gate, more_slots={1: cache.window_slots})
        first = {0: 0, 1: SEQUENCE - WINDOW}
        for layer in range(gate.num_layers):
            assert gate.wait(layer, PATIENCE_S)
            group = int(layer in WINDOW_LAYERS)
            at = (ALL_LAYERS, WINDOW_LAYERS)[group].index(layer)
            for which, buffer in enumerate((cache.full, cache.window)[group][at]):
                for block in range(first[group], SEQUENCE):
                    wanted = cache.content(1, block, buffer, 100 * group + 2 * at + which)
                    found = buffer[(block - first[group]) * BLOCK :][:BLOCK]
                    assert torch.equal(found, wanted), f"layer {layer} was opened before it was there"
        assert cache.engine.wait([task], PATIENCE_S)
        cache.engine.forget(task)


def test_damage_in_one_part_fails_the_load_and_the_request_computes(tmp_path: Path) -> None:
    disk = FaultyDisk(1)
    cache = Cache(tmp_path, disk)
    cache.put(1)
    cache.engine.clear_tiers(0)
    (files,) = tmp_path.glob("*-window.slots")
    data = bytearray(files.read_bytes())
    for at in range(1 << 20, len(data), 4096):
        data[at] ^= 1
    files.write_bytes(data)
    assert cache.get(1) == 0
    stats = cache.engine.stats()
    assert stats["DISK2H"]["corrupt_blocks"] == WINDOW
    assert stats["SSD window"]["ready"] == 0
    assert cache.boundaries(1) == []
    cache.put(1)
    assert cache.get(1) == SEQUENCE
    cache.close()


def test_a_tier_that_fails_for_one_part_leaves_no_half_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tierlife, "_CHECK_EVERY_S", 0.0)
    disk = FaultyDisk(1)
    cache = Cache(tmp_path, disk)
    for number in range(6):
        cache.put(number)
    disk.set_fault("read", 0.5, 5)
    came = [cache.get(number) for number in [*range(6), *range(6)]]
    assert set(came) <= {0, SEQUENCE}
    disk.clear_faults()
    cache.close()


def test_what_is_queued_to_be_read_counts_each_part_with_its_bytes(tmp_path: Path) -> None:
    disk = FaultyDisk(1)
    cache = Cache(tmp_path, disk)
    cache.put(1)
    cache.engine.clear_tiers(0)
    disk.set_fault("read", 1.0, delay_s=PATIENCE_S * 2)
    fetch = cache.engine.start_prefetch(cache.sequence(1).block_keys)
    assert fetch is not None
    (task,) = fetch.tasks
    (queued,) = cache.engine.queued_read_bytes().values()
    of_block, of_window = (
        sum(buffer[:BLOCK].nbytes for buffer in cache.buffers(group)) for group in range(2)
    )
    assert queued == SEQUENCE * of_block + WINDOW * of_window
    disk.clear_faults()
    assert cache.engine.wait([task], PATIENCE_S)
    cache.engine.forget_fetch(fetch)
    assert cache.engine.queued_read_bytes().total() == 0
    cache.close()


def test_files_of_one_group_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    first.put(1)
    first.close()
    names = sorted(path.name for path in tmp_path.glob("*.slots"))
    assert names == ["flexkv-rank0-window.slots", "flexkv-rank0.slots"]
    slots = [tmp_path / name for name in names]
    window, full = (_core.SsdReader(str(path), str(path.with_suffix(".journal"))).namespace for path in slots)
    assert full == NAMESPACE
    assert window != full


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "A B"}, "name of a KV group"),
        ({"layers": (1,)}, "1 layers, and 2 in its pool"),
        ({"window_blocks": 0}, "holds nothing"),
        ({"share": 0.0}, "share is above 0"),
        ({"every_blocks": 0}, "every 0 blocks is none"),
    ],
)
def test_what_makes_no_group_is_refused(cache: Cache, change: dict, message: str) -> None:
    good = {"name": "w", "device": cache.group.device, "layers": (0, 1), "window_blocks": 1}
    KVGroup(**good)
    with pytest.raises(ValueError, match=message):
        KVGroup(**{**good, **change})
