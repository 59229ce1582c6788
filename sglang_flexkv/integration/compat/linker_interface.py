"""SGLang's interface for an external KV store under its tree: what a linker is and what it is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

from sglang_flexkv.integration.compat import version

if TYPE_CHECKING or not version.is_0_5_22():
    from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker
else:
    from sglang_flexkv.integration.compat.sglang_0_5_22 import Linker as UnifiedCacheLinker

__all__ = ("PoolName", "PoolTransfer", "UnifiedCacheLinker")
