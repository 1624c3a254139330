"""Formatted output on terminals with rich. Output to pipes and files stays plain."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from llavactl.core.streams import is_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP = "  "
_NARROWEST = 24
"""Columns of text that are still readable if they are wrapped."""

_UNLIMITED = 10_000
"""The width of a file or a pipe."""


def color() -> bool | None:
    """Whether output has color by the usual environment variables; None: on terminals only."""
    variables = os.environ
    if variables.get("NO_COLOR") or variables.get("CLICOLOR") == "0" or variables.get("TERM") == "dumb":
        return False
    forced = (variables.get("FORCE_COLOR", ""), variables.get("CLICOLOR_FORCE", ""))
    return True if any(value not in ("", "0") for value in forced) else None


def console(stream: TextIO) -> Console | None:
    """A rich console for ``stream``; None for plain output: ``stream`` is no terminal, and color isn't forced.

    rich is imported here, not at module level, which keeps ``--help`` fast.
    """
    terminal = is_terminal(stream)
    if not terminal and not color():
        return None
    from rich.console import Console

    return Console(
        file=stream,
        highlight=False,
        force_terminal=True,
        no_color=color() is False,
        width=None if terminal else _UNLIMITED,
    )


def print_table(
    console: Console,
    rows: Sequence[Sequence[str]],
    columns: Sequence[str],
    styles: Mapping[str, str],
    numeric: Sequence[bool],
) -> None:
    """Prints ``rows``; ``columns`` are titles (may be empty), ``styles`` the rich styles of cells by their text.

    ``numeric`` columns are aligned to the right.

    Cells of the last column are wrapped. If it would be too narrow, every cell is printed on its own line.
    """
    if not rows:
        return
    from rich.table import Column, Table
    from rich.text import Text

    cells = [[Text(cell, styles.get(cell, "" if index else "cyan")) for index, cell in enumerate(row)] for row in rows]
    *fixed, last = (
        max(Text(cell).cell_len for cell in column) for column in zip(*rows, columns or rows[0], strict=True)
    )
    if console.width - sum(fixed) - len(_GAP) * len(fixed) < min(last, _NARROWEST):
        _print_stacked(console, cells, columns)
        return
    titles = [
        Column(title, no_wrap=index < len(fixed), overflow="fold", justify="right" if right else "left")
        for index, (title, right) in enumerate(zip(columns or [""] * len(numeric), numeric, strict=True))
    ]
    table = Table(
        *titles,
        box=None,
        show_header=bool(columns),
        header_style="bold",
        padding=(0, len(_GAP), 0, 0),
        pad_edge=False,
    )
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _print_stacked(console: Console, rows: Sequence[Sequence[Text]], columns: Sequence[str]) -> None:
    """Prints the first cell of each row, and below it the others, with their titles if there are several."""
    from rich.padding import Padding
    from rich.text import Text

    titles = columns[1:] if len(columns) > 2 else [""] * (len(rows[0]) - 1)
    for first, *others in rows:
        text = first.plain.lstrip()
        indent = len(first) - len(text)
        console.print(Padding(Text(text, first.style, overflow="fold"), (0, 0, 0, indent), expand=False))
        for title, cell in zip(titles, others, strict=True):
            if cell:
                line = Text.assemble((f"{title}: " if title else "", "bold"), cell, overflow="fold")
                console.print(Padding(line, (0, 0, 0, indent + len(_GAP)), expand=False))


def print_labeled(console: Console, label: str, text: str, style: str) -> None:
    """Prints ``label`` in ``style``, then ``text``, wrapped between words.

    A text with a command in backticks stays one line, which the terminal wraps, so that the command can be copied.
    """
    from rich.text import Text

    if "`" not in text:
        width = max(console.width - len(label), _NARROWEST)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        text = f"\n{' ' * len(label)}".join(lines)
    console.print(Text.assemble((label, style), text), soft_wrap=True)
