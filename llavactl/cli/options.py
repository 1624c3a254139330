"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline, Recipe, VisionRecipe

Command = TypeVar("Command", bound=Callable[..., object])


def recipe_options_or(default: str) -> Callable[[Command], Command]:
    """``-r/--recipe`` and ``-o``; the command receives ``source`` and ``overrides``. ``default``: what is without."""

    def decorate(command: Command) -> Command:
        command = click.option(
            "-o",
            "--override",
            "overrides",
            multiple=True,
            metavar="KEY.PATH=VALUE",
            help="Set one value of the recipe (repeatable).",
        )(command)
        return click.option(
            "-r", "--recipe", "source", metavar="NAME|PATH", help=f"A recipe's name or file.  [default: {default}]"
        )(command)

    return decorate


recipe_options = recipe_options_or("./recipe.yaml")
"""For ``load``."""


def json_option(command: Command) -> Command:
    """``--json``; the command receives ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def component_options(what: str) -> Callable[[Command], Command]:
    """``-t key=value``; the command receives ``options`` for ``key_values``. ``what``: the kind of component."""
    return click.option(
        "-t",
        "--option",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Set an option of the {what} (repeatable).",
    )


def key_values(given: Sequence[str]) -> dict[str, Any]:
    """The options in ``given`` (``key=value``), as text; repeated keys become a list.

    ``judge.model=x`` sets key ``model`` of option ``judge``.
    """
    from llavactl.core.options import Located

    found: dict[str, list[Located]] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{option!r} is not KEY=VALUE", param_hint="-t")
        found.setdefault(key, []).append(Located(value, Path.cwd()))
    options: dict[str, Any] = {}
    for key, values in found.items():
        inside = options
        *outer, last = key.split(".")
        for name in outer:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise click.BadParameter(f"{name} is given as a value and as keys", param_hint="-t")
        if last in inside:
            raise click.BadParameter(f"{key} is given as a value and as keys", param_hint="-t")
        inside[last] = values[0] if len(values) == 1 else values
    return options


def load(source: str | None, overrides: Sequence[str]) -> Recipe:
    """The whole recipe that ``recipe_options`` name."""
    from llavactl.recipe.load import load_recipe

    return load_recipe(source, overrides)


def load_outline(source: str | None, overrides: Sequence[str]) -> Outline:
    """The recipe that ``recipe_options`` name; no section is required."""
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.load import load_frame

    return load_frame(Outline, source, overrides)


def load_outline_if_given(source: str | None, overrides: Sequence[str]) -> Outline | None:
    """The recipe of ``-r`` or ``-o``; None if neither is given, even if there is a ``./recipe.yaml``."""
    return load_outline(source, overrides) if source or overrides else None


def load_vision(source: str | None, overrides: Sequence[str]) -> VisionRecipe:
    """The recipe that ``recipe_options`` name, with a vision backbone."""
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.load import load_frame

    return load_frame(VisionRecipe, source, overrides)


def load_vision_if_given(source: str | None, overrides: Sequence[str]) -> VisionRecipe | None:
    """As ``load_outline_if_given``, with a vision backbone."""
    return load_vision(source, overrides) if source or overrides else None


def load_outline_if_there(source: str | None, overrides: Sequence[str]) -> Outline | None:
    """The recipe of ``-r`` or ``-o``, else ``./recipe.yaml`` if it exists, else None."""
    from llavactl.recipe.resolve import DEFAULT

    return load_outline(source, overrides) if Path(DEFAULT).is_file() else load_outline_if_given(source, overrides)
