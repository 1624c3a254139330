"""``llavactl data stats``: what training records are like."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options

if TYPE_CHECKING:
    from llavactl.recipe.stages import StageNumber


@click.command("stats")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option(
    "--stage", type=click.Choice(["1", "2"]), help="Of one stage alone; FILE trains it.  [default: both; FILE: 2]"
)
@click.option("--html", type=click.Path(path_type=Path), metavar="PAGE", help="Write a page with plots, too.")
@json_option
def command(
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    stage: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure the recipe's records, or those of FILE: lengths, turns, images, first words of questions.

    With -r lengths are counted in tokens, too, as the stage's template and tokenizer make them.
    """
    from llavactl.curation.stats import Distribution
    from llavactl.verbs.stats import stats

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    report = stats(recipe, file, stage=cast("StageNumber | None", stage and int(stage)), html=html)
    if as_json:
        output.document(report)
        return
    output.line(f"{report.samples:,} samples, {report.unusable:,} unusable records, {report.seconds:.1f} s")
    output.line(f"tokens: {report.tokens}")
    rows = [(name, *(f"{value:,}" for value in astuple(each))) for name, each in report.measures.items()]
    output.table([("", *(field.name for field in fields(Distribution))), *rows])
    if report.openings:
        output.table([("questions begin", ""), *((words, f"{count:,}") for words, count in report.openings.items())])
    if report.html:
        output.line(report.html)
