"""The page of ``data stats``: a table, a plot a measure, and what questions begin with; no script, no network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llavactl.report.figures import show
from llavactl.report.histograms import draw_histogram
from llavactl.report.plots import DARK, LIGHT
from llavactl.report.templates import template
from llavactl.report.thumbnails import data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

QUANTILES: Sequence[str] = ("n", "mean", "min", "p5", "median", "p95", "max")


def statistics_page(name: str, report: Mapping[str, Any], distributions: Mapping[str, Mapping[int, int]]) -> str:
    """The HTML of ``report`` (a StatsReport as a dictionary) about ``name``, with plots of ``distributions``."""
    plots = [
        (each, *(data_uri(draw_histogram(counts, each, palette), "png") for palette in (LIGHT, DARK)))
        for each, counts in distributions.items()
        if len(counts) > 1
    ]
    rows = [(each, [show(summary[key]) for key in QUANTILES]) for each, summary in report["measures"].items()]
    most = max(report["openings"].values(), default=1)
    return template("statistics.html").render(
        name=name,
        samples=show(report["samples"]),
        unusable=show(report["unusable"]),
        tokens=report["token_counting"],
        columns=QUANTILES,
        rows=rows,
        plots=plots,
        openings=[(words, show(count), 100 * count / most) for words, count in report["openings"].items()],
    )
