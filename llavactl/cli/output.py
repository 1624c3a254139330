"""Printing results to stdout."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import click

from llavactl.core.paths import json_text
from llavactl.core.streams import result_stream


def document(value: Any) -> None:
    """``value`` as one JSON document."""
    _print(json_text(_plain(value), indent=2))


def report(value: Any, as_json: bool) -> None:
    """A verb's report: JSON, or ``key: value`` lines."""
    if as_json:
        document(value)
    else:
        from llavactl.recipe.document import write

        _print(write(_plain(value)).rstrip())


def line(text: str = "") -> None:
    """One line of text."""
    _print(text)


def lines(texts: Sequence[str]) -> None:
    """Lines of text."""
    _print("\n".join(texts))


def table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the last one runs on."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def text(piece: str) -> None:
    """``piece`` unchanged, without a newline."""
    _print(piece, newline=False)


def _print(text: str, *, newline: bool = True) -> None:
    """Once, however many processes torchrun or accelerate started."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text, file=result_stream(), nl=newline)


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))
