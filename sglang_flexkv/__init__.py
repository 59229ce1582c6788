"""Hierarchical KV cache for SGLang.

As a plugin of SGLang it needs no import: ``--enable-flexkv`` is enough. As a library, see ``KVManager``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_flexkv.common.config import CacheConfig
    from sglang_flexkv.common.storage import KVCacheLayout, KVCacheLayoutType, ModelConfig
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

_HOMES = {
    "CacheConfig": "common.config",
    "ModelConfig": "common.storage",
    "KVCacheLayout": "common.storage",
    "KVCacheLayoutType": "common.storage",
    "KVManager": "kvmanager",
    "KVResponse": "kvmanager",
    "KVResponseStatus": "kvmanager",
}


def __getattr__(name: str) -> object:
    """Imports the library at its first use.

    The plugin and the command line must load without it, to be able to say what is wrong with it: SGLang only
    logs a plugin that fails to import, and goes on with another cache.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
