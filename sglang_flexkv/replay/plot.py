"""Hit rates over the size of the tier, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sglang_flexkv.common.errors import FlexKVError


class PlotError(FlexKVError):
    """A picture cannot be drawn or written. Says what to do."""


def check_can_plot() -> None:
    """Raises PlotError without matplotlib: before the work whose result it was to show."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError(
            "--plot needs matplotlib; install it: pip install 'sglang-flexkv[replay]', or just matplotlib"
        ) from None


def plot_hit_rates(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    optimum: Sequence[tuple[int, float]] = (),
    title: str = "",
) -> None:
    """Writes a PNG with one line per policy.

    Args:
        curves: of each policy the sizes of the CPU tier (blocks) and the hit rates (0 to 1), smallest first.
        optimum: the same for the optimum, drawn dashed above them; empty: none.

    Raises:
        PlotError: no matplotlib, or the file cannot be written.
    """
    check_can_plot()
    # Without pyplot there is no display to look for and no state that outlives the call.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot([size for size, _ in points], [100 * rate for _, rate in points], marker="o", label=name)
    if optimum:
        axes.plot(
            [size for size, _ in optimum],
            [100 * rate for _, rate in optimum],
            "k--",
            marker=".",
            label="optimum",
        )
    sizes = sorted({size for points in (*curves.values(), optimum) for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("CPU tier (blocks)")
    axes.set_ylabel("input tokens that were hit (%)")
    axes.set_title(title.encode(errors="backslashreplace").decode(), parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, format="png")  # whatever the file is called
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}; name another file") from None
