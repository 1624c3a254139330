"""Markdown on a terminal while it is generated: every character is printed once, and nothing is ever overwritten.

So long answers, narrow or resized terminals, and characters of unexpected width can't garble the output. Text is
printed up to the last word whose style is known, code line by line, and a table once it is complete. Only unambiguous
Markdown markers are removed (``**bold**``, not ``2**3``); HTML, formulas and links are printed unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llavactl.cli.chat.code_highlighting import TAB, CodePrinter
from llavactl.cli.chat.table import is_delimiter, is_row, table_lines
from llavactl.core.control_characters import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_LONGEST_SPAN = 400
"""Characters of bold text or inline code; an opening marker without a closing one within them is text."""


_CJK = "\u3000-\u9fff\uac00-\ud7a3\uff00-\uff60"
_WORD = re.compile(rf"\s*(?:[{_CJK}]|[^\s{_CJK}]+)")
"""A word with the space before it; lines of Chinese, Japanese and Korean text may be broken at any character."""

_SPAN = re.compile(
    rf"""(?<!`)(?P<ticks>`{{1,2}})(?!`)(?P<code>.{{1,{_LONGEST_SPAN}}}?)(?<!`)(?P=ticks)(?!`)
    |(?<![\\*A-Za-z0-9_])(?P<stars>\*{{1,3}})(?=[^\s*])
     (?P<text>(?:(?!(?P=stars)).){{0,{_LONGEST_SPAN}}}[^\s*\\])(?P=stars)(?![*A-Za-z0-9_])""",
    re.VERBOSE,
)
_OPENING = re.compile(r"`|(?<![\\*A-Za-z0-9_])\*{1,3}(?=[^\s*])")
_STYLES = {1: "italic", 2: "bold", 3: "bold italic"}

_PREFIX = re.compile(
    r"[ \t]*(?:(?P<quote>(?:>[ ]?)+)|(?P<bullet>[-*+])[ \t]+(?=\S)|(?P<number>\d{1,9}[.)])[ \t]+(?=\S)"
    r"|(?P<heading>#{1,6})[ \t]+(?=\S))?"
)
_UNDECIDED = re.compile(r"`{1,2}|`{3,}[^`]*|~~?|~{3}.*|\|.*|#{1,6}[ \t]*|[-*+_][-*+_ \t]*|\d{1,9}[.)]?[ \t]*|(>[ ]?)+|")
"""The start of a line whose kind is still ambiguous."""

_FENCE = re.compile(r"[ \t]*(?P<fence>`{3,}(?=[^`]*$)|~{3,})[ \t]*(?P<info>.*)")
_RULE = re.compile(r"[ \t]*([-*_])([ \t]*\1){2,}[ \t]*")


class MarkdownPrinter:
    """Prints an answer to ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""
        self._code: CodePrinter | None = None
        self._fence = ""
        self._table: list[str] = []
        self._in_line = False
        self._style = ""
        self._column = self._indent = 0

    def write(self, text: str) -> None:
        """Adds ``text`` to the answer, and prints the part that is final."""
        self._pending += visible(text)
        while (end := self._pending.find("\n")) >= 0:
            line, self._pending = self._pending[:end], self._pending[end + 1 :]
            self._line(line)
        self._partial()

    def finish(self) -> None:
        """Prints the rest, and ends the line."""
        line, self._pending = self._pending, ""
        if line or self._in_line or (self._code and self._code.in_line):
            self._line(line)
        self._print_table()

    def _line(self, line: str) -> None:
        """Prints the rest of a line and ends it."""
        if self._code is not None:
            if not self._code.in_line and re.fullmatch(rf"[ \t]*{self._fence}{self._fence[0]}*[ \t]*", line):
                self._code = None
                self._print(line, "dim", end="\n")
            else:
                self._code.write(f"{line}\n")
        elif self._in_line:
            self._words(line)
            self._print("", end="\n")
            self._in_line = False
        elif is_row(line) and (len(self._table) != 1 or is_delimiter(line)):
            self._table.append(line)
        else:
            self._print_table()
            self._new_line(line)

    def _new_line(self, line: str) -> None:
        if fence := _FENCE.fullmatch(line):
            self._fence = fence["fence"]
            self._code = CodePrinter(self._console, fence["info"])
            self._print(line, "dim", end="\n")
        elif _RULE.fullmatch(line):
            self._print(line, "dim", end="\n")
        elif is_row(line):
            self._table.append(line)
        else:
            self._prose(line)

    def _prose(self, line: str) -> None:
        rest = self._prefix(line)
        self._words(rest)
        self._print("", end="\n")
        self._in_line = False

    def _partial(self) -> None:
        """Prints the final part of an incomplete line."""
        if self._code is not None:
            if len(self._pending) > self._width and not self._pending.lstrip().startswith(self._fence[0]):
                self._code.write(self._pending)
                self._pending = ""
            return
        if not self._in_line:
            if _UNDECIDED.fullmatch(self._pending.lstrip(" \t")):
                return
            self._print_table()
            self._pending = self._prefix(self._pending)
        final = _final_length(self._pending)
        self._words(self._pending[:final])
        self._pending = self._pending[final:]

    def _print_table(self) -> None:
        rows, self._table = self._table, []
        lines = table_lines(rows, inline, self._width)
        for line in lines or ():
            self._console.print(line, soft_wrap=True)
        if lines is None:
            for row in rows:
                self._prose(row)

    def _prefix(self, line: str) -> str:
        """Prints the marker of a list item, a quote or a heading; returns the rest of the line."""
        match = _PREFIX.match(line)
        assert match is not None  # it matches the empty string
        marker, rest = match[0].replace("\t", TAB), line[match.end() :]
        self._in_line, self._style, self._column = True, "", 0
        if match["heading"]:
            marker, self._style = "", "bold underline" if match["heading"] == "#" else "bold"
        elif match["bullet"]:
            marker = marker.replace(match["bullet"], "•", 1)
        elif match["quote"]:
            marker, self._style = marker.replace(">", "│"), "dim"
        self._print(marker, "cyan")
        self._column = self._indent = _cells(marker)
        return rest

    def _words(self, text: str) -> None:
        """Prints ``text`` with its inline styles, wrapped between words."""
        styled, end = inline(text.replace("\t", TAB), self._style), 0
        for word in _WORD.finditer(styled.plain):
            end = word.end()
            begin, cells = word.start(), _cells(word[0])
            if self._column + cells > self._width and self._column > self._indent:
                self._print(f"\n{' ' * self._indent}" if self._indent * 2 < self._width else "\n")
                self._column = self._indent if self._indent * 2 < self._width else 0
                begin += len(word[0]) - len(word[0].lstrip())
                cells = _cells(word[0].lstrip())
            self._console.print(styled[begin:end], end="", soft_wrap=True)
            self._column += cells
        if end < len(styled):
            self._console.print(styled[end:], end="", soft_wrap=True)

    def _print(self, text: str, style: str = "", end: str = "") -> None:
        self._console.print(text, style=style or None, end=end, soft_wrap=True, markup=False, emoji=False)

    @property
    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._console.file.fileno()).columns or self._console.width
        except (OSError, ValueError):
            return self._console.width


def inline(text: str, style: str = "") -> Text:
    """``text`` with the markers of bold and italic text and of inline code replaced by styles."""
    from rich.text import Text

    styled = Text(style=style)
    for part, part_style in _parts(text, ""):
        styled.append(part, part_style or None)
    return styled


def _parts(text: str, style: str) -> Iterator[tuple[str, str]]:
    end = 0
    for match in _SPAN.finditer(text):
        yield text[end : match.start()], style
        if match["code"] is not None:
            yield match["code"], f"{style} cyan".strip()
        else:
            yield from _parts(match["text"], f"{style} {_STYLES[len(match['stars'])]}".strip())
        end = match.end()
    yield text[end:], style


def _final_length(text: str) -> int:
    """The length of the start of ``text``, part of a line, whose rendering doesn't depend on what follows."""
    words = list(_WORD.finditer(text))
    if words and not re.search(rf"[\s{_CJK}]\Z", text) and len(words[-1][0]) <= _LONGEST_SPAN:
        words.pop()
    spans = [(span.start(), span.end()) for span in _SPAN.finditer(text)]
    openings = (match.start() for match in _OPENING.finditer(text) if len(text) - match.start() <= _LONGEST_SPAN + 8)
    limit = next((at for at in openings if not any(start <= at < end for start, end in spans)), len(text))
    ends = (word.end() for word in words if word.end() <= limit)
    return max((at for at in ends if not any(start < at < end for start, end in spans)), default=0)


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
