"""``llavactl export``: a folder that other programs load."""

from __future__ import annotations

from pathlib import Path

import click

from llavactl.cli import output
from llavactl.cli.options import (
    component_options,
    json_option,
    key_values,
    load_outline,
    load_outline_if_given,
    recipe_options,
)


@click.command()
@recipe_options
@click.option("--format", "form", required=True, metavar="NAME", help="`llavactl components formats` lists them.")
@click.option("--to", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--model", metavar="DIR|ID", help="A model instead of the recipe's; no recipe is needed then.")
@click.option(
    "--verify/--no-verify", default=None,
    help="Reload the export without llavactl and compare token ids, pixels, logits and answers.  "
    "[default: on for formats that can be reloaded]",
)  # fmt: skip
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="An image to verify with (repeatable).  [default: the recipe's]",
)  # fmt: skip
@component_options("format")
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    form: str,
    to: Path,
    model: str | None,
    verify: bool | None,
    images: tuple[Path, ...],
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Export the recipe's last finished stage, or --model, to a folder that other programs load."""
    recipe = load_outline_if_given(source, overrides) if model is not None else load_outline(source, overrides)
    from llavactl.verbs.export import export

    chosen = {"name": form, **key_values(options)}
    output.report(export(recipe, chosen, to, model=model, check=verify, images=images), as_json)
