"""From what a user types to one tree: finding the recipe, its parents (``extends``), ``-o`` on top.

What a text names depends only on how it is written: with a path separator or a ``.yaml``/``.yml``
suffix it is a file, otherwise a registered recipe. ``demo`` never turns into another recipe because
someone makes a file of that name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.errors import LlavactlError, Problem, RecipeError
from llavactl.core.paths import expand_user
from llavactl.core.registry import registry
from llavactl.recipe.document import Node, display, merge, parse, put, read

DEFAULT = "recipe.yaml"


@dataclass(frozen=True)
class RecipeLocation:
    """Where a recipe lies, and the folder that the paths in it are relative to."""

    file: Path
    base: Path


def find(source: str | Path | None) -> RecipeLocation:
    """The recipe that ``source`` names; None is ``./recipe.yaml``.

    A file's paths are relative to its folder, those of a recipe given by name to the working directory.

    Raises:
        RecipeError: there is none; the hint lists the recipes.
    """
    if source is None:
        if not Path(DEFAULT).is_file():
            raise RecipeError(
                f"there is no ./{DEFAULT} here",
                hint=f"`llavactl recipes copy NAME` writes one, or -r NAME|PATH; recipes: {_known()}",
            )
        source = Path(DEFAULT)
    if is_path(source):
        file = expand_user(source).absolute()
        return RecipeLocation(file, file.parent)
    return RecipeLocation(_registered(str(source)), Path.cwd())


def is_path(source: str | Path) -> bool:
    """True for a path, False for a recipe's name."""
    return isinstance(source, Path) or source.endswith((".yaml", ".yml")) or os.sep in source or "/" in source


def document(source: str | Path | None, overrides: Sequence[str]) -> tuple[Node, RecipeLocation, list[Problem]]:
    """The recipe's tree with parents merged and ``overrides`` applied, and what was wrong on the way.

    Raises:
        RecipeError: there is no tree to go on with.
    """
    problems: list[Problem] = []
    place = find(source)
    root = _with_parents(place, problems, ())
    for override in overrides:
        problems += _override(root, override)
    return root, place, problems


def overridden(overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The tree of ``overrides`` alone, and what is wrong with them."""
    root = Node({}, "-o")
    return root, [problem for override in overrides for problem in _override(root, override)]


def _with_parents(place: RecipeLocation, problems: list[Problem], below: tuple[Path, ...]) -> Node:
    child = read(place.file, place.base, problems)
    extends = child.value.pop("extends", None)
    if extends is None:
        return child
    line = (*below, place.file)
    try:
        parent = _parent(extends.value, place)
        if parent.file.resolve() in [file.resolve() for file in line]:
            raise RecipeError(f"extends itself: {' → '.join(display(file) for file in (*line, parent.file))}")
    except RecipeError as error:
        said = Problem(extends.where, "extends", sentence(error))
        raise RecipeError.from_problems([*problems, said]) from error
    return merge(_with_parents(parent, problems, line), child)


def _parent(extends: object, child: RecipeLocation) -> RecipeLocation:
    """The parent's place. A path is relative to the child's file.

    A parent found by name has no folder of its own: its paths are relative to what its child's are.
    """
    if not isinstance(extends, str) or not extends:
        raise RecipeError("must be the name or the path of a recipe")
    if not is_path(extends):
        return RecipeLocation(_registered(extends), child.base)
    file = Path(child.file.parent, expand_user(extends))
    if not file.is_file():
        raise RecipeError(f"there is no recipe file {display(file)}")
    return RecipeLocation(file, file.parent if child.base == child.file.parent else child.base)


def _registered(name: str) -> Path:
    if name not in registry().names("recipes") and Path(name).is_file():
        raise RecipeError(f"there is no recipe named {name!r}", hint=f"for the file write ./{name}")
    return registry().get("recipes", name).path()


def _known() -> str:
    return ", ".join(registry().names("recipes"))


_SECRET = re.compile(
    r"""((?:api_?key|token|secret|password|authorization)["']?\s*[:=]\s*|//(?=[^/\s]*@))[^\s,}@]+""", re.I
)
"""What a message doesn't repeat of an -o: it may be logged."""


def _override(root: Node, override: str) -> list[Problem]:
    where = "-o " + _SECRET.sub(r"\1***", override)
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [Problem(where, "", "must be key.path=value")]
    problems: list[Problem] = []
    try:
        new = parse(text, Path.cwd(), lambda _: where, problems)
    except RecipeError as error:
        return list(error.problems)
    if why := put(root, keys, new):
        problems.append(Problem(where, path, why))
    return problems


def sentence(error: LlavactlError) -> str:
    """The message and its hint as one clause, for a problem among others."""
    return f"{error.message}; {error.hint}" if error.hint else error.message
