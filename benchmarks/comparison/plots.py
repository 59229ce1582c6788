"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import median

from comparison.figures import METRICS, Row, of_contender, ratios


def write(
    rows: Sequence[Row], group: str, base: str, contenders: Sequence[str], directory: Path
) -> list[Path]:
    """Two PNG files per group: times to the first token, and the base's ratios with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    present = [name for name in contenders if of_contender(rows, group, name)]
    others = [name for name in present if name != base and base in present]
    stem = group.replace(" ", "-").replace(",", "")
    made = []
    times = [
        m for m in METRICS if m[1] == "ttft_p50" and any(m in r.values for r in rows if r.group == group)
    ]
    figure, axes = pyplot.subplots(figsize=(11, 5))
    width = 0.8 / len(present)
    for i, name in enumerate(present):
        of = of_contender(rows, group, name)
        taken = [[row.values[m] for row in of if m in row.values] for m in times]
        middles = [median(values) if values else 0.0 for values in taken]
        errors = [
            [middle - min(values, default=middle) for middle, values in zip(middles, taken, strict=True)],
            [max(values, default=middle) - middle for middle, values in zip(middles, taken, strict=True)],
        ]
        places = [at + (i - (len(present) - 1) / 2) * width for at in range(len(times))]
        axes.bar(places, middles, width, yerr=errors, label=name)
    axes.set_xticks(range(len(times)), [part for part, _ in times])
    axes.set_yscale("log")
    axes.set_ylabel("time to first token, median, ms")
    axes.set_title(f"{group}: less is better; bars from best to worst round")
    axes.legend()
    made.append(_save(pyplot, figure, directory / f"{stem}-ttft.png"))
    if not others:
        return made
    figure, axes = pyplot.subplots(figsize=(11, 6))
    height = 0.8 / len(others)
    for i, name in enumerate(others):
        of_base = ratios(rows, group, base, name)
        # Above 1 is better for the base, of times as of rates.
        better = [
            (at, [value if m[1] == "requests_per_s" else 1 / value for value in of_base[m]])
            for at, m in enumerate(METRICS)
            if of_base.get(m)
        ]
        places = [at + (i - (len(others) - 1) / 2) * height for at, _ in better]
        middles = [median(values) for _, values in better]
        errors = [
            [median(values) - min(values) for _, values in better],
            [max(values) - median(values) for _, values in better],
        ]
        axes.errorbar(middles, places, xerr=errors, fmt="o", label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(METRICS)), [f"{part} {name}" for part, name in METRICS])
    axes.invert_yaxis()
    axes.set_xlabel(f"how many times better {base} is: median of paired rounds, smallest to largest")
    axes.legend()
    made.append(_save(pyplot, figure, directory / f"{stem}-ratios.png"))
    return made


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
