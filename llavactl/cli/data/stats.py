"""``llavactl data stats``: measure training records."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options, stage_option


@click.command(
    "stats",
    cls=Command,
    examples=[
        "llavactl data stats",
        "llavactl data stats records.json --html stats.html",
    ],
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@stage_option("Measure one stage only; FILE is its data.  [default: both; FILE: 2]")
@click.option("--html", type=click.Path(path_type=Path), metavar="PAGE", help="Also write an HTML page with plots.")
@json_option
def command(
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    stage: int | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure the records of the recipe, or of FILE: lengths, turns, images, first words of questions.

    With -r, lengths are also counted in tokens, with the stage's template and the recipe's tokenizer.
    """
    from llavactl.curation.stats import Distribution
    from llavactl.verbs.stats import stats

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    report = stats(recipe, file, stage=stage, html=html)
    if as_json:
        output.document(report)
        return
    output.line(f"{report.samples:,} samples, {report.unusable:,} unusable records, {report.seconds:.1f} s")
    output.line(f"tokens: {report.token_counting}")
    rows = [(name, *(f"{value:,}" for value in astuple(each))) for name, each in report.measures.items()]
    output.table(rows, ("measure", *(field.name for field in fields(Distribution))), titles_in_pipes=True)
    if report.openings:
        openings = [(words, f"{count:,}") for words, count in report.openings.items()]
        output.table(openings, ("question opening", "count"), titles_in_pipes=True)
    if report.html:
        output.line(report.html)
