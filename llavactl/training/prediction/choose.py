"""Chooses the settings that affect speed and memory only: the fastest ones whose predicted memory fits."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.errors import LlavactlError, PredictionError, RecipeError
from llavactl.core.library_errors import reason
from llavactl.core.protocols import SkeletonLanguage
from llavactl.core.quantities import gigabytes
from llavactl.recipe.stages import STAGES, Stage2
from llavactl.training.placement import Placement, sharding_blocker
from llavactl.training.prediction.model import language_component
from llavactl.training.prediction.predict import Choice, Prediction, StagePredictor
from llavactl.training.prediction.target import Target
from llavactl.training.trainable import checkpointing_blocker

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape
    from llavactl.data.sample_set import SampleSet
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, TrainingStage

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)
"""Limits that ``micro_batch_tokens: auto`` tries after no limit."""

EFFICIENT_TOKENS = 4096
"""Micro-batches of fewer tokens leave a GPU partly idle, which costs more than computing activations again."""

MORE_DEVICES = (2, 4, 8, 16, 32, 64)
"""Numbers of devices to suggest."""


@dataclass(frozen=True)
class Alternative:
    """Options of the command line with which the stage fits, and their prediction."""

    options: tuple[str, ...]
    prediction: Prediction


def choose(predictor: StagePredictor, recipe: Recipe, device: Target) -> tuple[Prediction, bool]:
    """The first of the ``choices`` of ``recipe`` that fits; if none does, the one with the lowest peak, and False."""
    possible = choices(recipe, predictor.settings, device)
    if fitting := _first_that_fits(predictor, possible, device):
        return fitting, True
    return _smallest(predictor, possible, device), False


def choices(recipe: Recipe, settings: AnyStage, device: Target, *, free: bool = False) -> list[Choice]:
    """The choices that the recipe allows, fastest first; with ``free`` all that are possible.

    A setting that isn't ``auto`` has one value. On a CPU ``auto`` is the first of all values, which is the fastest.
    """

    def values(setting: Any, possible: Sequence[Any]) -> Sequence[Any]:
        if free:
            return possible
        return [setting] if setting != "auto" else possible if device.cuda else possible[:1]

    limit = settings.micro_batch_tokens
    limits = [None, *MICRO_BATCH_TOKENS]
    if isinstance(limit, int):
        limits = [limit, *(tokens for tokens in MICRO_BATCH_TOKENS if tokens < limit)]
    several = device.cuda and device.count > 1
    shardable = several and not sharding_blocker(settings)
    possible = {
        Choice(Placement(sharding == "full" and device.count > 1, state), again, tokens)
        for sharding in values(recipe.sharding, ["none", "full"] if shardable else ["none"])
        for state in values(recipe.optimizer_state, ["device", "host"] if device.cuda else ["device"])
        for again in values(settings.gradient_checkpointing, [False, True])
        for tokens in values(limit, limits)
    }
    return sorted(possible, key=_slowness)


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
    predictor = StagePredictor(recipe, number, shape, image_tokens, data, target.count, cuda=target.cuda)
    prediction, fits = choose(predictor, recipe, target)
    if not fits:
        message = f"stage {number}: predicted to need {gigabytes(prediction.device_bytes)} of device memory"
        if prediction.device_bytes > target.memory_bytes:
            options = [" ".join(each.options) for each in alternatives(predictor, recipe, target)]
            launch = "; `--devices N` is for --dry-run, `torchrun --nproc-per-node N` for training"
            raise RecipeError(
                f"{message}, but a device has {gigabytes(target.memory_bytes)}",
                hint=fitting_options(options) + (launch if any("--devices" in each for each in options) else ""),
            )
        log.warning("%s, nearly all of %s", message, gigabytes(target.memory_bytes))
    return prediction.choice


def fitting_options(options: Sequence[str]) -> str:
    """The hint for a stage that doesn't fit."""
    listed = ", or ".join(f"`{each}`" for each in options)
    return f"it fits with {listed}" if listed else "use a smaller model, or devices with more memory"


def settled(stage: TrainingStage, choice: Choice) -> TrainingStage:
    """``stage`` with the values of ``choice`` instead of ``auto``."""
    values = choice._asdict()
    del values["placement"]
    return replace(stage, settings=stage.settings.model_copy(update=values))


def _slowness(choice: Choice) -> tuple[bool | int, ...]:
    """Sorts choices by speed, fastest first.

    The update on a CPU takes longest, then come inefficiently small micro-batches, activations that are computed again
    (a third of the work), communication, and smaller micro-batches.
    """
    tokens = choice.micro_batch_tokens or 2**31
    return (
        choice.placement.optimizer_state == "host",
        tokens < EFFICIENT_TOKENS,
        choice.gradient_checkpointing,
        choice.placement.sharded,
        -tokens,
    )


def distinct_choices(predictor: StagePredictor, recipe: Recipe, device: Target) -> Iterator[Choice]:
    """All choices that are possible on ``device`` and differ, whatever ``recipe`` says; fastest first."""
    return _distinct(predictor, choices(recipe, predictor.settings, device, free=True))


def _first_that_fits(predictor: StagePredictor, choices: Sequence[Choice], device: Target) -> Prediction | None:
    """The prediction of the first of ``choices`` that fits; None if none does."""
    for choice in _distinct(predictor, choices):
        if predictor.static_bytes(choice) <= device.usable_bytes:
            prediction = predictor.predict(choice)
            if device.holds(prediction):
                return prediction
    return None


def _smallest(predictor: StagePredictor, choices: Sequence[Choice], device: Target) -> Prediction:
    """The prediction with the lowest peak among those of ``choices`` with the smallest micro-batches."""
    distinct = list(_distinct(predictor, choices))
    lowest = min(map(_limit, distinct))
    predictions = [predictor.predict(choice) for choice in distinct if _limit(choice) == lowest]
    return min(predictions, key=device.peak_bytes)


def _distinct(predictor: StagePredictor, choices: Sequence[Choice]) -> Iterator[Choice]:
    """``choices`` that the model supports, without those whose limit of tokens limits nothing, as does the highest."""
    plain = [choice for choice in choices if not choice.gradient_checkpointing]
    if plain and checkpointing_blocker(predictor.weights().model.language):
        choices = plain
    highest = max(map(_limit, choices), default=0)
    return (choice for choice in choices if _limit(choice) == highest or not predictor.limits_nothing(choice))


def _limit(choice: Choice) -> int:
    return choice.micro_batch_tokens or sys.maxsize


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
            prediction = _first_that_fits(predictor, choices(recipe, predictor.settings, device, free=free), device)
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
