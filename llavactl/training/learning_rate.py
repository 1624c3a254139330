"""Learning rates during a stage, as fractions of the peak: warm-up, then the stage's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from llavactl.components.schedules.decay import cosine
from llavactl.core.registry import Spec, registry

if TYPE_CHECKING:
    from llavactl.recipe.stages import AnyStage

LearningRate = Callable[[int, int], float]
"""The fraction of the peak learning rate at a step (from 0) of all steps."""


def learning_rate_schedule(settings: AnyStage) -> LearningRate:
    """The learning rate that the stage's settings define.

    Raises:
        PluginError: when it is called, if a plugin's schedule returns something else than a number of at least 0.
    """
    if (spec := settings.schedule_spec()) is not None:
        after_warmup = _component(spec)
        return lambda step, steps: schedule(step, steps, settings.warmup, after_warmup)
    if (fraction := settings.cooldown) is not None:
        return lambda step, steps: schedule(
            step, steps, settings.warmup, partial(_cooldown, cooldown_steps=math.ceil(steps * fraction))
        )
    return lambda step, steps: schedule(step, steps, settings.warmup)


def schedule(step: int, steps: int, warmup: float, after_warmup: LearningRate = cosine) -> float:
    """The fraction of the peak learning rate at ``step`` (from 0) of ``steps``.

    Linear warm-up over the first ``warmup`` fraction of steps, then ``after_warmup``, called with the step and the
    number of steps after the warm-up. The default is cosine decay to 0 (transformers'
    ``get_cosine_schedule_with_warmup``, as in LLaVA).
    """
    warmup_steps = math.ceil(steps * warmup)
    return step / warmup_steps if step < warmup_steps else after_warmup(step - warmup_steps, steps - warmup_steps)


def _cooldown(step: int, steps: int, cooldown_steps: int) -> float:
    """Constant, then linear decay to 0 over ``cooldown_steps``.

    Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations".
    """
    return min(1.0, (steps - step) / max(1, cooldown_steps))


def _component(spec: Spec) -> LearningRate:
    """The schedule ``spec``, whose results are checked."""
    component = registry().create("schedules", spec)
    return lambda step, steps: float(component.fraction(step, steps))
