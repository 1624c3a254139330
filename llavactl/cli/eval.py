"""``llavactl eval``: run or score a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, load_if_given, load_if_there, recipe_options


@click.command()
@click.argument("task")
@recipe_options
@click.option(
    "--answers", type=click.Path(path_type=Path), help="Score these stored answers (JSONL); no model is loaded."
)
@click.option("--protocol", help="How answers are scored.  [default: the task's first]")
@click.option(
    "-t", "--option", "options", multiple=True, metavar="KEY=VALUE", help="Set an option of the task (repeatable)."
)
@click.option("--model", metavar="DIR|ID", help="A model instead of the recipe's.")
@json_option
def command(
    task: str,
    source: str | None,
    overrides: tuple[str, ...],
    answers: Path | None,
    protocol: str | None,
    options: tuple[str, ...],
    model: str | None,
    as_json: bool,
) -> None:
    """Ask TASK's questions and score the answers.

    `llavactl components tasks` lists the tasks and their options. With --answers or --model no recipe is needed.
    """
    from llavactl.verbs.evaluate import evaluate

    given = task_options(options)
    if answers is not None or "reviews" in given:
        recipe = load_if_there(source, overrides)
    elif model is not None:
        recipe = load_if_given(source, overrides)
    else:
        recipe = load(source, overrides)
    output.report(evaluate(recipe, task, given, answers=answers, protocol=protocol, model=model), as_json)


def task_options(given: Sequence[str]) -> dict[str, Any]:
    """``-t key=value``: text that the task's options model makes its own; a key given twice is a list."""
    from llavactl.core.options import Located

    found: dict[str, list[Located]] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="-t")
        found.setdefault(key, []).append(Located(value, Path.cwd()))
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}
