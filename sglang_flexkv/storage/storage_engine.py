"""Owns the memory and the files of the tiers: what exists, how large it is, and when it goes."""

from __future__ import annotations

from sglang_flexkv import _core
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.storage.ssd_store import SsdStore


def slot_bytes_for(block_bytes: int) -> int:
    """Bytes a block takes in a tier: rounded up so that O_DIRECT can read and write it in place."""
    return -(-block_bytes // _core.IO_ALIGNMENT) * _core.IO_ALIGNMENT


class StorageEngine:
    """The storage of one rank: its device pool's layout, its CPU pool and its SSD files.

    Raises:
        ConfigError: the SSD tier cannot be set up as configured.
        OSError: the CPU pool cannot be mapped.
    """

    def __init__(self, config: CacheConfig, device: DeviceBuffers, rank_tag: str = "rank0") -> None:
        self.device = device
        self.layout = device.block_layout(config.tokens_per_block)
        self.slot_bytes = slot_bytes_for(self.layout.block_bytes)
        self.ssd = (
            SsdStore(config.ssd_cache_dir, config.num_ssd_blocks, self.slot_bytes, rank_tag)
            if config.enable_ssd
            else None
        )
        self.host = _core.HostPool(config.num_cpu_blocks, self.slot_bytes)

    @property
    def num_ssd_slots(self) -> int:
        return self.ssd.num_slots if self.ssd else 0

    def close(self) -> None:
        if self.ssd:
            self.ssd.close()
