"""The model that a stage starts from: a new connector, stage 1's connector, or another complete model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.model_description import DESCRIPTION, language_spec, read_description
from llavactl.core.registry import registry
from llavactl.model import folder as model_folder
from llavactl.model.build import ModelBundle, build
from llavactl.model.imported import resolve
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber


def initial_folder(recipe: Recipe, stage: StageNumber) -> Path | None:
    """The model folder that ``stage`` starts from; None for a new connector.

    Raises:
        ModelError: it doesn't exist.
    """
    init = recipe.stage(stage).settings.init
    if init == "scratch":
        return None
    if init not in STAGES.values():
        return resolve(init, recipe)
    folder = recipe.run_dir / init / "model"
    if not (folder / DESCRIPTION).is_file():
        number = next(number for number, section in STAGES.items() if section == init)
        raise ModelError(
            f"{folder}: stage {stage} starts from the model of stage {number}, which has not been trained",
            hint=f"run `llavactl train --stage {number}` first, or pass `-o {STAGES[stage]}.init=scratch`",
        )
    return folder


def starts_from_recipe_language(recipe: Recipe, stage: StageNumber) -> bool:
    """Whether ``stage`` starts from the recipe's language model, not from the language model of its ``init``.

    A stage that trains only the connector leaves the language model unchanged.
    """
    init = recipe.stage(stage).settings.init
    return init == "scratch" or (init in STAGES.values() and getattr(recipe, init).method == "connector")


def initial_model(
    recipe: Recipe, stage: StageNumber, init_folder: Path | None, shape: FeatureShape, device: str
) -> ModelBundle:
    """The model before the first step, on the CPU; the connector's weights are not loaded from ``init_folder`` yet.

    For QLoRA the language model is in 4 bits, on ``device``.
    """
    settings = recipe.stage(stage).settings
    quantize_on = device if settings.method == "qlora" else None
    if init_folder is not None and not starts_from_recipe_language(recipe, stage):
        return _complete_model(recipe, stage, init_folder, shape, quantize_on)
    specs = recipe.connector.spec(), recipe.language.spec()
    return build(*specs, shape, dtype=settings.precision, seed=recipe.seed, quantize_on=quantize_on)


def initial_language(recipe: Recipe, stage: StageNumber, init_folder: Path | None) -> dict[str, Any]:
    """The spec of the language model that ``stage`` starts from."""
    if init_folder is None or starts_from_recipe_language(recipe, stage):
        return recipe.language.spec()
    return language_spec(init_folder, read_description(init_folder))


def _complete_model(
    recipe: Recipe, stage: StageNumber, init_folder: Path, shape: FeatureShape, quantize_on: str | None
) -> ModelBundle:
    """Connector and language model of ``init_folder``, with an adapter merged.

    Raises:
        ModelError: its connector or the shape of its features differs from the recipe's.
    """
    settings, key = recipe.stage(stage).settings, f"{STAGES[stage]}.init"
    description = read_description(init_folder)
    if description["method"] == "lora" and settings.method != "full":
        raise ModelError(
            f"{key} {settings.init}: it is an adapter, and a second adapter on top is not supported",
            hint=f"merge it first: `llavactl export --format hf --to DIR`, then set `{key}: DIR`",
        )
    encoder = Path(description["vision"].get("model", ""))
    if encoder.parent == init_folder and recipe.vision.spec().get("model") != str(encoder):
        raise ModelError(
            f"{key} {settings.init}: it has a fine-tuned vision encoder, which is not the recipe's",
            hint=f"`-o vision.model={encoder}` uses its vision encoder",
        )
    for part, actual, expected in (
        ("connector", _with_defaults(description["connector"]), _with_defaults(recipe.connector.spec())),
        ("shape of the vision features", description["shape"], json.loads(json.dumps(asdict(shape)))),
    ):
        if actual != expected:
            raise ModelError(
                f"{key} {settings.init}: its {part} is {actual}, the recipe's {expected}",
                hint=f"set `connector` and `vision` to those of the model that stage {stage} starts from",
            )
    loaded = model_folder.load(init_folder, dtype=settings.precision, quantize_on=quantize_on)
    if description["method"] == "lora":
        language: Any = loaded.bundle.model.language
        loaded.bundle.model.language = language.merge_and_unload()
    return loaded.bundle


def _with_defaults(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a connector with all options."""
    return {"name": spec["name"], **registry().options("connectors", spec).model_dump(mode="json")}
