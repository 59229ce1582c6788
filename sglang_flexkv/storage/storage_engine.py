"""Owns the memory and the files of the tiers: what exists, how large it is, and when it goes."""

from __future__ import annotations

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace
from sglang_flexkv.common.config import CacheConfig, SsdMismatch
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.ssd_store import SsdStore


def slot_bytes_for(block_bytes: int) -> int:
    """Bytes a block takes in a tier: rounded up so that O_DIRECT can read and write it in place."""
    return -(-block_bytes // _core.IO_ALIGNMENT) * _core.IO_ALIGNMENT


class StorageEngine:
    """The storage of one rank: its device pool's layout, its CPU pool and its SSD files.

    Args:
        namespace: of the keys; what is found on SSD under another one is not ours.
        label: what people are told the SSD files hold.
        identity: what the namespace stands for, kept beside the SSD files.
        disk: what the SSD tier's system calls go through; tests put faults there.

    Raises:
        ConfigError: the SSD tier cannot be set up as configured.
        OSError: the CPU pool cannot be mapped.
    """

    def __init__(
        self,
        config: CacheConfig,
        device: DeviceBuffers,
        *,
        namespace: Namespace,
        label: str = "",
        identity: Identity | None = None,
        rank_tag: str = "rank0",
        disk: _core.Disk | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.layout = device.block_layout(config.tokens_per_block)
        self.slot_bytes = slot_bytes_for(self.layout.block_bytes)
        self._namespace, self._label, self._rank_tag = namespace, label, rank_tag
        self._identity = identity
        self._disk = disk or _core.Disk()
        self.ssd = self.open_ssd() if config.enable_ssd else None
        try:
            self.host = _core.HostPool(config.num_cpu_blocks, self.slot_bytes)
        except BaseException:
            self.close()
            raise

    def open_ssd(self) -> SsdStore:
        """Opens the SSD files; also the way back after they were closed because of a fault."""
        return SsdStore(
            self.config.ssd_cache_dir,
            self.config.num_ssd_blocks,
            _core.slice_bytes(self.layout, self.slot_bytes),
            self._rank_tag,
            namespace=self._namespace,
            label=self._label,
            identity=self._identity,
            fresh_on_mismatch=self.config.ssd_on_mismatch is SsdMismatch.FRESH,
            disk=self._disk,
        )

    def close(self) -> None:
        ssd, self.ssd = self.ssd, None
        if ssd is not None:
            ssd.close()
