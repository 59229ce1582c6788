"""What SGLang 0.5.22 lacks of 0.5.23, in the words of 0.5.23. Imported under 0.5.22 only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


class Linker(UnifiedCacheLinker):
    """A linker that knows when the device's pages may be read."""

    forward_stream: torch.cuda.Stream | None = None

    def record_offload_ready(self) -> list[torch.cuda.Event]:
        """Events behind what has named the pages to read, and behind the forwards that fill them."""
        streams = [torch.cuda.current_stream()]
        if self.forward_stream is not None:
            streams.append(self.forward_stream)
        return [stream.record_event() for stream in streams]


class RadixCache(UnifiedRadixCache):
    """A tree that looks below itself for a request's prefix only when the request wants it.

    0.5.22 also does when it matches what a request has just inserted, and nobody ends what that finds."""

    _request_looks = False

    def match_prefix(self, params: Any) -> Any:
        self._request_looks = True
        try:
            return super().match_prefix(params)
        finally:
            self._request_looks = False

    def _match_tree(self, params: Any) -> Any:
        return super()._match_tree(params if self._request_looks else replace(params, req=None))


class KVBufferLayout(Enum):
    """How the K and V of a layer lie in its buffers."""

    NHD = "nhd"
    PAGED_NHD = "paged_nhd"
    HND = "hnd"
    VECTORIZED_5D = "vectorized_5d"


@dataclass(frozen=True)
class _KVBuffers:
    k: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    layout: KVBufferLayout


@dataclass(frozen=True)
class MHABufferInfo:
    """Buffers of K and V, one of each per layer."""

    buffers: _KVBuffers
    page_size: int
    scales: None = None


@dataclass(frozen=True)
class MLABufferInfo:
    """Buffers of the latent, one per layer."""

    buffers: tuple[torch.Tensor, ...]
    page_size: int
    scales: None = None


@dataclass(frozen=True)
class _DevicePoolInfo:
    buffer_info: MHABufferInfo | MLABufferInfo


def device_pool_infos(pool: Any) -> tuple[_DevicePoolInfo]:
    """What a plain pool of MHA or MLA says of itself in 0.5.23. Says nothing of scales: whoever carries
    what is named here must look whether the pool has more."""
    if isinstance(pool, MLATokenToKVPool):
        return (_DevicePoolInfo(MLABufferInfo(tuple(pool.kv_buffer), pool.page_size)),)
    buffers = _KVBuffers(tuple(pool.k_buffer), tuple(pool.v_buffer), KVBufferLayout(pool.kv_cache_layout))
    return (_DevicePoolInfo(MHABufferInfo(buffers, pool.page_size)),)
