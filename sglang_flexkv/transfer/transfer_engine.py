"""Runs transfer graphs. A thin face of the C++ engine, whose threads never take the GIL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_flexkv import _core
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.transfer import SlotsOnTheirWay, TransferOpGraph, TransferType
from sglang_flexkv.storage.storage_engine import StorageEngine

# Copies of each kind that may be queued before background work is refused. Blocks that wait to be stored
# are locked on the device, so they must not pile up behind a host that is slower; a link needs far less to
# stay busy.
_QUEUE_BYTES = 1 << 30

_FOREVER_S = 1e9


class TransferEngine:
    """Submits graphs and hands their results back. Every submitted graph ends exactly once."""

    def __init__(self, config: CacheConfig, storage: StorageEngine) -> None:
        self._core = _core.TransferEngine(
            storage.first.layout,
            storage.first.host,
            copy_threads=config.copy_threads,
            cuda_device=storage.device.cuda_device,
            queue_bytes=_QUEUE_BYTES,
            lower_tiers=[tier.medium for tier in storage.first.lower],
        )
        self._media = [tier.medium for tier in storage.first.lower]
        if storage.more_groups:
            self._core.set_gate_layers(storage.layers)
        for group, of_group in zip(storage.more_groups, storage.groups[1:], strict=True):
            self._core.add_group(of_group.layout, of_group.host, group.layers)

    def attach(self, number: int, tier: _core.LowerTier, group: int = 0) -> None:
        """Puts a lower tier under a group.

        Raises:
            OSError: something below the tier cannot be set up.
        """
        self._core.attach(number, tier, group=group)

    def detach(self, number: int, group: int = 0) -> None:
        """Takes a lower tier away. No op of it may be pending."""
        self._core.detach(number, group)

    def name_of(self, transfer_type: TransferType, tier: int) -> str:
        """Of such transfers, in ``stats`` and in what people see."""
        return transfer_type.named(self._media[tier - 1] if tier else "")

    def make_gate(self, num_layers: int) -> _core.LayerGate:
        """A gate for graphs of this engine. On a GPU streams can be told to wait for it."""
        return self._core.make_gate(num_layers)

    def read_slots(self, token_slots: torch.Tensor) -> SlotsOnTheirWay:
        """Token slots from the memory of the GPU that the pool is on, behind what its current stream holds.
        Nobody waits for that."""
        tensor = token_slots.detach().to(torch.int64).contiguous()
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        return SlotsOnTheirWay(self._core.read_slots(tensor.data_ptr(), tensor.numel(), stream), tensor)

    def submit(
        self,
        graph: TransferOpGraph,
        *,
        gate: _core.LayerGate | None = None,
        wait_events: Sequence[int] = (),
        timeout_s: float = 0.0,
        background: bool = False,
    ) -> int:
        """Starts a graph whose device slots are bound.

        Args:
            gate: opened layer by layer by the graph's H2D ops; or one with a single layer, opened by its D2H
                op when the device's slots may be written again.
            wait_events: CUDA events that must have happened before the device pool is touched.
            timeout_s: ops that have not started by then are cancelled; 0: no limit.
            background: nobody waits for it, so it is refused while too much of its kind is queued.

        Returns:
            The core's id of the graph, which ``poll`` reports; 0 if it was refused.
        """
        ops = []
        for op in graph.ops:
            if op.src_block_ids is None or op.dst_block_ids is None:
                raise ValueError(f"op {op.op_id} of graph {graph.graph_id} has no device slots yet")
            ops.append(
                _core.OpSpec(
                    op.transfer_type.value,
                    np.ascontiguousarray(op.src_block_ids, dtype=np.int64),
                    np.ascontiguousarray(op.dst_block_ids, dtype=np.int64),
                    keys=op.keys,
                    after_layers=op.follows_layers_of,
                    awaited=op.awaited.awaited if op.awaited is not None else None,
                    tier=op.tier,
                    group=op.group,
                )
            )
        return self._core.submit(
            ops, gate=gate, wait_events=list(wait_events), timeout_s=timeout_s, background=background
        )

    def poll(self) -> list[_core.GraphResult]:
        return self._core.poll()

    def wait(self, core_graph: int, timeout_s: float) -> bool:
        """Waits until the graph has ended. False when the time is up first."""
        return self._core.wait(core_graph, timeout_s)

    def cancel(self, core_graph: int) -> bool:
        return self._core.cancel(core_graph)

    def drain(self, timeout_s: float) -> bool:
        return self._core.drain(timeout_s)

    def drain_device(self, timeout_s: float) -> bool:
        """Waits until no copy from or to the device runs. False when the time is up first."""
        return self._core.drain_device(timeout_s)

    @property
    def cuda_note(self) -> str:
        """Which ways copies take on this GPU, and what cannot be done in the best one; empty on a CPU."""
        return self._core.cuda_note

    def stats(self) -> dict[str, dict[str, float]]:
        """Per name of transfers (``name_of``): ops_done, ops_failed, ops_cancelled, bytes, busy_s,
        queued_bytes, refused_graphs, and queue_s, the host's time for queueing copies on a GPU. Of loads
        from a lower tier also corrupt_blocks, which were not what had been stored, missing_blocks, which were
        not there any more, and layers_per_read, at most, of the last one that was followed layer by layer."""
        return self._core.stats()

    def close(self) -> None:
        """Waits for what runs, however long that takes, and stops the threads. What has not started should
        have been cancelled."""
        # Its destructor would wait with the GIL, which threads of a tier need to end what they move. In one
        # piece: a thread that comes back from C++ when the interpreter has gone takes the process down.
        self._core.drain(_FOREVER_S)
        del self._core
