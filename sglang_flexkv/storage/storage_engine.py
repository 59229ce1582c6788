"""Owns the memory of the CPU tier and the tiers below it: what exists, how large it is, and when it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang_flexkv import _core
from sglang_flexkv.common.block import Namespace, make_namespace
from sglang_flexkv.common.closing import run_all
from sglang_flexkv.common.config import CacheConfig
from sglang_flexkv.common.kv_group import KVGroup
from sglang_flexkv.common.lower_tier import AwayError, LowerTier, SharedBlocks
from sglang_flexkv.common.storage import DeviceBuffers
from sglang_flexkv.storage.remote.tier import RemoteTier, WritePace
from sglang_flexkv.storage.ssd_identity import Identity
from sglang_flexkv.storage.ssd_tier import SsdTier


def slot_bytes_for(block_bytes: int) -> int:
    """Bytes a block takes in a tier: rounded up so that O_DIRECT can read and write it in place."""
    return -(-block_bytes // _core.IO_ALIGNMENT) * _core.IO_ALIGNMENT


@dataclass(frozen=True)
class SharedMemory:
    """Memory for the CPU tier that other processes map as well.

    Attributes:
        file: descriptor of a memfd, which need not stay open.
        num_slots: of it.
    """

    file: int
    num_slots: int


@dataclass(frozen=True)
class TierRequest:
    """What there is to build a lower tier from.

    Attributes:
        namespace: of the keys; what is found in a tier under another one is not ours.
        shared: whose blocks they are for other processes, in a tier that these write to as well.
        label: what people are told a tier holds.
        identity: what the namespace stands for, kept beside what a tier holds.
        rank_tag: tells ranks that share a place apart, e.g. ``rank0``.
        disk: what system calls go through; tests put faults there.
        group: whose blocks it is for; None: the first group's.
        slice_bytes: of each slice of a slot.
        number_bytes: of the floating-point numbers that blocks consist of; 0: of several sizes, or others.
        ssd_limit: of what all groups write to SSD.
        remote_pace: of what all groups store remotely.
        memory: of the CPU tier; None: of its own, as large as the configuration says.
    """

    config: CacheConfig
    namespace: Namespace
    shared: SharedBlocks
    label: str = ""
    identity: Identity | None = None
    rank_tag: str = "rank0"
    disk: _core.Disk | None = None
    group: KVGroup | None = None
    slice_bytes: tuple[int, ...] = ()
    number_bytes: int = 0
    ssd_limit: _core.WriteLimit | None = None
    remote_pace: WritePace | None = None
    memory: SharedMemory | None = None

    def of_group(self, namespace: Namespace) -> Namespace:
        """In its place for what is kept of the group: no other one takes it for its own."""
        if self.group is None:
            return namespace
        return make_namespace({"of all groups": namespace.hex(), "group": self.group.name})


def _ssd(request: TierRequest) -> LowerTier | None:
    if not request.config.enable_ssd:
        return None
    rank_tag, num_slots = request.rank_tag, request.config.num_ssd_blocks
    if (group := request.group) is not None:
        rank_tag = f"{rank_tag}-{group.name}"
        num_slots = group.quota(num_slots)
    return SsdTier(
        request.config,
        num_slots,
        request.slice_bytes,
        namespace=request.of_group(request.namespace),
        label=request.label,
        identity=request.identity if request.group is None else None,
        rank_tag=rank_tag,
        write_limit=request.ssd_limit,
        disk=request.disk,
    )


def _remote(request: TierRequest) -> LowerTier | None:
    config = request.config
    if config.remote is None:
        return None
    num_slots = config.num_remote_blocks
    return RemoteTier(
        config.remote,
        num_slots if request.group is None else request.group.quota(num_slots),
        namespace=request.namespace,
        shared=replace(request.shared, namespace=request.of_group(request.shared.namespace)),
        admission=config.remote_admission,
        pace=request.remote_pace,
        timeout_s=config.remote_timeout_s,
        compression=config.remote_compression,
        number_bytes=request.number_bytes,
    )


# The tiers that there can be below the CPU tier, nearest first. None: the configuration does not ask for it.
LOWER_TIERS: list[Callable[[TierRequest], LowerTier | None]] = [_ssd, _remote]


class GroupStorage:
    """The storage of one group: its device pool's layout, its CPU pool and its lower tiers, opened as far as
    they can be: ``away`` has the reason for each that cannot be reached now.

    Raises:
        ConfigError: a tier cannot be set up as configured.
        OSError: the CPU pool cannot be mapped.
    """

    def __init__(self, device: DeviceBuffers, request: TierRequest) -> None:
        config = request.config
        num_blocks, slots = config.num_cpu_blocks, config.tokens_per_block
        if request.group is not None:
            num_blocks, slots = request.group.quota(num_blocks), request.group.slots_of(slots)
        self.layout = device.block_layout(slots)
        self.slot_bytes = slot_bytes_for(self.layout.block_bytes)
        self.lower: list[LowerTier] = []
        self.away: dict[LowerTier, str] = {}
        request = replace(
            request,
            slice_bytes=tuple(_core.slice_bytes(self.layout, self.slot_bytes)),
            number_bytes=device.number_bytes,
        )
        try:
            for build in LOWER_TIERS:
                tier = build(request)
                if tier is not None:
                    try:
                        tier.open()
                    except AwayError as error:
                        self.away[tier] = str(error)
                    self.lower.append(tier)
            if (memory := request.memory) is not None:
                self.host = _core.HostPool(memory.num_slots, self.slot_bytes, memory.file)
            else:
                self.host = _core.HostPool(num_blocks, self.slot_bytes)
        except BaseException:
            self.close_lower()
            raise

    def close_lower(self) -> None:
        """Closes the lower tiers; for a start that does not come to its end (see TierLife for the others)."""
        run_all(*(tier.close for tier in self.lower))


class StorageEngine:
    """The storage of one rank.

    Args:
        layers: of the model, one for each layer of the first group; None: those that no other group has.

    Raises:
        ConfigError: a tier cannot be set up as configured.
        OSError: a CPU pool cannot be mapped.
    """

    def __init__(
        self,
        device: DeviceBuffers,
        request: TierRequest,
        more_groups: Sequence[KVGroup] = (),
        layers: Sequence[int] | None = None,
    ) -> None:
        self.device = device
        self.more_groups = more_groups
        theirs = {layer for group in more_groups for layer in group.layers}
        num_layers = len(device.tensors) + len(theirs)
        self.layers = layers or [layer for layer in range(num_layers) if layer not in theirs]
        self.groups: list[GroupStorage] = []
        # Groups write together what one does without them.
        request = replace(
            request,
            ssd_limit=_core.WriteLimit(request.config.ssd_write_limit_mb_s * 1e6),
            remote_pace=WritePace(request.config.remote_write_limit_mb_s * 1e6),
        )
        try:
            self.groups.append(GroupStorage(device, request))
            for group in more_groups:
                self.groups.append(GroupStorage(group.device, replace(request, group=group)))
        except BaseException:
            self.close_lower()
            raise

    @property
    def first(self) -> GroupStorage:
        """Of the first group."""
        return self.groups[0]

    def close_lower(self) -> None:
        """See GroupStorage.close_lower."""
        run_all(*(group.close_lower for group in self.groups))
