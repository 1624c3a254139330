"""Schedules that decay over the whole stage, as in transformers' ``get_scheduler``."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from llavactl.core.registry import Options


class DecayOptions(Options):
    minimum: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        0.0, description="the fraction of the peak learning rate at the end"
    )


def cosine(step: int, steps: int, minimum: float = 0.0) -> float:
    """The fraction of the peak at ``step`` (from 0) of ``steps``: cosine decay from 1 to ``minimum``."""
    return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


class Cosine:
    """Cosine decay from 1 to ``minimum``."""

    def __init__(self, options: DecayOptions) -> None:
        self.minimum = options.minimum

    def fraction(self, step: int, steps: int) -> float:
        return cosine(step, steps, self.minimum)


class Linear:
    """Linear decay from 1 to ``minimum``."""

    def __init__(self, options: DecayOptions) -> None:
        self.minimum = options.minimum

    def fraction(self, step: int, steps: int) -> float:
        return 1 - (1 - self.minimum) * step / max(1, steps)


class Constant:
    """The peak learning rate in every step."""

    def __init__(self, options: Options) -> None:
        pass

    def fraction(self, step: int, steps: int) -> float:  # noqa: ARG002 - the same in each
        return 1.0
