"""Blocks with a recurrent state beside them: one slot at the end of a run of blocks, of several dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from group_cache import BLOCK, PATIENCE_S, SEQUENCE, GroupCache
from remote_groups import *  # noqa: F403

from sglang_flexkv.common.kv_group import KVGroup
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.kvtask import TaskStatus

STATES = 5  # slots on the device
# Of a model with four, one of which has both (as Falcon-H1's), and one neither.
FULL_LAYERS, STATE_LAYERS = (1, 3), (0, 1)


class Cache(GroupCache):
    """An engine over KV and states. What sequence i has in both is drawn from i, and its end."""

    def __init__(self, directory: Path | None, share: float = 0.25) -> None:
        self.states = [
            [torch.zeros(STATES, 4, 8, 8), torch.zeros(STATES, 24, 3, dtype=torch.bfloat16)]
            for _ in STATE_LAYERS
        ]
        group = KVGroup("state", DeviceBuffers(self.states, 1), STATE_LAYERS, 1, share, slots_per_block=1)
        super().__init__(directory, len(FULL_LAYERS), group, layers=FULL_LAYERS)

    def buffers(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Each with its first layer of the model, and a number."""
        for layers, pool in ((FULL_LAYERS, self.full), (STATE_LAYERS, self.states)):
            for layer, of_layer in zip(layers, pool, strict=True):
                for which, buffer in enumerate(of_layer):
                    yield buffer, layer, 100 * layer + which

    def content(self, number: int, blocks: int, buffer: torch.Tensor, which: int) -> torch.Tensor:
        """What a buffer holds of a sequence: of KV all of it, of a state the one at its end."""
        in_state = buffer.shape[0] == STATES
        rows = 1 if in_state else SEQUENCE * BLOCK
        seed = number * 100_000 + which + (1000 * blocks if in_state else 0)
        drawn = torch.rand((rows, *buffer.shape[1:]), generator=torch.Generator().manual_seed(seed))
        return drawn[: rows if in_state else blocks * BLOCK].to(buffer.dtype)

    def put(self, number: int, blocks: int = SEQUENCE, slot: int = 1) -> None:
        """Stores a sequence up to here and the state at its end, all the way to SSD."""
        for buffer, _, which in self.buffers():
            at = slot if buffer.shape[0] == STATES else 0
            rows = self.content(number, blocks, buffer, which)
            buffer[at : at + len(rows)] = rows
        task = self.engine.create_put(None, self.sequence(number, blocks).block_keys, on_device={1: 1})
        self.run(task, {1: np.array([slot])})
        assert self.engine.flush_spills(PATIENCE_S)

    def get(self, number: int, blocks: int = SEQUENCE, slot: int = 3) -> int:
        """How many leading blocks came, with the right bytes, and the state at their end in this slot."""
        for buffer, _, _ in self.buffers():
            buffer.fill_(-1)
        task = self.engine.create_get(self.sequence(number, blocks).block_keys)
        self.run(task, {1: np.array([slot])})
        if task.status is not TaskStatus.COMPLETED or task.plan is None:
            return 0
        came = task.plan.num_blocks
        for buffer, _, which in self.buffers():
            first = slot if buffer.shape[0] == STATES else 0
            wanted = self.content(number, came, buffer, which)
            assert torch.equal(buffer[first : first + len(wanted)], wanted)
            others = torch.cat([buffer[:first], buffer[first + len(wanted) :]])
            assert bool((others == -1).all()), "something came that nobody asked for"
        return came


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path)
    yield made
    made.close()


def test_a_state_comes_to_another_slot_from_either_tier(cache: Cache) -> None:
    cache.put(1)
    assert cache.get(1) == SEQUENCE
    cache.engine.clear_tiers(0)
    assert cache.get(1, slot=4) == SEQUENCE
    stats = cache.engine.stats()
    assert stats["SSD"]["ready"] == SEQUENCE
    assert stats["SSD state"]["ready"] == 1


def test_a_state_outlives_a_restart(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    first.put(1)
    first.put(2, 5)
    first.close()
    assert sorted(path.name for path in tmp_path.glob("*.slots")) == [
        "flexkv-rank0-state.slots",
        "flexkv-rank0.slots",
    ]
    second = Cache(tmp_path)
    assert second.get(1) == SEQUENCE
    assert second.get(2) == 5
    second.close()


def test_a_hit_ends_where_a_state_was_stored_and_nowhere_else(cache: Cache) -> None:
    cache.put(1, 5)
    cache.put(1, 9)
    assert cache.boundaries(1) == [5, 9]
    assert cache.get(1) == 9
    assert cache.get(1, 8) == 5
    assert cache.get(1, 4) == 0
    cache.put(1, 3)  # blocks that are there, and a state that is not
    assert cache.boundaries(1) == [3, 5, 9]
    assert cache.get(1, 4) == 3


def test_states_have_a_quota_of_their_own_in_each_tier(tmp_path: Path) -> None:
    cache = Cache(tmp_path, share=0.05)  # 2 in memory, 10 on SSD
    stats = cache.engine.stats()
    assert stats["CPU state"]["slots"] == 2
    assert stats["SSD state"]["slots"] == 10
    assert cache.engine.blocks_per_window == SEQUENCE
    for number in range(12):
        cache.put(number)
    assert cache.engine.stats()["SSD"]["evicted"] == 0
    assert cache.get(11) == SEQUENCE
    assert cache.get(4) == SEQUENCE  # from SSD
    assert cache.boundaries(0) == []  # its KV is there, and of no use
    assert cache.get(0) == 0
    cache.close()


def test_a_damaged_state_fails_the_load(cache: Cache, tmp_path: Path) -> None:
    cache.put(1, 5)
    cache.put(1)
    cache.engine.clear_tiers(0)
    files = tmp_path / "flexkv-rank0-state.slots"
    data = bytearray(files.read_bytes())
    for at in range(1 << 20, len(data), 4096):
        data[at] ^= 1
    files.write_bytes(data)
    assert cache.get(1) == 0
    assert cache.boundaries(1) == [5]  # not read yet
    assert cache.get(1) == 0
    assert cache.boundaries(1) == []
    cache.put(1)
    assert cache.get(1) == SEQUENCE


def test_a_layer_opens_when_kv_and_state_of_it_are_there(cache: Cache) -> None:
    cache.put(1)
    for tiers in ((), (0,)):  # from the CPU tier, then from SSD
        if tiers:
            cache.engine.clear_tiers(*tiers)
        for buffer, _, _ in cache.buffers():
            buffer.fill_(-1)
        gate = cache.engine.make_gate(1 + max(*FULL_LAYERS, *STATE_LAYERS))
        task = cache.engine.create_get(cache.sequence(1).block_keys)
        gate.expect(task.num_loads)
        cache.engine.launch(task, cache.slots, gate=gate, more_slots={1: np.array([2])})
        for layer in range(gate.num_layers):
            assert gate.wait(layer, PATIENCE_S)
            for buffer, of_layer, which in cache.buffers():
                if of_layer == layer:
                    wanted = cache.content(1, SEQUENCE, buffer, which)
                    first = 2 if buffer.shape[0] == STATES else 0
                    assert torch.equal(buffer[first : first + len(wanted)], wanted), f"layer {layer}"
        assert cache.engine.wait([task], PATIENCE_S)
        cache.engine.forget(task)


def test_a_block_takes_a_slot_at_least(cache: Cache) -> None:
    assert cache.group.slots_of(BLOCK) == 1
    assert replace(cache.group, slots_per_block=None).slots_of(BLOCK) == BLOCK
    with pytest.raises(ValueError, match="0 slots for a block"):
        replace(cache.group, slots_per_block=0)
