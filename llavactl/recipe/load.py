"""Loading a recipe: one call from a name or a path to a validated, resolved, frozen ``Recipe``.

    load_recipe("llava-v1.5-7b", ["stage1.epochs=2"])

Every problem is found before any is reported, each as ``file:line: key: why``. A component's
options are validated by its own options model, so a recipe that loads has absolute paths and every default
written out; the component itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, Problem, RecipeError
from llavactl.core.options import Located
from llavactl.core.registry import registry
from llavactl.core.validation import KeyPath, explain
from llavactl.recipe.document import Node, write
from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
from llavactl.recipe.resolve import document, overridden, sentence
from llavactl.recipe.sections import Eval
from llavactl.recipe.specs import Component
from llavactl.recipe.stages import STAGES

TEMPLATES = tuple((section, "template") for section in ("language", *STAGES.values()))
"""Recipe keys that name a template."""

Found = tuple[KeyPath, str]
"""A path in the recipe and what is wrong there."""

Written = tuple[KeyPath, type[Component], dict[str, Any]]
"""A component: its path, its class in the frame and what was written."""


F = TypeVar("F", bound=Outline)


def load_recipe(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The complete recipe that ``source`` names (see ``recipe.resolve``), with ``key.path=value`` overrides.

    Raises:
        RecipeError: lists all its problems.
    """
    return load_frame(Recipe, source, overrides)


def load_frame(frame: type[F], source: str | Path | None = None, overrides: Sequence[str] = ()) -> F:
    """As ``load_recipe``, but only the sections of ``frame`` are required. A complete recipe is a ``Recipe``."""
    root, place, problems = document(source, overrides)
    data = root.plain()
    data.setdefault("run_dir", Located(f"runs/{data.get('name')}", place.base))
    found = [*_components(data), *_templates(data)]
    whole: Any = next((each for each in (Recipe, VisionRecipe) if _required(each) <= data.keys()), frame)
    frame = whole if issubclass(whole, frame) else frame
    try:
        recipe = frame.model_validate(data)
    except ValidationError as error:
        recipe = None
        found += explain(error, frame, data)
    problems += _placed(found, root)
    if recipe is not None and not problems:
        problems += _asked(recipe, root)
    if recipe is None or problems:
        raise RecipeError.from_problems(sorted(dict.fromkeys(problems), key=_by_line))
    return recipe


def _required(frame: type[Outline]) -> set[str]:
    return {name for name, field in frame.model_fields.items() if field.is_required()}


def load_eval(overrides: Sequence[str]) -> Eval:
    """The section ``eval`` where there is no recipe: its defaults, with ``eval.key=value`` over them.

    Raises:
        RecipeError: with all problems at once; an override of another section is one.
    """
    root, problems = overridden(overrides)
    data = root.plain()
    found: list[Found] = [((key,), "without a recipe (-r) `eval` alone can be set") for key in data if key != "eval"]
    try:
        settings = Eval.model_validate(data.get("eval", {}))
    except ValidationError as error:
        settings = None
        found += [(("eval", *path), why) for path, why in explain(error, Eval, data["eval"])]
    problems += _placed(found, root)
    if settings is None or problems:
        raise RecipeError.from_problems(problems)
    return settings


def check(source: str | Path | None = None, overrides: Sequence[str] = ()) -> list[Problem]:
    """All problems of a recipe; empty if it loads. One that only generates data needs no model."""
    try:
        frame = Outline if _only_generates(source, overrides) else Recipe
        load_frame(frame, source, overrides)
    except RecipeError as error:
        return list(error.problems) or [Problem(str(source or "recipe"), "", sentence(error))]
    return []


def where(key: str, source: str | Path | None, overrides: Sequence[str]) -> str:
    """Where the recipe says ``key`` (dotted): ``file:line``, or ``-o`` and what was overridden."""
    return document(source, overrides)[0].whereabouts(key.split("."))


def _only_generates(source: str | Path | None, overrides: Sequence[str]) -> bool:
    """Whether the recipe has a teacher, but no component of a model and no training data."""
    keys = document(source, overrides)[0].plain().keys()
    return "generate" in keys and not keys & {"vision", "connector", "language", "data", "export"}


def dump(recipe: Outline) -> str:
    """The recipe as YAML; loading it gives an equal recipe."""
    return write(recipe.model_dump(mode="json"))


def specs(section: type[BaseModel], data: Any, path: KeyPath = ()) -> Iterator[Written]:
    """Every component in the raw ``data`` of a ``section``."""
    if not isinstance(data, dict):
        return
    for name, field in section.model_fields.items():
        if (inner := _model_in(field.annotation)) is None:
            continue
        here, at = (*path, name), data.get(name)
        for place, item in [((*here, i), item) for i, item in enumerate(at)] if isinstance(at, list) else [(here, at)]:
            yield from specs(inner, item, place)
            if issubclass(inner, Component) and isinstance(item, dict):
                yield place, inner, item


def _components(data: dict[str, Any]) -> list[Found]:
    """Validates every component's options and writes the resolved ones into ``data``."""
    found: list[Found] = []
    for path, kind, given in specs(Recipe, data):
        found += [((*path, *key), why) for key, why in _component(kind, given)]
    return found


def _component(kind: type[Component], given: dict[str, Any]) -> list[Found]:
    name = given.get(kind.named_by)
    if not isinstance(name, str):
        return []  # the frame says so
    try:
        entry = registry().get(kind.kind, name)
        own = {key: value for key, value in given.items() if key not in {kind.named_by, *kind.frame_keys()}}
        options = entry.parse(own)
    except LlavactlError as error:
        return [((kind.named_by,), sentence(error))]
    except ValidationError as error:
        return list(explain(error, entry.options_model(), own, also=kind.frame_keys()))
    given.update(options.model_dump(mode="json"))
    return []


def _templates(data: Mapping[str, Any]) -> Iterator[Found]:
    """Templates given by name alone; if they have options, the defaults are added for the resolved recipe."""
    for section, key in TEMPLATES:
        inside = data.get(section)
        name = inside.get(key) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and isinstance(name, str):
            try:
                defaults = registry().get("templates", name).parse({}).model_dump(mode="json")
            except (LlavactlError, ValidationError) as error:
                yield (section, key), sentence(error) if isinstance(error, LlavactlError) else _lacks(name)
            else:
                inside[key] = {"name": name, **defaults} if defaults else name


def _lacks(name: str) -> str:
    return f"template {name} has required options: {{name: {name}, …}}"


def _asked(recipe: Outline, root: Node) -> Iterator[Problem]:
    """What plugins object to (hook ``check_recipe``); a problem without a place gets that of its key."""
    document = recipe.model_dump(mode="json")
    for plugin, implementation in plugins.implementations("check_recipe"):
        with plugins.isolated(plugin):
            for problem in implementation(recipe=document) or ():
                path = [int(key) if key.isdecimal() else key for key in problem.key.split(".")]
                yield Problem(problem.where or root.whereabouts(path), problem.key, problem.why)


def _placed(found: Sequence[Found], root: Node) -> Iterator[Problem]:
    """The frame and a component may both refuse a key that they share: once is enough."""
    for path, why in dict(reversed(found)).items():
        yield Problem(root.whereabouts(path), ".".join(map(str, path)), why)


def _by_line(problem: Problem) -> tuple[bool, str, int, str]:
    """Files first, line by line, then what came with -o."""
    override = problem.where.startswith("-o ")
    file, _, line = problem.where.rpartition(":")
    if override or not line.isdecimal():
        return override, problem.where, 0, problem.key
    return override, file, int(line), problem.key


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model``, ``Model | None`` or ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
