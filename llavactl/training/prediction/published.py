"""Predictions for models of four sizes that are stored with the recipes, for models whose files aren't here.

docs/memory.py computes them. The choices of settings of each model and method are sorted like those of training,
fastest first, without those that need as much memory as a faster one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llavactl.core.registry import registry
from llavactl.recipe.load import load_recipe
from llavactl.training.prediction.assumption import LongestMicroBatch, longest_micro_batch
from llavactl.training.prediction.target import Target

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
    count = 1 if device.cuda else device.count
    return next(
        (peak for peak in published_peaks(model, method, device) if peak.bytes * count <= device.usable_bytes), None
    )


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
