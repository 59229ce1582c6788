"""What the cache did, counted: for the log, and for SGLang's /metrics where that is on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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
    "shared": _Metric(
        "flexkv_shared_tokens",
        "Tokens that a request had from the load of another one in its batch instead of loading them again.",
    ),
    "recomputed": _Metric(
        "flexkv_recomputed_tokens",
        "Tokens whose KV a tier held but which were computed, because that was expected to be faster or "
        "load_policy says so.",
    ),
    "failed": _Metric(
        "flexkv_failed_loads",
        "Requests that were computed because a load failed, their own or one that they shared.",
    ),
    "puts_without_room": _Metric(
        "flexkv_puts_without_room",
        "Copies to the CPU tier that were not made because everything in it was in use.",
    ),
    "spill_dropped": _Metric(
        "flexkv_spill_dropped_blocks",
        "Blocks that were to go from the CPU tier to a lower one and did not get there.",
    ),
}


# Of the remote tier, where there is one, by the engine's own names for its figures.
_REMOTE = {
    "online": _Metric("flexkv_remote_online", "1 while the remote store is used, 0 while it is left alone."),
    "times_out": _Metric("flexkv_remote_outages", "Times that the remote store was of no use any more."),
    "lookups": _Metric("flexkv_remote_lookups", "Prompts that the remote store was asked for."),
    "lookups_failed": _Metric("flexkv_remote_lookups_failed", "Of these without an answer in time."),
    "lookup_s": _Metric("flexkv_remote_lookup_seconds", "Time that these took."),
    "asked_blocks": _Metric("flexkv_remote_asked_blocks", "Blocks that the remote store was asked for."),
    "found_blocks": _Metric("flexkv_remote_found_blocks", "Of these it had."),
    "there_already": _Metric(
        "flexkv_remote_present_blocks", "Blocks that were not stored because somebody else had stored them."
    ),
    "full": _Metric("flexkv_remote_full", "Times that the remote store had no room."),
    "compressed_bytes": _Metric(
        "flexkv_remote_compressed_bytes", "Bytes of blocks that were compressed before they were stored."
    ),
    "compressed_to_bytes": _Metric("flexkv_remote_compressed_to_bytes", "What was left of these."),
    "expanded_bytes": _Metric(
        "flexkv_remote_expanded_bytes", "Bytes of blocks that were loaded and had been compressed."
    ),
    "loaded_bytes": _Metric("flexkv_remote_loaded_bytes", "Bytes that came from the remote store."),
    "loading_s": _Metric("flexkv_remote_loading_seconds", "Time in which some were coming."),
    "missing_blocks": _Metric("flexkv_remote_missing_blocks", "Blocks that had gone when they were loaded."),
    "corrupt_blocks": _Metric("flexkv_remote_corrupt_blocks", "Blocks that were not what had been stored."),
    "stored_bytes": _Metric("flexkv_remote_stored_bytes", "Bytes that went to the remote store."),
    "storing_s": _Metric("flexkv_remote_storing_seconds", "Time in which some were going."),
}
_GAUGES = {"online"}


class Metrics:
    """Counters of one rank. All of them, with every value of their labels, are there from the start.

    Args:
        labels: values of labels that are the same for all, such as the rank; None: no Prometheus.
        tiers: names of the tiers.
        remote: one of them is a remote store.
    """

    def __init__(
        self,
        labels: dict[str, str] | None = None,
        tiers: Iterable[str] = ("CPU",),
        *,
        remote: bool = False,
    ) -> None:
        self.total: Counter[str] = Counter()
        self._exported: dict[tuple[str, str], Any] = {}
        self._remote: dict[str, Any] = {}
        self._remote_total: dict[str, float] = {}
        if labels is not None:
            # Not before SGLang has named its directory for the metrics of several processes.
            from prometheus_client import Counter as Exported
            from prometheus_client import Gauge

            for figure, metric in _REMOTE.items() if remote else ():
                kind_of = (
                    partial(Gauge, multiprocess_mode="livemostrecent") if figure in _GAUGES else Exported
                )
                self._remote[figure] = kind_of(metric.name, metric.text, [*labels]).labels(**labels)

            for kind, metric in _METRICS.items():
                own = [metric.label] if metric.label else []
                counter = Exported(metric.name, metric.text, [*own, *labels])
                for value in (tier.lower() for tier in tiers) if own else ("",):
                    self._exported[kind, value] = counter.labels(**dict.fromkeys(own, value), **labels)

    def loaded(self, tier: str, tokens: int) -> None:
        self._count("loaded", tokens, tier.lower())

    def shared(self, tokens: int) -> None:
        self._count("shared", tokens)

    def recomputed(self, tokens: int) -> None:
        self._count("recomputed", tokens)

    def failed_loads(self, requests: int) -> None:
        self._count("failed", requests)

    def put_without_room(self) -> None:
        self._count("puts_without_room", 1)

    def spill_dropped(self, blocks_in_all: int) -> None:
        self._count("spill_dropped", blocks_in_all - self.total["spill_dropped"])

    @property
    def wants_remote(self) -> bool:
        return bool(self._remote)

    def remote(self, figures: Mapping[str, float]) -> None:
        """Figures of the remote tier since the start, by the names in ``_REMOTE``. One that is missing has
        not changed."""
        for name, metric in self._remote.items():
            value = figures.get(name)
            if value is None:
                continue
            if name in _GAUGES:
                metric.set(value)
            else:
                metric.inc(max(0.0, value - self._remote_total.get(name, 0.0)))
                self._remote_total[name] = value

    def _count(self, kind: str, amount: int, value: str = "") -> None:
        if amount == 0:
            return
        self.total[f"{kind} {value}".strip()] += amount
        if self._exported:
            self._exported[kind, value].inc(amount)
