"""The HTML page of a sweep: scores, costs and paired tests of all variants; without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llavactl.core.quantities import BYTE, quantity
from llavactl.recipe.stages import step_title
from llavactl.report.figures import MISSING, Row, Table, duration, show
from llavactl.report.plots import DARK, LIGHT, PLOTS_MISSING, CostPoint, draw_costs, plots_available
from llavactl.report.templates import template
from llavactl.report.thumbnails import data_uri

Document = Mapping[str, Any]
"""A SweepReport as a dictionary, or a part of it."""

COSTS: tuple[tuple[str, str], ...] = (
    ("seconds", "seconds of all steps"),
    ("tokens", "training tokens"),
    ("image_tokens", "tokens per image"),
)
"""The costs of the plots, with their labels."""

SHOWN_COMPARISONS = 300


@dataclass(frozen=True)
class TaskComparison:
    """A task on the page; ``plots`` are (title, light, dark) with data URIs."""

    name: str
    score: str
    plots: tuple[tuple[str, str, str], ...]
    scores: tuple[Table, ...]
    comparisons: tuple[Table, ...]
    count: int


@dataclass(frozen=True)
class RunRow:
    """A run on the page; ``link`` is the relative URL of its own page, or ""."""

    name: str
    link: str
    cells: tuple[str, ...]
    error: str


def sweep_page(report: Document) -> str:
    """The HTML of ``report``, a SweepReport as a dictionary."""
    can_plot = plots_available()
    columns, rows = variant_table(report)
    return template("sweep.html").render(
        name=report["name"],
        facts=_facts(report),
        columns=columns,
        rows=rows,
        axes=len(report["axes"]),
        seeds=len(report["seeds"]),
        tasks=[_task(report, task, score, can_plot=can_plot) for task, score in report["main_scores"].items()],
        run_columns=("seed", "validation loss", *map(step_title, report["computed"])),
        runs=[_run(report, variant, run) for variant in report["variants"] for run in variant["runs"]],
        times=_times(report),
        plots_missing="" if can_plot else PLOTS_MISSING,
    )


def variant_table(report: Document) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table of variants: axes, the main score of each task, costs. The best one is first."""
    tasks = report["main_scores"]
    several = len(report["seeds"]) > 1
    scores = [(task, column) for task in tasks for column in (task, "95 % interval", *(["sd"] if several else []))]
    columns = (
        *report["names"].values(),
        *(column for _, column in scores),
        *("tokens/image", "trainable", "train tokens", "time", "features"),
    )
    rows = []
    for variant in sorted(report["variants"], key=lambda each: _rank(report, each), reverse=True):
        cells = [*variant["axes"].values()]
        for task, score in tasks.items():
            spread = variant["scores"].get(task, {}).get(score)
            cells += [_percent(spread["mean"]), _interval(spread["interval"])] if spread else [MISSING, MISSING]
            cells += [_percent(spread["sd"]) if spread else MISSING] if several else []
        cells += [
            show(_whole(variant["image_tokens"])),
            _count(variant["trainable_parameters"]),
            _count(variant["tokens"]),
            duration(variant["seconds"]),
            MISSING if variant["feature_bytes"] is None else quantity(variant["feature_bytes"], BYTE),
        ]
        rows.append(tuple(cells))
    return columns, rows


def _rank(report: Document, variant: Document) -> float:
    """The mean of the main score on the first task; variants without one come last."""
    for task, score in report["main_scores"].items():
        spread = variant["scores"].get(task, {}).get(score)
        return float(spread["mean"]) if spread else float("-inf")
    return 0.0


def comparison_table(report: Document, task: str, *, limit: int | None = None) -> Table | None:
    """The paired tests of ``task``, the better variant first, the smallest p on top; None without any."""
    pairs = sorted((pair for pair in report["comparisons"] if pair["task"] == task), key=lambda pair: pair["p"])
    rows = tuple(map(_comparison, pairs[:limit]))
    return Table(("difference", "95 % interval", "p", "p (Holm)"), rows) if rows else None


def _comparison(pair: Document) -> Row:
    low, high = pair["interval"]
    better, worse, difference, interval = pair["b"], pair["a"], pair["difference"], (low, high)
    if difference < 0:
        better, worse, difference, interval = worse, better, -difference, (-high, -low)
    cells = (f"{difference:.1f}", _interval(interval), _p(pair["p"]), _p(pair["p_holm"]))
    return Row(f"{better} – {worse}", cells)


def _task(report: Document, task: str, score: str, *, can_plot: bool) -> TaskComparison:
    table = comparison_table(report, task, limit=SHOWN_COMPARISONS)
    return TaskComparison(
        name=task,
        score=score,
        plots=tuple(_plots(report, task, score)) if can_plot else (),
        scores=(_scores(report, task),),
        comparisons=(table,) if table else (),
        count=sum(pair["task"] == task for pair in report["comparisons"]),
    )


def _plots(report: Document, task: str, score: str) -> list[tuple[str, str, str]]:
    """Plots of the main score against every cost that differs between variants."""
    plots = []
    for cost, label in COSTS:
        points = _points(report["variants"], task, score, cost)
        if len({point.x for point in points}) > 1:
            images = [data_uri(draw_costs(points, label, f"{task} {score}", each), "png") for each in (LIGHT, DARK)]
            plots.append((f"{task} {score} by {label}", images[0], images[1]))
    return plots


def _points(variants: Sequence[Document], task: str, score: str, cost: str) -> list[CostPoint]:
    """The variants with a score and a cost: the first axis determines the color, the others the marker."""
    points = []
    for variant in variants:
        spread, x = variant["scores"].get(task, {}).get(score), variant[cost]
        if spread and x is not None:
            first, *others = [*variant["axes"].values()] or [""]
            points.append(CostPoint(x, spread["mean"], spread["interval"], first, ", ".join(others)))
    return points


def _scores(report: Document, task: str) -> Table:
    """All scores of ``task``, one row per variant."""
    by_name = {variant["name"]: variant["scores"].get(task, {}) for variant in report["variants"]}
    names = tuple(dict.fromkeys(name for scores in by_name.values() for name in scores))
    rows = [Row(name, tuple(_percent(scores[each]["mean"]) if each in scores else MISSING for each in names))
            for name, scores in by_name.items() if scores]  # fmt: skip
    return Table(names, tuple(rows))


def _run(report: Document, variant: Document, run: Document) -> RunRow:
    folder = Path(run["run_dir"])
    times = []
    for step in report["computed"]:
        seconds = duration(run["seconds"].get(step))
        times.append(f"{seconds} (shared)" if step in run["shared"] else seconds)
    link = f"{quote(folder.name)}/report.html" if (folder / "report.html").is_file() else ""
    cells = (show(run["seed"]), show(run["val_loss"]), *times)
    return RunRow(variant["name"], link, cells, run["error"] or ("" if run["state"] == "finished" else run["state"]))


def _facts(report: Document) -> str:
    runs = [run for variant in report["variants"] for run in variant["runs"]]
    counts = [quantity(len(report["variants"]), "variant"), quantity(len(report["seeds"]), "seed")]
    counts += [
        f"{number} {state}" for state in ("failed", "pending") if (number := sum(run["state"] == state for run in runs))
    ]
    return " · ".join(counts)


def _times(report: Document) -> list[tuple[str, str]]:
    """How often each step was carried out, and the total time."""
    seconds = report["seconds"]
    return [
        *((step_title(step), f"{count} ×") for step, count in report["computed"].items()),
        ("time of these steps", duration(seconds["computed"])),
        ("without sharing", duration(seconds["without_sharing"])),
    ]


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}" if isinstance(value, float) else show(value)


def _interval(interval: Sequence[float] | None) -> str:
    # Rounded first, and 0 added: a bound just below 0 would be -0.0.
    return MISSING if interval is None else " to ".join(f"{round(bound, 1) + 0.0:.1f}" for bound in interval)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _whole(value: float | None) -> float | int | None:
    return int(value) if value is not None and value == int(value) else value


def _count(value: float | None) -> str:
    """A number of parameters or tokens: ``1.2 M``."""
    if value is None:
        return MISSING
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.1f} {prefix}"
    return f"{value:,.0f}"
