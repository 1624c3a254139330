"""Prints answers: rendered on terminals, and elsewhere exactly their text."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from llavactl.cli import output, terminal
from llavactl.core.streams import is_terminal, result_stream


def print_answer(pieces: Iterable[str]) -> None:
    """Prints an answer while it is generated, without the space around it; ends the line, also of an interrupted one.

    On a terminal with color, Markdown and code are highlighted.
    """
    stream = result_stream()
    console = terminal.console(stream) if is_terminal(stream) and terminal.color() is not False else None
    if console is None:
        begun = failed = False
        try:
            for piece in _stripped(pieces):
                begun = True
                output.text(piece)
        except Exception:
            failed = True
            raise
        finally:
            if begun or not failed:
                output.line()
        return
    from llavactl.cli.chat.markdown import MarkdownPrinter

    printer = MarkdownPrinter(console)
    try:
        for piece in _stripped(pieces):
            printer.write(piece)
    finally:
        printer.finish()


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """``pieces`` without space before the first and after the last text."""
    space, begun = "", False
    for piece in pieces:
        text = space + piece if begun else piece.lstrip()
        begun = begun or bool(text)
        kept = text.rstrip()
        space = text[len(kept) :]
        if kept:
            yield kept


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """Keys that are pressed while nothing is read don't appear amid an answer; they are read after it."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (termios.error, AttributeError, OSError, ValueError):  # not a terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
