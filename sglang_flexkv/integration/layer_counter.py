"""What SGLang's KV pool asks before it hands a layer to attention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from sglang_flexkv import _core

logger = logging.getLogger(__name__)

# A layer that takes this long will not come; the load is reported as failed then.
_LAYER_TIMEOUT_S = 60.0
_LOOK_AFTER_S = 0.1


class LayerLoadCounter:
    """One gate per batch that loads. The pool's accessors wait for the layer they are about to read, with the
    GIL released, so that the rest of the scheduler's threads go on."""

    def __init__(self, num_layers: int, look_after: Callable[[], object]) -> None:
        """
        Args:
            look_after: called now and then while a forward waits on the host: nobody else looks after the
                tiers meanwhile, and a disk that hangs must be noticed.
        """
        self.num_layers = num_layers
        self._look_after = look_after
        self.consumer_index = -1
        self._gates: dict[int, _core.LayerGate] = {}
        self._next_index = 0
        self._went_on: set[int] = set()

    def open_batch(self) -> tuple[int, _core.LayerGate]:
        """A gate for the loads of one batch and the index under which the forward will wait for it."""
        index = self._next_index
        self._next_index += 1
        gate = _core.LayerGate(self.num_layers)
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
        self.consumer_index = index

    def wait_until(self, layer: int) -> None:
        """SGLang's call before each use of a layer. A failed load does not raise here: the forward runs on
        and its output is dropped when ``finish_layer_wise_loading`` reports the failure."""
        gate = self._gates.get(self.consumer_index)
        if gate is None or self.consumer_index in self._went_on:
            return
        deadline = time.monotonic() + _LAYER_TIMEOUT_S
        while not gate.wait(layer, _LOOK_AFTER_S) and not gate.failed:
            self._look_after()
            if time.monotonic() > deadline:
                if self.consumer_index not in self._went_on:
                    logger.error("KV of layer %d did not arrive in %.0f s", layer, _LAYER_TIMEOUT_S)
                self._went_on.add(self.consumer_index)
                return

    def reset(self) -> None:
        self._gates.clear()
        self.consumer_index = -1
