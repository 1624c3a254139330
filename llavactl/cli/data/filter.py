"""``llavactl data filter``: select captions balanced by concept."""

from __future__ import annotations

from pathlib import Path

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options


@click.command(
    "filter",
    cls=Command,
    examples=[
        "llavactl data filter captions.json --out filtered.json",
        "llavactl data filter captions.json --out filtered.json --at-most 50",
    ],
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output file, .json or .jsonl.")
@click.option(
    "--at-least", type=click.IntRange(min=1), metavar="N", default=3, show_default=True, help="Skip rarer phrases."
)
@click.option(
    "--at-most", type=click.IntRange(min=1), metavar="N", default=100, show_default=True, help="Captions per phrase."
)
@click.option("--seed", type=int, help="Seed of the sampling for frequent phrases.  [default: the recipe's, or 0]")
@click.option(
    "--extractor", metavar="MODULE:ATTR", help="Noun phrase extractor to use (docs/reference/data.md#noun-phrases)."
)
@click.option(
    "--workers", type=click.IntRange(min=1), metavar="N", help="Worker processes.  [default: CPU cores; small files: 1]"
)
@json_option
def command(
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    out: Path,
    at_least: int,
    at_most: int,
    seed: int | None,
    extractor: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Select captions of FILE, or of the recipe's stage 1, balanced by their noun phrases.

    This is how LLaVA selected 595K of CC3M's 3 million captions: all captions with a phrase that occurs in 3 to 100
    of them, and 100 random captions for each more frequent phrase. FILE is JSON or JSONL of records with a `caption`,
    or of LLaVA records, whose first answer is the caption.
    """
    from llavactl.curation.inputs import caption_source
    from llavactl.curation.noun_phrases import DEFAULT
    from llavactl.verbs.filter import filter_captions

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    report = filter_captions(
        caption_source(recipe, file),
        out,
        at_least=at_least,
        at_most=at_most,
        seed=seed if seed is not None else recipe.seed if recipe else 0,
        extractor=extractor or DEFAULT,
        workers=workers,
    )
    output.report(report, as_json)
