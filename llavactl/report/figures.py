"""Formatting of numbers and durations, and scores as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavactl.core import quantities

MISSING = "–"


def show(value: Any) -> str:
    """``value`` formatted for reading: 1,234 · 12.3 · 0.001234 · yes · –."""
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show(inner)}" for key, inner in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value)) or MISSING
    return str(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.4g}"


def duration(seconds: Any) -> str:
    """``seconds`` as text; MISSING if this isn't a duration."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    return quantities.duration(seconds)


@dataclass(frozen=True)
class Row:
    """A row of a score table; ``percent`` is drawn as a bar and ``mark`` as a tick on it, unless None."""

    name: str
    cells: tuple[str, ...]
    percent: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Table:
    """A score table; the first column has the names of the rows, ``columns`` are the others."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def score_tables(scores: Mapping[str, Any]) -> tuple[Table, ...]:
    """``scores`` as tables: scalars with the groups that have the same keys as columns, then all other groups as rows.

    ``{"accuracy": 61.2, "chance": {"accuracy": 33.1}}`` is one row with two columns;
    ``{"all": {"relative": 80.1, "n": 90}, "conv": {…}}`` has one row per group. A float is a percentage.
    """
    scalars = {name: value for name, value in scores.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in scores.items() if isinstance(value, Mapping) and value}
    columns = {name: group for name, group in groups.items() if group.keys() <= scalars.keys()}
    separate = {name: group for name, group in groups.items() if name not in columns}
    tables = []
    if scalars:
        rows = [_row(name, value, columns) for name, value in scalars.items()]
        tables.append(Table(("score", *columns), tuple(rows)))
    if separate:
        keys = tuple(dict.fromkeys(key for group in separate.values() for key in group))
        rows = [Row(name, tuple(show(group.get(key)) for key in keys)) for name, group in separate.items()]
        tables.append(Table(keys, tuple(rows)))
    return tuple(tables)


def _row(name: str, value: Any, columns: Mapping[str, Mapping[str, Any]]) -> Row:
    others = [group.get(name) for group in columns.values()]
    marks = [percent for percent in map(_percent, others) if percent is not None]
    return Row(name, (show(value), *map(show, others)), _percent(value), marks[0] if marks else None)


def _percent(value: Any) -> float | None:
    """``value`` if it is a percentage: a float from 0 to 100. Counts are integers."""
    return value if isinstance(value, float) and 0 <= value <= 100 else None
