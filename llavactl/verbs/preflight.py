"""Checks whether the components of a recipe fit together. Reads only configurations: no weights, no data, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.errors import DataError, LlavactlError, Problem, RecipeError
from llavactl.core.identity import is_local
from llavactl.core.plugin_code import fault_text
from llavactl.core.plugin_faults import plugin_error
from llavactl.core.protocols import CheckableFormat, ShapedVision, SkeletonLanguage, check_component
from llavactl.core.registry import kind_label, registry
from llavactl.core.schema import Turn
from llavactl.images.references import ImageBytes
from llavactl.model.connector_check import validate_connector
from llavactl.recipe.axes import load_sweep
from llavactl.recipe.frame import Outline, Recipe
from llavactl.recipe.load import by_line, valid_part, where
from llavactl.recipe.stages import STAGES
from llavactl.training.learning_rate import learning_rate_schedule
from llavactl.training.trainable import train_only
from llavactl.training.update_rules import optimizer_of, probe_groups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llavactl.core.schema import FeatureShape
    from llavactl.recipe.resolve import RecipeSource

PROBE = (Turn("user", ("What?",)), Turn("assistant", ("That.",)))
"""A conversation to render with every template."""

_IMAGE_PROBE = (Turn("user", (ImageBytes("image", "0", b""), "\nWhat?")), PROBE[1])

_STEPS = [(step, steps) for steps in (1, 2, 100) for step in range(steps)]
"""Steps, and their total, that the learning rate is computed for."""

Fault = tuple[str, str]
"""A recipe key and what is wrong there."""


def problems(source: RecipeSource, overrides: Sequence[str] = ()) -> list[Problem]:
    """Every problem of the recipe ``source``: of its keys and values, and of its components if their keys are valid.

    Those of the keys and values of its variants (``sweep``) are included.
    """
    recipe, invalid = valid_part(source, overrides)
    found = faults(recipe) if isinstance(recipe, Recipe) else []
    own = [Problem(where(key, why, source, overrides), key, why) for key, why in found]
    return by_line([*invalid, *_of_variants(recipe, source, overrides), *own])


def _of_variants(recipe: Outline | None, source: RecipeSource, overrides: Sequence[str]) -> Sequence[Problem]:
    if recipe is None or recipe.sweep is None or not recipe.sweep.axes:
        return ()
    try:
        load_sweep(source, overrides)
    except RecipeError as error:
        return error.problems
    return ()


def refuse(recipe: Recipe) -> None:
    """Raises a RecipeError with all ``faults`` of ``recipe``, if there are any."""
    if found := faults(recipe):
        raise RecipeError.from_problems(
            [Problem("recipe", key, why) for key, why in found],
            hint="run `llavactl recipes check` for the line numbers",
        )


def faults(recipe: Recipe) -> list[Fault]:
    """Everything that keeps the recipe's components from working together.

    Models that are neither in a folder nor in the hub's cache are not checked: nothing is downloaded.
    """
    found: list[Fault] = []
    shapes = [shape for stage in recipe.stages() if (shape := _feature_shape(stage.vision, found)) is not None]
    skeleton, tokenizer = _language(recipe, found)
    if skeleton is not None:
        _check_connector(recipe, shapes, skeleton, found)
        _check_trainable_modules(recipe, skeleton, found)
    if tokenizer is not None:
        _check_templates(recipe, tokenizer, found)
    _check_updates(recipe, found)
    _check_tasks(recipe, found)
    if skeleton is not None and tokenizer is not None and shapes:
        _check_exports(recipe, skeleton, tokenizer, found)
    return list(dict.fromkeys(found))


def _feature_shape(spec: Mapping[str, Any], found: list[Fault]) -> FeatureShape | None:
    if is_local(spec):
        with _collected(found, "vision", spec):
            vision = registry().create("vision", spec)
            check_component(vision)
            return vision.shape() if isinstance(vision, ShapedVision) else None
    return None


def _language(recipe: Recipe, found: list[Fault]) -> tuple[Any, Any]:
    """The language model without weights, and its tokenizer; None for each that can't be loaded."""
    spec = recipe.language.spec()
    language = registry().create("languages", spec)
    skeleton = tokenizer = None
    if is_local(spec):
        with _collected(found, "language", spec):
            check_component(language)
            skeleton = language.skeleton() if isinstance(language, SkeletonLanguage) else None
        with _collected(found, "language", spec):
            tokenizer = language.tokenizer()
    return skeleton, tokenizer


def _check_connector(recipe: Recipe, shapes: Sequence[FeatureShape], skeleton: Any, found: list[Fault]) -> None:
    width = skeleton.get_input_embeddings().weight.shape[1]
    precisions = dict.fromkeys(stage.settings.precision for stage in recipe.stages())
    for shape in dict.fromkeys(shapes):
        with _collected(found, "connector", recipe.connector.spec()):
            validate_connector(recipe.connector.spec(), shape, width, precisions)


def _check_trainable_modules(recipe: Recipe, skeleton: Any, found: list[Fault]) -> None:
    for stage in recipe.stages():
        if stage.settings.method != "connector":
            with _collected(found, f"{STAGES[stage.number]}.trainable_modules"):
                train_only(skeleton, stage.settings.trainable_modules)


def _check_templates(recipe: Recipe, tokenizer: Any, found: list[Fault]) -> None:
    for stage in recipe.stages():
        section = STAGES[stage.number] if stage.settings.template else "language"
        with _collected(found, f"{section}.template"):
            template = registry().create("templates", stage.template)
            for turns in (PROBE, _IMAGE_PROBE):
                template.render(turns, tokenizer)
            template.stop(tokenizer)


def _check_updates(recipe: Recipe, found: list[Fault]) -> None:
    """Optimizers that can't be built and schedules without a learning rate: otherwise training would start first."""
    for stage in recipe.stages():
        section = STAGES[stage.number]
        with _collected(found, f"{section}.optimizer"):
            optimizer_of(stage.settings).build(probe_groups())
        with _collected(found, f"{section}.schedule"):
            rate = learning_rate_schedule(stage.settings)
            for step, steps in _STEPS:
                rate(step, steps)


def _check_tasks(recipe: Recipe, found: list[Fault]) -> None:
    """Questions of plugins' tasks that can't be asked. Missing files are reported when the task is run."""
    for index, spec in enumerate(recipe.eval.tasks):
        if registry().get("tasks", spec.name).plugin != plugins.BUILTIN:
            with _collected(found, f"eval.tasks.{index}"), suppress(DataError, OSError):
                registry().create("tasks", spec.spec()).questions()


def _check_exports(recipe: Recipe, skeleton: Any, tokenizer: Any, found: list[Fault]) -> None:
    """Formats that can't represent the recipe's model: otherwise the export would fail after training."""
    vision = recipe.stages()[-1].vision
    for index, export in enumerate(recipe.export):
        with _collected(found, f"export.{index}.format"):
            component = registry().create("formats", export.spec())
            if isinstance(component, CheckableFormat):
                component.check(vision, recipe.connector.spec(), skeleton, tokenizer)


@contextmanager
def _collected(found: list[Fault], key: str, spec: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Appends an exception of the block to ``found``.

    One that is not typed is a plugin's if its code raised it, or a bug of the component ``spec``.
    """
    try:
        yield
    except LlavactlError as error:
        found.append((key, error.with_hint()))
    except Exception as error:
        if fault := plugin_error(error):
            found.append((key, fault.message))
            return
        if spec is None:
            raise
        kind = {"vision": "vision", "connector": "connectors", "language": "languages"}[key]
        plugin = registry().get(kind, spec["name"]).plugin
        component = f"{kind_label(kind)} {spec['name']!r} of plugin {plugin}"
        found.append((key, f"{component} fails: {fault_text(error)}"))
