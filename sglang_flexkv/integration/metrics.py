"""What the cache did, counted: for the log, and for SGLang's /metrics where that is on."""

from __future__ import annotations

from collections import Counter
from typing import Any

_NAMES = {
    "loaded": ("flexkv_loaded_tokens", "Tokens whose KV was loaded instead of computed, by tier.", ("tier",)),
    "recomputed": (
        "flexkv_recomputed_tokens",
        "Tokens whose KV a tier held but which were computed, because that was expected to be faster or "
        "load_policy says so.",
        (),
    ),
    "failed": ("flexkv_failed_loads", "Requests that were computed because their load failed.", ()),
}


class Metrics:
    """Counters of one rank.

    Args:
        labels: values of labels that are the same for all, such as the rank; None: no Prometheus.
    """

    def __init__(self, labels: dict[str, str] | None = None) -> None:
        self.total: Counter[str] = Counter()
        self._exported: dict[str, Any] = {}
        self._labels = labels or {}
        if labels is not None:
            # Not before SGLang has named its directory for the metrics of several processes.
            from prometheus_client import Counter as Exported

            self._exported = {
                kind: Exported(name, text, [*own, *self._labels])
                for kind, (name, text, own) in _NAMES.items()
            }

    def loaded(self, tier: str, tokens: int) -> None:
        self._count("loaded", tokens, tier=tier)

    def recomputed(self, tokens: int) -> None:
        self._count("recomputed", tokens)

    def failed_loads(self, requests: int) -> None:
        self._count("failed", requests)

    def _count(self, kind: str, amount: int, **own: str) -> None:
        if amount == 0:
            return
        self.total[" ".join([kind, *own.values()])] += amount
        if kind in self._exported:
            self._exported[kind].labels(**own, **self._labels).inc(amount)
