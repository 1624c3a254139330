"""``llavactl data stats``: how long records are, how many turns and images they have, what questions begin with."""

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
from llavactl.curation.inputs import Input, counted_lengths, inputs, with_bar
from llavactl.curation.lengths import Lengths
from llavactl.curation.scan import CHUNK
from llavactl.curation.stats import Distribution, Statistics, summary

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.stages import StageNumber

OPENINGS = 20


@dataclass(frozen=True)
class StatsReport:
    """Summaries by measure; ``unusable`` records were left out, `llavactl data check` says why.

    ``openings`` counts the first two words of questions, the most frequent first.
    """

    samples: int
    unusable: int
    tokens: str
    measures: Mapping[str, Distribution]
    openings: Mapping[str, int]
    seconds: float
    html: str | None = None


def stats(
    recipe: Outline | None, file: Path | None = None, *, stage: StageNumber | None = None, html: Path | None = None
) -> StatsReport:
    """Measures the records of ``recipe``'s sources, or of ``file``; ``html`` is a page to write, with plots.

    Raises:
        DataError: a file is not there, or has no usable record.
        RecipeError: there is nothing to measure.
    """
    began = time.perf_counter()
    found, unusable, said = Statistics(), 0, []
    for each in inputs(recipe, file, None, stage):
        lengths, how = counted_lengths(recipe, each.stage)
        said.append(how)
        for sample, tokens in _measured(each, lengths):
            if sample is None:
                unusable += 1
            else:
                found.add(sample, tokens)
    if not found.samples:
        raise DataError("there is no usable record to measure", hint="`llavactl data check` says what is wrong")
    distributions = found.finished()
    report = StatsReport(
        samples=found.samples,
        unusable=unusable,
        tokens="; ".join(dict.fromkeys(said)),
        measures={name: summary(counts) for name, counts in distributions.items()},
        openings=dict(found.openings.most_common(OPENINGS)),
        seconds=round(time.perf_counter() - began, 3),
        html=str(html) if html else None,
    )
    if html is not None:
        from llavactl.report.stats_page import statistics_page

        title = file.name if file is not None else recipe.name if recipe is not None else ""
        write_atomic(html, statistics_page(title, asdict(report), distributions))
    return report


def _measured(each: Input, lengths: Lengths | None) -> Iterator[tuple[Sample | None, int | None]]:
    """The samples of ``each`` with their tokens, if they can be counted; None is a record that can't be used."""
    records = with_bar(each.records(True), each, "stats")
    while chunk := [examined.sample for examined in itertools.islice(records, CHUNK)]:
        usable = [sample for sample in chunk if sample is not None]
        counted = iter(lengths.count(usable) if lengths is not None else [])
        for sample in chunk:
            yield sample, None if sample is None or lengths is None else next(counted)
