"""Prints results to stdout: plain text or JSON, formatted tables on terminals."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from llavactl.cli import terminal
from llavactl.core import progress
from llavactl.core.paths import json_text
from llavactl.core.streams import result_stream


def document(value: Any) -> None:
    """Prints ``value`` as one JSON document."""
    _print(json_text(_plain(value), indent=2))


def report(value: Any, as_json: bool) -> None:
    """Prints a verb's report as JSON or as YAML."""
    if as_json:
        document(value)
    else:
        from llavactl.recipe.document import write

        _print(write(_plain(value)).rstrip())


def line(text: str = "") -> None:
    """Prints one line."""
    _print(text)


def lines(texts: Sequence[str]) -> None:
    """Prints lines."""
    _print("\n".join(texts))


def labeled(rows: Sequence[tuple[str, str]]) -> None:
    """Prints lines that begin with a label, which is bold on terminals."""
    console = terminal.console(result_stream()) if _is_main_process() else None
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        if console is None:
            _print(f"{label:<{width}} {text}".rstrip())
        else:
            with progress.bars_hidden():
                terminal.print_labeled(console, f"{label:<{width}}", f" {text}".rstrip(), "bold")


def table(rows: Sequence[Sequence[str]], columns: Sequence[str] = (), styles: Mapping[str, str] | None = None) -> None:
    """Prints aligned columns.

    Titles (``columns``) and ``styles`` (rich styles of cells by their text) are used on terminals only.
    """
    console = terminal.console(result_stream()) if _is_main_process() else None
    if console is not None:
        with progress.bars_hidden():
            terminal.print_table(console, rows, columns, styles or {})
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def text(piece: str) -> None:
    """Prints ``piece`` unchanged, without a newline."""
    _print(piece, newline=False)


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
