"""``llavactl eval``: run or score a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llavactl.cli import output
from llavactl.cli.options import (
    component_options,
    json_option,
    key_values,
    load_outline,
    load_outline_if_given,
    load_outline_if_there,
    recipe_options,
)


@click.command()
@click.argument("task")
@recipe_options
@click.option(
    "--answers", type=click.Path(path_type=Path), help="Score these stored answers (JSONL); no model is loaded."
)
@click.option("--protocol", help="How answers are scored.  [default: the task's first]")
@component_options("task")
@click.option(
    "--model", metavar="DIR|ID", help="A model instead of the recipe's; hf:DIR or hf:ID: any for images and text."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N questions alone.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RUN|FILE",
    help="Compare runs or files of answers in pairs (repeatable); nothing is asked.",
)
@click.option(
    "--cases",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a page and a Markdown file of the worst answers there.  [default: in the run, for a model]",
)
@json_option
def command(
    task: str,
    source: str | None,
    overrides: tuple[str, ...],
    answers: Path | None,
    protocol: str | None,
    options: tuple[str, ...],
    model: str | None,
    limit: int | None,
    compare: tuple[Path, ...],
    cases: Path | None,
    as_json: bool,
) -> None:
    """Ask TASK's questions and score the answers.

    `llavactl components tasks` lists the tasks and their options. With --answers, --compare, --model or
    -t reviews= no recipe is needed.
    """
    from llavactl.recipe.load import load_eval
    from llavactl.recipe.resolve import DEFAULT

    given, settings = key_values(options), None
    if answers is not None or compare or "reviews" in given:
        recipe = load_outline_if_there(source, overrides)
    elif model is not None and source is None and not Path(DEFAULT).is_file():
        recipe, settings = None, load_eval(overrides)
    elif model is not None:
        recipe = load_outline_if_given(source, overrides)
    else:
        recipe = load_outline(source, overrides)
    if compare:
        from llavactl.verbs.compare import compare as compared

        output.report(compared(recipe, task, given, compare, protocol=protocol, limit=limit), as_json)
        return
    from llavactl.verbs.evaluate import evaluate

    chosen: dict[str, Any] = {"answers": answers, "protocol": protocol, "model": model, "limit": limit, "cases": cases}
    if settings is not None:
        chosen["settings"] = settings
    made = evaluate(recipe, task, given, **chosen)
    output.report(made, as_json)
