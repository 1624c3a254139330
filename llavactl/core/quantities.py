"""Quantities, rates and durations as text."""

from __future__ import annotations

BYTE = "byte"
"""The unit of a quantity that is shown as kB, MB or GB, such as the progress in a file."""


def quantity(count: float, unit: str) -> str:
    """``count`` ``unit``s as text: ``1,200 steps``, ``30.1 MB``."""
    if unit != BYTE:
        return f"{count:,.0f} {unit}" + "s" * (count != 1)
    for size, prefix in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:,.1f} {prefix}"
    return f"{count / 1e3:,.0f} kB"


def gigabytes(size: float) -> str:
    """A ``size`` of memory in bytes as text, in GB (10⁹ bytes) from 0.1 GB on, otherwise in MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def speed(rate: float, unit: str) -> str:
    """A ``rate`` in ``unit``s per second as text: ``490 kB/s``, ``12.5 images/s``, ``3.2 s/step``."""
    if unit == BYTE:
        return f"{quantity(rate, unit)}/s"
    if 0 < rate < 1:
        return f"{1 / rate:,.1f} s/{unit}"
    return f"{rate:,.{0 if rate >= 100 else 1}f} {unit}s/s"


def duration(seconds: float) -> str:
    """``95`` → ``1 min 35 s``."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
