"""What the transfer engine did when: a timeline for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_flexkv import _core
from sglang_flexkv.common.transfer import TransferOpGraph, TransferType

# The last ops are kept, about 300 bytes each.
_OPS_MAX = 100_000


class TransferTrace:
    """Collects ops that have ended. Times are those of the engine's own clock."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=_OPS_MAX)

    def add(
        self,
        purpose: str,
        graph: TransferOpGraph,
        result: _core.GraphResult,
        name_of: Callable[[TransferType, int], str],
    ) -> None:
        """Notes the ops of a graph that has ended.

        Args:
            purpose: what the graph was for, for example ``get``.
            name_of: see TransferEngine.
        """
        for op, outcome in zip(graph.ops, result.ops, strict=True):
            kind = name_of(op.transfer_type, op.tier)
            self._events.append(
                {
                    "name": f"{purpose} {kind}",
                    "cat": purpose,
                    "ph": "X",
                    "ts": outcome.start_s * 1e6,
                    "dur": (outcome.end_s - outcome.start_s) * 1e6,
                    "pid": 0,
                    "tid": kind,
                    "args": {
                        "graph": graph.graph_id,
                        "op": op.op_id,
                        "blocks": len(op.block_positions),
                        "follows_layers_of": op.follows_layers_of,
                        "status": outcome.status.name,
                        "error": result.error,
                    },
                }
            )

    def write(self, path: Path) -> int:
        """Writes what was collected as Chrome's trace format. Returns the number of ops.

        Raises:
            OSError: the file cannot be written.
        """
        path.write_text(
            json.dumps({"traceEvents": list(self._events), "displayTimeUnit": "ms"}), encoding="utf-8"
        )
        return len(self._events)
