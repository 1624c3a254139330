"""``llavactl data generate``: a teacher's samples about pictures."""

from __future__ import annotations

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options


@click.command("generate")
@recipe_options
@click.option("--dry-run", is_flag=True, help="Say what would be asked; ask and write nothing.")
@json_option
def command(source: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Have the recipe's teacher write samples about the pictures of `generate.source`."""
    from llavactl.verbs.generate import generate

    output.report(generate(load(source, overrides), dry_run=dry_run), as_json)
