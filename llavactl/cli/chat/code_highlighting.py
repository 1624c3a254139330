"""A code block on a terminal while it is generated, highlighted line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

TAB = "    "
"""Replaces a tab, whose width depends on its column and the terminal."""

_CONTEXT = 2_000
"""Characters before a line that its highlighting may depend on; limits the time per line."""


class CodePrinter:
    """Prints the code of a block with the info string ``info``, which names its language; every character once."""

    def __init__(self, console: Console, info: str) -> None:
        self._console = console
        self._language = (info.split() or [""])[0].strip("{.}").partition(":")[0]
        self._before = ""

    @property
    def in_line(self) -> bool:
        """Whether the last line is incomplete."""
        return bool(self._before) and not self._before.endswith("\n")

    def write(self, code: str) -> None:
        """Prints ``code``, which continues the block."""
        from rich.text import Text

        start, code = len(self._before), self._before + code
        text = Text()
        for at, kind, value in self._tokens(code):
            if at + len(value) > start:
                text.append(value[max(start - at, 0) :].replace("\t", TAB), self._theme.get_style_for_token(kind))
        self._console.print(text, end="", soft_wrap=True)
        while len(code) > _CONTEXT and "\n" in code[:-1]:
            code = code[code.index("\n") + 1 :]
        self._before = code

    def _tokens(self, code: str) -> Iterable[tuple[int, Any, str]]:
        """The tokens of ``code`` with their positions; they contain all of it."""
        tokens = list(self._lexer.get_tokens_unprocessed(code)) if self._lexer else []
        return tokens if "".join(value for _, _, value in tokens) == code else _plain(code)

    @cached_property
    def _lexer(self) -> Any:
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound

        try:
            return get_lexer_by_name(self._language) if self._language else None
        except ClassNotFound:
            return None

    @cached_property
    def _theme(self) -> Any:
        from rich.syntax import Syntax

        return Syntax.get_theme("ansi_dark")


def _plain(code: str) -> Iterator[tuple[int, Any, str]]:
    from pygments.token import Token

    yield 0, Token.Text, code
