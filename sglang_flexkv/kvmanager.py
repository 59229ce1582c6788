"""KVManager: the library's face. Caches the KV of token sequences for any paged pool of torch tensors.

::

    manager = KVManager(model_config, cache_config)
    manager.register_kv_caches(kv_caches, layout)
    manager.start()

    task = manager.put_async(token_ids, slot_mapping)
    manager.wait([task])

    task, mask = manager.get_match(token_ids)
    manager.launch([task], [slot_mapping])
    manager.wait([task])

Slots of the device pool are the caller's: they must not be reused for anything else while a task that names
them runs. Thread-safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch

from sglang_flexkv.cache.cache_engine import TransferPlan
from sglang_flexkv.common.block import BlockKeys, SequenceMeta, TokenIds
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.errors import ConfigError
from sglang_flexkv.common.storage import DeviceBuffers, KVCacheLayout, ModelConfig
from sglang_flexkv.common.transfer import Slots
from sglang_flexkv.kvtask import KVTask, KVTaskEngine, TaskStatus
from sglang_flexkv.storage.ssd_identity import Identity, digest

Mask = npt.NDArray[np.bool_]

_WAIT_DEFAULT_S = 60.0


class KVResponseStatus(Enum):
    SUCCESS = "success"
    FAILED = "failed"  # what the mask says did not arrive: treat it as a miss
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"  # still running when the wait was over


@dataclass(frozen=True)
class KVResponse:
    """Outcome of a task.

    ``return_mask`` is bool [tokens]: for a get the tokens whose KV is on the device now, for a put those that
    were newly stored.
    """

    task_id: int
    status: KVResponseStatus
    return_mask: Mask
    error: str = ""


@dataclass(frozen=True)
class _Span:
    """The part of a sequence that a task is about."""

    first_block: int
    num_tokens: int  # of the whole sequence
    tokens_per_block: int

    def mask(self, plan: TransferPlan | None) -> Mask:
        """The tokens that a plan copies, bool [tokens]."""
        mask = np.zeros(self.num_tokens, dtype=bool)
        whole = self.num_tokens - self.num_tokens % self.tokens_per_block
        by_block = mask[:whole].reshape(-1, self.tokens_per_block)
        for op in plan.graph.ops if plan is not None else ():
            if op.transfer_type.touches_device:
                by_block[self.first_block + op.block_positions] = True
        return mask

    def places(self, plan: TransferPlan | None, num_slots: int) -> Slots | None:
        """Which blocks of a slot mapping as the user gives it the plan's blocks are, int64 [blocks]; None if
        there is no plan. Blocks that are not copied may be anything.

        Raises:
            ValueError: the mapping has not as many slots as it must.
        """
        if plan is None:
            return None
        if num_slots == self.num_tokens:
            return np.arange(self.first_block, self.first_block + plan.num_blocks)
        mask = self.mask(plan)
        if num_slots == int(mask.sum()):
            whole = self.num_tokens - self.num_tokens % self.tokens_per_block
            copied = mask[: whole : self.tokens_per_block]
            return (np.cumsum(copied) - 1)[self.first_block : self.first_block + plan.num_blocks]
        raise ValueError(
            f"a slot mapping for this task has {self.num_tokens} slots (the sequence) or "
            f"{int(mask.sum())} (the mask), not {num_slots}"
        )


@dataclass
class _Request:
    task: KVTask
    span: _Span


class KVManager:
    """Cache of one device pool.

    Args:
        model_config: the shape of the model's KV.
        cache_config: the tiers.
        tenant: sequences of different tenants never share a block.

    Raises:
        ConfigError: a setting is impossible on this machine.
    """

    def __init__(self, model_config: ModelConfig, cache_config: CacheConfig, tenant: str = "") -> None:
        self.model_config = model_config
        if cache_config.remote is not None:
            # Its keys are fast hashes of tokens that this process compares; what others store it could not.
            raise ConfigError(
                "remote: a store is shared under SGLang only; leave it out of the library's settings"
            )
        self.cache_config = cache_config
        fields = {
            **model_config.model_dump(),
            "tokens_per_block": cache_config.tokens_per_block,
            "tenant": digest(tenant),  # may be anything, and is kept on disk
            "format": 1,
        }
        self._identity = Identity({name: str(value) for name, value in fields.items()})
        self.namespace = self._identity.namespace
        self._device: DeviceBuffers | None = None
        self._engine: KVTaskEngine | None = None
        self._requests: dict[int, _Request] = {}

    def register_kv_caches(
        self, kv_caches: torch.Tensor | Sequence[torch.Tensor], layout: KVCacheLayout
    ) -> None:
        """Names the device pool. To be called once, before the first task.

        Raises:
            ValueError: the tensors do not have the layout's shape, or the layout is not the model's.
        """
        if self._device is not None:
            raise RuntimeError("a device pool is registered already")
        model = self.model_config
        if (layout.num_layer, layout.num_head, layout.head_size, layout.is_mla) != (
            model.num_layers,
            model.num_kv_heads,
            model.head_size,
            model.use_mla,
        ):
            raise ValueError(f"the layout {layout} is not that of the model {model}")
        self._device = layout.device_buffers(kv_caches)

    def start(self) -> None:
        """Sets the tiers up. Without a registered pool this waits until the first task needs it."""
        if self._device is not None and self._engine is None:
            self._engine = KVTaskEngine(
                self.cache_config,
                self._device,
                namespace=self.namespace,
                label=self.model_config.model_name or "a model without a name",
                identity=self._identity,
                keep_tokens=True,
            )

    @property
    def engine(self) -> KVTaskEngine:
        """The engine under this manager.

        Raises:
            RuntimeError: no device pool was registered.
        """
        self.start()
        if self._engine is None:
            raise RuntimeError("register_kv_caches(kv_caches, layout) must name the device pool first")
        return self._engine

    # ---- get ----

    def get_match(
        self, token_ids: npt.ArrayLike, token_mask: npt.ArrayLike | None = None
    ) -> tuple[int, Mask]:
        """Finds out what is held and pins it for a task.

        Args:
            token_ids: int [tokens].
            token_mask: bool [tokens]; False for a leading part that the device has already. Whole blocks.

        Returns:
            The task (launch or cancel it) and a mask of the tokens it will bring, bool [tokens].
        """
        sequence, span = self._sequence(token_ids, token_mask)
        first = span.first_block
        if first:
            task = self.engine.create_get(sequence.block_keys[first:], sequence.tokens_from(first))
        else:
            task = self.engine.create_get(sequence)
        return self._add(task, span)

    def get_async(
        self, token_ids: npt.ArrayLike, slot_mapping: object, token_mask: npt.ArrayLike | None = None
    ) -> int:
        """``get_match`` and ``launch`` in one."""
        task_id, _ = self.get_match(token_ids, token_mask)
        self.launch([task_id], [slot_mapping])
        return task_id

    # ---- put ----

    def put_match(
        self, token_ids: npt.ArrayLike, token_mask: npt.ArrayLike | None = None
    ) -> tuple[int, Mask]:
        """Finds out what is not held and reserves room for it.

        Args:
            token_mask: bool [tokens]; False for a leading part that shall not be looked at. Whole blocks.

        Returns:
            The task (launch or cancel it) and a mask of the tokens it will store, bool [tokens].
        """
        sequence, span = self._sequence(token_ids, token_mask)
        return self._add(self.engine.create_put(*self._rest(sequence, span.first_block)), span)

    def put_async(
        self, token_ids: npt.ArrayLike, slot_mapping: object, token_mask: npt.ArrayLike | None = None
    ) -> int:
        """``put_match`` and ``launch`` in one. With an SSD tier it is put off while so much waits for the
        disk that blocks would be lost to it: nothing is copied before there is room, which ``wait`` and every
        other call see to."""
        sequence, span = self._sequence(token_ids, token_mask)
        slots = self.engine.token_slots(slot_mapping)
        task = self.engine.put(
            *self._rest(sequence, span.first_block), slots, lambda plan: span.places(plan, len(slots))
        )
        return self._add(task, span)[0]

    # ---- running ----

    def launch(self, task_ids: Sequence[int], slot_mappings: Sequence[object]) -> None:
        """Starts tasks. One that runs or has ended already is left alone.

        Args:
            slot_mappings: per task the device token slots, int [tokens] (of the whole sequence), or only
                those of the tokens in the task's mask.
        """
        if len(task_ids) != len(slot_mappings):
            raise ValueError("launch needs one slot mapping per task")
        for task_id, mapping in zip(task_ids, slot_mappings, strict=True):
            request = self._request(task_id)
            if request.task.status is TaskStatus.READY:
                slots = self.engine.token_slots(mapping)
                places = request.span.places(request.task.plan, len(slots))
                self.engine.launch(request.task, slots, places=places)

    def wait(self, task_ids: Sequence[int], timeout_s: float = _WAIT_DEFAULT_S) -> dict[int, KVResponse]:
        """Waits for tasks and takes their results: a task that ended is forgotten. One that has not ended in
        time is reported as TIMEOUT and can be waited for again."""
        requests = [self._request(task_id) for task_id in task_ids]
        self.engine.wait([request.task for request in requests], timeout_s)
        return {request.task.task_id: self._respond(request) for request in requests}

    def try_wait(self, task_ids: Sequence[int]) -> dict[int, KVResponse]:
        """Results of those of the tasks that have ended, without waiting."""
        self.engine.poll()
        requests = [self._request(task_id) for task_id in task_ids]
        return {r.task.task_id: self._respond(r) for r in requests if r.task.ended}

    def cancel(self, task_ids: Sequence[int]) -> None:
        """Cancels tasks. A running one ends soon, and its slots are in use until ``wait`` says so."""
        for task_id in task_ids:
            self.engine.cancel(self._request(task_id).task)

    def clear(self) -> None:
        """Forgets everything that is cached, for instance because the model's weights changed."""
        self.engine.clear()

    def shutdown(self) -> None:
        """Ends everything and gives memory and files back. Safe to call twice.

        Raises:
            BaseException: that of the first step that failed, when all others are done.
        """
        engine, self._engine, self._device = self._engine, None, None
        if engine is not None:
            engine.close()

    # ---- inside ----

    def _sequence(
        self, token_ids: npt.ArrayLike, token_mask: npt.ArrayLike | None
    ) -> tuple[SequenceMeta, _Span]:
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.cpu().numpy()
        sequence = SequenceMeta(token_ids, self.cache_config.tokens_per_block, self.namespace)
        count, size = len(sequence.token_ids), sequence.tokens_per_block
        if token_mask is None:
            return sequence, _Span(0, count, size)
        mask = np.asarray(token_mask, dtype=bool)
        skipped = int(np.argmax(mask)) if mask.any() else len(mask)
        if len(mask) != len(sequence.token_ids) or not mask[skipped:].all():
            raise ValueError("token_mask must have one value per token: False for a leading part, then True")
        # A part of a block cannot be brought alone: the block that the mask cuts is looked at as a whole.
        return sequence, _Span(skipped // size, count, size)

    @staticmethod
    def _rest(sequence: SequenceMeta, first: int) -> tuple[BlockKeys | None, BlockKeys, TokenIds]:
        """What to store of a sequence: the key before the block ``first``, keys and tokens from it on."""
        keys = sequence.block_keys
        return keys[first - 1] if first else None, keys[first:], sequence.tokens_from(first)

    def _add(self, task: KVTask, span: _Span) -> tuple[int, Mask]:
        self._requests[task.task_id] = _Request(task, span)
        return task.task_id, span.mask(task.plan)

    def _request(self, task_id: int) -> _Request:
        try:
            return self._requests[task_id]
        except KeyError:
            raise KeyError(
                f"no task {task_id}: it was never created, or its result was taken already"
            ) from None

    def _respond(self, request: _Request) -> KVResponse:
        task = request.task
        nothing = request.span.mask(None)
        if not task.ended:
            return KVResponse(task.task_id, KVResponseStatus.TIMEOUT, nothing)
        del self._requests[task.task_id]
        self.engine.forget(task)
        if task.status is TaskStatus.COMPLETED:
            return KVResponse(task.task_id, KVResponseStatus.SUCCESS, request.span.mask(task.plan))
        status = (
            KVResponseStatus.CANCELLED if task.status is TaskStatus.CANCELLED else KVResponseStatus.FAILED
        )
        return KVResponse(task.task_id, status, nothing, task.error)
