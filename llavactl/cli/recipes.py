"""``llavactl recipes``: list, show, copy and check recipes."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llavactl.cli import completion, output
from llavactl.cli.help import Group
from llavactl.cli.options import device_options, json_option, load, recipe_options

log = logging.getLogger(__name__)


@click.group(
    cls=Group,
    examples=[
        "llavactl recipes list",
        "llavactl recipes copy llava-v1.5-7b-lora",
        "llavactl recipes check",
    ],
)
def command() -> None:
    """List, show, copy and check recipes.

    A recipe argument with a slash or a .yaml suffix is a file, any other the name of a registered recipe. Paths in a
    recipe file are relative to the file, paths in a registered recipe to the working directory.
    """


def _source(argument: str | None, option: str | None) -> str | None:
    if argument and option:
        raise click.UsageError("pass the recipe either as an argument or with -r")
    return argument or option


@command.command(
    "list",
    examples=[
        "llavactl recipes list",
        "llavactl recipes list --json",
    ],
)
@json_option
def list_(as_json: bool) -> None:
    """List the registered recipes."""
    from llavactl.core.registry import registry

    entries = [registry().get("recipes", name) for name in registry().names("recipes")]
    if as_json:
        output.document([{"name": e.name, "summary": e.summary, "plugin": e.plugin} for e in entries])
    else:
        output.table([(entry.name, entry.summary) for entry in entries], ("name", "summary"))


@command.command(
    examples=[
        "llavactl recipes show llava-v1.5-7b",
        "llavactl recipes show --resolved -o stage2.epochs=2",
    ]
)
@click.argument("recipe", required=False, shell_complete=completion.names_of("recipes", or_files=True))
@recipe_options
@click.option("--resolved", is_flag=True, help="Print the resolved recipe: parents merged, defaults filled in.")
@json_option
def show(recipe: str | None, source: str | None, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Print a recipe."""
    from llavactl.recipe.document import content
    from llavactl.recipe.load import dump
    from llavactl.recipe.resolve import find

    source = _source(recipe, source)
    if as_json:
        output.document(load(source, overrides).model_dump(mode="json"))
    elif resolved or overrides:
        output.text(dump(load(source, overrides)))
    else:
        output.text(content(find(source).file))


@command.command(
    examples=[
        "llavactl recipes copy demo",
        "llavactl recipes copy llava-v1.5-7b-qlora my-recipe.yaml",
    ]
)
@click.argument("name", shell_complete=completion.names_of("recipes"))
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def copy(name: str, destination: Path | None, force: bool) -> None:
    """Copy the recipe NAME to ./recipe.yaml or DESTINATION."""
    from llavactl.recipe.copying import copy

    output.line(str(copy(name, destination, force=force)))


@command.command(
    examples=[
        "llavactl recipes check",
        "llavactl recipes check llava-v1.5-7b --device-memory 24GB",
    ]
)
@click.argument("recipe", required=False, shell_complete=completion.names_of("recipes", or_files=True))
@recipe_options
@device_options()
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    recipe: str | None,
    source: str | None,
    overrides: tuple[str, ...],
    device_memory: int | None,
    devices: int | None,
    as_json: bool,
) -> None:
    """Check a recipe and list all problems, as `file:line: key: reason`.

    Exit with 1 if there are any. No weights are loaded and nothing is downloaded. Stages that don't fit on the GPUs of
    this machine (without GPUs: in its memory), or on GPUs of --device-memory, are warnings. For models that aren't on
    this machine, this is known only if a stored prediction covers the recipe.
    """
    from llavactl.verbs.preflight import problems

    source = _source(recipe, source)
    found = problems(source, overrides)
    document: dict[str, Any] = {"ok": not found, "problems": [asdict(problem) for problem in found]}
    if not found:
        document |= _memory(source, overrides, device_memory, devices)
    if as_json:
        output.document(document)
    else:
        output.lines([str(problem) for problem in found] or [f"{source or 'recipe.yaml'}: ok"])
    if found:
        ctx.exit(1)


def _memory(
    source: str | None, overrides: tuple[str, ...], device_memory: int | None, devices: int | None
) -> dict[str, Any]:
    """Logs whether the stages fit; the part of the JSON document about it."""
    from llavactl.verbs.plan import check_memory  # which imports torch

    memory = check_memory(source, overrides, device_memory, devices)
    for warning in memory.warnings:
        log.warning("%s", warning)
    if memory.note:
        log.info("%s", memory.note)
    found = {"warnings": memory.warnings, "memory_not_checked": memory.not_checked}
    return {key: value for key, value in found.items() if value}


@command.command(
    examples=[
        "llavactl recipes schema > recipe.schema.json",
    ]
)
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    from llavactl.recipe.schema import schema

    output.document(schema())
