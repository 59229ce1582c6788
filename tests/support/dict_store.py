"""A store in a dict, and one engine over it: what of the remote tier needs no server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_flexkv import CacheConfig, KVCacheLayout, KVCacheLayoutType
from sglang_flexkv.common.block import SequenceMeta, keys_from_page_hashes, make_namespace
from sglang_flexkv.common.config import Admission
from sglang_flexkv.common.lower_tier import SharedBlocks
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.storage.remote.store import (
    Outcome,
    Session,
    Store,
    Value,
    fits,
    leading,
    outcomes_of,
)

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

    def get(
        self, names: Sequence[str], values: Sequence[Value], sizes: list[int] | None = None
    ) -> list[Outcome]:
        got = []
        for name, value in zip(names, values, strict=True):
            held = self.held.get(name)
            if held is None:
                got.append((Outcome.MISSING, 0))
                continue
            if not fits(len(held), value, sizes):
                got.append((Outcome.CORRUPT, 0))
                continue
            got.append((Outcome.GOOD, len(held)))
            for piece in leading(value, len(held)):
                piece[:] = held[: len(piece)]
                held = held[len(piece) :]
        return outcomes_of(got, sizes)

    def put(self, names: Sequence[str], values: Sequence[Value]) -> list[Outcome]:
        for name, value in zip(names, values, strict=True):
            self.held[name] = b"".join(map(bytes, value))
        return [Outcome.GOOD] * len(names)

    def close(self) -> None:
        pass


class Server:
    """One engine over the store, with a prompt of some blocks, by default one."""

    def __init__(
        self,
        namespace: bytes = NAMESPACE,
        heads: int = 2,
        blocks: int = 1,
        dtype: torch.dtype = torch.float32,
        compression: str = "none",
        shared: SharedBlocks | None = None,
        admission: Admission = Admission.ALL,
    ) -> None:
        layout = KVCacheLayout(KVCacheLayoutType.LAYERWISE, LAYERS, blocks, BLOCK, heads, 64)
        self.kv = torch.zeros(layout.kv_shape, dtype=dtype)
        self.engine = KVTaskEngine(
            CacheConfig(
                tokens_per_block=BLOCK,
                num_cpu_blocks=blocks + 3,
                remote="file:///tmp",
                remote_compression=compression,
                remote_admission=admission,
                remote_timeout_s=PATIENCE_S,
            ),
            layout.device_buffers(list(self.kv)),
            namespace=namespace,
            shared=shared,
        )
        self.num_tokens = blocks * BLOCK
        hashes = SequenceMeta(np.arange(self.num_tokens), BLOCK, NAMESPACE).block_keys
        self.keys = keys_from_page_hashes([h.tobytes().hex() for h in hashes], namespace)
        self.content = torch.randn(self.kv.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

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
        self.engine.learn(question)
        self.kv[:] = -1
        task = self.engine.create_get(self.keys)
        self.launch(task)
        if task.plan is None or task.status is not TaskStatus.COMPLETED:
            return False
        assert torch.equal(self.kv.view(torch.uint8), self.content.view(torch.uint8))
        return True
