"""The plots of the performance page, as SVG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = ["bars", "lines"]

OURS = "#2563eb"
OTHERS = "#94a3b8"
STYLE: Any = {  # as matplotlib's own files say it
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "aiotracker",  # the same figures give the same file
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def bars(path: Path, title: str, values: Mapping[str, float], ours: str) -> None:
    """Lifecycles a second, one bar a contender, the fastest at the top; on a logarithmic axis."""
    names = sorted(values, key=values.__getitem__)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.6 + 0.4 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        drawn = axes.barh(
            names, [values[name] for name in names], color=[OURS if n.startswith(ours) else OTHERS for n in names]
        )
        axes.bar_label(drawn, labels=[f" {values[name]:,.0f}" for name in names])
        axes.set_xscale("log")
        axes.set_xlim(right=max(values.values()) * 3)
        axes.set_xlabel("lifecycles a second")
        _finish(figure, axes, path, title, [axes.xaxis])


def lines(path: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str) -> None:
    """One line a series, on logarithmic axes, so that what grows in proportion is straight."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(frameon=False)
        _finish(figure, axes, path, title, [axes.xaxis, axes.yaxis])


def _finish(figure: Figure, axes: Axes, path: Path, title: str, scaled: Sequence[object]) -> None:
    axes.set_title(title, loc="left")
    for axis in scaled:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))  # type: ignore[attr-defined]  # both kinds of axis have it
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
