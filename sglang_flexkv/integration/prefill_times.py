"""How long the model takes for its prefills, measured as they run."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from sglang_flexkv.cache.load_or_recompute import PrefillCost

Spans = list[tuple[int, int]]  # of each request of a batch: first token that is computed, and the end


class PrefillTimes:
    """Tells a PrefillCost what batches took. On a GPU by events in the forward's stream, which are read when
    they have happened: nothing waits for them.

    Args:
        on_gpu: whether forwards run on a stream.
        forward_stream: which; None: the current one.
    """

    def __init__(self, cost: PrefillCost, on_gpu: bool, forward_stream: Any | None = None) -> None:
        self._cost = cost
        self._on_gpu = on_gpu
        self._stream = forward_stream
        self._start: Any = None
        self._running: deque[tuple[Any, Any, Spans]] = deque()

    def start(self) -> None:
        """The next forward is about to be started."""
        self._start = self._mark()
        while self._running and self._running[0][1].query():
            before, after, spans = self._running.popleft()
            self._cost.observe(spans, before.elapsed_time(after) / 1e3)

    @property
    def started(self) -> bool:
        """Whether the forward that was started last is one to learn from."""
        return self._start is not None

    def cancel(self) -> None:
        """The next forward is none to learn from."""
        self._start = None

    def end(self, spans: Spans) -> None:
        """The forward was started, and on a CPU has ended."""
        start, self._start = self._start, None
        if any(begin >= end for begin, end in spans):
            return
        if not self._on_gpu:
            self._cost.observe(spans, time.perf_counter() - start)
        else:
            self._running.append((start, self._mark(), spans))

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event
