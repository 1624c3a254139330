"""The variants of a recipe for ``llavactl sweep``: every combination of the values of its axes, with every seed.

An axis is a recipe key with several values. Each variant is the recipe with one value per axis, loaded like a recipe
with overrides (``-o``), so the problems of all variants are known before any work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.validation import explain
from llavactl.recipe.document import Node, origin_of, parse, put
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import by_line, load_recipe
from llavactl.recipe.resolve import Assignment, RecipeSource, document, masked
from llavactl.recipe.sections import Sweep

COMPONENTS = ("vision", "connector", "language")
"""Keys whose values are components; on an axis, a string is the name of one."""

_OWN_KEYS = {
    "export": "variants are not exported",
    "generate": "all variants train on the same generated data",
    "name": "it names all variants",
    "run_dir": "each variant has its own folder in it",
    "seed": "use --seeds N or `sweep.seeds`",
    "sweep": "it defines the axes",
}
"""Sections that can't be an axis, with the reason."""

MAX_FOLDER_NAME = 200
"""Characters of a folder name; file systems allow 255 bytes."""


@dataclass(frozen=True)
class Variant:
    """A recipe of a sweep: the label of its value on each axis, its seed, and its own run folder ``recipe.run_dir``."""

    labels: Mapping[str, str]
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The values of all axes, such as ``layer=-2,connector=linear``; without axes the recipe's name."""
        return _named(self.labels) or self.recipe.name

    @property
    def slug(self) -> str:
        """The name of its run folder."""
        return self.recipe.run_dir.name


@dataclass(frozen=True)
class SweepRecipes:
    """All variants of a recipe: the labels of each axis, the seeds, and the folder of all runs.

    ``base`` is the recipe of the first variant with the run folder of the recipe itself. Its generated data is that of
    all variants.
    """

    axes: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    folder: Path
    base: Recipe
    variants: tuple[Variant, ...]


def load_sweep(
    source: RecipeSource = None, overrides: Sequence[str] = (), axes: Sequence[str] = (), seeds: int | None = None
) -> SweepRecipes:
    """Loads all variants of the recipe ``source``.

    ``axes`` (``key=value,value,…``) and ``seeds`` replace those of its section ``sweep``; its other axes are kept.

    Raises:
        RecipeError: lists all problems of all variants.
    """
    root, _, problems = document(source, overrides)
    problems += [problem for axis in axes for problem in _add_axis(root, axis)]
    if seeds is not None:
        put(root, ["sweep", "seeds"], Node(seeds, "--seeds"))
    values, seed_count = _section(root, problems)
    if problems:
        raise RecipeError.from_problems(by_line(problems))
    if not values and seed_count == 1:
        raise RecipeError("a sweep needs an axis", hint="--axis KEY=A,B,C, `sweep.axes` in the recipe, or --seeds N")
    first = root.get("seed")
    seed = first.value if first is not None and isinstance(first.value, int) else 0
    own = [Assignment("sweep", Node(None, "--axis"))]
    loaded: list[tuple[dict[str, str], int, Recipe]] = []
    for combination in product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        # Keys of a component follow the component: it would replace them.
        assigned = [Assignment(key, node) for key, (_, node) in sorted(chosen.items(), key=_depth)]
        for offset in range(seed_count):
            seeded = [Assignment("seed", Node(seed + offset, "--seeds"))] if seed_count > 1 else []
            try:
                recipe = load_recipe(source, [*overrides, *own, *assigned, *seeded])
            except RecipeError as error:
                if not error.problems:
                    raise
                problems += error.problems
            else:
                loaded.append(({key: label for key, (label, _) in chosen.items()}, recipe.seed, recipe))
    if problems:
        raise RecipeError.from_problems(by_line(problems))
    base = loaded[0][2]
    folder = base.run_dir / "sweep"
    return SweepRecipes(
        axes={key: tuple(label for label, _ in labeled) for key, labeled in values.items()},
        seeds=tuple(base.seed + offset for offset in range(seed_count)),
        folder=folder,
        base=base,
        variants=tuple(
            Variant(labels, seed, _in_folder(recipe, folder / _slug(labels, seed))) for labels, seed, recipe in loaded
        ),
    )


def _depth(item: tuple[str, Any]) -> int:
    return item[0].count(".")


def _in_folder(recipe: Recipe, run_dir: Path) -> Recipe:
    """``recipe`` with another run folder, without the steps that all variants share or that a sweep leaves out."""
    return recipe.model_copy(update={"run_dir": run_dir, "generate": None, "export": ()})


def _add_axis(root: Node, axis: str) -> list[Problem]:
    """Adds ``axis`` (``key=value,value,…``) to the section ``sweep`` of the tree; returns its problems."""
    where = f"--axis {masked(axis)}"
    key, equals, text = axis.partition("=")
    if not equals or not key.strip():
        return [Problem(where, "", "expected KEY=VALUE,VALUE,…")]
    problems: list[Problem] = []
    try:
        node = parse(f"[{text}]", Path.cwd(), lambda _: where, problems)
    except RecipeError as error:
        return list(error.problems)
    if len(node.value) == 1 and isinstance(node.value[0].value, list):  # the brackets were given
        node = node.value[0]
    if why := put(root, ["sweep", "axes", key.strip()], node):
        problems.append(Problem(where, "sweep", why))
    return problems


def _section(root: Node, problems: list[Problem]) -> tuple[dict[str, list[tuple[str, Node]]], int]:
    """The labeled values of each axis and the number of seeds; what is wrong is appended to ``problems``."""
    node = root.get("sweep")
    if node is None or node.value is None:
        return {}, 1
    data = node.plain()
    try:
        section = Sweep.model_validate(data)
    except ValidationError as error:
        for path, why in explain(error, Sweep, data):
            full = ("sweep", *path)
            problems.append(Problem(origin_of(root, full, why), ".".join(map(str, full)), why))
        return {}, 1
    axes = node.get("axes")
    values = {}
    for key, given in axes.value.items() if axes is not None else ():
        own = next((why for own, why in _OWN_KEYS.items() if key == own or key.startswith(f"{own}.")), "")
        why = "expected a recipe key" if not all(key.split(".")) else f"can't be an axis: {own}" if own else ""
        labeled = _labeled(key, given)
        if not why and (repeated := _repeated(node.plain() for _, node in labeled)):
            why = f"{repeated} is listed twice"
        if why:
            problems.append(Problem(given.where, f"sweep.axes.{key}", why))
        values[key] = labeled
    return values, section.seeds


def _labeled(key: str, values: Node) -> list[tuple[str, Node]]:
    """The values of an axis with their labels, which are distinct."""
    if isinstance(values.value, dict):
        pairs = [(str(label), node) for label, node in values.value.items()]
    else:
        pairs = [(_label(node.plain()), node) for node in values.value]
    taken: set[str] = set()
    labeled = []
    for label, node in pairs:
        while _file_name(label) in taken:
            label += "+"
        taken.add(_file_name(label))
        labeled.append((label, _component(key, node)))
    return labeled


def _component(key: str, node: Node) -> Node:
    """``node``, or the component with this name if ``key`` is a component."""
    return Node({"name": node}, node.where) if key in COMPONENTS and isinstance(node.value, str) else node


def _label(value: Any) -> str:
    """A short name of ``value``: of a path or model id the last part, of a component its name and its options."""
    if isinstance(value, Mapping):
        options = [
            (f"no-{key}", key)[inner] if isinstance(inner, bool) else _label(inner) for key, inner in value.items()
        ]
        first = list(value).index("name") if "name" in value else 0
        return "-".join([*options[first : first + 1], *options[:first], *options[first + 1 :]])
    if isinstance(value, list):
        return "+".join(map(_label, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return PurePath(value).name if isinstance(value, str) else str(value)


def _repeated(values: Iterable[Any]) -> str:
    """The first value that occurs twice; "" if none does."""
    seen: list[str] = []
    for value in map(repr, values):
        if value in seen:
            return value
        seen.append(value)
    return ""


def _named(labels: Mapping[str, str]) -> str:
    names = short_names(labels)
    return ",".join(f"{names[key]}={label}" for key, label in labels.items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The keys of axes with names for tables and folders: ``layer`` for ``vision.layer``, ``connector`` for
    ``connector.name``; keys with the same last part keep their full names.
    """
    full = {key: key.removesuffix(".name") for key in keys}
    last = [name.rpartition(".")[2] for name in full.values()]
    return {key: short if last.count(short := name.rpartition(".")[2]) == 1 else name for key, name in full.items()}


def _slug(labels: Mapping[str, str], seed: int) -> str:
    """The folder name of a variant, such as ``layer=-2,connector=linear,seed=0``."""
    slug = _file_name(_named({**labels, "seed": str(seed)}))
    if len(slug) <= MAX_FOLDER_NAME:
        return slug
    digest = sha256(slug.encode()).hexdigest()[:8]
    return f"{slug[: MAX_FOLDER_NAME - 20]}-{digest},seed={seed}"


def _file_name(text: str) -> str:
    """``text`` without characters that are special in a shell or a file system."""
    return re.sub(r"[^A-Za-z0-9._+,=-]", "_", text)
