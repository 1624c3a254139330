"""Commands whose help has grouped options and examples, and that accept ``--quiet`` and ``--verbose``."""

from __future__ import annotations

import inspect
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import click

from llavactl.core.progress import hide_library_bars

RECIPE, GENERAL = "Recipe options", "General options"
SECTIONS = {
    "source": RECIPE,
    "overrides": RECIPE,
    "as_json": GENERAL,
    "quiet": GENERAL,
    "verbose": GENERAL,
    "plugin_files": GENERAL,
    "version": GENERAL,
}
"""Sections of the help by the name of a parameter. All others are in the first section, "Options"."""


_LEVEL = "llavactl.level"
"""The key of the logging level in the meta data of a context, which nested commands share."""


def verbosity_options() -> list[click.Parameter]:
    """``-q/--quiet`` and ``-v/--verbose``; if several are given, the last one counts."""

    def option(*names: str, level: int, text: str) -> click.Option:
        def store(context: click.Context, _option: click.Parameter, given: bool) -> None:
            if given:
                context.meta[_LEVEL] = level

        return click.Option(names, is_flag=True, expose_value=False, callback=store, help=text)

    return [
        option("-q", "--quiet", level=logging.WARNING, text="Print only results, warnings and errors."),
        option("-v", "--verbose", level=logging.DEBUG, text="Log details, and tracebacks of errors."),
    ]


def _set_level(level: int) -> None:
    logging.getLogger("llavactl").setLevel(level)
    if level > logging.INFO:
        hide_library_bars()


MAX_COLUMNS = 80
MIN_COLUMNS = 20
NARROWEST = 24
"""Columns of text beside a term; if fewer are left, the text is below the term."""

_MARGIN = 2
"""Columns that click keeps free at the right."""


class Formatter(click.HelpFormatter):
    """Fits the help into the terminal, also a narrow one: click's own assumes at least 50 columns."""

    def __init__(self) -> None:
        columns = max(min(shutil.get_terminal_size().columns, MAX_COLUMNS), MIN_COLUMNS)
        super().__init__(width=columns - _MARGIN)

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """Writes the usage, broken only where a line is full."""
        prefix = "Usage: " if prefix is None else prefix
        text = click.wrap_text(f"{prefix}{prog} {args}", self.width, subsequent_indent=" " * len(prefix))
        self.write(f"{text}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Writes terms with their texts beside them, or below them if too little room is left."""
        items = list(rows)
        term_width = min(max(len(term) for term, _ in items), col_max)
        if self.width - self.current_indent - term_width - col_spacing >= NARROWEST:
            super().write_dl(items, col_max, col_spacing)
            return
        for term, text in items:
            self.write(f"{'':{self.current_indent}}{term.rstrip()}\n")
            indent = " " * (self.current_indent + self.indent_increment)
            self.write(f"{click.wrap_text(text, self.width, indent, indent)}\n")


class Context(click.Context):
    """A context with our formatter."""

    def make_formatter(self) -> click.HelpFormatter:
        return Formatter()


_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|\S)+""")
"""A word of a shell command, which may contain quoted spaces."""

_CONTINUED = " \\"
"""The end of a line that the next one continues."""


def continued(command: str, columns: int, indent: int) -> list[str]:
    """``command`` as indented lines that end with a backslash, except the last one, to be copied into a shell.

    An option stays beside its value. A line is longer than ``columns`` only if such a pair is.
    """
    parts: list[str] = []
    for word in _WORD.findall(command):
        is_value = bool(parts) and re.fullmatch(r"-\S+", parts[-1]) and not word.startswith("-")
        parts[-1:] = [f"{parts[-1]} {word}"] if is_value else [*parts[-1:], word]
    lines = [""]
    for number, part in enumerate(parts, 1):
        margin = 0 if number == len(parts) else len(_CONTINUED)
        if lines[-1] and len(f"{lines[-1]} {part}") + margin > columns:
            lines[-1] += _CONTINUED
            lines.append("")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else " " * (indent if len(lines) == 1 else indent + 4) + part
    return lines


class Command(click.Command):
    """A command with ``examples``: lines of a shell, shown at the end of its help.

    ``resumes``: interrupted and run again, it continues where it stopped.
    """

    context_class = Context

    def __init__(self, *args: Any, examples: Sequence[str] = (), resumes: bool = False, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.resumes = resumes
        self.params += verbosity_options()

    def invoke(self, ctx: click.Context) -> Any:
        if _LEVEL in ctx.meta:
            _set_level(ctx.meta[_LEVEL])
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if self.resumes:
                interrupt.add_note("run the same command to resume")
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        help_option = self.get_help_option(ctx)
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], RECIPE: [], GENERAL: []}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                section = GENERAL if option is help_option else SECTIONS.get(option.name or "", "Options")
                sections[section].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    for line in continued(example, formatter.width + _MARGIN, formatter.current_indent):
                        formatter.write(f"{line}\n")


class Group(Command, click.Group):
    """A group of commands, in the order of their definition, with the first sentence of their help."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        super().format_options(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(command)) for name, command in self.commands.items()])


def _first_sentence(command: click.Command) -> str:
    return re.split(r"(?<=\.)\s", inspect.cleandoc(command.help or ""), maxsplit=1)[0]
