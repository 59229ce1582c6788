"""An engine whose blocks have a part in a second pool, as the tests of groups drive it."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
        directory: None: there is a remote store in place of SSD.
        num_layers: of the first group.
        write_limit_mb_s: of SSD.
        settings: of the engine.
    """

    def __init__(
        self,
        directory: Path | None,
        num_layers: int,
        group: KVGroup,
        write_limit_mb_s: float = 0.0,
        **settings: Any,
    ) -> None:
        slots = SEQUENCE * BLOCK
        self.full = [[torch.zeros(slots, 2, 64) for _ in "kv"] for _ in range(num_layers)]
        self.group = group
        self.engine = KVTaskEngine(
            CacheConfig(
                tokens_per_block=BLOCK,
                num_cpu_blocks=2 * SEQUENCE,
                enable_ssd=directory is not None,
                num_ssd_blocks=16 * SEQUENCE if directory is not None else 0,
                ssd_cache_dir=(directory,) if directory is not None else (),
                remote=None if directory is not None else "file:///tmp",
                ssd_eviction_policy=EvictionPolicy.LRU,
                ssd_write_limit_mb_s=write_limit_mb_s,
            ),
            DeviceBuffers(self.full, 1),
            namespace=NAMESPACE,
            more_groups=[group],
            **settings,
        )
        self.slots = np.arange(slots)
        self._closed = False

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

    def bring(self, number: int, blocks: int = SEQUENCE) -> None:
        """What a store has of a sequence to the CPU tier, as far as a prompt can go on from it."""
        keys = self.sequence(number, blocks).block_keys
        inquiry = self.engine.ask(keys)
        assert inquiry is not None
        deadline_s = time.monotonic() + PATIENCE_S
        while not inquiry.is_over:
            assert time.monotonic() < deadline_s, "a question is never over"
            self.engine.poll()
        self.engine.learn(inquiry)
        fetch = self.engine.start_prefetch(keys)
        if fetch is not None:
            assert self.engine.wait(fetch.tasks, PATIENCE_S)
            self.engine.forget_fetch(fetch)

    def names(self, held: Mapping[str, bytes], number: int, group: int) -> list[str]:
        """That the blocks of a sequence have in a store, with their part in a group; see docs/remote.md."""
        namespace = NAMESPACE
        if group:
            namespace = make_namespace({"of all groups": NAMESPACE.hex(), "group": self.group.name})
        generation = held.get(f"fkv1/{namespace.hex()}/generation", bytes(24))[8:24]
        of_values = make_namespace({"keys": namespace.hex(), "generation": generation.hex()})
        fold, of_group = (np.frombuffer(each, np.uint64) for each in (NAMESPACE, namespace))
        keys = self.sequence(number).block_keys ^ fold ^ of_group
        return [f"fkv1/{of_values.hex()}/{key.tobytes().hex()}" for key in keys]

    def in_store(self, held: Mapping[str, bytes], number: int) -> int:
        """How many leading blocks of a sequence a prompt can go on behind, with what a store has."""
        window, _ = self.engine.windows[0]
        full, further = (self.names(held, number, group) for group in range(2))
        return max(
            n
            for n in range(SEQUENCE + 1)
            if all(name in held for name in (*full[:n], *further[max(0, n - window) : n]))
        )

    def close(self) -> None:
        """Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.engine.quiesce()
        self.engine.drain(PATIENCE_S)
        self.engine.check_integrity()
        self.engine.close()
