"""The shape of a model's KV, and how it is laid out on the device, in the seeds' two layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from pydantic import Field

from sglang_flexkv import _core
from sglang_flexkv.common.config import CheckedSettings


class ModelConfig(CheckedSettings):
    """The shape of the KV cache of one model, as this process sees it (one tensor-parallel shard)."""

    num_layers: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    use_mla: bool = False
    dtype: torch.dtype = torch.bfloat16
    model_name: str = ""  # part of the namespace: two models never share a block

    @property
    def token_size_in_bytes(self) -> int:
        """Bytes of KV of one token over all layers."""
        kv_dim = 1 if self.use_mla else 2
        return self.num_layers * self.num_kv_heads * self.head_size * kv_dim * self.dtype.itemsize


class KVCacheLayoutType(Enum):
    LAYERWISE = "LAYERWISE"  # [layer, kv, block, token, head, head_dim]
    BLOCKWISE = "BLOCKWISE"  # [block, layer, kv, token, head, head_dim]


@dataclass(frozen=True)
class KVCacheLayout:
    """Shape of a device pool that a library user brings along.

    ``kv`` has length 2 (K and V), or 1 with MLA.
    """

    type: KVCacheLayoutType
    num_layer: int
    num_block: int
    tokens_per_block: int
    num_head: int
    head_size: int
    is_mla: bool = False

    @property
    def kv_dim(self) -> int:
        return 1 if self.is_mla else 2

    @property
    def kv_shape(self) -> tuple[int, ...]:
        block = (self.tokens_per_block, self.num_head, self.head_size)
        if self.type is KVCacheLayoutType.LAYERWISE:
            return (self.num_layer, self.kv_dim, self.num_block, *block)
        return (self.num_block, self.num_layer, self.kv_dim, *block)

    def device_buffers(self, kv_caches: torch.Tensor | Sequence[torch.Tensor]) -> DeviceBuffers:
        """The buffers of a pool of this layout.

        Args:
            kv_caches: one tensor of ``kv_shape``, or with LAYERWISE one tensor of ``kv_shape[1:]`` per layer.

        Raises:
            ValueError: a tensor has another shape, or is not contiguous where rows are.
        """
        if self.type is KVCacheLayoutType.LAYERWISE:
            layers = list(kv_caches)
            for layer in layers:
                if tuple(layer.shape) != self.kv_shape[1:]:
                    raise ValueError(
                        f"a layer of this layout is {self.kv_shape[1:]}, not {tuple(layer.shape)}"
                    )
            if len(layers) != self.num_layer:
                raise ValueError(f"this layout has {self.num_layer} layers, not {len(layers)}")
            # Tokens of all blocks follow one another: a row is a token.
            per_layer = [[part.flatten(0, 1) for part in layer] for layer in layers]
            return DeviceBuffers(per_layer, tokens_per_row=1)
        if not isinstance(kv_caches, torch.Tensor) or tuple(kv_caches.shape) != self.kv_shape:
            raise ValueError(f"a BLOCKWISE pool is one tensor of shape {self.kv_shape}")
        per_layer = [
            [kv_caches[:, layer, part] for part in range(self.kv_dim)] for layer in range(self.num_layer)
        ]
        return DeviceBuffers(per_layer, tokens_per_row=self.tokens_per_block)


class DeviceBuffers:
    """The device pool as the engine sees it: per layer some matrices of rows.

    A row is one token, or several where a buffer is laid out by page. Keeps the tensors alive as long as the
    engine may touch them.

    Args:
        layers: per layer its buffers, each with rows in dimension 0 and a contiguous row.
        tokens_per_row: of every buffer, or of each, in the shape of ``layers``.

    Raises:
        ValueError: rows are not contiguous, or the buffers are not all on one device.
    """

    def __init__(
        self, layers: Sequence[Sequence[torch.Tensor]], tokens_per_row: int | Sequence[Sequence[int]]
    ) -> None:
        self.tensors = [list(buffers) for buffers in layers]
        if isinstance(tokens_per_row, int):
            tokens_per_row = [[tokens_per_row] * len(buffers) for buffers in self.tensors]
        self.tokens_per_row = [list(numbers) for numbers in tokens_per_row]
        devices = {tensor.device for buffers in self.tensors for tensor in buffers}
        if len(devices) != 1:
            raise ValueError(f"all KV buffers must be on one device, not on {sorted(map(str, devices))}")
        self.device = devices.pop()
        for tensor in (t for buffers in self.tensors for t in buffers):
            if not tensor[0].is_contiguous():
                raise ValueError(f"a row of a KV buffer must be contiguous (strides {tensor.stride()})")

    @property
    def number_bytes(self) -> int:
        """Bytes of a floating-point number where all of them have 16 bits, or all 32; else 0."""
        dtypes = {tensor.dtype for buffers in self.tensors for tensor in buffers}
        sizes = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 4}
        return sizes.get(dtypes.pop(), 0) if len(dtypes) == 1 else 0

    def block_layout(self, tokens_per_block: int) -> _core.BlockLayout:
        return _core.BlockLayout(
            [
                [_describe(tensor, tokens) for tensor, tokens in zip(buffers, numbers, strict=True)]
                for buffers, numbers in zip(self.tensors, self.tokens_per_row, strict=True)
            ],
            tokens_per_block,
        )

    @property
    def cuda_device(self) -> int:
        """Index of the CUDA device, -1 when the pool is CPU memory."""
        if self.device.type == "cpu":
            return -1
        return self.device.index if self.device.index is not None else torch.cuda.current_device()


def _describe(tensor: torch.Tensor, tokens_per_row: int) -> _core.DeviceBuffer:
    row = tensor[0]
    return _core.DeviceBuffer(
        base=tensor.data_ptr(),
        num_rows=tensor.shape[0],
        row_bytes=row.numel() * tensor.element_size(),
        row_stride=tensor.stride(0) * tensor.element_size(),
        tokens_per_row=tokens_per_row,
    )
