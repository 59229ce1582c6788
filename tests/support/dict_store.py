"""A store in a dict, and one engine over it: what of the remote tier needs no server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType
from sglang_flexkv.common.block import SequenceMeta, make_namespace
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.storage.remote.store import Outcome, Session, Store, Value

BLOCK, LAYERS = 16, 3
NAMESPACE = make_namespace({"test": "values"})
PATIENCE_S = 60.0


class Values(Store, Session):
    """A store in a dict."""

    def __init__(self) -> None:
        self.name = "dict"
        self.held: dict[str, bytes] = {}

    def open(self) -> None:
        pass

    def session(self) -> Session:
        return self

    def exists(self, names: Sequence[str]) -> list[bool]:
        return [name in self.held for name in names]

    def get(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        outcomes = []
        for name, value in zip(names, values, strict=True):
            held = self.held.get(name)
            outcomes.append(Outcome.MISSING if held is None else Outcome.GOOD)
            if held is not None and len(held) != sum(map(len, value)):
                outcomes[-1] = Outcome.CORRUPT
            elif held is not None:
                for piece in value:
                    piece[:] = held[: len(piece)]
                    held = held[len(piece) :]
        return outcomes

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        for name, value in zip(names, values, strict=True):
            self.held[name] = b"".join(map(bytes, value))
        return [Outcome.GOOD] * len(names)

    def close(self) -> None:
        pass


class Server:
    """One engine over the store, with a prompt of some blocks, by default one."""

    def __init__(self, namespace: bytes = NAMESPACE, heads: int = 2, blocks: int = 1) -> None:
        layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, LAYERS, blocks, BLOCK, heads, 64)
        self.kv = torch.zeros(layout.kv_shape)
        self.engine = KVTaskEngine(
            CacheConfig(tokens_per_block=BLOCK, num_cpu_blocks=blocks + 3, remote="file:///tmp"),
            layout.device_buffers(list(self.kv)),
            namespace=namespace,
        )
        self.num_tokens = blocks * BLOCK
        self.keys = SequenceMeta(np.arange(self.num_tokens), BLOCK, NAMESPACE).block_keys
        self.content = torch.rand(self.kv.shape, generator=torch.Generator().manual_seed(1))

    def launch(self, task: KVTask) -> None:
        self.engine.launch(task, np.arange(self.num_tokens))
        assert self.engine.wait([task], PATIENCE_S)
        self.engine.forget(task)

    def put(self) -> None:
        self.kv[:] = self.content
        self.launch(self.engine.create_put(None, self.keys))
        assert self.engine.flush_spills(PATIENCE_S)

    def get(self) -> bool:
        """Whether it comes from the store."""
        self.engine.clear_tiers(0)
        question = self.engine.ask(self.keys)
        assert question is not None
        while not question.is_over:
            self.engine.poll()
        self.engine.learn(question, None)
        self.kv[:] = -1
        task = self.engine.create_get(self.keys)
        self.launch(task)
        if task.plan is None or task.status is not TaskStatus.COMPLETED:
            return False
        assert torch.equal(self.kv, self.content)
        return True
