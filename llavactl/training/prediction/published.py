"""Predictions for models of four sizes that are stored with the recipes, for models whose files aren't here.

docs/memory.py computes them. The choices of settings of each model and method are sorted like those of training,
fastest first, without those that need as much memory as a faster one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from llavactl.core.registry import registry
from llavactl.recipe.load import load_recipe
from llavactl.training.prediction.assumption import LongestMicroBatch, longest_micro_batch
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.target import Target

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber

RECIPE = "llava-v1.5-7b"
"""The recipe that all predictions are of, with other language models and methods."""

MODELS: Mapping[str, str] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2 135M",
    "meta-llama/Llama-3.2-1B-Instruct": "Llama 3.2 1B",
    "lmsys/vicuna-7b-v1.5": "Vicuna 7B",
    "lmsys/vicuna-13b-v1.5": "Vicuna 13B",
}
"""The names of the models in the predictions, by id."""


@dataclass(frozen=True)
class PublishedPeak:
    """The predicted peak of a process, and the settings that lead to it."""

    bytes: int
    sharded: bool
    optimizer_state: str
    gradient_checkpointing: bool
    micro_batch_tokens: int | None
    assumes: LongestMicroBatch


def published_peaks(model: str, method: str, device: Target) -> Sequence[PublishedPeak]:
    """The choices for training ``model`` on ``device``; those of fewer devices if there are none for their number.

    ``method``: ``connector`` for stage 1, otherwise that of stage 2. Empty if nothing was predicted.
    """
    counts = sorted((each for each in _all_peaks() if each[:3] == (model, method, device.cuda)), reverse=True)
    return next((_all_peaks()[each] for each in counts if each[3] <= device.count), ())


def fastest_fit(model: str, method: str, device: Target) -> PublishedPeak | None:
    """The fastest choice that fits on ``device``; None if none does."""
    return next((peak for peak in published_peaks(model, method, device) if _holds(device, peak)), None)


def lowest_peak(model: str, method: str, device: Target) -> PublishedPeak | None:
    """The choice that needs least memory; None if nothing was predicted."""
    return min(published_peaks(model, method, device), key=lambda peak: peak.bytes, default=None)


class StoredVerdict(NamedTuple):
    """Whether a stage fits, by the stored prediction ``peak``."""

    fits: bool
    peak: PublishedPeak


def stored_verdict(recipe: Recipe, stage: StageNumber, device: Target) -> StoredVerdict | None:
    """Whether ``stage`` fits with settings that ``recipe`` allows; None if no stored prediction covers it.

    A prediction is an upper bound for the same or shorter samples and smaller micro-batches, which fit if it does, and
    a lower bound for longer and larger ones. The vision encoder doesn't matter: its features are cached, and samples
    are as long as ``max_length`` allows.
    """
    reference, settings = load_recipe(RECIPE), recipe.stage(stage).settings
    language, like = recipe.language.spec(), reference.language.spec()
    same_parts = recipe.connector.spec() == reference.connector.spec() and language == {
        **like,
        "model": language.get("model"),
    }
    model = MODELS.get(str(language.get("model")))
    if model is None or not same_parts or recipe.features.mode != "cached" or settings.trainable_modules:
        return None
    if settings.method in ("lora", "qlora") and recipe.stage2.lora != reference.stage2.lora:
        return None
    allowed = {
        (each.placement.sharded, each.placement.optimizer_state, each.gradient_checkpointing, each.micro_batch_tokens)
        for each in choices(recipe, settings, device)
    }
    covered = [
        (peak, longest_micro_batch(settings, peak.micro_batch_tokens, device.count))
        for peak in published_peaks(model, settings.method, device)
        if (peak.sharded, peak.optimizer_state, peak.gradient_checkpointing, peak.micro_batch_tokens) in allowed
    ]
    bfloat16 = settings.precision == "bfloat16"
    for peak, longest in covered:
        if _holds(device, peak) and bfloat16 and _within(longest, peak.assumes):
            return StoredVerdict(True, peak)
    if covered and all(not _holds(device, peak) and _within(peak.assumes, longest) for peak, longest in covered):
        return StoredVerdict(False, min((peak for peak, _ in covered), key=lambda peak: peak.bytes))
    return None


def _within(longest: LongestMicroBatch, other: LongestMicroBatch) -> bool:
    return longest.samples <= other.samples and longest.tokens <= other.tokens


def _holds(device: Target, peak: PublishedPeak) -> bool:
    return peak.bytes * (1 if device.cuda else device.count) <= device.usable_bytes


@cache
def _all_peaks() -> Mapping[tuple[str, str, bool, int], Sequence[PublishedPeak]]:
    """The choices by model, method, whether the devices are CUDA devices, and their number."""
    file = registry().get("recipes", RECIPE).path().with_name("model_memory.json")
    recipe = load_recipe(RECIPE)

    def peaks(row: Mapping[str, Any]) -> Sequence[PublishedPeak]:
        settings = recipe.stage1 if row["method"] == "connector" else recipe.stage2
        assumed = [longest_micro_batch(settings, each["micro_batch_tokens"], row["devices"]) for each in row["peaks"]]
        return [PublishedPeak(**each, assumes=longest) for each, longest in zip(row["peaks"], assumed, strict=True)]

    return {
        (row["model"], row["method"], row["cuda"], row["devices"]): peaks(row)
        for row in json.loads(file.read_text(encoding="utf-8"))
    }
