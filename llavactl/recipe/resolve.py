"""Finds a recipe and resolves it to one tree: its parents (``extends``) merged, overrides (``-o``) applied.

A string with a path separator or the suffix ``.yaml`` or ``.yml`` is a file, any other string the name of a registered
recipe. Existing files don't matter: a file named ``demo`` doesn't change the meaning of ``demo``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.locations import shown_path
from llavactl.core.paths import expand_user
from llavactl.core.registry import registry
from llavactl.recipe.document import Node, merge, parse, put, read

DEFAULT = "recipe.yaml"


@dataclass(frozen=True)
class RecipeLocation:
    """The file of a recipe, and the folder that its paths are relative to."""

    file: Path
    base: Path


RecipeSource = str | Path | RecipeLocation | None
"""The name or path of a recipe, a file with another base folder, or None for ``./recipe.yaml``."""


@dataclass(frozen=True)
class Assignment:
    """An override of ``key`` (dotted) by a value that has an origin and a base folder of its own."""

    key: str
    node: Node


Override = str | Assignment
"""``key.path=value``, relative to the working directory, or an ``Assignment``."""


def find(source: RecipeSource) -> RecipeLocation:
    """Finds the recipe ``source``.

    Paths in a file are relative to its folder, paths in a registered recipe to the working directory.

    Raises:
        RecipeError: the recipe doesn't exist; the hint lists the recipes.
    """
    if isinstance(source, RecipeLocation):
        return source
    if source is None:
        if not Path(DEFAULT).is_file():
            raise RecipeError(
                f"./{DEFAULT} not found",
                hint="create it with `llavactl init` or `llavactl recipes copy NAME`, or pass -r NAME|PATH; "
                f"recipes: {_names()}",
            )
        source = Path(DEFAULT)
    if is_path(source):
        file = expand_user(source).absolute()
        return RecipeLocation(file, file.parent)
    return RecipeLocation(_registered(str(source)), Path.cwd())


def is_path(source: str | Path) -> bool:
    """Whether ``source`` is a path, not the name of a registered recipe."""
    return isinstance(source, Path) or source.endswith((".yaml", ".yml")) or os.sep in source or "/" in source


def document(source: RecipeSource, overrides: Sequence[Override]) -> tuple[Node, RecipeLocation, list[Problem]]:
    """The tree of the recipe with parents merged and ``overrides`` applied, its location, and problems.

    Raises:
        RecipeError: a file can't be read or parsed.
    """
    problems: list[Problem] = []
    location = find(source)
    root = _with_parents(location, problems, ())
    for override in overrides:
        problems += _override(root, override)
    return root, location, problems


def overridden(overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """The tree of ``overrides`` without a recipe, and their problems."""
    root = Node({}, "-o")
    return root, [problem for override in overrides for problem in _override(root, override)]


def _with_parents(location: RecipeLocation, problems: list[Problem], children: tuple[Path, ...]) -> Node:
    """The tree of a recipe merged over its parents; ``children`` are the files that extend it."""
    child = read(location.file, location.base, problems)
    extends = child.value.pop("extends", None)
    if extends is None:
        return child
    chain = (*children, location.file)
    try:
        parent = _parent(extends.value, location)
        if parent.file.resolve() in [file.resolve() for file in chain]:
            raise RecipeError(f"extends itself: {' → '.join(shown_path(file) for file in (*chain, parent.file))}")
    except RecipeError as error:
        problem = Problem(extends.where, "extends", error.with_hint())
        raise RecipeError.from_problems([*problems, problem]) from error
    return merge(_with_parents(parent, problems, chain), child)


def _parent(extends: object, child: RecipeLocation) -> RecipeLocation:
    """The location of the parent recipe. A path is relative to the child's file.

    Paths in a registered parent are relative to the same folder as the paths in the child.
    """
    if not isinstance(extends, str) or not extends:
        raise RecipeError("expected the name or path of a recipe")
    if not is_path(extends):
        return RecipeLocation(_registered(extends), child.base)
    file = Path(child.file.parent, expand_user(extends))
    if not file.is_file():
        raise RecipeError(f"recipe file {shown_path(file)} not found")
    return RecipeLocation(file, file.parent if child.base == child.file.parent else child.base)


def _registered(name: str) -> Path:
    if name not in registry().names("recipes") and Path(name).is_file():
        raise RecipeError(f"unknown recipe {name!r}", hint=f"pass ./{name} for the file")
    return registry().get("recipes", name).path()


def _names() -> str:
    return ", ".join(registry().names("recipes"))


_SECRET = re.compile(
    r"""((?:api_?key|token|secret|password|authorization)["']?\s*[:=]\s*|//(?=[^/\s]*@))[^\s,}@]+""", re.I
)
"""Values of overrides that messages mask, as messages may be logged."""


def masked(override: str) -> str:
    """``override`` with its secrets masked."""
    return _SECRET.sub(r"\1***", override)


def shown(override: Override) -> str:
    """``override`` for messages."""
    return f"{override.key} from {override.node.where}" if isinstance(override, Assignment) else masked(override)


def _override(root: Node, override: Override) -> list[Problem]:
    if isinstance(override, Assignment):
        why = put(root, override.key.split("."), override.node.copy())
        return [Problem(override.node.where, override.key, why)] if why else []
    where = f"-o {masked(override)}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [Problem(where, "", "expected key.path=value")]
    problems: list[Problem] = []
    try:
        new = parse(text, Path.cwd(), lambda _: where, problems)
    except RecipeError as error:
        return list(error.problems)
    if why := put(root, keys, new):
        problems.append(Problem(where, path, why))
    return problems
