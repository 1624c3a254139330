"""``llavactl data generate``: a teacher's samples about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_outline, recipe_options

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("generate")
@recipe_options
@click.option("--dry-run", is_flag=True, help="Say what would be asked and what it would take; ask and write nothing.")
@click.option(
    "--max-cost", type=click.FloatRange(min=0), help="Stop before all that was spent on the file exceeds this."
)
@click.option("--max-requests", type=click.IntRange(min=0), help="Send at most so many requests now, repeats included.")
@click.option("--retry-refused", is_flag=True, help="Ask again for what was answered, but could not be used.")
@click.option(
    "--batch-requests", type=FILE, help="Write what is to be asked into this file for a batch, and ask nothing."
)
@click.option("--batch-results", type=FILE, multiple=True, help="Read a batch's results (repeatable), and ask nothing.")
@json_option
def command(source: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Have the recipe's teacher write samples about the pictures of `generate.source`."""
    from llavactl.teaching.session import GenerationOptions
    from llavactl.verbs.generate import generate

    output.report(
        generate(load_outline(source, overrides), dry_run=dry_run, options=GenerationOptions(**options)), as_json
    )
