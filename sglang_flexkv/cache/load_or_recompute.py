"""How much of a hit to load, and how much of it to compute again.

Loading is nearly always faster than prefill, but not always: a slow disk under a small model, or many reads
queued before this one. The costs are measured while the server runs, nothing is assumed about the machine.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sglang_flexkv import _core
from sglang_flexkv.common.config import LoadPolicy
from sglang_flexkv.common.lower_tier import CPU, TierNumbers

# A part of a hit is left to be computed only if the first token comes so much sooner: computing takes the
# device from other requests, loading does not.
_WORTH_COMPUTING = 0.8
# Lengths of the loaded part that are weighed against each other, evenly spread over the hit.
_CANDIDATES = 17
# Prefills, and copies, that must have been seen before they are believed.
_OBSERVED_MIN = 4
# How fast a link is follows what was measured last by so much.
_LINK_WEIGHT = 0.3
# What has not been seen for so long is not believed any more: a link that was slow once would never be used
# again. The next to come load, and what is seen then takes its place.
_LINK_BELIEVED_S = 60.0
# Copies that took less time together say little about a link.
_LINK_BUSY_S_MIN = 1e-3


class PrefillCost:
    """Seconds that the model computes for so many tokens after so many others."""

    def __init__(self) -> None:
        # Per token, and per pair of a token and one that it attends to. The values hardly matter.
        self._fit = _core.CostFit(20e-6, 1e-9)

    def observe(self, spans: list[tuple[int, int]], seconds: float) -> None:
        """A batch that computed tokens ``start`` to ``end`` of each of its requests, and loaded nothing."""
        tokens = sum(end - start for start, end in spans)
        self._fit.observe(tokens, sum(_pairs(start, end) for start, end in spans), seconds)

    @property
    def known(self) -> bool:
        return self._fit.num_observed >= _OBSERVED_MIN

    def seconds(self, start: int, end: int) -> float:
        return self._fit.seconds(end - start, _pairs(start, end))


class LinkSpeed:
    """Bytes per second of one kind of transfer, from the engine's totals."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes = self._busy_s = 0.0
        self._observed = 0
        self._seen_s = clock()
        self.bytes_per_s = 0.0

    def observe(self, total_bytes: float, total_busy_s: float) -> None:
        busy_s = total_busy_s - self._busy_s
        if busy_s < _LINK_BUSY_S_MIN:
            return
        speed = (total_bytes - self._bytes) / busy_s
        self._bytes, self._busy_s = total_bytes, total_busy_s
        if speed > 0:
            weight = _LINK_WEIGHT if self._observed and not self._is_old else 1.0
            self.bytes_per_s = (1 - weight) * self.bytes_per_s + weight * speed
            self._observed += 1
            self._seen_s = self._clock()

    @property
    def known(self) -> bool:
        return self._observed >= _OBSERVED_MIN and not self._is_old

    @property
    def _is_old(self) -> bool:
        return self._clock() - self._seen_s > _LINK_BELIEVED_S

    def seconds(self, num_bytes: float) -> float:
        return num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Prompt:
    """What there is to decide about. Blocks count from the first that is not on the device."""

    tiers: TierNumbers  # of each held block the tier that it would come from
    device_tokens: int  # on the device already
    total_tokens: int
    queued_bytes: Mapping[int, int] = field(default_factory=dict)  # by lower tier, loaded before this
    # How many of the leading blocks can be loaded, growing; None: any number.
    ends: npt.NDArray[np.int64] | None = None


class LoadOrRecompute:
    """Decides for one rank; the ranks then take the shortest answer.

    Args:
        loaded_before: tiers whose blocks come before anything is computed, and not while it is.
        windows: of each window that comes with a prefix its blocks, and the bytes of each.
    """

    def __init__(
        self,
        policy: LoadPolicy,
        *,
        block_bytes: int,
        tokens_per_block: int,
        loaded_before: Collection[int] = (),
        windows: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._windows = windows
        self._policy, self._loaded_before = policy, loaded_before
        self._block_bytes, self._tokens_per_block = block_bytes, tokens_per_block
        self.prefill = PrefillCost()
        self.to_device = LinkSpeed()
        self.from_tier: defaultdict[int, LinkSpeed] = defaultdict(LinkSpeed)  # by the number of a lower tier

    def blocks_to_load(self, prompt: Prompt) -> int:
        """Leading blocks of the hit to load; the rest is computed."""
        held = len(prompt.tiers)
        if self._policy is LoadPolicy.RECOMPUTE:
            return 0
        lower = np.unique(prompt.tiers)
        lower = lower[lower != CPU].tolist()
        # Of a tier whose speed is not known yet, it is learned by loading.
        if (
            self._policy is LoadPolicy.LOAD
            or held == 0
            or not self.prefill.known
            or not self.to_device.known
            or not all(self.from_tier[tier].known for tier in lower)
        ):
            return held
        if prompt.ends is None:
            candidates = np.unique(np.linspace(0, held, _CANDIDATES).astype(int)).tolist()
        else:
            ends = np.concatenate(([0], prompt.ends))
            places = np.linspace(0, len(ends) - 1, _CANDIDATES).astype(int)
            candidates = np.unique(ends[places]).tolist()
        seconds = [self._seconds(prompt, count, bool(lower)) for count in candidates]
        best = min(range(len(candidates)), key=lambda i: (seconds[i], -candidates[i]))
        return candidates[best] if seconds[best] < _WORTH_COMPUTING * seconds[-1] else held

    def is_worth_waiting(
        self, num_bytes: Mapping[int, int], start_tokens: int, reached_tokens: int, total_tokens: int
    ) -> bool:
        """Whether to wait until so many bytes have been loaded from lower tiers and then compute a prompt
        from ``reached_tokens`` on, or to compute it from ``start_tokens`` on right away: what comes first."""
        if self._policy is LoadPolicy.RECOMPUTE:
            return False
        load_s = self.seconds_of_loads(num_bytes)
        if self._policy is LoadPolicy.LOAD or load_s is None or not self.prefill.known:
            return True
        reached_tokens = min(reached_tokens, total_tokens)
        after_s = load_s + self.prefill.seconds(reached_tokens, total_tokens)
        return after_s <= self.prefill.seconds(start_tokens, total_tokens)

    def seconds_of_loads(self, num_bytes: Mapping[int, int]) -> float | None:
        """Until so many bytes have come from lower tiers, all of which load at the same time. None: the speed
        of one of them is not known yet."""
        seconds = 0.0
        for tier, wanted in num_bytes.items():
            if wanted and not self.from_tier[tier].known:
                return None
            seconds = max(seconds, self.from_tier[tier].seconds(wanted) if wanted else 0.0)
        return seconds

    def bytes_by_tier(self, tiers: TierNumbers) -> Counter[int]:
        """Bytes that come from lower tiers with a prefix and the windows at its end, by the tier's number.

        Args:
            tiers: of each block of the prefix the tier that it comes from.
        """
        out: Counter[int] = Counter()
        for blocks, of_each in ((len(tiers), self._block_bytes), *self._windows):
            first = max(0, len(tiers) - blocks)
            counts = np.bincount(tiers[first:], minlength=1)[1:].tolist()
            out.update({tier: count * of_each for tier, count in enumerate(counts, 1) if count})
        return out

    def _seconds(self, prompt: Prompt, num_blocks: int, has_lower: bool) -> float:
        """Until the first token, if so many blocks are loaded: layers are computed while others arrive."""
        load_s = before_s = 0.0
        if num_blocks:
            num_bytes = num_blocks * self._block_bytes
            num_bytes += sum(min(num_blocks, blocks) * of_each for blocks, of_each in self._windows)
            load_s = self.to_device.seconds(num_bytes)
        if has_lower:
            for tier, num_bytes in self.bytes_by_tier(prompt.tiers[:num_blocks]).items():
                seconds = self.from_tier[tier].seconds(prompt.queued_bytes.get(tier, 0) + num_bytes)
                if tier in self._loaded_before:
                    before_s = max(before_s, seconds)
                else:
                    load_s = max(load_s, seconds)
        start = prompt.device_tokens + num_blocks * self._tokens_per_block
        compute_s = self.prefill.seconds(min(start, prompt.total_tokens), prompt.total_tokens)
        return before_s + max(load_s, compute_s)


def _pairs(start: int, end: int) -> float:
    """Pairs of a computed token and one that it attends to."""
    return (end - start) * (start + end + 1) / 2
