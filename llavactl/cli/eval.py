"""``llavactl eval``: run a benchmark or score stored answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llavactl.cli import completion, output
from llavactl.cli.help import Command
from llavactl.cli.options import (
    component_options,
    json_option,
    key_values,
    load_outline,
    load_outline_if_given,
    load_outline_if_there,
    recipe_options,
)


@click.command(
    cls=Command,
    resumes=True,
    examples=[
        "llavactl eval scenes -r demo",
        "llavactl eval scienceqa -t questions=problems.json --limit 100",
        "llavactl eval pope --answers answers.jsonl -t questions=q.jsonl -t labels=coco",
        "llavactl eval vqa --compare runs/a --compare runs/b",
    ],
)
@click.argument("task", shell_complete=completion.names_of("tasks"))
@recipe_options
@click.option(
    "--answers", type=click.Path(path_type=Path), help="Score the answers in this file (JSONL) without loading a model."
)
@click.option("--protocol", metavar="NAME", help="Score with this protocol.  [default: the task's first]")
@component_options("task")
@click.option(
    "--model",
    metavar="DIR|ID",
    shell_complete=completion.file_names,
    help="Evaluate this model instead of the recipe's; hf:DIR, hf:ID: any transformers image-text-to-text model.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Evaluate only the first N questions.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="RUN|FILE",
    help="Compare runs or answer files pairwise, without loading a model (repeat for each run or file).",
)
@click.option(
    "--cases",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write pages of the worst answers (HTML, Markdown) to this folder.  [default: eval/cases/ of the run]",
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
    """Run a benchmark, or score stored answers.

    `llavactl components tasks` lists the tasks and their options. A recipe is optional with --answers, --compare,
    --model or -t reviews=FILE.
    """
    from llavactl.recipe.load import load_eval
    from llavactl.recipe.resolve import DEFAULT

    task_options, settings = key_values(options), None
    if answers is not None or compare or "reviews" in task_options:
        recipe = load_outline_if_there(source, overrides)
    elif model is not None and source is None and not Path(DEFAULT).is_file():
        recipe, settings = None, load_eval(overrides)
    elif model is not None:
        recipe = load_outline_if_given(source, overrides)
    else:
        recipe = load_outline(source, overrides)
    if compare:
        from llavactl.verbs.compare import compare as compare_answers

        output.report(compare_answers(recipe, task, task_options, compare, protocol=protocol, limit=limit), as_json)
        return
    from llavactl.verbs.evaluate import evaluate

    arguments: dict[str, Any] = {
        "answers": answers,
        "protocol": protocol,
        "model": model,
        "limit": limit,
        "cases": cases,
    }
    if settings is not None:
        arguments["settings"] = settings
    output.report(evaluate(recipe, task, task_options, **arguments), as_json)
