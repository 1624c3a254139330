"""``llavactl run``: a recipe's whole pipeline."""

from __future__ import annotations

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options


@click.command()
@recipe_options
@json_option
def command(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Extract, stage 1, stage 2, eval: finished steps are skipped, an interrupted one resumes."""
    from llavactl.verbs.run import run

    output.report(run(load(source, overrides)), as_json)
