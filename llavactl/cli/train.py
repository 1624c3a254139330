"""``llavactl train``: train one stage of a recipe."""

from __future__ import annotations

from typing import Literal, cast

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, max_skipped_option, recipe_options
from llavactl.recipe.stages import STAGES


@click.command()
@recipe_options
@click.option(
    "--stage",
    required=True,
    type=click.Choice([str(number) for number in STAGES]),
    help="Train this stage. 1: connector; 2: connector and language model.",
)
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Resume from the last checkpoint (auto), or discard it and start over (never).",
)
@max_skipped_option
@json_option
def command(
    source: str | None, overrides: tuple[str, ...], stage: str, resume: str, max_skipped: int | None, as_json: bool
) -> None:
    """Train one stage of a recipe.

    Features are read from the feature store, or computed during training with `-o features.mode=live`.
    """
    from llavactl.verbs.train import train

    mode = cast(Literal["auto", "never"], resume)
    output.report(train(load(source, overrides), int(stage), mode, max_skipped=max_skipped), as_json)
