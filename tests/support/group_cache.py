"""An engine whose blocks have a part in a second pool, as the tests of groups drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang_flexkv import CacheConfig
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.common.config import EvictionPolicy
from sglang_flexkv.common.kv_group import KVGroup
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.kvtask import KVTask, KVTaskEngine

BLOCK = 16
SEQUENCE = 12  # blocks
NAMESPACE = make_namespace({"test": "groups"})
PATIENCE_S = 60.0


class GroupCache:
    """A CPU tier for two sequences and an SSD tier for sixteen, over pools with room for one.

    Args:
        num_layers: of the first group.
        settings: of the engine.
    """

    def __init__(self, directory: Path, num_layers: int, group: KVGroup, **settings: Any) -> None:
        slots = SEQUENCE * BLOCK
        self.full = [[torch.zeros(slots, 2, 64) for _ in "kv"] for _ in range(num_layers)]
        self.group = group
        self.engine = KVTaskEngine(
            CacheConfig(
                tokens_per_block=BLOCK,
                num_cpu_blocks=2 * SEQUENCE,
                enable_ssd=True,
                num_ssd_blocks=16 * SEQUENCE,
                ssd_cache_dir=(directory,),
                ssd_eviction_policy=EvictionPolicy.LRU,
            ),
            DeviceBuffers(self.full, 1),
            namespace=NAMESPACE,
            more_groups=[group],
            **settings,
        )
        self.slots = np.arange(slots)

    def sequence(self, number: int, blocks: int = SEQUENCE) -> SequenceMeta:
        return SequenceMeta(np.arange(blocks * BLOCK) + number * 10_000, BLOCK, NAMESPACE)

    def run(self, task: KVTask, more_slots: dict[int, np.ndarray]) -> None:
        """Until it has ended."""
        self.engine.launch(task, self.slots, more_slots=more_slots)
        assert self.engine.wait([task], PATIENCE_S)
        self.engine.forget(task)

    def boundaries(self, number: int) -> list[int]:
        """Prefixes of a sequence from which a prompt can go on, in blocks."""
        found: list[int] = self.engine.match(self.sequence(number).block_keys).boundaries.tolist()
        return found

    def close(self) -> None:
        self.engine.quiesce()
        self.engine.drain(PATIENCE_S)
        self.engine.check_integrity()
        self.engine.close()
