"""``llavactl recipes``: what a run is made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options


@click.group()
def command() -> None:
    """List, show, copy and check recipes.

    A text with a slash or a .yaml suffix is a file; any other is a recipe's name. Paths in a file are
    relative to it, those of a recipe given by name to the working directory.
    """


def _recipe(positional: str | None, source: str | None) -> str | None:
    if positional and source:
        raise click.UsageError("name the recipe once: as the argument or with -r")
    return positional or source


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """The recipes there are."""
    from llavactl.core.registry import registry

    entries = [registry().get("recipes", name) for name in registry().names("recipes")]
    if as_json:
        output.document([{"name": e.name, "summary": e.summary, "plugin": e.plugin} for e in entries])
    else:
        output.table([(entry.name, entry.summary) for entry in entries])


@command.command()
@click.argument("recipe", required=False)
@recipe_options
@click.option("--resolved", is_flag=True, help="As it would run: parents merged, defaults written out.")
@json_option
def show(recipe: str | None, source: str | None, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Print a recipe."""
    from llavactl.recipe.document import content
    from llavactl.recipe.load import dump
    from llavactl.recipe.resolve import find

    chosen = _recipe(recipe, source)
    if as_json:
        output.document(load(chosen, overrides).model_dump(mode="json"))
    elif resolved or overrides:
        output.text(dump(load(chosen, overrides)))
    else:
        output.text(content(find(chosen).file))


@command.command()
@click.argument("name")
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def copy(name: str, destination: Path | None, force: bool) -> None:
    """Write the recipe NAME to ./recipe.yaml, or to DESTINATION, to be edited."""
    from llavactl.recipe.copying import copy

    output.line(str(copy(name, destination, force=force)))


@command.command()
@click.argument("recipe", required=False)
@recipe_options
@json_option
@click.pass_context
def check(
    ctx: click.Context, recipe: str | None, source: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Every problem of a recipe at once, as file:line: key: why. Exit 1 if there is any."""
    from llavactl.verbs.preflight import problems

    chosen = _recipe(recipe, source)
    found = problems(chosen, overrides)
    if as_json:
        output.document({"ok": not found, "problems": [asdict(problem) for problem in found]})
    else:
        output.lines([str(each) for each in found] or [f"{chosen or 'recipe.yaml'}: ok"])
    if found:
        ctx.exit(1)


@command.command()
def schema() -> None:
    """The JSON schema of a recipe file, for editors."""
    from llavactl.recipe.schema import schema

    output.document(schema())
