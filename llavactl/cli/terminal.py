"""Formatted output on terminals with rich. Output to pipes and files stays plain."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def console(stream: TextIO) -> Console | None:
    """A rich console for ``stream``; None if ``stream`` is not a terminal.

    rich is imported here, not at module level, which keeps ``--help`` fast. It respects NO_COLOR.
    """
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False)


def print_table(
    console: Console, rows: Sequence[Sequence[str]], columns: Sequence[str], styles: Mapping[str, str]
) -> None:
    """Prints ``rows``; ``columns`` are titles (may be empty), ``styles`` the rich styles of cells by their text."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, show_header=bool(columns), header_style="bold", padding=(0, 2, 0, 0))
    for row in rows:
        first, *others = row
        table.add_row(Text(first, styles.get(first, "cyan")), *(Text(cell, styles.get(cell, "")) for cell in others))
    console.print(table)


def print_labeled(console: Console, label: str, text: str, style: str) -> None:
    """Prints ``label`` in ``style``, then ``text``, without wrapping: the terminal wraps lines."""
    from rich.text import Text

    console.print(Text.assemble((label, style), text), soft_wrap=True)
