"""The report of a sweep: means over seeds, costs, and paired tests between variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from llavactl.evaluation.significance import Difference, bootstrap, holm, paired
from llavactl.recipe.axes import short_names
from llavactl.verbs.sweep.results import FinishedRun, Grades, Outcome, SweepRun

if TYPE_CHECKING:
    from llavactl.recipe.axes import SweepRecipes, Variant


@dataclass(frozen=True)
class Spread:
    """A score over the seeds: ``mean``, sample standard deviation ``sd`` (None for one seed), number of runs ``n``.

    ``interval``: 95 % interval of the mean over the questions, for these models; it doesn't include the variation
    between seeds. None if the score isn't the mean of grades.
    """

    mean: float
    sd: float | None
    n: int
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class SweepVariant:
    """A variant: the label of its value on each axis (by key), its runs, and its scores by task.

    The costs are means over its finished runs: ``tokens`` and ``seconds`` of all steps, ``trainable_parameters`` of the
    last stage.
    """

    name: str
    axes: Mapping[str, str]
    runs: tuple[SweepRun, ...]
    scores: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)
    image_tokens: float | None = None
    trainable_parameters: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    feature_bytes: float | None = None


@dataclass(frozen=True)
class Comparison(Difference):
    """A paired test of two variants on a ``task``, with the mean grades over the ``seeds`` that both have finished.

    ``p_holm``: ``p``, corrected for all comparisons on this task (Holm 1979).
    """

    task: str
    seeds: tuple[int, ...]
    p_holm: float


@dataclass(frozen=True)
class SweepReport:
    """All variants of a sweep. ``axes``: the labels by key; ``names``: the short names of these keys.

    ``main_scores``: the score of each task that tables and plots show. ``computed``: how often each step was carried
    out for the finished runs, also by earlier commands; in a dry run, how often it will be for all runs. ``seconds``:
    the time that these took (``computed``), and that all runs would take without sharing (``without_sharing``).
    ``failed``: the number of failed runs.
    """

    name: str
    folder: str
    axes: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str]
    seeds: tuple[int, ...]
    variants: tuple[SweepVariant, ...]
    comparisons: tuple[Comparison, ...]
    main_scores: Mapping[str, str]
    computed: Mapping[str, int]
    seconds: Mapping[str, float]
    failed: int
    report: str
    dry_run: bool = False


def sweep_report(
    recipes: SweepRecipes, outcomes: Mapping[str, Outcome], page: Path, *, compare: bool = True
) -> SweepReport:
    """The report of all variants; ``outcomes`` are those so far, by the name of the run folder.

    With many variants, comparing all pairs (``compare``) takes a minute.
    """
    finished = {slug: each for slug, each in outcomes.items() if isinstance(each, FinishedRun)}
    runs = {variant.slug: _run(variant, finished, outcomes) for variant in recipes.variants}
    by_variant: dict[str, list[Variant]] = {}
    for variant in recipes.variants:
        by_variant.setdefault(variant.name, []).append(variant)
    grades = {
        name: {variant.seed: finished[variant.slug].grades for variant in group if variant.slug in finished}
        for name, group in by_variant.items()
    }
    variants = [
        _variant(name, group[0].labels, [runs[variant.slug] for variant in group], grades[name])
        for name, group in by_variant.items()
    ]
    scores = {task: each for variant in variants for task, each in variant.scores.items()}
    return SweepReport(
        name=recipes.base.name,
        folder=str(recipes.folder),
        axes=recipes.axes,
        names=short_names(recipes.axes),
        seeds=recipes.seeds,
        variants=tuple(variants),
        comparisons=tuple(_comparisons(grades)) if compare else (),
        main_scores={task: main_score(each) for task, each in scores.items() if each},
        computed=_computed(finished),
        seconds=_seconds(finished),
        failed=sum(run.state == "failed" for run in runs.values()),
        report=str(page),
    )


def _run(variant: Variant, finished: Mapping[str, FinishedRun], outcomes: Mapping[str, Outcome]) -> SweepRun:
    if variant.slug in finished:
        return finished[variant.slug].run
    error = outcomes.get(variant.slug)
    state: Literal["pending", "failed"] = "pending" if error is None else "failed"
    return SweepRun(variant.seed, str(variant.recipe.run_dir), state, str(error or ""))


def _variant(
    name: str, labels: Mapping[str, str], runs: Sequence[SweepRun], grades: Mapping[int, Mapping[str, Grades]]
) -> SweepVariant:
    finished = [run for run in runs if run.state == "finished"]
    tasks = dict.fromkeys(task for run in finished for task in run.scores)
    return SweepVariant(
        name=name,
        axes=dict(labels),
        runs=tuple(runs),
        scores={task: dict(_spreads(task, finished, grades)) for task in tasks},
        image_tokens=_mean(finished, lambda run: run.image_tokens),
        trainable_parameters=_mean(finished, lambda run: next(iter([*run.trainable_parameters.values()][::-1]), None)),
        tokens=_mean(finished, lambda run: sum(run.tokens.values())),
        seconds=_mean(finished, lambda run: sum(filter(None, run.seconds.values()))),
        feature_bytes=_mean(finished, lambda run: run.feature_bytes),
    )


def _mean(runs: Sequence[SweepRun], value: Callable[[SweepRun], float | None]) -> float | None:
    known = [each for each in map(value, runs) if each is not None]
    return fmean(known) if known else None


def _spreads(
    task: str, runs: Sequence[SweepRun], grades: Mapping[int, Mapping[str, Grades]]
) -> Iterator[tuple[str, Spread]]:
    """The scores of ``task`` over all seeds."""
    mean_grades = _mean_grades(task, grades, tuple(grades))
    for name in dict.fromkeys(name for run in runs for name in run.scores.get(task, {})):
        values = [run.scores[task][name] for run in runs if name in run.scores.get(task, {})]
        mean, sd = fmean(values), stdev(values) if len(values) > 1 else None
        interval = runs[0].intervals.get(task, {}).get(name) if len(runs) == 1 else None
        if len(runs) > 1 and mean_grades and abs(100 * fmean(mean_grades.values()) - mean) < 1e-6:
            interval = bootstrap(list(mean_grades.values()))
        yield name, Spread(mean, sd, len(values), interval)


def _mean_grades(task: str, grades: Mapping[int, Mapping[str, Grades]], seeds: Sequence[int]) -> dict[str, float]:
    """The mean grade of each question over ``seeds``; empty if a run has no grades or other questions."""
    each = [grades[seed].get(task, {}) for seed in seeds]
    if not each or any(other.keys() != each[0].keys() for other in each):
        return {}
    return {question: fmean(other[question] for other in each) for question in each[0]}


def _comparisons(grades: Mapping[str, Mapping[int, Mapping[str, Grades]]]) -> Iterator[Comparison]:
    """All pairs of variants that answered the same questions of a task."""
    for task in dict.fromkeys(task for seeds in grades.values() for tasks in seeds.values() for task in tasks):
        pairs = []
        for a, b in combinations(grades, 2):
            seeds = tuple(sorted(grades[a].keys() & grades[b].keys()))
            grades_a, grades_b = (_mean_grades(task, grades[name], seeds) for name in (a, b))
            if grades_a and grades_a.keys() == grades_b.keys():
                pairs.append((seeds, paired(a, b, grades_a, grades_b)))
        for (seeds, pair), p in zip(pairs, holm([pair.p for _, pair in pairs]), strict=True):
            yield Comparison(**asdict(pair), task=task, seeds=seeds, p_holm=p)


def main_score(scores: Mapping[str, Any]) -> str:
    """The score of a task for tables and plots: ``accuracy``, else the first one."""
    return "accuracy" if "accuracy" in scores else next(iter(scores))


def _computed(finished: Mapping[str, FinishedRun]) -> dict[str, int]:
    """How often each step was carried out."""
    steps = dict.fromkeys(step for each in finished.values() for step in each.run.seconds)
    return {step: len(set(filter(None, (_key(slug, each, step) for slug, each in finished.items())))) for step in steps}


def _key(slug: str, finished: FinishedRun, step: str) -> str | None:
    """An identifier of the execution of ``step``, which several runs may share; None if the run doesn't have it."""
    if step not in finished.run.seconds:
        return None
    return finished.extraction if step == "extract" else finished.run.shared.get(step, slug)


def _seconds(finished: Mapping[str, FinishedRun]) -> dict[str, float]:
    runs = [(slug, each, step, s or 0.0) for slug, each in finished.items() for step, s in each.run.seconds.items()]
    computed = {(step, _key(slug, each, step)): seconds for slug, each, step, seconds in runs}
    return {
        "computed": round(sum(computed.values()), 1),
        "without_sharing": round(sum(seconds for *_, seconds in runs), 1),
    }
