"""Prints results to stdout: plain text or JSON, formatted tables on terminals; control characters are made visible."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

from llavactl.cli import terminal
from llavactl.core import progress
from llavactl.core.control_characters import visible
from llavactl.core.paths import json_text
from llavactl.core.quantities import BYTE, quantity
from llavactl.core.streams import result_stream

_NUMBER = re.compile(r"-?[\d,.]+ ?%?")


def document(value: Any) -> None:
    """Prints ``value`` as one JSON document."""
    print_json(_plain(value), indent=2)


def print_json(value: Any, indent: int | None = None) -> None:
    """Prints ``value`` as JSON, exactly: it escapes control characters itself."""
    _print(json_text(value, indent))


def report(value: Any, as_json: bool) -> None:
    """Prints a verb's report as JSON, or as YAML for people: rounded, sizes with a unit, without missing values."""
    if as_json:
        document(value)
    else:
        from llavactl.recipe.document import write

        line(write(_readable(_plain(value))).rstrip())


def _readable(value: Any, key: str = "") -> Any:
    """``value`` of ``key`` in a report, for people."""
    if isinstance(value, dict) and value:
        return {name: _readable(inner, name) for name, inner in value.items() if inner is not None}
    if isinstance(value, list) and value:
        return [_readable(inner, key) for inner in value]
    if isinstance(value, int) and (key == "bytes" or key.endswith("_bytes")):
        return quantity(value, BYTE)
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return "none" if value in ({}, [], "") else value


def line(text: str = "") -> None:
    """Prints one line."""
    _print(visible(text))


def paragraph(text: str) -> None:
    """Prints ``text``, wrapped on terminals."""
    labeled([("", text)])


def lines(texts: Sequence[str], *, styled: bool = False) -> None:
    """Prints lines; ``styled`` ones contain escape sequences of click, and nothing else that a terminal executes."""
    _print("\n".join(texts if styled else map(visible, texts)))


def labeled(rows: Sequence[tuple[str, str]]) -> None:
    """Prints lines that begin with a label, which is bold on terminals; there, long texts are wrapped."""
    console = terminal.console(result_stream()) if _is_main_process() else None
    rows = [(visible(label), visible(text)) for label, text in rows]
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        begin = f"{label:<{width}}  " if width else ""
        if console is None:
            _print(f"{begin}{text}".rstrip())
        else:
            with progress.bars_hidden():
                terminal.print_labeled(console, begin, text, "bold")


def table(
    rows: Sequence[Sequence[str]],
    columns: Sequence[str] = (),
    styles: Mapping[str, str] | None = None,
    *,
    titles_in_pipes: bool = False,
) -> None:
    """Prints aligned columns, those of numbers to the right.

    Titles (``columns``) are printed on terminals, and with ``titles_in_pipes`` elsewhere as well. ``styles`` (rich
    styles of cells by their text) are used on terminals only.
    """
    rows, columns = [[visible(cell) for cell in row] for row in rows], [visible(title) for title in columns]
    numeric = [all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)]
    console = terminal.console(result_stream()) if _is_main_process() else None
    if console is not None:
        with progress.bars_hidden():
            terminal.print_table(console, rows, columns, styles or {}, numeric)
        return
    printed = [columns, *rows] if titles_in_pipes and columns else rows
    widths = [max(map(len, column)) for column in zip(*printed, strict=True)]
    for row in printed:
        cells = zip(row, widths, numeric, strict=True)
        _print("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip())


def text(piece: str) -> None:
    """Prints ``piece`` without a newline."""
    _print(visible(piece), newline=False)


def _print(text: str, *, newline: bool = True) -> None:
    if _is_main_process():
        with progress.bars_hidden():
            click.echo(text, file=result_stream(), nl=newline)


def _is_main_process() -> bool:
    """Whether this process prints: one of the processes that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def _plain(value: Any) -> Any:
    """``value`` with dataclasses, tuples and paths converted to JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value, default=str))
