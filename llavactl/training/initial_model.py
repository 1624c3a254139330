"""The model that a stage starts from: a new connector, stage 1's connector, or another complete model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.registry import registry
from llavactl.model import folder as model_folder
from llavactl.model.build import ModelBundle, build
from llavactl.model.imported import resolve

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber

BUILT_FROM_RECIPE = ("stage1", "scratch")
"""Values of ``stage2.init`` with which the recipe's language model is trained; others refer to a complete model."""


def initial_folder(recipe: Recipe, stage: StageNumber) -> Path | None:
    """The model folder that ``stage`` starts from; None for a new connector.

    Raises:
        ModelError: it doesn't exist.
    """
    if stage == 1 or recipe.stage2.init == "scratch":
        return None
    if recipe.stage2.init != "stage1":
        return resolve(recipe.stage2.init, recipe)
    folder = recipe.run_dir / "stage1" / "model"
    if not (folder / model_folder.DESCRIPTION).is_file():
        raise ModelError(
            f"{folder}: stage 2 starts from the connector of stage 1, which has not been trained",
            hint="run `llavactl train --stage 1` first, or pass `-o stage2.init=scratch`",
        )
    return folder


def initial_model(recipe: Recipe, stage: StageNumber, start: Path | None, shape: FeatureShape) -> ModelBundle:
    """The model before the first step, on the CPU; the connector's weights are not loaded from ``start`` yet."""
    if stage == 2 and recipe.stage2.init not in BUILT_FROM_RECIPE:
        assert start is not None
        return _complete_model(recipe, start, shape)
    precision = recipe.stage(stage).settings.precision
    return build(recipe.connector.spec(), recipe.language.spec(), shape, dtype=precision, seed=recipe.seed)


def initial_language(recipe: Recipe, start: Path | None) -> dict[str, Any]:
    """The spec of the language model that stage 2 trains: of the model ``stage2.init``, else of the recipe."""
    if start is None or recipe.stage2.init in BUILT_FROM_RECIPE:
        return recipe.language.spec()
    return model_folder.language_of(start, model_folder.describe(start))


def _complete_model(recipe: Recipe, start: Path, shape: FeatureShape) -> ModelBundle:
    """Connector and language model of ``start``, with an adapter merged.

    Raises:
        ModelError: its connector or the shape of its features differs from the recipe's.
    """
    description = model_folder.describe(start)
    if description["method"] == "lora" and recipe.stage2.method != "full":
        raise ModelError(
            f"stage2.init {recipe.stage2.init}: it is an adapter, and a second adapter on top is not supported",
            hint="merge it first: `llavactl export --format hf --to DIR`, then set `stage2.init: DIR`",
        )
    encoder = Path(description["vision"].get("model", ""))
    if encoder.parent == start and recipe.vision.spec().get("model") != str(encoder):
        raise ModelError(
            f"stage2.init {recipe.stage2.init}: it has a fine-tuned vision encoder, which is not the recipe's",
            hint=f"`-o vision.model={encoder}` uses its vision encoder",
        )
    for key, actual, expected in (
        ("connector", _with_defaults(description["connector"]), _with_defaults(recipe.connector.spec())),
        ("shape of the vision features", description["shape"], json.loads(json.dumps(asdict(shape)))),
    ):
        if actual != expected:
            raise ModelError(
                f"stage2.init {recipe.stage2.init}: its {key} is {actual}, the recipe's {expected}",
                hint="set `connector` and `vision` to those of the model that stage 2 starts from",
            )
    loaded = model_folder.load(start, dtype=recipe.stage2.precision)
    if description["method"] == "lora":
        language: Any = loaded.bundle.model.language
        loaded.bundle.model.language = language.merge_and_unload()
    return loaded.bundle


def _with_defaults(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a connector with all options."""
    return {"name": spec["name"], **registry().options("connectors", spec).model_dump(mode="json")}
