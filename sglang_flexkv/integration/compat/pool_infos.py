"""How SGLang's KV pools describe their buffers, in every version that is supported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_flexkv.integration.compat import version

if TYPE_CHECKING or not version.is_0_5_22():
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, MHABufferInfo, MLABufferInfo

    def device_pool_infos(pool: Any) -> tuple[Any, ...]:
        """A pool's own description of each of its parts."""
        infos: tuple[Any, ...] = pool.get_device_pool_infos()
        return infos
else:
    from sglang_flexkv.integration.compat.sglang_0_5_22 import (
        KVBufferLayout,
        MHABufferInfo,
        MLABufferInfo,
        device_pool_infos,
    )

__all__ = ("KVBufferLayout", "MHABufferInfo", "MLABufferInfo", "device_pool_infos")
