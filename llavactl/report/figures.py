"""Numbers as a person reads them, and scores as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"


def show(value: Any) -> str:
    """One value: 1,234 · 12.35 · 0.001234 · yes · –."""
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
    """``95`` → ``1 min 35 s``."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


@dataclass(frozen=True)
class Row:
    """A line of a score table; ``share`` of 100 is drawn as a bar, ``mark`` as a tick on it, where there are such."""

    name: str
    cells: tuple[str, ...]
    share: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Table:
    """Scores: a column for the name, then ``columns``."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def score_tables(scores: Mapping[str, Any]) -> tuple[Table, ...]:
    """``scores`` as tables: the plain ones beside the groups that are about them, then groups that stand alone.

    ``{"accuracy": 61.2, "chance": {"accuracy": 33.1}}`` is one line with two columns;
    ``{"all": {"relative": 80.1, "n": 90}, "conv": {…}}`` a line a group. In scores a float is a percentage.
    """
    plain = {name: value for name, value in scores.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in scores.items() if isinstance(value, Mapping) and value}
    beside = {name: group for name, group in groups.items() if group.keys() <= plain.keys()}
    alone = {name: group for name, group in groups.items() if name not in beside}
    tables = []
    if plain:
        rows = [_row(name, value, beside) for name, value in plain.items()]
        tables.append(Table(("score", *beside), tuple(rows)))
    if alone:
        columns = tuple(dict.fromkeys(key for group in alone.values() for key in group))
        lines = [Row(name, tuple(show(group.get(key)) for key in columns)) for name, group in alone.items()]
        tables.append(Table(columns, tuple(lines)))
    return tuple(tables)


def _row(name: str, value: Any, beside: Mapping[str, Mapping[str, Any]]) -> Row:
    others = [group.get(name) for group in beside.values()]
    marks = [share for share in map(_share, others) if share is not None]
    return Row(name, (show(value), *map(show, others)), _share(value), marks[0] if marks else None)


def _share(value: Any) -> float | None:
    """A percentage is a float; a count, an int, is none."""
    return value if isinstance(value, float) and 0 <= value <= 100 else None
