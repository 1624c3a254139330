"""Quantities, rates and durations as text."""

from __future__ import annotations

import pytest

from llavactl.core.quantities import duration, quantity, speed


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (1, "step", "1 step"),
        (3, "step", "3 steps"),
        (50_099, "record", "50,099 records"),
        (900, "byte", "1 kB"),
        (30_106_000, "byte", "30.1 MB"),
        (12e9, "byte", "12.0 GB"),
    ],
)
def test_quantities(count: float, unit: str, text: str) -> None:
    assert quantity(count, unit) == text


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (490_000, "byte", "490 kB/s"),
        (1234.5, "step", "1,234 steps/s"),
        (12.5, "image", "12.5 images/s"),
        (0.3125, "step", "3.2 s/step"),
        (0.0, "answer", "0.0 answers/s"),
    ],
)
def test_rates_have_no_exponents(rate: float, unit: str, text: str) -> None:
    assert speed(rate, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (42.4, "42 s"), (59.7, "1 min 0 s"), (95, "1 min 35 s"), (3599.7, "1 h 0 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
