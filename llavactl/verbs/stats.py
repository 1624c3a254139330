"""``llavactl data stats``: lengths, turns, images and question openings of training records."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError
from llavactl.core.paths import write_atomic
from llavactl.core.schema import Sample
from llavactl.curation.inputs import Input, inputs, token_lengths, with_progress
from llavactl.curation.lengths import Lengths
from llavactl.curation.scan import CHUNK
from llavactl.curation.stats import Distribution, Statistics, summary

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.stages import StageNumber

MAX_OPENINGS = 20


@dataclass(frozen=True)
class StatsReport:
    """Distributions by measure, over ``samples``; ``unusable`` records are excluded, `llavactl data check` lists them.

    ``token_counting`` is how tokens were counted, or why they weren't. ``openings`` counts the first two words of
    questions, the most frequent first.
    """

    samples: int
    unusable: int
    token_counting: str
    measures: Mapping[str, Distribution]
    openings: Mapping[str, int]
    seconds: float
    html: str | None = None


def stats(
    recipe: Outline | None, file: Path | None = None, *, stage: StageNumber | None = None, html: Path | None = None
) -> StatsReport:
    """Measures the records of ``recipe``'s sources, or of ``file``; writes a page with plots to ``html``.

    Raises:
        DataError: a file is missing, or no record is usable.
        RecipeError: no source to measure.
    """
    began = time.perf_counter()
    statistics, unusable, token_counting = Statistics(), 0, []
    for source in inputs(recipe, file, None, stage):
        for number in source.stages:
            lengths, how = token_lengths(recipe, number)
            token_counting.append(how)
            for sample, tokens in _samples_with_tokens(source, lengths):
                if sample is None:
                    unusable += 1
                else:
                    statistics.add(sample, tokens)
    if not statistics.samples:
        raise DataError("no usable record to measure", hint="`llavactl data check` lists the problems")
    distributions = statistics.finished()
    report = StatsReport(
        samples=statistics.samples,
        unusable=unusable,
        token_counting="; ".join(dict.fromkeys(token_counting)),
        measures={name: summary(counts) for name, counts in distributions.items()},
        openings=dict(statistics.openings.most_common(MAX_OPENINGS)),
        seconds=round(time.perf_counter() - began, 3),
        html=str(html) if html else None,
    )
    if html is not None:
        from llavactl.report.stats_page import statistics_page

        title = file.name if file is not None else recipe.name if recipe is not None else ""
        write_atomic(html, statistics_page(title, asdict(report), distributions))
    return report


def _samples_with_tokens(source: Input, lengths: Lengths | None) -> Iterator[tuple[Sample | None, int | None]]:
    """The samples of ``source`` (None: an unusable record) with their length in tokens, if it can be counted."""
    records = with_progress(source.scan(True), source.records, "stats")
    while chunk := [record.sample for record in itertools.islice(records, CHUNK)]:
        usable = [sample for sample in chunk if sample is not None]
        counts = iter(lengths.count(usable) if lengths is not None else [])
        for sample in chunk:
            yield sample, None if sample is None or lengths is None else next(counts)
