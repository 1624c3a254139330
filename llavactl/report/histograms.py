"""Distributions of whole numbers as pictures, through matplotlib's objects alone, as in ``plots``."""

from __future__ import annotations

import io
from collections.abc import Mapping

from llavactl.report.plots import Palette

BARS = 60
"""Columns of a histogram at most; values are grouped beyond that."""

SHOWN_SHARE = 0.995
"""Of the values, the longest are left out of the picture: one of a thousand times the rest would hide all others."""


def draw_histogram(counts: Mapping[int, int], xlabel: str, palette: Palette) -> bytes:
    """The PNG of how often each value of ``counts`` ({value: how often}) is there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    edges, heights = grouped(counts)
    figure = Figure(figsize=(5.2, 2.5), dpi=144, facecolor=palette.ground, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = edges[1] - edges[0]
    middles = [edge + (width - 1) / 2 for edge in edges[:-1]]  # a column of one value stands over it
    axes.bar(middles, heights, width=0.92 * width, color=palette.curve, linewidth=0)
    axes.set_facecolor(palette.ground)
    axes.set_xlabel(xlabel, color=palette.ink)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=palette.ink, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(palette.grid)
    axes.margins(x=0.02)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def grouped(counts: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """(edges, heights) of columns of one width, from the least value to the one that SHOWN_SHARE of all reach."""
    total, passed, last = sum(counts.values()), 0, max(counts)
    for value in sorted(counts):
        passed += counts[value]
        if passed >= SHOWN_SHARE * total:
            last = value
            break
    first = min(counts)
    width = -(-(last - first + 1) // BARS)
    edges = list(range(first, last + width + 1, width))
    heights = [0] * (len(edges) - 1)
    for value, count in counts.items():
        if value < edges[-1]:
            heights[(value - first) // width] += count
    return edges, heights
