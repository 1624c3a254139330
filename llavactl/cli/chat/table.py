"""Tables in Markdown, aligned on a terminal that is wide enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_GAP = " │ "
_DELIMITER = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")


def is_row(line: str) -> bool:
    """Whether ``line`` is a row of a table; only rows that begin with ``|`` are recognized."""
    return line.lstrip(" \t").startswith("|")


def is_delimiter(line: str) -> bool:
    """Whether ``line`` is a delimiter row (``|---|:-:|``), which follows the titles."""
    return _DELIMITER.fullmatch(line) is not None


def table_lines(rows: Sequence[str], inline: Callable[[str], Text], width: int) -> list[Text] | None:
    """The lines of the table ``rows``, at most ``width`` columns wide; None if it isn't a table, or is wider."""
    from rich.text import Text

    if len(rows) < 2 or not is_delimiter(rows[1]):
        return None
    titles, delimiter, *others = ([*map(str.strip, _cells(row))] for row in rows)
    columns = [*zip_longest(*([inline(cell) for cell in row] for row in (titles, *others)))]
    widths = [max(cell.cell_len for cell in column if cell is not None) for column in columns]
    if sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        return None
    marks = [*delimiter, *[""] * len(columns)]
    aligned = [
        [_aligned(cell or Text(), mark, cells) for cell in column]
        for column, mark, cells in zip(columns, marks, widths, strict=False)
    ]
    first, *rest = (Text(_GAP).join(row) for row in zip(*aligned, strict=True))
    first.stylize("bold")
    return [first, Text("─┼─".join("─" * cells for cells in widths), "dim"), *rest]


def _aligned(cell: Text, mark: str, width: int) -> Text:
    """``cell`` padded to ``width``, aligned by ``mark``, the column's cell of the delimiter row."""
    cell.align("left" if not mark.endswith(":") else "center" if mark.startswith(":") else "right", width)
    return cell


def _cells(row: str) -> list[str]:
    return re.split(r"(?<!\\)\|", re.sub(r"(?<!\\)\|$", "", row.strip())[1:])
