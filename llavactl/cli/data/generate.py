"""``llavactl data generate``: generate training samples with a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, recipe_options

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    "generate",
    cls=Command,
    resumes=True,
    examples=[
        "llavactl data generate --dry-run",
        "llavactl data generate --max-cost 20",
        "llavactl data generate --batch-requests requests.jsonl",
    ],
)
@recipe_options
@click.option("--dry-run", is_flag=True, help="Estimate requests, tokens and cost; send and write nothing.")
@click.option(
    "--max-cost",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Stop before the total cost of the output file exceeds this.",
)
@click.option(
    "--max-requests", type=click.IntRange(min=0), metavar="N", help="Send at most this many requests now, with retries."
)
@click.option("--retry-refused", is_flag=True, help="Resend requests whose replies could not be used.")
@click.option("--batch-requests", type=FILE, help="Write the requests to this batch file instead of sending them.")
@click.option(
    "--batch-results",
    type=FILE,
    multiple=True,
    help="Read the results of a batch (repeatable) instead of sending requests.",
)
@json_option
def command(source: str | None, overrides: tuple[str, ...], dry_run: bool, as_json: bool, **options: Any) -> None:
    """Generate samples about the images of `generate.source` with the recipe's teacher."""
    recipe = load_outline(source, overrides)  # before imports that take seconds
    from llavactl.teaching.session import GenerationOptions
    from llavactl.verbs.generate import generate

    output.report(generate(recipe, dry_run=dry_run, options=GenerationOptions(**options)), as_json)
