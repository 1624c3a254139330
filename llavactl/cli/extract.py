"""``llavactl extract``: extract vision features into the feature store."""

from __future__ import annotations

import re

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_vision, max_skipped_option, recipe_options


@click.command(
    cls=Command,
    resumes=True,
    examples=[
        "llavactl extract --dry-run",
        "llavactl extract -r llava-v1.5-7b -o features.dtype=int8",
        "torchrun --nproc-per-node 8 -m llavactl extract",
    ],
)
@recipe_options
@click.option("--dry-run", is_flag=True, help="Estimate images, bytes, free disk space and time; write nothing.")
@max_skipped_option
@click.option(
    "--part",
    metavar="I/N",
    help="Extract part I (from 0) of N only.  [default: set by torchrun, accelerate and srun]",
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
    """Extract vision features into the feature store.

    Every image of the recipe is encoded once. Images that can't be read are skipped and listed with a reason.
    """
    index_and_count = _index_and_count(part) if part else None
    recipe = load_vision(source, overrides)  # before the import of torch, which takes seconds
    from llavactl.features.parts import Part
    from llavactl.verbs.extract import extract

    share = Part(*index_and_count) if index_and_count else None
    report = extract(recipe, dry_run=dry_run, max_skipped=max_skipped, part=share)
    output.report(report, as_json)


def _index_and_count(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", part, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise click.UsageError(f"--part: expected I/N with I from 0 to N-1, such as 0/4, got {part!r}")
    return int(match[1]), int(match[2])
