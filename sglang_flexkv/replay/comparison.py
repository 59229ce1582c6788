"""Policies and sizes side by side on one trace, each with how far it is from the optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sglang_flexkv.common.config import EvictionPolicy
from sglang_flexkv.replay.optimum import optimum
from sglang_flexkv.replay.simulator import Progress, Replay, TierSetup, simulate
from sglang_flexkv.replay.trace import Trace


@dataclass(frozen=True)
class Result:
    """One policy at one size. Rates are shares of the input tokens; warm ones those of the second half of the
    requests, when the tiers are no longer empty."""

    cpu_blocks: int
    ssd_blocks: int
    policy: str  # of the CPU tier
    requests: int
    input_tokens: int
    hit_tokens: int
    cpu_hit_tokens: int
    ssd_hit_tokens: int
    hit_rate: float
    cpu_hit_rate: float
    ssd_hit_rate: float
    warm_hit_rate: float
    optimum_hit_rate: float | None  # of one tier of as many blocks as all together; None: not asked for
    optimum_warm_hit_rate: float | None
    cpu_evicted: int  # blocks
    ssd_evicted: int
    refused_puts: int  # requests of which nothing was stored
    moved_bytes: dict[str, int] | None  # by transfer type; None: the size of a block is not known
    control_us_median: float  # of a request in the control plane
    control_us_p99: float


def compare(
    trace: Trace,
    base: TierSetup,
    cpu_sizes: Sequence[int],
    policies: Sequence[EvictionPolicy],
    *,
    with_optimum: bool = True,
    block_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Every policy at every size of the CPU tier, the sizes in the order given.

    Args:
        base: everything else of the setup.
        block_bytes: of a block of the trace, for the bytes that are moved.

    Raises:
        ConfigError: a size makes no cache.
    """
    results = []
    for size in cpu_sizes:
        bound = optimum(trace, size + base.ssd_blocks) if with_optimum else None
        for policy in policies:
            replay = simulate(trace, replace(base, cpu_blocks=size, cpu_policy=policy), progress)
            half = trace.num_requests // 2
            results.append(
                _result(
                    replay,
                    half,
                    block_bytes,
                    None if bound is None else (replay.hit_rate(bound), replay.hit_rate(bound, half)),
                )
            )
    return results


def _result(replay: Replay, half: int, block_bytes: int | None, bound: tuple[float, float] | None) -> Result:
    setup = replay.setup
    return Result(
        cpu_blocks=setup.cpu_blocks,
        ssd_blocks=setup.ssd_blocks,
        policy=setup.cpu_policy.value,
        requests=len(replay.input_tokens),
        input_tokens=int(replay.input_tokens.sum()),
        hit_tokens=int(replay.hit_tokens.sum()),
        cpu_hit_tokens=int(replay.cpu_hit_tokens.sum()),
        ssd_hit_tokens=int(replay.ssd_hit_tokens.sum()),
        hit_rate=replay.hit_rate(),
        cpu_hit_rate=replay.hit_rate(replay.cpu_hit_tokens),
        ssd_hit_rate=replay.hit_rate(replay.ssd_hit_tokens),
        warm_hit_rate=replay.hit_rate(start=half),
        optimum_hit_rate=bound[0] if bound else None,
        optimum_warm_hit_rate=bound[1] if bound else None,
        cpu_evicted=replay.cpu_evicted,
        ssd_evicted=replay.ssd_evicted,
        refused_puts=replay.refused_puts,
        moved_bytes=None
        if block_bytes is None
        else {kind.named("DISK"): blocks * block_bytes for kind, blocks in replay.moved_blocks.items()},
        control_us_median=float(np.median(replay.control_us)),
        control_us_p99=float(np.percentile(replay.control_us, 99)),
    )
