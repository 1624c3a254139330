"""Options shared by several commands, and loading the recipe that they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llavactl.cli import completion

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline, Recipe, VisionRecipe

Command = TypeVar("Command", bound=Callable[..., object])


def recipe_options_or(default: str) -> Callable[[Command], Command]:
    """``-r/--recipe`` and ``-o``; the command receives ``source`` and ``overrides``.

    ``default`` is the help text for a command without ``-r``.
    """

    def decorate(command: Command) -> Command:
        command = click.option(
            "-o",
            "--override",
            "overrides",
            multiple=True,
            metavar="KEY.PATH=VALUE",
            help="Override one value of the recipe (repeatable).",
        )(command)
        return click.option(
            "-r",
            "--recipe",
            "source",
            metavar="NAME|PATH",
            shell_complete=completion.names_of("recipes", or_files=True),
            help=f"Use this recipe.  [default: {default}]",
        )(command)

    return decorate


recipe_options = recipe_options_or("./recipe.yaml")
"""``-r/--recipe`` and ``-o`` of commands that need a recipe."""


def json_option(command: Command) -> Command:
    """``--json``; the command receives ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def stage_option(text: str, *, required: bool = False) -> Callable[[Command], Command]:
    """``--stage`` with the help ``text``; the command receives ``stage``, a number or None."""
    from llavactl.recipe.stages import STAGES

    return click.option(
        "--stage",
        type=click.Choice([str(number) for number in STAGES]),
        callback=lambda _context, _option, value: value and int(value),
        required=required,
        help=text,
    )


def max_skipped_option(command: Command) -> Command:
    """``--max-skipped``; the command receives ``max_skipped``."""
    return click.option(
        "--max-skipped",
        type=click.IntRange(min=0),
        metavar="N",
        help="Fail if more than N images can't be read.  [default: no limit]",
    )(command)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """A size such as 24GB (10⁹ bytes) or 80GiB (2³⁰ bytes), in bytes; raises BadParameter for any other text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper(), re.ASCII)
    if not match or match[2] not in _UNITS or not (size := round(float(match[1]) * _UNITS[match[2]])):
        raise click.BadParameter(f"expected a size such as 24GB or 80GiB, got {text!r}")
    if not text.strip()[-1].isalpha() and size < _UNITS["M"]:
        raise click.BadParameter(f"{text} has no unit; expected a size such as 24GB")
    return size


def device_memory_option(condition: str = "") -> Callable[[Command], Command]:
    """``--device-memory``, in bytes; ``condition`` begins its help text."""
    return click.option(
        "--device-memory",
        metavar="SIZE",
        callback=lambda _context, _option, text: None if text is None else parse_bytes(text),
        help=f"{condition}Plan for GPUs with this memory, such as 24GB or 80GiB.  [default: this machine's]",
    )


def device_options(condition: str = "") -> Callable[[Command], Command]:
    """``--device-memory`` and ``--devices``; ``condition`` begins their help texts."""

    def decorate(command: Command) -> Command:
        command = click.option(
            "--devices",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"{condition}Plan for N devices, one process each.  [default: 1, or as launched by torchrun]",
        )(command)
        return device_memory_option(condition)(command)

    return decorate


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


def key_values(arguments: Sequence[str]) -> dict[str, Any]:
    """The options in ``arguments`` (``key=value``), as strings; repeated keys become a list.

    ``judge.model=x`` sets key ``model`` of option ``judge``.
    """
    from llavactl.core.options import Located

    values: dict[str, list[Located]] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"expected KEY=VALUE, got {argument!r}", param_hint="-t")
        values.setdefault(key, []).append(Located(value, Path.cwd()))
    options: dict[str, Any] = {}
    for key, of_key in values.items():
        mapping = options
        *outer, last = key.split(".")
        for name in outer:
            mapping = mapping.setdefault(name, {})
            if not isinstance(mapping, dict):
                raise click.BadParameter(f"{name} has both a value and keys", param_hint="-t")
        if last in mapping:
            raise click.BadParameter(f"{key} has both a value and keys", param_hint="-t")
        mapping[last] = of_key[0] if len(of_key) == 1 else of_key
    return options


def load(source: str | None, overrides: Sequence[str]) -> Recipe:
    """The complete recipe that ``recipe_options`` name."""
    from llavactl.recipe.load import load_recipe

    return load_recipe(source, overrides)


def load_outline(source: str | None, overrides: Sequence[str]) -> Outline:
    """The recipe that ``recipe_options`` name; no section is required."""
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.load import load_frame

    return load_frame(Outline, source, overrides)


def load_outline_if_given(source: str | None, overrides: Sequence[str]) -> Outline | None:
    """The recipe of ``-r`` or ``-o``; None without both, even if ``./recipe.yaml`` exists."""
    return load_outline(source, overrides) if source or overrides else None


def load_vision(source: str | None, overrides: Sequence[str]) -> VisionRecipe:
    """The recipe that ``recipe_options`` name; only a vision encoder is required."""
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.load import load_frame

    return load_frame(VisionRecipe, source, overrides)


def load_vision_if_given(source: str | None, overrides: Sequence[str]) -> VisionRecipe | None:
    """Like ``load_outline_if_given``, with a vision encoder."""
    return load_vision(source, overrides) if source or overrides else None


def load_outline_if_there(source: str | None, overrides: Sequence[str]) -> Outline | None:
    """The recipe of ``-r`` or ``-o``, otherwise ``./recipe.yaml`` if it exists, otherwise None."""
    from llavactl.recipe.resolve import DEFAULT

    return load_outline(source, overrides) if Path(DEFAULT).is_file() else load_outline_if_given(source, overrides)
