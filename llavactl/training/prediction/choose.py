"""Chooses the settings that affect speed and memory only: the fastest ones whose predicted memory fits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.library_errors import reason
from llavactl.core.protocols import SkeletonLanguage
from llavactl.recipe.stages import STAGES, Stage2
from llavactl.training.placement import Placement
from llavactl.training.prediction.model import language_component
from llavactl.training.prediction.predict import Choice, Prediction, StagePredictor

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

CUDA_RESERVE = 0.06
"""The fraction of a CUDA device's memory that is left free: for the CUDA context, kernels' work space, and memory that
torch's allocator can't use because of fragmentation. An estimate: it was not measured.
"""


@dataclass(frozen=True)
class Target:
    """The devices to plan for: ``count`` CUDA devices, or CPU processes, with ``memory_bytes`` each."""

    cuda: bool
    memory_bytes: int
    count: int = 1

    def holds(self, prediction: Prediction) -> bool:
        """Whether the peak memory of ``prediction`` fits."""
        if not self.cuda:
            return prediction.host_bytes * self.count <= self.memory_bytes
        return prediction.device_bytes <= self.usable_bytes

    @property
    def usable_bytes(self) -> int:
        return round(self.memory_bytes * (1 - CUDA_RESERVE)) if self.cuda else self.memory_bytes


@dataclass(frozen=True)
class Alternative:
    """Options of the command line with which the stage fits, and their prediction."""

    options: tuple[str, ...]
    prediction: Prediction


def choose(predictor: StagePredictor, recipe: Recipe, device: Target) -> tuple[Prediction, bool]:
    """The first of the ``choices`` of ``recipe`` that fits; if none does, the one with the lowest peak, and False."""
    return _first_that_fits(predictor, choices(recipe, predictor.settings, device), device)


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
    shardable = several and settings.method != "qlora" and settings.optimizer != "muon"
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
        if isinstance(error, LlavactlError):
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
            raise RecipeError(
                f"{message}, but a device has {gigabytes(target.memory_bytes)}",
                hint=fitting_options(options),
            )
        log.warning("%s, nearly all of %s", message, gigabytes(target.memory_bytes))
    return prediction.choice


def fitting_options(options: Sequence[str]) -> str:
    """The hint for a stage that doesn't fit."""
    listed = ", or ".join(f"`{each}`" for each in options)
    return f"it fits with {listed}" if listed else "use a smaller model, or devices with more memory"


def gigabytes(size: float) -> str:
    """``size`` in bytes as text, in GB (10⁹ bytes) or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


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


def _first_that_fits(predictor: StagePredictor, choices: Sequence[Choice], device: Target) -> tuple[Prediction, bool]:
    """The first of ``choices`` that fits, or the one with the lowest peak, and whether it fits."""
    smallest: Prediction | None = None
    for choice in choices:
        if smallest and (predictor.limits_nothing(choice) or predictor.static_bytes(choice) > device.usable_bytes):
            continue
        prediction = predictor.predict(choice)
        if device.holds(prediction):
            return prediction, True
        if smallest is None or prediction.device_bytes < smallest.device_bytes:
            smallest = prediction
    assert smallest is not None, "there is at least one choice"
    return smallest, False


def alternatives(predictor: StagePredictor, recipe: Recipe, device: Target) -> Iterator[Alternative]:
    """Changes with which the stage would fit: of settings, of the number of devices, and of the method."""
    if found := _alternative(predictor, recipe, device, ()):
        yield found
    for count in MORE_DEVICES if device.cuda else ():
        if count > device.count and count <= predictor.settings.batch_size:
            more = predictor.with_settings(predictor.settings, count)
            options = (f"--devices {count}",)
            if found := _alternative(more, recipe, Target(device.cuda, device.memory_bytes, count), options):
                yield found
                break
    settings = predictor.settings
    if isinstance(settings, Stage2):
        for method in {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[settings.method]:
            changed = settings.model_copy(update={"method": method, "trainable_modules": ()})
            options = (f"-o stage2.method={method}",)
            if found := _alternative(predictor.with_settings(changed, device.count), recipe, device, options):
                yield found
                break


def _alternative(
    predictor: StagePredictor, recipe: Recipe, device: Target, options: tuple[str, ...]
) -> Alternative | None:
    """``options`` and as few further ones as necessary; None if nothing fits."""
    for free in (False, True):
        prediction, fits = _first_that_fits(predictor, choices(recipe, predictor.settings, device, free=free), device)
        if fits:
            return Alternative((*options, *_changes(prediction.choice, recipe, predictor)), prediction)
    return None


def _changes(choice: Choice, recipe: Recipe, predictor: StagePredictor) -> Iterator[str]:
    """The options that lead to ``choice``; none for settings that are ``auto``."""
    settings, section = predictor.settings, STAGES[predictor.stage]
    if settings.micro_batch_tokens not in ("auto", choice.micro_batch_tokens):
        yield f"-o {section}.micro_batch_tokens={choice.micro_batch_tokens}"
    if settings.gradient_checkpointing not in ("auto", choice.gradient_checkpointing):
        yield f"-o {section}.gradient_checkpointing={str(choice.gradient_checkpointing).lower()}"
    if recipe.sharding not in ("auto", "full" if choice.placement.sharded else "none"):
        yield f"-o sharding={'full' if choice.placement.sharded else 'none'}"
    if recipe.optimizer_state not in ("auto", choice.placement.optimizer_state):
        yield f"-o optimizer_state={choice.placement.optimizer_state}"
