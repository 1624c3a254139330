"""``llavactl data expand``: convert captions to conversations for stage 1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options

if TYPE_CHECKING:
    from llavactl.curation.captions import TagPlace


@click.command(
    "expand",
    cls=Command,
    examples=[
        "llavactl data expand captions.json --out stage1.jsonl",
    ],
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output file, .json or .jsonl.")
@click.option(
    "--image-tag",
    type=click.Choice(["first", "last", "random"]),
    default="random",
    show_default=True,
    help="Put <image> before the instruction, after it, or at random.",
)
@click.option("--seed", type=int, help="Seed of the drawn instructions.  [default: the recipe's, or 0]")
@json_option
def command(
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    out: Path,
    image_tag: TagPlace,
    seed: int | None,
    as_json: bool,
) -> None:
    """Convert each caption of FILE, or of the recipe's stage 1, to a one-turn conversation for stage 1.

    FILE is JSON or JSONL of {id, image, caption}, or of LLaVA records, whose first answer is the caption.
    """
    from llavactl.curation.inputs import caption_source
    from llavactl.verbs.expand import expand

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    seed = seed if seed is not None else recipe.seed if recipe else 0
    output.report(expand(caption_source(recipe, file), out, image_tag=image_tag, seed=seed), as_json)
