"""What the cache did, counted: for the log, and for SGLang's /metrics where that is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Metric:
    name: str
    text: str
    label: str = ""


_METRICS = {
    "loaded": _Metric(
        "flexkv_loaded_tokens",
        "Tokens whose KV was loaded instead of computed, by tier.",
        "tier",
    ),
    "recomputed": _Metric(
        "flexkv_recomputed_tokens",
        "Tokens whose KV a tier held but which were computed, because that was expected to be faster or "
        "load_policy says so.",
    ),
    "failed": _Metric("flexkv_failed_loads", "Requests that were computed because their load failed."),
    "puts_without_room": _Metric(
        "flexkv_puts_without_room",
        "Copies to the CPU tier that were not made because everything in it was in use.",
    ),
    "spill_dropped": _Metric(
        "flexkv_spill_dropped_blocks",
        "Blocks that were to go from the CPU tier to a lower one and did not get there.",
    ),
}


class Metrics:
    """Counters of one rank. All of them, with every value of their labels, are there from the start.

    Args:
        labels: values of labels that are the same for all, such as the rank; None: no Prometheus.
        tiers: names of the tiers.
    """

    def __init__(self, labels: dict[str, str] | None = None, tiers: Iterable[str] = ("CPU",)) -> None:
        self.total: Counter[str] = Counter()
        self._exported: dict[tuple[str, str], Any] = {}
        if labels is not None:
            # Not before SGLang has named its directory for the metrics of several processes.
            from prometheus_client import Counter as Exported

            for kind, metric in _METRICS.items():
                own = [metric.label] if metric.label else []
                counter = Exported(metric.name, metric.text, [*own, *labels])
                for value in (tier.lower() for tier in tiers) if own else ("",):
                    self._exported[kind, value] = counter.labels(**dict.fromkeys(own, value), **labels)

    def loaded(self, tier: str, tokens: int) -> None:
        self._count("loaded", tokens, tier.lower())

    def recomputed(self, tokens: int) -> None:
        self._count("recomputed", tokens)

    def failed_loads(self, requests: int) -> None:
        self._count("failed", requests)

    def put_without_room(self) -> None:
        self._count("puts_without_room", 1)

    def spill_dropped(self, blocks_in_all: int) -> None:
        self._count("spill_dropped", blocks_in_all - self.total["spill_dropped"])

    def _count(self, kind: str, amount: int, value: str = "") -> None:
        if amount == 0:
            return
        self.total[f"{kind} {value}".strip()] += amount
        if self._exported:
            self._exported[kind, value].inc(amount)
