"""The settings that a run uses instead of ``auto``, predicted before any weight is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llavactl.core.errors import LlavactlError, PredictionError, RecipeError
from llavactl.core.library_errors import reason
from llavactl.core.protocols import SkeletonLanguage
from llavactl.core.quantities import gigabytes
from llavactl.training.prediction.alternatives import alternatives, fitting_options
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.choose import choose
from llavactl.training.prediction.model import language_component
from llavactl.training.prediction.predict import Choice, StagePredictor
from llavactl.training.prediction.target import Target

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape
    from llavactl.data.sample_set import SampleSet
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import TrainingStage

log = logging.getLogger(__name__)


def choice_for_training(
    recipe: Recipe, stage: TrainingStage, shape: FeatureShape, data: SampleSet, device: torch.device, processes: int
) -> Choice:
    """The choice for training ``stage`` on ``device`` of each of ``processes``; elsewhere than on CUDA, the fastest.

    The steps are planned only if the longest micro-batch that the settings allow wouldn't fit. If nothing can be
    predicted, such as for a plugin's language model without ``skeleton``, training starts with the fastest choice.

    Raises:
        RecipeError: the stage doesn't fit, even if all of the device's memory could be used.
    """
    if device.type != "cuda":
        return choices(recipe, stage.settings, Target(False, 0, processes))[0]
    target = Target(True, int(torch.cuda.get_device_properties(device).total_memory), processes)
    fastest = choices(recipe, stage.settings, target)[0]
    if not isinstance(language_component(recipe, stage.number), SkeletonLanguage):
        log.warning("stage%d: its memory can't be predicted without the language model's weights", stage.number)
        return fastest
    try:
        return choice_on(recipe, stage, shape, data, target)
    except Exception as error:  # a prediction must not keep a stage from being trained
        if isinstance(error, LlavactlError) and not isinstance(error, PredictionError):
            raise
        log.warning("stage%d: its memory can't be predicted (%s)", stage.number, reason(error))
        return fastest


def choice_on(recipe: Recipe, stage: TrainingStage, shape: FeatureShape, data: SampleSet, target: Target) -> Choice:
    """``choice_for_training`` on ``target``."""
    image_tokens, number = data.encoding.image_tokens, stage.number
    fastest = choices(recipe, stage.settings, target)[0]
    longest = StagePredictor(recipe, number, shape, image_tokens, None, target.count, cuda=target.cuda)
    if target.holds(longest.predict(fastest)):
        return fastest
    predictor = longest.with_data(data, 0)
    prediction, fits = choose(predictor, recipe, target)
    if not fits:
        message = f"stage{number}: predicted to need {gigabytes(prediction.device_bytes)} of device memory"
        if prediction.device_bytes > target.memory_bytes:
            options = [" ".join(each.options) for each in alternatives(predictor, recipe, target)]
            launch = "; `--devices N` is for --dry-run, `torchrun --nproc-per-node N` for training"
            raise RecipeError(
                f"{message}, but a device has {gigabytes(target.memory_bytes)}",
                hint=fitting_options(options) + (launch if any("--devices" in each for each in options) else ""),
            )
        log.warning("%s, nearly all of %s", message, gigabytes(target.memory_bytes))
    return prediction.choice


def settled(stage: TrainingStage, choice: Choice) -> TrainingStage:
    """``stage`` with the values of ``choice`` instead of ``auto``."""
    values = choice._asdict()
    del values["placement"]
    return replace(stage, settings=stage.settings.model_copy(update=values))
