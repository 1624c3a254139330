"""``llavactl train``: train one stage of a recipe."""

from __future__ import annotations

from typing import Literal, cast

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, max_skipped_option, recipe_options, stage_option


@click.command()
@recipe_options
@stage_option("Train this stage. 1: connector; 2: connector and language model.", required=True)
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Resume from the last checkpoint (auto), or start over (never).",
)
@max_skipped_option
@json_option
def command(
    source: str | None, overrides: tuple[str, ...], stage: int, resume: str, max_skipped: int | None, as_json: bool
) -> None:
    """Train one stage of a recipe.

    Features are read from the feature store, or computed during training with `-o features.mode=live`.
    """
    from llavactl.verbs.train import train

    mode = cast(Literal["auto", "never"], resume)
    output.report(train(load(source, overrides), stage, mode, max_skipped=max_skipped), as_json)
