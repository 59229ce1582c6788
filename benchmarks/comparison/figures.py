"""From parts of rounds to the figures of a comparison: medians, paired ratios, hits, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import median, spread

from comparison.traffic import SOURCES, Part

# What a user has of each part: typical and worst times to the first token, in milliseconds, and requests a
# second where more than one is under way. Of a few requests one at a time there is no 99th percentile.
_FIELDS = {
    "cold": ("ttft_p50",),
    "soon": ("ttft_p50",),
    "late": ("ttft_p50",),
    "late_warm": ("ttft_p50",),
    "late_dropped": ("ttft_p50",),
    "sessions": ("ttft_p50", "ttft_p99", "requests_per_s"),
    "prefix": ("ttft_p50", "ttft_p99", "requests_per_s"),
    "trace": ("ttft_p50", "ttft_p99", "requests_per_s"),
    "new": ("ttft_p50", "requests_per_s"),
    "burst": ("ttft_p50", "ttft_p99", "requests_per_s"),
    "late_burst": ("ttft_p50", "ttft_p99", "requests_per_s"),
}
METRICS = [(part, name) for part, names in _FIELDS.items() for name in names]

Values = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Row:
    """One contender in one round.

    Attributes:
        group: the contenders that were up at the same time, and their host pool.
        values: by part and field.
        cached: by part, the tokens from each source.
        prompts: by part, the tokens of its prompts.
    """

    group: str
    contender: str
    round_number: int
    values: Values
    cached: dict[str, dict[str, int]]
    prompts: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        parts = {
            part: {
                **{name: self.values[part, name] for name in _FIELDS[part]},
                "prompt_tokens": self.prompts[part],
                **{f"{source}_tokens": tokens for source, tokens in cached.items()},
            }
            for part, cached in self.cached.items()
        }
        return {
            "group": self.group,
            "contender": self.contender,
            "round": self.round_number,
            "parts": parts,
        }


def row_of(group: str, contender: str, round_number: int, parts: Mapping[str, Part]) -> Row:
    of: dict[str, Callable[[Part], float]] = {
        "ttft_p50": lambda part: 1000 * float(np.percentile(part.ttfts, 50)),
        "ttft_p99": lambda part: 1000 * float(np.percentile(part.ttfts, 99)),
        "requests_per_s": lambda part: part.requests_per_s,
    }
    values = {(part, name): of[name](parts[part]) for part, name in METRICS if part in parts}
    cached = {name: part.cached for name, part in parts.items()}
    prompts = {name: part.prompt_tokens for name, part in parts.items()}
    return Row(group, contender, round_number, values, cached, prompts)


def of_contender(rows: Iterable[Row], group: str, contender: str) -> list[Row]:
    return [row for row in rows if row.group == group and row.contender == contender]


def ratios(rows: Sequence[Row], group: str, base: str, other: str) -> dict[tuple[str, str], list[float]]:
    """Of every metric the base over the other one, round by round: of times below 1, and of rates above 1, is
    better for the base."""
    others = {row.round_number: row for row in of_contender(rows, group, other)}
    pairs = [
        (row, others[row.round_number])
        for row in of_contender(rows, group, base)
        if row.round_number in others
    ]
    return {
        metric: [row.values[metric] / of_other.values[metric] for row, of_other in pairs]
        for metric in METRICS
        if pairs and all(metric in row.values for pair in pairs for row in pair)
    }


def tables(rows: Sequence[Row], group: str, base: str, contenders: Sequence[str]) -> str:
    """Three tables in Markdown: medians, the ratios of the base to the others, and where hits came from."""
    present = [name for name in contenders if of_contender(rows, group, name)]
    metrics = [m for m in METRICS if any(m in row.values for row in rows if row.group == group)]
    others = [name for name in present if name != base and base in present]
    by_other = {name: ratios(rows, group, base, name) for name in others}
    parts = list(dict.fromkeys(part for part, _ in metrics))
    return "\n\n".join(
        [
            f"#### {group}: medians of rounds (spread)",
            _table(
                ["", *present], [[_name(m), *(_median(rows, group, n, m) for n in present)] for m in metrics]
            ),
            f"#### {group}: {base} over each, median of paired rounds (smallest to largest)",
            _table(
                ["", *others], [[_name(m), *(_ratio(by_other[n].get(m)) for n in others)] for m in metrics]
            ),
            f"#### {group}: cached tokens in percent of all, device + host + storage",
            _table(["", *present], [[p, *(_hits(rows, group, n, p) for n in present)] for p in parts]),
        ]
    )


def _name(metric: tuple[str, str]) -> str:
    units = {"ttft_p50": "TTFT p50, ms", "ttft_p99": "TTFT p99, ms", "requests_per_s": "requests/s"}
    return f"{metric[0]} {units[metric[1]]}"


def _median(rows: Sequence[Row], group: str, contender: str, metric: tuple[str, str]) -> str:
    values = [r.values[metric] for r in of_contender(rows, group, contender) if metric in r.values]
    if not values:
        return "-"
    digits = 2 if metric[1] == "requests_per_s" else 0
    return f"{median(values):.{digits}f} ({100 * spread(values):.0f} %)"


def _ratio(values: Sequence[float] | None) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def _hits(rows: Sequence[Row], group: str, contender: str, part: str) -> str:
    of = [row for row in of_contender(rows, group, contender) if part in row.cached]
    if not of:
        return "-"
    tokens = sum(row.prompts[part] for row in of)
    return " + ".join(
        f"{100 * sum(row.cached[part][source] for row in of) / tokens:.0f}" for source in SOURCES
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
