"""Runs a trace through the control plane that the server uses, with copies that succeed at once.

What is simulated is ``GlobalCacheEngine`` itself: the same index, policies, plans and admission. Only the
data plane is left out, so a replay says what would have been hit and moved, and how long deciding took, but
nothing about copies that compete, arrive late or fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.cache.cache_engine import GlobalCacheEngine, TransferPlan
from sglang_flexkv.common.block import BlockKeys
from sglang_flexkv.common.config import Admission, CacheConfig, EvictionPolicy
from sglang_flexkv.common.lower_tier import CPU, HeldBlocks, LowerTier, TierSlots
from sglang_flexkv.common.transfer import TransferType
from sglang_flexkv.replay.trace import Request, Trace

_SSD = 1  # the tier below the CPU tier
# Requests between two reports of progress.
_PROGRESS_REQUESTS = 256

Progress = Callable[[int], None]  # is told how many requests more have been replayed
Tokens = npt.NDArray[np.int64]  # [requests]


@dataclass(frozen=True)
class TierSetup:
    """What to simulate. Sizes are in blocks of the trace."""

    cpu_blocks: int
    ssd_blocks: int = 0  # 0: no SSD tier
    device_blocks: int = (
        0  # a device cache (LRU) above the tiers, as SGLang's own; 0: the tiers see everything
    )
    cpu_policy: EvictionPolicy = CacheConfig.model_fields["cpu_eviction_policy"].default
    ssd_policy: EvictionPolicy = CacheConfig.model_fields["ssd_eviction_policy"].default
    ssd_admission: Admission = CacheConfig.model_fields["ssd_admission"].default

    def cache_config(self, tokens_per_block: int) -> CacheConfig:
        """Raises ConfigError for sizes that no server would take."""
        return CacheConfig(
            tokens_per_block=tokens_per_block,
            num_cpu_blocks=self.cpu_blocks,
            enable_ssd=self.ssd_blocks > 0,
            num_ssd_blocks=self.ssd_blocks,
            cpu_eviction_policy=self.cpu_policy,
            ssd_eviction_policy=self.ssd_policy,
            ssd_admission=self.ssd_admission,
            # The control plane opens no file; the setting is only asked for.
            ssd_cache_dir=(Path("replay"),) if self.ssd_blocks else (),
        )


@dataclass(frozen=True)
class Replay:
    """What became of each request, in the order of the trace."""

    setup: TierSetup
    input_tokens: Tokens
    device_hit_tokens: Tokens
    cpu_hit_tokens: Tokens
    ssd_hit_tokens: Tokens
    control_us: npt.NDArray[np.float64]  # [requests]: time in the control plane
    moved_blocks: dict[TransferType, int]
    cpu_evicted: int  # blocks that left the tier to make room
    ssd_evicted: int
    refused_puts: int  # requests of which the CPU tier stored nothing though it lacked something
    ssd_offered: int  # blocks that came to the CPU tier while there was an SSD tier
    ssd_admitted: int  # of them, or of those used again, written to SSD

    @property
    def hit_tokens(self) -> Tokens:
        return self.device_hit_tokens + self.cpu_hit_tokens + self.ssd_hit_tokens

    def hit_rate(self, hits: Tokens | None = None, start: int = 0) -> float:
        """Share of the input tokens that ``hits`` (all of them, if not given) covers, from request
        ``start``."""
        hits = self.hit_tokens if hits is None else hits
        return float(hits[start:].sum() / max(1, self.input_tokens[start:].sum()))


@dataclass(frozen=True)
class _Done:
    """The outcome of an op, as far as ``finish`` looks at it."""

    status: _core.OpStatus = _core.OpStatus.DONE
    ok: npt.NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    corrupt: int = 0
    missing: int = 0


@dataclass(frozen=True)
class _AllDone:
    """The outcome of a graph in which everything went well."""

    ops: list[_Done]
    done: bool = True
    error: str = ""


class _ReplayedTier(LowerTier):
    """A lower tier of which only the size and the policies matter: it holds nothing at the start and keeps
    nothing."""

    def open(self) -> None:
        pass

    @property
    def core(self) -> _core.LowerTier:
        raise NotImplementedError("a replay moves no byte")

    def take_held(self) -> HeldBlocks:
        return HeldBlocks()

    def stored(self, keys: BlockKeys, parents: BlockKeys, slots: TierSlots) -> None:
        pass

    def lost(self, slots: TierSlots) -> None:
        pass

    def why_broken(self) -> str:
        return ""

    def clear(self, *, keep: bool, flush: bytes, late: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


class _Machine:
    """The tiers of one setup, and what was moved between them."""

    def __init__(self, setup: TierSetup, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        lower = [
            _ReplayedTier(
                "SSD",
                "DISK",
                setup.ssd_blocks,
                eviction_policy=setup.ssd_policy,
                admission=setup.ssd_admission,
            )
        ]
        self._has_ssd = setup.ssd_blocks > 0
        self.engine = GlobalCacheEngine(setup.cache_config(tokens_per_block), lower if self._has_ssd else ())
        if self._has_ssd:
            self.engine.groups[0].take_in(_SSD)
        self.device = (
            GlobalCacheEngine(
                CacheConfig(
                    tokens_per_block=tokens_per_block,
                    num_cpu_blocks=setup.device_blocks,
                    cpu_eviction_policy=EvictionPolicy.LRU,
                )
            )
            if setup.device_blocks
            else None
        )
        self.moved = {kind: 0 for kind in TransferType}
        self.refused = 0

    def serve(self, request: Request) -> tuple[int, int, int, float]:
        """Tokens that were hit on the device, in the CPU tier and on SSD, and the microseconds it took to
        decide what happens in the tiers."""
        keys = request.keys
        on_device = _look_up_and_store(self.device, keys) if self.device is not None else 0
        begin_s = time.perf_counter()
        found, from_ssd = self._get(keys[on_device:])
        self._put(keys, on_device + found)
        self._spill()
        took_us = (time.perf_counter() - begin_s) * 1e6

        end = on_device + found
        device_tokens = self._tokens(request, on_device)
        all_tokens = self._tokens(request, end)
        # Only the last block can be incomplete.
        ssd_tokens = len(from_ssd) * self.tokens_per_block
        if len(from_ssd) and from_ssd[-1] == found - 1:
            ssd_tokens -= end * self.tokens_per_block - all_tokens
        return device_tokens, all_tokens - device_tokens - ssd_tokens, ssd_tokens, took_us

    def _tokens(self, request: Request, blocks: int) -> int:
        return min(blocks * self.tokens_per_block, request.input_tokens)

    def _get(self, keys: BlockKeys) -> tuple[int, npt.NDArray[np.int64]]:
        """How many blocks were brought to the device, and the positions of those that came from SSD."""
        self.engine.match(keys)
        plan = self.engine.plan_get(keys)
        if plan is None:
            return 0, np.zeros(0, np.int64)
        self._finish(plan)
        from_ssd = [op.block_positions for op in plan.graph.ops if op.transfer_type is TransferType.LOWER2H]
        return plan.num_blocks, from_ssd[0] if from_ssd else np.zeros(0, np.int64)

    def _put(self, keys: BlockKeys, held: int) -> None:
        if held == len(keys):
            return
        plan = self.engine.plan_put(keys[held - 1] if held else None, keys[held:])
        if plan is not None:
            self._finish(plan)
        # A policy may refuse what is new, and a request may be larger than what its own pins leave.
        if plan is None or not plan.graph.ops:
            self.refused += 1

    def _spill(self) -> None:
        while self._has_ssd and (plan := self.engine.plan_spill(_SSD)) is not None:
            self._finish(plan)

    def _finish(self, plan: TransferPlan) -> None:
        for op in plan.graph.ops:
            self.moved[op.transfer_type] += len(op.block_positions)
        _succeed(self.engine, plan)


def _succeed(engine: GlobalCacheEngine, plan: TransferPlan) -> None:
    engine.finish(plan, cast(_core.GraphResult, _AllDone([_Done()] * len(plan.graph.ops))))


def _look_up_and_store(device: GlobalCacheEngine, keys: BlockKeys) -> int:
    """One request on a device cache: how many leading blocks it held. Now it holds them all, if they fit."""
    plan = device.plan_get(keys)
    held = plan.num_blocks if plan is not None else 0
    if plan is not None:
        _succeed(device, plan)
    if held < len(keys):
        stored = device.plan_put(keys[held - 1] if held else None, keys[held:])
        if stored is not None:
            _succeed(device, stored)
    return held


def simulate(trace: Trace, setup: TierSetup, progress: Progress | None = None) -> Replay:
    """Runs every request of a trace, one after the other, through tiers that start empty.

    A request hits its leading blocks that some tier holds; the rest is then stored, and what was stored is
    spilled to SSD before the next request. What does not fit is not stored.

    Raises:
        ConfigError: the sizes make no cache.
    """
    # A tier holds no more than all blocks: room for more would only cost memory here.
    fitted = replace(
        setup,
        cpu_blocks=min(setup.cpu_blocks, trace.num_blocks),
        ssd_blocks=min(setup.ssd_blocks, trace.num_blocks),
        device_blocks=min(setup.device_blocks, trace.num_blocks),
    )
    machine = _Machine(fitted, trace.tokens_per_block)
    count = trace.num_requests
    hits = np.zeros((3, count), np.int64)
    control_us = np.zeros(count)
    for number, request in enumerate(trace.requests()):
        *hits[:, number], control_us[number] = machine.serve(request)
        if progress is not None and (number + 1) % _PROGRESS_REQUESTS == 0:
            progress(_PROGRESS_REQUESTS)
    if progress is not None:
        progress(count % _PROGRESS_REQUESTS)
    cpu = machine.engine.groups[0].stats(CPU)
    ssd = machine.engine.groups[0].stats(_SSD) if setup.ssd_blocks else {}
    return Replay(
        setup=setup,
        input_tokens=trace.input_lengths,
        device_hit_tokens=hits[0],
        cpu_hit_tokens=hits[1],
        ssd_hit_tokens=hits[2],
        control_us=control_us,
        moved_blocks=machine.moved,
        cpu_evicted=int(cpu["evicted"]),
        ssd_evicted=int(ssd.get("evicted", 0)),
        refused_puts=machine.refused,
        ssd_offered=int(ssd.get("offered", 0)),
        ssd_admitted=int(ssd.get("admitted", 0)),
    )
