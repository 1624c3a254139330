"""The loss curve of a stage, from its metrics.jsonl.

Drawn through matplotlib's objects alone: nothing global is touched, so any thread may draw.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llavactl.core.paths import write_atomic
from llavactl.report.inputs import read_objects

SMOOTHED_SHARE = 25
"""The smoothed curve is a mean over one part in so many of all steps."""


@dataclass(frozen=True)
class Palette:
    """Colours for one background."""

    ground: str
    ink: str
    grid: str
    raw: str
    curve: str
    validation: str


LIGHT = Palette("#ffffff", "#4b5563", "#e5e7eb", "#a5b4fc", "#4338ca", "#d97706")
DARK = Palette("#17191f", "#9ca3af", "#2c3039", "#4b4f8f", "#a5b4fc", "#fbbf24")


def plot_loss(metrics: Path, png: Path) -> None:
    """Draws the losses in ``metrics`` to the file ``png``: each step, smoothed, and the validation loss."""
    write_atomic(png, draw_loss(metrics, LIGHT))


def draw_loss(metrics: Path, palette: Palette) -> bytes:
    """The PNG of ``plot_loss`` in the colours of ``palette``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_objects(metrics)
    steps, losses = _series(lines, "loss")
    at, validation = _series(lines, "val_loss")
    figure = Figure(figsize=(8, 3.4), dpi=144, facecolor=palette.ground, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        raw = {"linewidth": 0.8, "label": "each step"} if len(steps) > 1 else {"marker": "o", "label": "step"}
        axes.plot(steps, losses, color=palette.raw, **raw)
    if len(steps) > 2:
        axes.plot(steps, smooth(losses), color=palette.curve, linewidth=2, label="smoothed")
    if at:
        axes.plot(at, validation, "o-", color=palette.validation, linewidth=1, markersize=4.5, label="validation")
    _dress(axes, palette, [*losses, *validation])
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window around each value.

    It narrows towards the first value, where a loss falls fast, and is cut at the last: it lags behind nothing
    and does not end on one step's chance.
    """
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    count = len(values)
    index = np.arange(count)
    reach = np.minimum(index, count // SMOOTHED_SHARE // 2 + 1)
    first, last = index - reach, np.minimum(index + reach + 1, count)
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have a finite number for ``key``."""
    kept = [line for line in lines if _finite(line.get("step")) and _finite(line.get(key))]
    return [line["step"] for line in kept], [line[key] for line in kept]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _dress(axes: Any, palette: Palette, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axes.set_facecolor(palette.ground)
    axes.set_xlabel("step", color=palette.ink)
    axes.set_ylabel("loss a trained token", color=palette.ink)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.ink, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.grid)
    # A loss that falls far spends most of a linear plot on its first steps.
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.02)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=palette.ink)
    else:
        axes.text(0.5, 0.5, "no step yet", color=palette.ink, ha="center", va="center", transform=axes.transAxes)
