"""What is wrong with a recipe's components together, found from configurations alone: no weights, no data, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import LlavactlError, Problem, RecipeError
from llavactl.core.identity import content_of
from llavactl.core.protocols import CheckableFormat, ShapedVision, SkeletonLanguage
from llavactl.core.registry import kind_label, registry
from llavactl.core.schema import Turn
from llavactl.model.connector_check import validate_connector
from llavactl.recipe.frame import Outline, Recipe
from llavactl.recipe.load import check, load_frame, where
from llavactl.training.stages import train_only

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llavactl.core.schema import FeatureShape

PROBE = (Turn("user", ("What?",)), Turn("assistant", ("That.",)))

Fault = tuple[str, str]
"""A key of the recipe and what is wrong there."""


def faults(recipe: Recipe) -> list[Fault]:
    """Everything that would keep the recipe's components from working together.

    A model that is neither a folder nor in the hub's cache is not looked at: nothing is downloaded to check a recipe.
    """
    found: list[Fault] = []
    shapes = [shape for stage in recipe.stages() if (shape := _shape(stage.vision, found)) is not None]
    language = registry().create("languages", recipe.language.spec())
    skeleton = tokenizer = None
    if _is_here(recipe.language.spec()):
        with _collected(found, "language", recipe.language.spec()):
            skeleton = language.skeleton() if isinstance(language, SkeletonLanguage) else None
        with _collected(found, "language", recipe.language.spec()):
            tokenizer = language.tokenizer()
    if skeleton is not None:
        width = skeleton.get_input_embeddings().weight.shape[1]
        precisions = dict.fromkeys((recipe.stage1.precision, recipe.stage2.precision))
        for shape in dict.fromkeys(shapes):
            with _collected(found, "connector", recipe.connector.spec()):
                validate_connector(recipe.connector.spec(), shape, width, precisions)
        with _collected(found, "stage2.trainable_modules"):
            train_only(skeleton, recipe.stage2.trainable_modules)
    if tokenizer is not None:
        for stage in recipe.stages():
            with _collected(found, f"stage{stage.number}.template" if stage.settings.template else "language.template"):
                registry().create("templates", stage.template).render(PROBE, tokenizer)
    if skeleton is not None and tokenizer is not None and shapes:
        _exports(recipe, skeleton, tokenizer, found)
    return list(dict.fromkeys(found))


def _exports(recipe: Recipe, skeleton: Any, tokenizer: Any, found: list[Fault]) -> None:
    """Adds the exports whose layout can't represent the recipe's model, so that they fail before training."""
    for index, each in enumerate(recipe.export):
        with _collected(found, f"export.{index}.format"):
            made = registry().create("formats", each.spec())
            if isinstance(made, CheckableFormat):
                made.check(recipe.stage(2).vision, recipe.connector.spec(), skeleton, tokenizer)


def problems(source: str | Path | None, overrides: Sequence[str] = ()) -> list[Problem]:
    """Every problem of the recipe ``source``: of its keys and values, or else of its components together."""
    if found := check(source, overrides):
        return found
    recipe = load_frame(Outline, source, overrides)
    together = faults(recipe) if isinstance(recipe, Recipe) else []
    return [Problem(where(key, source, overrides), key, why) for key, why in together]


def refuse(recipe: Recipe) -> None:
    """Raises a RecipeError with all ``faults`` of ``recipe``, if there are any."""
    if found := faults(recipe):
        raise RecipeError(
            "\n".join(f"{key}: {why}" for key, why in found), hint="`llavactl recipes check` shows their lines"
        )


def _shape(spec: Mapping[str, Any], found: list[Fault]) -> FeatureShape | None:
    if _is_here(spec):
        with _collected(found, "vision", spec):
            vision = registry().create("vision", spec)
            return vision.shape() if isinstance(vision, ShapedVision) else None
    return None


def _is_here(spec: Mapping[str, Any]) -> bool:
    """Whether the models that ``spec`` names are on this machine."""
    names = [value for value in spec.values() if isinstance(value, str) and "/" in value]
    ids = [name for name in names if not Path(name).is_absolute()]  # ``content_of`` would read a folder's weights
    return not any(content_of(each) == each for each in ids)


@contextmanager
def _collected(found: list[Fault], key: str, spec: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Adds what the block raises to ``found``; what isn't a typed error is the fault of the plugin of ``spec``."""
    try:
        yield
    except LlavactlError as error:
        found.append((key, f"{error.message}; {error.hint}" if error.hint else error.message))
    except Exception as error:
        if spec is None:
            raise
        kind = {"vision": "vision", "connector": "connectors", "language": "languages"}[key]
        plugin = registry().get(kind, spec["name"]).plugin
        what = f"{kind_label(kind)} {spec['name']!r} of plugin {plugin}"
        found.append((key, f"{what} fails: {type(error).__name__}: {error}"))
