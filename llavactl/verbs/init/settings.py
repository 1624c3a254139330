"""The training settings of a new recipe: LLaVA's, adapted to the number of samples and the size of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from llavactl.core.quantities import quantity
from llavactl.data.held_out import images_to_hold_out
from llavactl.data.plan import BatchPlan
from llavactl.recipe.stages import Stage1, Stage2
from llavactl.verbs.init.yaml import Entry

_STEPS = 300
"""Optimizer steps per epoch that batches should leave; LLaVA's stages have 2,180 and 5,200."""

_MIN_STEPS = 100
_MAX_EPOCHS = 5
_WARMUP_STEPS = 10
_MIN_BATCH = 4
_VALIDATION_IMAGES = 20
_VICUNA_WIDTH = 4096
_MAX_RATE = 2e-4


@dataclass(frozen=True)
class MemorySettings:
    """The settings that save memory: ``auto`` where training chooses them, otherwise values."""

    gradient_checkpointing: bool | str = "auto"
    micro_batch_tokens: int | str | None = "auto"


@dataclass(frozen=True)
class StageFacts:
    """What the settings of a stage depend on: its data, its longest sample, and the precision of the device."""

    samples: int
    images: int
    max_length: int
    length_reason: str
    precision: str
    template: str | None
    memory: MemorySettings


def stage1_entries(facts: StageFacts) -> list[Entry]:
    """The settings of stage 1."""
    template = facts.template or "plain"
    why = "image and caption only: the connector learns to describe images"
    if facts.template:
        why = "as in stage 2, because the data are questions and answers; for captions, `plain`"
    return [
        ("template", template, why),
        *_schedule(facts, Stage1().batch_size),
        ("learning_rate", Stage1().learning_rate, "LLaVA's: only the connector is trained, from scratch"),
        *_common(facts, Stage1().batch_size),
    ]


def stage2_entries(facts: StageFacts, method: str, width: int, reason: str) -> list[Entry]:
    """The settings of stage 2 with ``method``, chosen for ``reason``; ``width`` is that of the language model."""
    if method == "full":
        rate = min(_MAX_RATE, float(f"{Stage2().learning_rate * _VICUNA_WIDTH / width:.0e}"))
        why = "LLaVA's"
        if rate != Stage2().learning_rate:
            why = f"LLaVA's is 2e-5, for a width of {_VICUNA_WIDTH:,}; narrower models (this one: {width:,}) need more"
        rates: list[Entry] = [("learning_rate", rate, why)]
    else:
        rates = [
            ("lora", {"r": 128, "alpha": 256, "dropout": 0.05}, "LLaVA's; `r: 16, alpha: 32` trains less and faster"),
            ("learning_rate", 2e-4, "LLaVA's for LoRA"),
            ("connector_learning_rate", 2e-5, "LLaVA's: the connector is trained completely"),
        ]
    steps = _steps(facts, Stage2().batch_size)
    shown = {"steps": max(1, steps // 4), "samples": 2}
    return [
        ("method", method, reason),
        *_schedule(facts, Stage2().batch_size),
        *rates,
        *_common(facts, Stage2().batch_size),
        ("evaluate_every", shown, "answers to two validation samples, four times, in the report"),
    ]


def batch_size(samples: int, largest: int) -> int:
    """The power of two, at most ``largest``, that leaves about 300 steps per epoch."""
    return max(_MIN_BATCH, min(largest, 2 ** int(math.log2(max(1, samples / _STEPS)))))


def epochs(samples: int, largest: int) -> int:
    """As many epochs as 100 steps take, at most five."""
    return max(1, min(_MAX_EPOCHS, math.ceil(_MIN_STEPS * batch_size(samples, largest) / max(1, samples))))


@cache
def _steps(facts: StageFacts, largest: int) -> int:
    """The steps of training, without the images that are held out for validation."""
    held_out = images_to_hold_out(facts.images, _validation(facts)) / max(1, facts.images)
    trained = max(1, facts.samples - round(facts.samples * held_out))
    size, count = batch_size(facts.samples, largest), epochs(facts.samples, largest)
    return BatchPlan([1.0] * trained, epochs=count, batch_size=size, seed=0).steps


def _validation(facts: StageFacts) -> float:
    """The fraction of the images that validation holds out."""
    return max(0.01, min(0.2, round(_VALIDATION_IMAGES / max(1, facts.images), 2)))


def _schedule(facts: StageFacts, largest: int) -> Sequence[Entry]:
    size, count = batch_size(facts.samples, largest), epochs(facts.samples, largest)
    steps = _steps(facts, largest)
    why_size = "LLaVA's"
    if size < largest:
        why_size = f"LLaVA's {largest} would be {quantity(math.ceil(facts.samples / largest), 'step')} for these data"
    why_epochs = f"about {steps:,} steps"
    if count > 1:
        why_epochs += "; LLaVA has one epoch, of 2,000 and more. Fewer if the validation loss rises"
    return [("epochs", count, why_epochs), ("batch_size", size, why_size)]


def _common(facts: StageFacts, largest: int) -> Sequence[Entry]:
    steps = _steps(facts, largest)
    warmup = max(0.03, min(0.2, round(_WARMUP_STEPS / steps, 2)))
    entries: list[Entry] = [
        ("warmup", warmup, "fraction of the steps; LLaVA's" + ("" if warmup == 0.03 else " 0.03 would be too few")),
        ("max_length", facts.max_length, facts.length_reason),
        ("validation", _validation(facts), "fraction of the images that are held out for the validation loss; 0: none"),
    ]
    if batch_size(facts.samples, largest) < largest:
        entries.append(("max_grad_norm", 1.0, "small batches have noisy gradients; LLaVA doesn't clip them"))
    if facts.precision != "bfloat16":
        entries.append(("precision", facts.precision, "this device has no hardware support for bfloat16"))
    memory = facts.memory
    auto = "chosen before training, so that the stage fits"
    if memory.gradient_checkpointing:
        why = auto if memory.gradient_checkpointing == "auto" else "true: less memory, a third more time"
        entries.append(("gradient_checkpointing", memory.gradient_checkpointing, why))
    if memory.micro_batch_tokens is not None:
        why = auto if memory.micro_batch_tokens == "auto" else "limits the memory of activations"
        entries.append(("micro_batch_tokens", memory.micro_batch_tokens, why))
    if steps < 2 * Stage2().checkpoint_every:
        every = max(10, math.ceil(steps / 4))
        entries.append(("checkpoint_every", every, "steps; an interrupted run resumes from the last checkpoint"))
    return entries
