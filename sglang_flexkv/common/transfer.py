"""The language between the control plane and the data plane: graphs of copies.

The cache engine writes a graph and moves no byte; the transfer engine runs it and decides nothing. Device
slots are bound late: a plan can be made before anyone knows where on the device its blocks will go.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.lower_tier import CPU

Slots = npt.NDArray[np.int64]

_graph_ids = itertools.count(1)


@dataclass(frozen=True)
class SlotsOnTheirWay:
    """Token slots that the device computes. They come behind what its stream held when they were asked for
    (``TransferEngine.read_slots``)."""

    awaited: _core.AwaitedSlots
    memory: object  # what they are read from, kept alive

    def __len__(self) -> int:
        return len(self.awaited)


class TransferType(Enum):
    """Where a copy reads and writes. Values are the core's."""

    H2D = _core.TransferType.H2D
    D2H = _core.TransferType.D2H
    LOWER2H = _core.TransferType.LOWER2H
    H2LOWER = _core.TransferType.H2LOWER

    @property
    def device_is_source(self) -> bool:
        return self is TransferType.D2H

    @property
    def touches_device(self) -> bool:
        return self in (TransferType.H2D, TransferType.D2H)

    def named(self, medium: str) -> str:
        """As people know it, e.g. DISK2H."""
        return self.name.replace("LOWER", medium)


@dataclass
class TransferOp:
    """One copy of some blocks between the device and the CPU tier, or between that and a tier below.

    ``src_block_ids`` and ``dst_block_ids`` are slots of the respective tier, int64 [blocks]. On the device
    side they are None until the plan is launched; ``block_positions`` says which of the blocks of its part
    the op moves, and ``first`` with which block of the plan that part begins, so that the launch can pick
    their device slots: token slots, int64 [blocks * tokens_per_block], or which blocks of ``awaited`` they
    are, int64 [blocks].
    """

    transfer_type: TransferType
    block_positions: npt.NDArray[np.int64]
    src_block_ids: Slots | None = None
    dst_block_ids: Slots | None = None
    keys: BlockKeys | None = None  # of a lower tier: what its slots hold, or are to hold
    tier: int = CPU  # which one, by its number
    group: int = 0  # whose part of the blocks
    first: int = 0  # block of the plan
    op_id: int = -1
    follows_layers_of: int = -1  # H2D: the LOWER2H op whose layers it copies as they come
    awaited: SlotsOnTheirWay | None = None


class TransferOpGraph:
    """Ops, numbered in the order in which they were added."""

    def __init__(self) -> None:
        self.graph_id = next(_graph_ids)
        self.ops: list[TransferOp] = []

    def add_transfer_op(self, op: TransferOp) -> int:
        op.op_id = len(self.ops)
        self.ops.append(op)
        return op.op_id

    def bind_device_slots(
        self,
        token_slots: Slots | SlotsOnTheirWay,
        tokens_per_block: int,
        places: Slots | None = None,
        group: int = 0,
    ) -> None:
        """Fills in the device side of every op of a group.

        Args:
            token_slots: token slots in the device pool, tokens_per_block for each block, and maybe more.
            places: which blocks of these the blocks of the request are, int64 [blocks]; None: the first ones.
        """
        for op in self.ops:
            if not op.transfer_type.touches_device or op.group != group:
                continue
            slots = op.block_positions + op.first
            if places is not None:
                slots = places[slots]
            if isinstance(token_slots, SlotsOnTheirWay):
                op.awaited = token_slots
            else:
                whole = len(token_slots) // tokens_per_block * tokens_per_block
                slots = token_slots[:whole].reshape(-1, tokens_per_block)[slots].ravel()
            if op.transfer_type.device_is_source:
                op.src_block_ids = slots
            else:
                op.dst_block_ids = slots
