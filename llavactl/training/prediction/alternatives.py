"""Changes of a recipe with which a stage that doesn't fit would fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavactl.core.errors import PredictionError, RecipeError
from llavactl.recipe.stages import STAGES, Stage2
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.choose import first_that_fits
from llavactl.training.prediction.predict import Choice, Prediction, StagePredictor
from llavactl.training.prediction.target import Target

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe

log = logging.getLogger(__name__)

MORE_DEVICES = (2, 4, 8, 16, 32, 64)
"""Numbers of devices to suggest."""


@dataclass(frozen=True)
class Alternative:
    """Options of the command line with which the stage fits, and their prediction."""

    options: tuple[str, ...]
    prediction: Prediction


def fitting_options(options: Sequence[str]) -> str:
    """The hint for a stage that doesn't fit."""
    listed = ", or ".join(f"`{each}`" for each in options)
    return f"it fits with {listed}" if listed else "use a smaller model, or devices with more memory"


def alternatives(predictor: StagePredictor, recipe: Recipe, device: Target) -> Iterator[Alternative]:
    """Changes with which the stage would fit: of settings, of the number of devices, and of the method.

    A change that has the options of another one and more is left out.
    """
    found: list[Alternative] = []
    for each in _alternatives(predictor, recipe, device):
        if not any(set(other.options) <= set(each.options) for other in found):
            found.append(each)
            yield each


def _alternatives(predictor: StagePredictor, recipe: Recipe, device: Target) -> Iterator[Alternative]:
    if found := _alternative(predictor, recipe, device, ()):
        yield found
    for count in MORE_DEVICES if device.cuda else ():
        if count > device.count and count <= predictor.settings.batch_size:
            more = predictor.with_settings(predictor.settings, count)
            target = Target(device.cuda, device.memory_bytes, count)
            if found := _alternative(more, recipe, target, (f"--devices {count}",)):
                yield found
                break
    settings = predictor.settings
    if isinstance(settings, Stage2):
        for method in {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[settings.method]:
            changed = settings.model_copy(update={"method": method, "trainable_modules": ()})
            options: tuple[str, ...] = (f"-o stage2.method={method}",)
            if settings.trainable_modules:
                options += ("-o stage2.trainable_modules=[]",)
            unsharded = recipe
            if method == "qlora" and recipe.sharding == "full":
                options += ("-o sharding=none",)
                unsharded = recipe.model_copy(update={"sharding": "none"})
            if found := _alternative(predictor.with_settings(changed, device.count), unsharded, device, options):
                yield found
                break


def _alternative(
    predictor: StagePredictor, recipe: Recipe, device: Target, options: tuple[str, ...]
) -> Alternative | None:
    """``options`` and as few further ones as necessary; None if nothing fits, or if the model can't be trained so."""
    try:
        for free in (False, True):
            prediction = first_that_fits(predictor, choices(recipe, predictor.settings, device, free=free), device)
            if prediction:
                return Alternative((*options, *_changes(prediction.choice, recipe, predictor, device)), prediction)
    except (RecipeError, PredictionError) as error:  # such as LoRA with dropout for the experts of Mixtral
        log.debug("%s: %s", " ".join(options), error.message)
    return None


def _changes(choice: Choice, recipe: Recipe, predictor: StagePredictor, device: Target) -> Iterator[str]:
    """The options that lead to ``choice``; none for a setting whose value the recipe allows.

    That a setting is ``auto`` is not enough: on a CPU ``auto`` is one value.
    """
    section, allowed = STAGES[predictor.stage], choices(recipe, predictor.settings, device)
    if choice.micro_batch_tokens not in {each.micro_batch_tokens for each in allowed}:
        yield f"-o {section}.micro_batch_tokens={choice.micro_batch_tokens or 'null'}"
    if choice.gradient_checkpointing not in {each.gradient_checkpointing for each in allowed}:
        yield f"-o {section}.gradient_checkpointing={str(choice.gradient_checkpointing).lower()}"
    if choice.placement.sharded not in {each.placement.sharded for each in allowed}:
        yield f"-o sharding={'full' if choice.placement.sharded else 'none'}"
    if choice.placement.optimizer_state not in {each.placement.optimizer_state for each in allowed}:
        yield f"-o optimizer_state={choice.placement.optimizer_state}"
