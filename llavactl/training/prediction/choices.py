"""The settings that affect speed and memory only: those that a recipe allows, fastest first."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llavactl.training.placement import Placement, sharding_blocker
from llavactl.training.prediction.predict import Choice, StagePredictor
from llavactl.training.prediction.target import Target
from llavactl.training.trainable import checkpointing_blocker

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage

MICRO_BATCH_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)
"""Limits that ``micro_batch_tokens: auto`` tries after no limit."""

EFFICIENT_TOKENS = 4096
"""Micro-batches of fewer tokens leave a GPU partly idle, which costs more than computing activations again."""


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


def distinct_choices(predictor: StagePredictor, recipe: Recipe, device: Target) -> Iterator[Choice]:
    """All choices that are possible on ``device`` and differ, whatever ``recipe`` says; fastest first."""
    return distinct(predictor, choices(recipe, predictor.settings, device, free=True))


def distinct(predictor: StagePredictor, choices: Sequence[Choice]) -> Iterator[Choice]:
    """``choices`` that the model supports, without those whose limit of tokens limits nothing, as does the highest."""
    plain = [choice for choice in choices if not choice.gradient_checkpointing]
    if plain and checkpointing_blocker(predictor.weights().model.language):
        choices = plain
    highest = max(map(tokens_limit, choices), default=0)
    return (choice for choice in choices if tokens_limit(choice) == highest or not predictor.limits_nothing(choice))


def tokens_limit(choice: Choice) -> int:
    """The most tokens of a micro-batch with ``choice``."""
    return choice.micro_batch_tokens or sys.maxsize


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
