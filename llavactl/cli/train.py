"""``llavactl train``: one stage of a recipe."""

from __future__ import annotations

from typing import Literal, cast

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options


@click.command()
@recipe_options
@click.option(
    "--stage", required=True, type=click.Choice(["1", "2"]), help="1: connector; 2: connector and language model."
)
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True)
@click.option("--max-skipped", type=click.IntRange(min=0), help="Fail when more images than this can't be read.")
@json_option
def command(
    source: str | None, overrides: tuple[str, ...], stage: str, resume: str, max_skipped: int | None, as_json: bool
) -> None:
    """Train one stage, from the feature store, or live with `-o features.mode=live`."""
    from llavactl.verbs.train import train

    number = cast(Literal[1, 2], int(stage))
    mode = cast(Literal["auto", "never"], resume)
    output.report(train(load(source, overrides), number, mode, max_skipped=max_skipped), as_json)
