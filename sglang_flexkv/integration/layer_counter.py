"""What SGLang's KV pool asks before it hands a layer to attention."""

from __future__ import annotations

import logging

from sglang_flexkv import _core

logger = logging.getLogger(__name__)

# A copy out of pinned memory that takes this long will not come; the load is reported as failed then.
_LAYER_TIMEOUT_S = 60.0


class LayerLoadCounter:
    """One gate per batch that loads. The pool's accessors wait for the layer they are about to read, with the
    GIL released, so that the rest of the scheduler's threads go on."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.consumer_index = -1
        self._gates: dict[int, _core.LayerGate] = {}
        self._next_index = 0

    def open_batch(self) -> tuple[int, _core.LayerGate]:
        """A gate for the loads of one batch and the index under which the forward will wait for it."""
        index = self._next_index
        self._next_index += 1
        gate = _core.LayerGate(self.num_layers)
        self._gates[index] = gate
        return index, gate

    def close_batch(self, index: int) -> None:
        self._gates.pop(index, None)

    def set_consumer(self, index: int) -> None:
        """SGLang's call before each forward: the batch whose loads it depends on, -1 for none."""
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """SGLang's call before each use of a layer. A failed load does not raise here: the forward runs on
        and its output is dropped when ``finish_layer_wise_loading`` reports the failure."""
        gate = self._gates.get(self.consumer_index)
        if gate is not None and not gate.wait(layer, _LAYER_TIMEOUT_S):
            logger.error("KV of layer %d did not arrive; its requests will be aborted", layer)

    def reset(self) -> None:
        self._gates.clear()
        self.consumer_index = -1
