"""Questions and commands: edited on a terminal, or lines of a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from llavactl.cli.chat import arguments
from llavactl.core.control_characters import visible
from llavactl.core.errors import DataError, LlavactlError
from llavactl.core.paths import data_dir
from llavactl.core.streams import is_terminal, result_stream

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

PROMPT = "> "
FILE_COMMANDS = frozenset({"/image", "/save", "/save!", "/load"})

_LONGEST_ENTRY = 10_000
"""Characters; longer questions are not kept in the history, which is read completely at every start."""

Read = Callable[[str], str | None]
"""Reads a question, given the text to edit (on a terminal only); None at the end of the input."""


def reader(commands: Mapping[str, bool], settings: Sequence[str]) -> tuple[Read, bool]:
    """A function that reads questions from a terminal, a pipe or a file, and whether questions can be edited.

    ``commands`` are the names of commands, and whether they take an argument.
    """
    stream = next((each for each in (sys.stderr, result_stream()) if is_terminal(each)), None)
    if sys.stdin is not None and sys.stdin.isatty() and stream is not None:
        return _edited(stream, commands, settings), True
    lines, prompt = piped_lines(), PROMPT if sys.stdin is not None and sys.stdin.isatty() else ""

    def read(_text: str) -> str | None:
        if prompt:
            click.echo(prompt, nl=False, err=True)
        line = None
        try:
            line = next(lines, None)
        finally:
            if prompt and line is None:  # Ctrl-C or Ctrl-D
                click.echo(err=True)
        return line

    return read, False


def piped_text() -> str:
    """All of stdin.

    Raises:
        DataError: it isn't UTF-8.
    """
    return _decoded(_stdin().read(), "stdin")


def piped_lines() -> Iterator[str]:
    """The lines of stdin, without the characters that end them.

    Raises:
        DataError: a line isn't UTF-8.
    """
    stdin = _stdin()

    def line(item: tuple[int, bytes | str]) -> str:
        return _decoded(item[1], f"line {item[0]} of stdin").rstrip("\r\n")

    return map(line, enumerate(iter(stdin.readline, stdin.read(0)), 1))  # not a generator, which Ctrl-C would end


def _stdin() -> Any:
    """stdin as bytes; in tests as text."""
    return open(os.devnull, "rb") if sys.stdin is None else getattr(sys.stdin, "buffer", sys.stdin)  # noqa: PTH123


def _decoded(data: bytes | str, where: str) -> str:
    try:
        return data if isinstance(data, str) else data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: {error.reason}", hint="name an image with /image or --image"
        ) from error


def _edited(stream: TextIO, commands: Mapping[str, bool], settings: Sequence[str]) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    output = create_output(stdout=stream)
    # prompt_toolkit would warn about terminals that don't report the cursor position.
    output.enable_cpr = False  # type: ignore[attr-defined]
    session: PromptSession[str] = PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=lambda width, _line, _wraps: ". ".rjust(width),
        key_bindings=_key_bindings(),
        history=_history(),
        completer=_completer(commands, settings),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        enable_open_in_editor=False,
        output=output,
    )

    def read(text: str) -> str | None:
        try:
            return session.prompt(default=text).replace("\r", "")
        except EOFError:
            return None

    return read


def _key_bindings() -> Any:
    """Enter sends the question or takes a search result; Alt-Enter, or Enter after a backslash, starts a new line."""
    from prompt_toolkit.filters import is_searching
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter", filter=~is_searching)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "c-j")  # typed before the prompt was shown
    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def history_file() -> Path:
    """The questions of earlier conversations."""
    return data_dir() / "chat-history"


def _history() -> History:
    """The history in ``history_file``, which only its user may read; in memory if it can't be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class PrivateHistory(FileHistory):
        def store_string(self, string: str) -> None:
            if len(string) <= _LONGEST_ENTRY:
                with contextlib.suppress(OSError):  # the disk is full
                    super().store_string(string.encode("utf-8", "replace").decode())

    try:
        file = history_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, LlavactlError):
        return InMemoryHistory()
    return PrivateHistory(str(file))


def _completer(commands: Mapping[str, bool], settings: Sequence[str]) -> Any:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class CommandCompleter(Completer):
        """Completes commands, file names after commands that take a file, and settings after ``/set``."""

        def get_completions(self, document: Document, _event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if not space:
                found = [name for name in commands if text.startswith("/") and name.startswith(text)]
                candidates = [(0, name + " " * commands[name], name) for name in found]
            elif command in FILE_COMMANDS:
                candidates = list(arguments.completions(rest))
            elif command == "/set" and " " not in rest:
                candidates = [(0, f"{name} ", name) for name in settings if name.startswith(rest)]
            else:
                candidates = []
            for start, replacement, shown in candidates:
                yield Completion(replacement, start - len(rest if space else text), display=visible(shown))

    return CommandCompleter()
