"""``llavactl extract``: vision features into the store."""

from __future__ import annotations

import re

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_vision, recipe_options


@click.command()
@recipe_options
@click.option("--dry-run", is_flag=True, help="Count images, bytes, free disk and time; write nothing.")
@click.option("--max-skipped", type=click.IntRange(min=0), help="Fail when more images than this can't be read.")
@click.option(
    "--part",
    metavar="I/N",
    help="Make the I-th (from 0) of N shares only; torchrun, accelerate and srun say it themselves.",
)
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    max_skipped: int | None,
    part: str | None,
    as_json: bool,
) -> None:
    """Encode every image of the recipe once and store its features.

    An image that can't be read is skipped and listed with its reason.
    """
    from llavactl.features.parts import Part
    from llavactl.verbs.extract import extract

    share = Part(*_numbers(part)) if part else None
    recipe = load_vision(source, overrides)
    report = extract(recipe, dry_run=dry_run, max_skipped=max_skipped, part=share)
    output.report(report, as_json)


def _numbers(part: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", part, re.ASCII)
    if not found or not int(found[1]) < int(found[2]):
        raise click.UsageError(f"--part {part}: it is I/N with I from 0 to N-1, as in 0/4")
    return int(found[1]), int(found[2])
