"""Commands whose help has grouped options and examples, and that accept ``--quiet`` and ``--verbose``."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
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


class Command(click.Command):
    """A command with ``examples``: lines of a shell, shown at the end of its help."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.params += verbosity_options()

    def invoke(self, ctx: click.Context) -> Any:
        if _LEVEL in ctx.meta:
            _set_level(ctx.meta[_LEVEL])
        return super().invoke(ctx)

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
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")


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
