"""Loss curves and histograms as PNG, drawn with matplotlib (the extra ``plots``).

They use matplotlib's objects, never pyplot: no global state, so any thread may draw.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llavactl.core.errors import LlavactlError
from llavactl.core.paths import write_atomic
from llavactl.report.inputs import read_objects

log = logging.getLogger(__name__)

PLOTS_MISSING = "plots need matplotlib: pip install 'llavactl[plots]'"

SMOOTHED_SHARE = 25
"""The smoothed curve is a moving average over 1/25 of all steps."""

MAX_BARS = 60
"""Bars of a histogram; values are grouped beyond that."""

SHOWN_SHARE = 0.995
"""Share of the values in a histogram: the largest are left out, as one outlier would compress all others."""


@dataclass(frozen=True)
class Palette:
    """Colors for a light or a dark background."""

    background: str
    text: str
    grid: str
    raw: str
    curve: str
    validation: str
    series: tuple[str, ...]


LIGHT = Palette(
    "#ffffff", "#4b5563", "#e5e7eb", "#a5b4fc", "#4338ca", "#d97706",
    ("#4338ca", "#d97706", "#15803d", "#be123c", "#0e7490", "#6b7280"),
)  # fmt: skip
DARK = Palette(
    "#17191f", "#9ca3af", "#2c3039", "#4b4f8f", "#a5b4fc", "#fbbf24",
    ("#a5b4fc", "#fbbf24", "#4ade80", "#fb7185", "#67e8f9", "#d1d5db"),
)  # fmt: skip


@dataclass(frozen=True)
class CostPoint:
    """A score ``y`` with its ``interval`` at cost ``x``; points with equal ``color`` or ``marker`` texts look alike."""

    x: float
    y: float
    interval: tuple[float, float] | None
    color: str
    marker: str


MARKERS = "os^Dv*PX"

LEGEND_COLUMNS = 3
LEGEND_WIDTH = 28
"""Characters of a text in the legend."""


def plots_available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401, ICN001 - only imported to see whether it can be
    except ImportError:
        return False
    return True


@cache
def log_missing_plots() -> None:
    """Logs once how to get the plots; without matplotlib, which is optional, none are written."""
    log.info(PLOTS_MISSING)


def plot_loss(metrics: Path, png: Path) -> None:
    """Plots the losses in ``metrics`` to the file ``png``: per step, smoothed, and validation.

    Raises:
        LlavactlError: matplotlib is not installed.
    """
    write_atomic(png, draw_loss(metrics, LIGHT))


def draw_loss(metrics: Path, palette: Palette) -> bytes:
    """The PNG of ``plot_loss`` in the colors of ``palette``."""
    lines = read_objects(metrics)
    return _draw_loss(*_series(lines, "loss"), *_series(lines, "val_loss"), palette)


@lru_cache(maxsize=8)  # report.html is written after every step of a run, mostly with the same curves
def _draw_loss(
    steps: Sequence[float],
    losses: Sequence[float],
    validation_steps: Sequence[float],
    validation: Sequence[float],
    palette: Palette,
) -> bytes:
    figure, axes = _figure(8, 3.4, palette)
    axes.set_xlabel("step", color=palette.text)
    axes.set_ylabel("loss per target token", color=palette.text)
    if steps:
        raw = {"linewidth": 0.8, "label": "per step"} if len(steps) > 1 else {"marker": "o", "label": "step"}
        axes.plot(steps, losses, color=palette.raw, **raw)
    if len(steps) > 2:
        axes.plot(steps, smooth(losses), color=palette.curve, linewidth=2, label="smoothed")
    if validation:
        axes.plot(
            validation_steps, validation, "o-", color=palette.validation, linewidth=1, markersize=4.5,
            label="validation",
        )  # fmt: skip
    _log_scale_if_steep(axes, [*losses, *validation])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=palette.text)
    else:
        axes.text(0.5, 0.5, "no step yet", color=palette.text, ha="center", va="center", transform=axes.transAxes)
    return _png(figure)


def draw_histogram(counts: Mapping[int, int], xlabel: str, palette: Palette) -> bytes:
    """The PNG of a histogram of ``counts`` ({value: frequency})."""
    from matplotlib.ticker import MaxNLocator

    edges, heights = histogram(counts)
    figure, axes = _figure(5.2, 2.5, palette)
    axes.set_xlabel(xlabel, color=palette.text)
    width = edges[1] - edges[0]
    centers = [edge + (width - 1) / 2 for edge in edges[:-1]]  # a bar of a single value is centered on it
    axes.bar(centers, heights, width=0.92 * width, color=palette.curve, linewidth=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return _png(figure)


def draw_costs(points: Sequence[CostPoint], xlabel: str, ylabel: str, palette: Palette) -> bytes:
    """The PNG of scores against costs, with their intervals as vertical lines."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colors = dict(zip(dict.fromkeys(point.color for point in points), itertools.cycle(palette.series), strict=False))
    markers = dict(zip(dict.fromkeys(point.marker for point in points), itertools.cycle(MARKERS), strict=False))
    legend = [(text, "o", color) for text, color in colors.items()]
    legend += [(text, marker, palette.text) for text, marker in markers.items()]
    legend = [entry for entry in legend if entry[0]]
    figure, axes = _figure(5.2, 3 + 0.2 * math.ceil(len(legend) / LEGEND_COLUMNS), palette)
    axes.set_xlabel(xlabel, color=palette.text)
    axes.set_ylabel(ylabel, color=palette.text)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.margins(x=0.06, y=0.08)
    for point in points:
        color = colors[point.color]
        if point.interval is not None:
            axes.plot([point.x, point.x], point.interval, color=color, linewidth=1, alpha=0.6)
        axes.plot([point.x], [point.y], markers[point.marker], color=color, markersize=7)
    figure.legend(
        [Line2D([], [], color=color, marker=marker, linestyle="") for _, marker, color in legend],
        [text if len(text) <= LEGEND_WIDTH else f"{text[: LEGEND_WIDTH - 1]}…" for text, _, _ in legend],
        loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, labelcolor=palette.text,
    )  # fmt: skip
    return _png(figure)


def histogram(counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """(edges, heights) of bars of equal width, from the smallest value to the quantile ``SHOWN_SHARE``."""
    total, cumulative, last = sum(counts.values()), 0, max(counts)
    for value in sorted(counts):
        cumulative += counts[value]
        if cumulative >= SHOWN_SHARE * total:
            last = value
            break
    first = min(counts)
    width = -(-(last - first + 1) // MAX_BARS)
    edges = list(range(first, last + width + 1, width))
    heights = [0] * (len(edges) - 1)
    for value, count in counts.items():
        if value < edges[-1]:
            heights[(value - first) // width] += count
    return edges, heights


def smooth(values: Sequence[float]) -> list[float]:
    """The mean over a centered window around each value.

    The window shrinks towards the first value, where a loss falls fast, and is truncated at the last one, so the curve
    has no lag and does not end on a single noisy step.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(index, count // SMOOTHED_SHARE // 2 + 1)
    first, last = index - reach, np.minimum(index + reach + 1, count)
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(steps, values) of the lines with a finite number for ``key``."""
    kept = [line for line in lines if _finite(line.get("step")) and _finite(line.get(key))]
    return tuple(line["step"] for line in kept), tuple(line[key] for line in kept)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(width: float, height: float, palette: Palette) -> tuple[Any, Any]:
    """A figure of ``width`` × ``height`` inches and its axes, in the colors of ``palette``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise LlavactlError(PLOTS_MISSING, hint="pip install 'llavactl[plots]'") from error
    figure = Figure(figsize=(width, height), dpi=144, facecolor=palette.background, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor(palette.background)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.text, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.grid)
    axes.margins(x=0.02)
    return figure, axes


def _log_scale_if_steep(axes: Any, values: Sequence[float]) -> None:
    """A loss that falls far would fill a linear plot with its first steps."""
    from matplotlib.ticker import ScalarFormatter

    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.canvas.print_png(out)  # figure.savefig would draw it twice
    return out.getvalue()
