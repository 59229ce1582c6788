"""Hierarchical KV cache for SGLang.

As a plugin of SGLang it needs no import: ``--enable-flexkv`` is enough. As a library, see ``KVManager``.
"""

from sglang_flexkv.common.config import CacheConfig, ModelConfig
from sglang_flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from sglang_flexkv.kvmanager import KVManager, KVResponse, KVResponseStatus

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "KVCacheLayout",
    "KVCacheLayoutType",
    "KVManager",
    "KVResponse",
    "KVResponseStatus",
    "ModelConfig",
    "__version__",
]
