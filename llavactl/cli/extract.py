"""``llavactl extract``: vision features into the store."""

from __future__ import annotations

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options


@click.command()
@recipe_options
@click.option("--dry-run", is_flag=True, help="Count images, bytes, free disk and time; write nothing.")
@click.option("--max-skipped", type=click.IntRange(min=0), help="Fail when more images than this can't be read.")
@json_option
def command(
    source: str | None, overrides: tuple[str, ...], dry_run: bool, max_skipped: int | None, as_json: bool
) -> None:
    """Encode every image of the recipe once and store its features.

    An image that can't be read is skipped and listed with its reason.
    """
    from llavactl.verbs.extract import extract

    output.report(extract(load(source, overrides), dry_run=dry_run, max_skipped=max_skipped), as_json)
