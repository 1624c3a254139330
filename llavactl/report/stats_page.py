"""The HTML page of ``data stats``: a table of measures, histograms, and how questions begin; without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llavactl.report.figures import show
from llavactl.report.plots import DARK, LIGHT, PLOTS_MISSING, draw_histogram, plots_available
from llavactl.report.templates import template
from llavactl.report.thumbnails import data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

QUANTILES: Sequence[str] = ("n", "mean", "min", "p5", "median", "p95", "max")


def statistics_page(name: str, report: Mapping[str, Any], distributions: Mapping[str, Mapping[int, int]]) -> str:
    """The HTML of ``report`` (a StatsReport as a dictionary) titled ``name``, with histograms of ``distributions``."""
    can_plot = plots_available()
    plots = [
        (measure, *(data_uri(draw_histogram(counts, measure, palette), "png") for palette in (LIGHT, DARK)))
        for measure, counts in distributions.items()
        if can_plot and len(counts) > 1
    ]
    rows = [(measure, [show(summary[key]) for key in QUANTILES]) for measure, summary in report["measures"].items()]
    max_count = max(report["openings"].values(), default=1)
    return template("statistics.html").render(
        name=name,
        samples=show(report["samples"]),
        unusable=show(report["unusable"]),
        tokens=report["token_counting"],
        columns=QUANTILES,
        rows=rows,
        plots=plots,
        plots_missing="" if can_plot else PLOTS_MISSING,
        openings=[(words, show(count), 100 * count / max_count) for words, count in report["openings"].items()],
    )
