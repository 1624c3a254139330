"""Spikes: steps whose loss or gradient norm is far above that of recent steps, and the samples that cause them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

WATCHED = ("loss", "grad_norm")
"""The fields of metrics.jsonl in which spikes are detected."""

WINDOW = 100
"""Recent steps that a value is compared with."""

MIN_STEPS = 20
"""Steps before the first value that can be a spike."""

DEVIATIONS = 8.0
"""A spike is above the median by this many standard deviations, estimated robustly: 1.4826 · the median absolute
deviation (Rousseeuw and Croux 1993), which earlier spikes hardly change.
"""

RATIO = 1.5
"""A spike is above the median by this factor as well; otherwise one of nearly equal values could be a spike."""


def is_spike(value: float, recent: Sequence[float]) -> bool:
    """Whether ``value`` is far above ``recent`` values, or not finite."""
    if not math.isfinite(value):
        return True
    if len(recent) < MIN_STEPS:
        return False
    middle = median(recent)
    deviation = 1.4826 * median(abs(other - middle) for other in recent)
    return value > middle + DEVIATIONS * deviation and value > RATIO * middle


@dataclass
class RecentSteps:
    """The watched values of the last ``WINDOW`` steps."""

    values: dict[str, deque[float]] = field(default_factory=lambda: {key: deque(maxlen=WINDOW) for key in WATCHED})

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> RecentSteps:
        """The values in ``lines`` of metrics.jsonl, so that a resumed run detects the same spikes."""
        recent = cls()
        for line in lines:
            recent.add(line)
        return recent

    def spikes(self, line: Mapping[str, float]) -> list[str]:
        """The watched fields of ``line`` that are spikes."""
        return [key for key, recent in self.values.items() if key in line and is_spike(line[key], recent)]

    def add(self, line: Mapping[str, Any]) -> None:
        """Remembers the values of ``line``."""
        for key, recent in self.values.items():
            if key in line:
                recent.append(line[key])

    def describe(self, line: Mapping[str, float], keys: Sequence[str]) -> str:
        """``loss 9.1 (median 1.2), …`` for the fields ``keys`` of ``line``."""
        medians = {key: f" (median {median(recent):.4g})" if recent else "" for key, recent in self.values.items()}
        return ", ".join(f"{key} {line[key]:.4g}{medians[key]}" for key in keys)
