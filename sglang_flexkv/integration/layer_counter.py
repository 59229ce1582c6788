"""What SGLang's KV pool asks before it hands a layer to attention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sglang_flexkv import _core

logger = logging.getLogger(__name__)

# A layer that takes this long will not come; the loads of its batch are reported as failed then.
_LAYER_TIMEOUT_S = 60.0
_LOOK_AFTER_S = 0.1


class LayerLoadCounter:
    """One gate per batch that loads. The pool's accessors ask for the layer they are about to read.

    On a GPU the stream that is going to read it is told to wait for the layer, and the host goes on: by the
    time the copy lands, the whole forward may be queued. A stream never waits for a copy that is not on a
    stream itself, so the host waits for that: for a layer that is yet to come from SSD. On a CPU the accessor
    waits for the layer. Both with the GIL released, so that the rest of the scheduler's threads go on. A CPU
    remembers how many layers it found open and does not ask for those: with KV running through the caches,
    asking costs more than it seems.

    While SGLang captures a CUDA graph nothing is issued: no batch is loading then and ``consumer_index`` is
    -1. A captured wait would wait for a gate of the past at every replay. Prefill graphs are replayed after a
    wait for the last layer, which SGLang asks for outside the graph.

    Args:
        make_gate: for a number of layers, see ``TransferEngine.make_gate``.
        look_after: called now and then while a forward waits on the host: nobody else looks after the tiers
            meanwhile, and a disk that hangs must be noticed.
        current_stream: the CUstream on which the caller of ``wait_until`` queues work; None on a CPU.
        before_forward: called before each forward, by the thread that is about to queue it.
        by_layer: attention asks for every layer before it reads it. If not, a forward waits for all of them
            before its first one.
    """

    def __init__(
        self,
        num_layers: int,
        make_gate: Callable[[int], _core.LayerGate],
        look_after: Callable[[], object],
        current_stream: Callable[[], int] | None = None,
        before_forward: Callable[[], object] = lambda: None,
        *,
        by_layer: bool = True,
    ) -> None:
        self.num_layers = num_layers
        self._look_after = look_after
        self.consumer_index = -1
        self._make_gate = make_gate
        self._current_stream = current_stream
        self._before_forward = before_forward
        self._by_layer = by_layer
        self._gates: dict[int, _core.LayerGate] = {}
        self._next_index = 0
        self._went_on: set[int] = set()
        self._open_layers = 0  # of the consumer's gate, when a CPU last waited for it

    def open_batch(self) -> tuple[int, _core.LayerGate]:
        """A gate for the loads of one batch and the index under which the forward will wait for it."""
        index = self._next_index
        self._next_index += 1
        gate = self._make_gate(self.num_layers)
        self._gates[index] = gate
        return index, gate

    def close_batch(self, index: int) -> bool:
        """False if a forward went on without a layer, because it took too long."""
        self._gates.pop(index, None)
        went_on = index in self._went_on
        self._went_on.discard(index)
        return not went_on

    def set_consumer(self, index: int) -> None:
        """SGLang's call before each forward: the batch whose loads it depends on, -1 for none."""
        self._before_forward()
        self._use(index)
        if not self._by_layer:
            self.wait_until(self.num_layers - 1)

    def _use(self, index: int) -> None:
        self.consumer_index = index
        self._open_layers = 0

    def wait_until(self, layer: int) -> None:
        """SGLang's call before each use of a layer. A failed load does not raise here: the forward runs on,
        and the output of its request is dropped when ``finish_layer_wise_loading`` reports the failure."""
        if layer < self._open_layers:
            return
        gate = self._gates.get(self.consumer_index)
        if gate is None or self.consumer_index in self._went_on:
            return
        if self._wait(gate, layer):
            return
        deadline = time.monotonic() + _LAYER_TIMEOUT_S
        while time.monotonic() < deadline:
            self._look_after()
            if self._wait(gate, layer):
                return
        logger.error("KV of layer %d did not arrive in %.0f s", layer, _LAYER_TIMEOUT_S)
        self._went_on.add(self.consumer_index)

    def _wait(self, gate: _core.LayerGate, layer: int) -> bool:
        if self._current_stream is None:
            self._open_layers = gate.wait(layer, _LOOK_AFTER_S)
            return self._open_layers > layer
        return gate.stream_wait(layer, self._current_stream(), _LOOK_AFTER_S)

    def reset(self) -> None:
        self._gates.clear()
        self._use(-1)
