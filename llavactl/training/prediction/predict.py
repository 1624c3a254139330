"""Predicts the memory of a stage for one choice of settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from llavactl.core import progress
from llavactl.core.errors import LlavactlError, PredictionError
from llavactl.core.library_errors import out_of_memory, reason
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded
from llavactl.data.packing import MicroBatchLimits
from llavactl.data.stage_plan import PlannedSamples, StagePlan, built, micro_batches, planned, stage_plan
from llavactl.model.build import connector_tokens
from llavactl.model.packed import packing_blocker
from llavactl.recipe.stages import STAGES
from llavactl.training.loop import batch_plan
from llavactl.training.prediction.assumption import LongestMicroBatch, longest_micro_batch, samples_limit
from llavactl.training.prediction.fake import as_fake, fake_tensors
from llavactl.training.prediction.model import dequantized, feature_shape, stage_model
from llavactl.training.prediction.process import ALLOCATOR_SHARE, kernel_bytes, process_bytes
from llavactl.training.prediction.step import GRADIENTS, StepMemory, step_memory
from llavactl.training.prediction.storage import Part
from llavactl.training.prediction.weights import Weights
from llavactl.training.update_rules import moments_by_weight

if TYPE_CHECKING:
    from llavactl.core.schema import Batch, FeatureShape, ImageRef
    from llavactl.data.sample_set import SampleSet
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, StageNumber
    from llavactl.training.placement import Placement
    from llavactl.training.prediction.target import Target


class Choice(NamedTuple):
    """The settings that change memory and speed, but not the result."""

    placement: Placement
    gradient_checkpointing: bool
    micro_batch_tokens: int | None

    def __str__(self) -> str:
        placement, limit = self.placement, self.micro_batch_tokens
        return ", ".join(
            [
                "sharded" if placement.sharded else "replicated",
                f"optimizer state in {placement.optimizer_state} memory",
                f"activation checkpointing {'on' if self.gradient_checkpointing else 'off'}",
                "micro-batches of " + ("any length" if limit is None else f"up to {limit:,} tokens"),
            ]
        )


@dataclass(frozen=True)
class Prediction:
    """The peak memory of one process in bytes by part: on its device, and in host memory.

    On a CPU the device's memory is host memory, and ``host`` contains the parts of ``device``.
    """

    choice: Choice
    device: Counter[str]
    host: Counter[str]
    plan: StagePlan | None

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def stage_predictor(recipe: Recipe, stage: StageNumber, device: Target) -> StagePredictor:
    """The predictor of ``stage`` on ``device``, from configurations only.

    Raises:
        RecipeError: the vision encoder is a plugin's whose shape is unknown without its weights.
        ModelError: the configuration of the vision encoder can't be read.
    """
    shape = feature_shape(recipe, stage)
    tokens = connector_tokens(recipe.connector.spec(), shape)
    return StagePredictor(recipe, stage, shape, tokens, None, device.count, cuda=device.cuda)


class StagePredictor:
    """Predicts ``stage`` on ``processes`` devices, CUDA devices or CPUs; caches what several predictions use.

    ``data`` is None if it isn't known: then ``longest_micro_batch`` is assumed. ``records_bytes``: host memory that its
    records take.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageNumber,
        shape: FeatureShape,
        image_tokens: int,
        data: SampleSet | None,
        processes: int,
        *,
        cuda: bool,
    ) -> None:
        self.recipe, self.stage, self.shape, self.image_tokens = recipe, stage, shape, image_tokens
        self.settings: AnyStage = recipe.stage(stage).settings
        self.data, self.processes, self.cuda = data, processes, cuda
        self.records_bytes = 0
        self._samples = None if data is None else PlannedSamples(data)
        self.weights = cache(self._weights)
        self.static_memory = cache(lambda placement: self.weights().memory(placement, self.processes))
        self.plan = cache(self._plan)
        self._traced = cache(self._trace)

    def with_settings(self, settings: AnyStage, processes: int) -> StagePredictor:
        """The predictor of the same stage and data with other ``settings`` or ``processes``."""
        other = self._with(self.data, processes)
        other.settings, other._samples, other.records_bytes = settings, self._samples, self.records_bytes
        return other

    def with_data(self, data: SampleSet, records_bytes: int) -> StagePredictor:
        """The predictor of the same stage for the lengths of ``data``."""
        other = self._with(data, self.processes)
        other.weights, other.records_bytes = self.weights, records_bytes
        return other

    def _with(self, data: SampleSet | None, processes: int) -> StagePredictor:
        return StagePredictor(self.recipe, self.stage, self.shape, self.image_tokens, data, processes, cuda=self.cuda)

    def longest_micro_batch(self, choice: Choice) -> LongestMicroBatch:
        """The micro-batch that ``choice`` is predicted for without data."""
        return longest_micro_batch(self.settings, choice.micro_batch_tokens, self.processes)

    @cached_property
    def packing_blocker(self) -> str:
        """Why training will pad samples; "" if it packs them. On CUDA, ``model.cuda.self_check`` decides later."""
        if self.settings.packing == "never":
            return "disabled by `packing: never`"
        return packing_blocker(self.weights().model.language)

    def predict(self, choice: Choice) -> Prediction:
        """The peak memory with ``choice``."""
        placement = choice.placement
        memory = self.static_memory(placement)
        keeps_gradients = not placement.sharded and placement.optimizer_state == "device"
        peaks = self._traced(choice.gradient_checkpointing, choice.micro_batch_tokens, keeps_gradients)
        steps = [peak.without_gradients if placement.sharded else peak.whole for peak in peaks]
        largest = max(steps, key=lambda parts: sum(parts.values()))
        device = memory.device + Counter({part: round(size) for part, size in largest.items()})
        plan = self.plan(choice.micro_batch_tokens)
        host = memory.host + Counter(batches=self._batch_bytes(plan))
        if self.cuda:
            # Before training, when there is no other use of host memory.
            loading = Counter(loading=self._loaded_bytes())
            host = max(host, loading, key=lambda parts: sum(parts.values()))
        else:
            host += device + self._allocator_parts(choice, keeps_gradients, plan)
            # Written between steps, but the allocator keeps the memory of the activations.
            host["checkpoint"] = self.weights().checkpoint_copy_bytes()
        resident = Counter(process=process_bytes(), records=self.records_bytes)
        return Prediction(choice, device, host + resident, plan)

    def _allocator_parts(self, choice: Choice, keeps_gradients: bool, plan: StagePlan | None) -> Counter[Part]:
        """On a CPU: free memory that glibc keeps, and oneDNN's kernels."""
        # Checkpointing keeps fewer blocks at a time, but allocates and releases as many.
        traces = self._traced(False, choice.micro_batch_tokens, keeps_gradients)
        free = max(ALLOCATOR_SHARE * each.whole.get("activations", 0) + each.whole.get(GRADIENTS, 0) for each in traces)
        parts = Counter(allocator=round(free))
        if self.settings.precision == "bfloat16":
            parts["kernels"] = kernel_bytes(None if plan is None else plan.micro_batches // self.processes)
        return parts

    def static_bytes(self, choice: Choice) -> int:
        """Bytes on the device before the first forward pass; computed without tracing a step."""
        return sum(self.static_memory(choice.placement).device.values())

    def limits_nothing(self, choice: Choice) -> bool:
        """Whether no micro-batch is larger than ``micro_batch_tokens`` without this limit."""
        tokens, plan = choice.micro_batch_tokens, self.plan(None)
        if plan is None:
            largest = self._limits(None).samples * self.settings.max_length
        else:
            largest = max(batch.positions for _, batch in plan.largest)
        return tokens is not None and tokens >= largest

    def _weights(self) -> Weights:
        settings = self.settings.model_copy(update={"gradient_checkpointing": False})
        model = stage_model(self.recipe, self.stage, settings, self.shape)
        size = getattr(torch, settings.precision).itemsize
        return Weights(model, size, moments_by_weight(model, settings), settings.method == "qlora")

    def _plan(self, micro_batch_tokens: int | None) -> StagePlan | None:
        if self.data is None or self._samples is None:
            return None
        plan, limits = batch_plan(self.data, self.settings), self._limits(micro_batch_tokens)
        with progress.bar(plan.steps, f"{STAGES[self.stage]}: planning", "step") as bar:
            return stage_plan(
                plan, self._samples, limits, self.processes, packed=not self.packing_blocker, advance=bar.advance
            )

    def _limits(self, micro_batch_tokens: int | None) -> MicroBatchLimits:
        return MicroBatchLimits(samples_limit(self.settings, self.processes), micro_batch_tokens)

    def _trace(
        self, gradient_checkpointing: bool, micro_batch_tokens: int | None, master_gradients: bool
    ) -> Sequence[StepMemory]:
        """The memory of each of the largest micro-batches."""
        settings = self.settings.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
        model = stage_model(self.recipe, self.stage, settings, self.shape)
        with fake_tensors(), _typed_errors(model.language.config.model_type):
            as_fake(model, getattr(torch, settings.precision))
            with dequantized(model) if settings.method == "qlora" else nullcontext():
                return [
                    step_memory(model, batch, cuda=self.cuda, master_gradients=master_gradients)
                    for batch in self._largest_batches(micro_batch_tokens)
                ]

    def _largest_batches(self, micro_batch_tokens: int | None) -> list[Batch]:
        plan = self.plan(micro_batch_tokens)
        if plan is None or self.data is None:
            limits = self._limits(micro_batch_tokens)
            longest = longest_micro_batch(self.settings, micro_batch_tokens, self.processes)
            items = _longest_samples(*longest, self.image_tokens)
            lengths = [planned(item, self.image_tokens) for item in items]
            largest = [(items, next(micro_batches(lengths, limits, 1, packed=not self.packing_blocker)))]
        else:
            largest = [([self.data.encoded(*index) for index in indices], batch) for indices, batch in plan.largest]
        features = _ZeroFeatures(self.shape, self.recipe.features.dtype)
        return [built(batch, items, features, packed=not self.packing_blocker) for items, batch in largest]

    def _batch_bytes(self, plan: StagePlan | None) -> int:
        """The features of the images of two steps, as those of the next one are prefetched; tokens are negligible."""
        images = self.settings.batch_size if plan is None else plan.images_per_step
        values = self.shape.patches * self.shape.width
        scales = 4 * (self.shape.patches + self.shape.width)
        per_image = values + scales if self.recipe.features.dtype == "int8" else 2 * values
        return 2 * -(-images // self.processes) * per_image

    def _loaded_bytes(self) -> int:
        """All weights, which are read into host memory before they are moved to the device."""
        weights = self.weights()
        return weights.size * (weights.trainable + weights.frozen)


@contextmanager
def _typed_errors(family: str) -> Iterator[None]:
    """Converts any error of a traced step: a model may compute what needs values, or what no training step can.

    Raises:
        PredictionError: for any exception except those that llavactl has a message for, and a full memory.
    """
    try:
        yield
    except LlavactlError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise PredictionError(
            f"{family}: a training step on tensors without values failed: {reason(error)}",
            hint="`llavactl train` without --dry-run starts without a prediction",
        ) from error


class _UnknownImage(NamedTuple):
    """An image without content; all are distinct, so no prefix is shared."""

    number: int

    @property
    def name(self) -> str:
        return f"image {self.number}"

    def read(self) -> bytes:
        raise FileNotFoundError(self.name)

    def stamp(self) -> None:
        return None


def _longest_samples(count: int, tokens: int, image_tokens: int) -> list[Encoded]:
    """``count`` samples of ``tokens`` tokens: an image, if it fits, and text that is all target."""
    image = image_tokens if image_tokens < tokens else 0
    text = tokens - image
    ids, labels = (IMAGE_TOKEN,) * image + (1,) * text, (IGNORE,) * image + (1,) * text
    return [Encoded(ids, labels, (_UnknownImage(index),) if image else ()) for index in range(count)]


@dataclass(frozen=True)
class _ZeroFeatures:
    """Features of ``shape`` and ``dtype``, whose values don't matter."""

    shape: FeatureShape
    dtype: str

    def arrays(self, _image: ImageRef) -> tuple[np.ndarray, ...]:
        size = (self.shape.patches, self.shape.width)
        if self.dtype == "int8":
            return np.zeros(size, np.int8), np.zeros(sum(size), np.float32)
        return (np.zeros(size, np.float16),)
