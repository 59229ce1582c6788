"""The SSD tier: slots in preallocated files, a journal of what they hold, io_uring between them and the host
pool. What the files look like is in docs/ssd-format.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sglang_flexkv import _core
from sglang_flexkv.common.block import BlockKeys, Namespace
from sglang_flexkv.common.config import CacheConfig, IoEngine, SsdMismatch
from sglang_flexkv.common.lower_tier import HeldBlocks, LowerTier, TierSlots
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.ssd_store import SsdStore

_IO_KINDS = {kind: getattr(_core.IoEngineKind, kind.name) for kind in IoEngine}


class SsdTier(LowerTier):
    """The files of one rank.

    Args:
        slice_bytes: bytes of each slice of a slot.
        namespace: of the keys; what is found under another one is not ours.
        label: what people are told the files hold.
        identity: what the namespace stands for, kept beside the files.
        write_limit: of what is written; None: no limit.
        disk: what system calls go through; tests put faults there.
    """

    def __init__(
        self,
        config: CacheConfig,
        num_slots: int,
        slice_bytes: Sequence[int],
        *,
        namespace: Namespace,
        label: str = "",
        identity: Identity | None = None,
        rank_tag: str = "rank0",
        write_limit: _core.WriteLimit | None = None,
        disk: _core.Disk | None = None,
    ) -> None:
        super().__init__(
            "SSD",
            "DISK",
            num_slots,
            eviction_policy=config.ssd_eviction_policy,
            admission=config.ssd_admission,
        )
        self._config, self._slice_bytes = config, slice_bytes
        self._namespace, self._label, self._identity = namespace, label, identity
        self._rank_tag, self._write_limit = rank_tag, write_limit or _core.WriteLimit(0.0)
        self._disk = disk or _core.Disk()
        self._store: SsdStore | None = None
        self._core: _core.SsdTier | None = None

    def open(self) -> None:
        config = self._config
        self._store = SsdStore(
            config.ssd_cache_dir,
            self.num_slots,
            self._slice_bytes,
            self._rank_tag,
            namespace=self._namespace,
            label=self._label,
            identity=self._identity,
            fresh_on_mismatch=config.ssd_on_mismatch is SsdMismatch.FRESH,
            disk=self._disk,
        )
        self._core = _core.SsdTier(
            self._store.core, _IO_KINDS[config.io_engine], config.io_depth, self._write_limit
        )

    @property
    def core(self) -> _core.SsdTier:
        assert self._core is not None
        return self._core

    @property
    def store(self) -> SsdStore:
        """The files, while the tier is open."""
        assert self._store is not None
        return self._store

    def take_held(self) -> HeldBlocks:
        return HeldBlocks(*self.store.core.take_recovered())

    def stored(self, keys: BlockKeys, parents: BlockKeys, slots: TierSlots) -> None:
        self.store.core.publish(keys, parents, slots)

    def lost(self, slots: TierSlots) -> None:
        self.store.core.drop(slots)

    def why_broken(self) -> str:
        return self.store.core.error

    def clear(self, *, keep: bool, flush: bytes, late: bool = False) -> None:
        del flush, late  # nobody else has these files
        self.store.core.clear(keep)

    def sync(self, timeout_s: float) -> bool:
        return self.store.core.sync(timeout_s)

    def stats(self) -> Mapping[str, float]:
        return {f"journal_{name}": value for name, value in self.store.core.stats().items()}

    def close(self) -> None:
        self._core = None
        store, self._store = self._store, None
        if store is not None:
            store.close()
