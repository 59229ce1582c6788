"""The copies of HiCache's host pool between host and device, where both are host memory.

The two kernels of ``sgl_kernel.kvcacheio`` that a pool of plain attention calls with SGLang's defaults
(``--hicache-io-backend kernel``, ``--hicache-mem-layout page_first``), under their names and with their
arguments. Whatever else HiCache could call is missing here, and an error.

Slots that are consecutive on both sides are copied in one piece, others row by row.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

__all__ = ["transfer_kv_all_layer_lf_pf", "transfer_kv_per_layer_pf_lf"]

# With fewer tokens in a piece, on average, rows are faster: a piece costs a call into torch, a row does not.
_PIECE_TOKENS_MIN = 128

Pieces = list[tuple[int, int, int]]  # first slot of the source, of the destination, number


class _PiecesOfLast:
    """What consecutive slots there are in two lists, kept for the next layer, which has the same ones."""

    def __init__(self) -> None:
        self._of: tuple[torch.Tensor, torch.Tensor, int, int] | None = None
        self._pieces: Pieces | None = None

    def find(self, source: torch.Tensor, destination: torch.Tensor) -> Pieces | None:
        """None: they are too short to be worth it."""
        of = self._of
        versions = (source._version, destination._version)
        if of is None or of[0] is not source or of[1] is not destination or of[2:] != versions:
            # Held on to, so that nothing else can be at their address.
            self._of = (source, destination, *versions)
            self._pieces = _pieces(source, destination)
        return self._pieces


def _pieces(source: torch.Tensor, destination: torch.Tensor) -> Pieces | None:
    count = source.numel()
    if not count:
        return []
    steps = (source[1:] - source[:-1] != 1) | (destination[1:] - destination[:-1] != 1)
    begins = [0, *(torch.nonzero(steps).flatten() + 1).tolist()]
    if count < _PIECE_TOKENS_MIN * len(begins):
        return None
    ends = [*begins[1:], count]
    slots = zip(source[begins].tolist(), destination[begins].tolist(), strict=True)
    return [(first, onto, end - begin) for (first, onto), begin, end in zip(slots, begins, ends, strict=True)]


_last = _PiecesOfLast()


def _copy(
    source: torch.Tensor, destination: torch.Tensor, from_slots: torch.Tensor, to_slots: torch.Tensor
) -> None:
    """Rows ``to_slots`` of the destination become rows ``from_slots`` of the source."""
    pieces = _last.find(from_slots, to_slots)
    if pieces is None:
        destination.index_copy_(0, to_slots.long(), source.index_select(0, from_slots.long()))
        return
    for first, onto, count in pieces:
        destination[onto : onto + count].copy_(source[first : first + count])


@lru_cache(maxsize=4096)
def _memory(address: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)


def _rows(address: int, slots: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """As many rows from an address on as the slots reach."""
    count = int(slots.max()) + 1 if slots.numel() else 1
    return _memory(address, count * row_bytes).view(count, row_bytes)


def transfer_kv_per_layer_pf_lf(
    src_k: torch.Tensor,
    dst_k: torch.Tensor,
    src_v: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    **_: Any,
) -> None:
    """One layer of some tokens, host to device.

    Args:
        src_k, src_v: the host pool, [slots, layers, heads, width].
        dst_k, dst_v: the layer on the device, [slots, heads, width].
    """
    _copy(src_k[:, layer_id], dst_k, src_indices, dst_indices)
    _copy(src_v[:, layer_id], dst_v, src_indices, dst_indices)


def transfer_kv_all_layer_lf_pf(
    src_k_layers: torch.Tensor,
    dst_k: torch.Tensor,
    src_v_layers: torch.Tensor,
    dst_v: torch.Tensor,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    item_size: int,
    num_layers: int,
    **_: Any,
) -> None:
    """All layers of some tokens, device to host.

    Args:
        src_k_layers, src_v_layers: addresses of the layers on the device, [layers].
        dst_k, dst_v: the host pool, [slots, layers, heads, width].
        item_size: bytes of a token in a layer.
    """
    for addresses, destination in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        rows = destination.view(torch.uint8).view(destination.shape[0], num_layers, item_size)
        for layer, address in enumerate(addresses.tolist()[:num_layers]):
            _copy(_rows(address, src_indices, item_size), rows[:, layer], src_indices, dst_indices)
