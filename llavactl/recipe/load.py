"""Loads recipes: from a name or path to a validated, resolved, frozen ``Recipe``.

    load_recipe("llava-v1.5-7b", ["stage1.epochs=2"])

All problems are reported at once, each as ``file:line: key: reason``. The options of components are validated by their
options models, so a loaded recipe has absolute paths and all defaults; the components themselves are not imported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from llavactl.core import plugin_options, plugins
from llavactl.core.errors import LlavactlError, PluginError, Problem, RecipeError
from llavactl.core.options import Located
from llavactl.core.plugin_code import location
from llavactl.core.registry import kind_label, registry
from llavactl.core.validation import KeyPath, KeyProblem, explain
from llavactl.recipe.document import Node, is_override, origin_of, write
from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
from llavactl.recipe.resolve import Override, RecipeSource, document, overridden, shown
from llavactl.recipe.sections import Eval
from llavactl.recipe.specs import Component
from llavactl.recipe.stages import STAGES

log = logging.getLogger(__name__)

_STAGE_COMPONENTS = {"template": "templates", "optimizer": "optimizers", "schedule": "schedules"}

NAMED_COMPONENTS = (
    ("language", "template", "templates"),
    *((stage, key, kind) for stage in STAGES.values() for key, kind in _STAGE_COMPONENTS.items()),
)
"""Sections and keys whose value may be just the name of a component, and its kind."""

RawComponent = tuple[KeyPath, type[Component], dict[str, Any]]
"""A component before validation: its path, its class in the frame and its mapping."""

F = TypeVar("F", bound=Outline)


def load_recipe(source: RecipeSource = None, overrides: Sequence[Override] = ()) -> Recipe:
    """Loads the complete recipe ``source`` (see ``recipe.resolve``) with ``key.path=value`` overrides.

    Raises:
        RecipeError: lists all problems of the recipe.
    """
    return load_frame(Recipe, source, overrides)


def load_frame(frame: type[F], source: RecipeSource = None, overrides: Sequence[Override] = ()) -> F:
    """Like ``load_recipe``, but only the sections of ``frame`` are required. A complete recipe is a ``Recipe``."""
    recipe, problems = _valid_part(frame, source, overrides)
    if recipe is None or problems:
        raise RecipeError.from_problems(problems)
    return recipe


def _valid_part(frame: type[F], source: RecipeSource, overrides: Sequence[Override]) -> tuple[F | None, list[Problem]]:
    """The recipe, and its problems by line. Sections with problems have their defaults; None if one is required.

    Raises:
        RecipeError: the recipe can't be read at all.
    """
    registry()  # in strict mode a broken plugin is one error, not a problem of every component
    root, location, problems = document(source, overrides)
    log.debug("recipe %s, overrides: %s", location.file, " ".join(map(shown, overrides)) or "none")
    data = root.plain()
    _expand_names(Recipe, data)
    data.setdefault("run_dir", Located(f"runs/{data.get('name')}", location.base))
    found = [*_resolve_components(data), *_resolve_named(data), *_resolve_plugins(data)]
    fullest: Any = next((each for each in (Recipe, VisionRecipe) if _required(each) <= data.keys()), frame)
    frame = fullest if issubclass(fullest, frame) else frame
    recipe, invalid = _validated(frame, data)
    found += invalid
    if found:
        faulty = {key for path, _ in found for key in path[:1]}
        recipe, _ = _validated(frame, {key: value for key, value in data.items() if key not in faulty})
    if recipe is not None:
        found += recipe.conflicts()
    problems += _with_origin(found, root)
    if recipe is not None and not problems:
        problems += _plugin_problems(recipe, root)
    return recipe, by_line(problems)


def _validated(frame: type[F], data: dict[str, Any]) -> tuple[F | None, list[KeyProblem]]:
    try:
        return frame.model_validate(data), []
    except ValidationError as error:
        return None, list(explain(error, frame, data))


def _required(frame: type[Outline]) -> set[str]:
    return {name for name, field in frame.model_fields.items() if field.is_required()}


def load_eval(overrides: Sequence[str]) -> Eval:
    """The section ``eval`` without a recipe: defaults, and overrides ``eval.key=value``.

    Raises:
        RecipeError: lists all problems; an override of another section is one.
    """
    root, problems = overridden(overrides)
    data = root.plain()
    _expand_names(Eval, data.get("eval"))
    found: list[KeyProblem] = [
        ((key,), "without a recipe (-r), only `eval` can be overridden") for key in data if key != "eval"
    ]
    try:
        settings = Eval.model_validate(data.get("eval", {}))
    except ValidationError as error:
        settings = None
        found += [(("eval", *path), why) for path, why in explain(error, Eval, data["eval"])]
    problems += _with_origin(found, root)
    if settings is None or problems:
        raise RecipeError.from_problems(problems)
    return settings


def check(source: RecipeSource = None, overrides: Sequence[str] = ()) -> list[Problem]:
    """All problems of a recipe; empty if it loads. A recipe that only generates data needs no model."""
    return valid_part(source, overrides)[1]


def valid_part(source: RecipeSource, overrides: Sequence[str] = ()) -> tuple[Outline | None, list[Problem]]:
    """The recipe with the defaults of sections that have problems, and all problems as in ``check``.

    None if a section without default has a problem. It is for finding further problems, not for use.
    """
    try:
        frame = Outline if _only_generates(source, overrides) else Recipe
        return _valid_part(frame, source, overrides)
    except RecipeError as error:
        return None, list(error.problems) or [Problem(str(source or "recipe"), "", error.with_hint())]


def where(key: str, why: str, source: RecipeSource, overrides: Sequence[str]) -> str:
    """The origin of the problem ``why`` of ``key`` (dotted): ``file:line``, or ``-o`` with the override."""
    return origin_of(document(source, overrides)[0], _keys(key), why)


def _only_generates(source: RecipeSource, overrides: Sequence[str]) -> bool:
    """Whether the recipe has a teacher, but no component of a model and no training data."""
    keys = document(source, overrides)[0].plain().keys()
    return "generate" in keys and not keys & {"vision", "connector", "language", "data", "export"}


def dump(recipe: Outline) -> str:
    """The recipe as YAML, without ``sweep``; loading it gives an equal recipe.

    Paths in the values of axes can't be made absolute: which values are paths depends on their keys.
    """
    return write(recipe.model_dump(mode="json", exclude={"sweep"}))


def _expand_names(section: type[BaseModel], data: Any) -> None:
    """Replaces components in the unvalidated ``data`` of ``section`` that are just names by ``{"name": …}``.

    Where the frame has a component or a string, such as for templates, the string remains (``NAMED_COMPONENTS``).
    """
    if not isinstance(data, dict):
        return
    for name, field in section.model_fields.items():
        if (inner := _model_in(field.annotation)) is None or name not in data:
            continue
        value = data[name]
        if issubclass(inner, Component) and str not in get_args(field.annotation):
            data[name] = value = (
                [_expanded(inner, item) for item in value] if isinstance(value, list) else _expanded(inner, value)
            )
        for item in value if isinstance(value, list) else [value]:
            _expand_names(inner, item)


def _expanded(cls: type[Component], value: Any) -> Any:
    return {cls.named_by: value} if isinstance(value, str) else value


def raw_components(section: type[BaseModel], data: Any, path: KeyPath = ()) -> Iterator[RawComponent]:
    """Every component in the unvalidated ``data`` of a ``section``."""
    if not isinstance(data, dict):
        return
    for name, field in section.model_fields.items():
        if (inner := _model_in(field.annotation)) is None:
            continue
        value, value_path = data.get(name), (*path, name)
        items = [((*value_path, i), item) for i, item in enumerate(value)] if isinstance(value, list) else None
        for item_path, item in [(value_path, value)] if items is None else items:
            yield from raw_components(inner, item, item_path)
            if issubclass(inner, Component) and isinstance(item, dict):
                yield item_path, inner, item


def _resolve_components(data: dict[str, Any]) -> list[KeyProblem]:
    """Validates the options of all components and adds their defaults to ``data``."""
    found: list[KeyProblem] = []
    for path, cls, component in raw_components(Recipe, data):
        found += [((*path, *key), why) for key, why in _resolve_component(cls, component)]
    return found


def _resolve_component(cls: type[Component], component: dict[str, Any]) -> list[KeyProblem]:
    name = component.get(cls.named_by)
    if not isinstance(name, str):
        return []  # reported by the frame
    try:
        entry = registry().get(cls.kind, name)
        if hidden := cls.hidden_options(entry.options_model()):
            why = f"{entry.subject}: recipes use the key `{hidden[0]}` themselves; the plugin must rename this option"
            return [((cls.named_by,), why)]
        own = {key: value for key, value in component.items() if key not in {cls.named_by, *cls.frame_keys()}}
        options = entry.parse(own)
    except LlavactlError as error:
        return [((cls.named_by,), error.with_hint())]
    except ValidationError as error:
        return list(explain(error, entry.options_model(), own, also=cls.frame_keys()))
    component.update(options.model_dump(mode="json"))
    return []


def _resolve_named(data: Mapping[str, Any]) -> Iterator[KeyProblem]:
    """Adds the default options to components that are given by name only."""
    for section, key, kind in NAMED_COMPONENTS:
        values = data.get(section)
        name = values.get(key) if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(name, str):
            try:
                defaults = registry().get(kind, name).parse({}).model_dump(mode="json")
            except LlavactlError as error:
                yield (section, key), error.with_hint()
            except ValidationError:
                yield (section, key), f"{kind_label(kind)} {name} has required options; write {{name: {name}, …}}"
            else:
                values[key] = {"name": name, **defaults} if defaults else name


def _resolve_plugins(data: Mapping[str, Any]) -> Iterator[KeyProblem]:
    """Validates the section ``plugins`` and adds the defaults of the plugins' options to it."""
    sections = data.get("plugins")
    for name, section in sections.items() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue  # reported by the frame
        path = ("plugins", name)
        try:
            plugins.check_loaded(name)
            if (options := plugin_options.parse(name, section)) is not None:
                section.update(options.model_dump(mode="json"))
            elif section:
                yield path, f"plugin {name} has no options"
        except LlavactlError as error:
            yield path, error.with_hint()
        except ValidationError as error:
            model = plugin_options.options_model(name)
            assert model is not None
            yield from (((*path, *key), why) for key, why in explain(error, model, section))
    for name, implementation in plugins.implementations("plugin_options"):
        if name not in (sections or ()):
            with plugins.isolated(name):
                if why := plugin_options.missing_section(name):
                    raise PluginError(f"plugin {name}: plugin_options ({location(implementation)}): {why}")


def _plugin_problems(recipe: Outline, root: Node) -> Iterator[Problem]:
    """The problems that plugins report (hook ``check_recipe``); those without an origin get that of their key."""
    document = recipe.model_dump(mode="json")
    for plugin, implementation in plugins.implementations("check_recipe"):
        with plugins.isolated(plugin, "check_recipe"):
            for problem in implementation(recipe=document) or ():
                where = problem.where or origin_of(root, _keys(problem.key), problem.why)
                yield Problem(where, problem.key, problem.why)


def _keys(dotted: str) -> KeyPath:
    """The keys of a ``dotted`` path, with indices of lists as integers."""
    return tuple(int(key) if key.isdecimal() else key for key in dotted.split("."))


def _with_origin(found: Sequence[KeyProblem], root: Node) -> Iterator[Problem]:
    """Problems with file and line, one per key: the frame and a component may both report a shared key."""
    for path, why in dict(reversed(found)).items():
        yield Problem(origin_of(root, path, why), ".".join(map(str, path)), why)


def by_line(problems: Iterable[Problem]) -> list[Problem]:
    """The distinct ``problems``, by file and line; those of overrides come last."""
    return sorted(dict.fromkeys(problems), key=_line)


def _line(problem: Problem) -> tuple[bool, str, int, str]:
    override = is_override(problem.where)
    file, _, line = problem.where.rpartition(":")
    if override or not line.isdecimal():
        return override, problem.where, 0, problem.key
    return override, file, int(line), problem.key


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model``, ``Model | None`` or ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
