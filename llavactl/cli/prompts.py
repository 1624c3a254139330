"""Questions on the terminal; an answer that can't be used is asked for again, after an error in the usual form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

from llavactl.cli import boundary
from llavactl.core.control_characters import visible
from llavactl.core.errors import LlavactlError

Value = TypeVar("Value")


def ask(label: str, convert: Callable[[str], Value], default: str | None = None) -> Value:
    """The answer, converted; ``convert`` raises LlavactlError or click.UsageError if it can't be used.

    Raises:
        click.Abort: Ctrl-C, or the input has ended.
    """
    label = visible(label)
    while True:
        try:
            text = click.prompt(label, default=default, show_default=bool(default), value_proc=str.strip, err=True)
        except click.Abort:
            click.echo(err=True)  # ends the line of the question
            raise
        try:
            return convert(text)
        except LlavactlError as error:
            boundary.report(error)
        except click.UsageError as error:
            boundary.message("error:", error.message, "bold red")


def confirm(question: str) -> bool:
    """Whether the answer is yes; the default is no.

    Raises:
        click.Abort: as ``ask``.
    """
    return ask(f"{question} [y/N]", _is_yes, default="")


def _is_yes(text: str) -> bool:
    match text.lower():
        case "y" | "yes":
            return True
        case "n" | "no" | "":
            return False
    raise click.UsageError(f"expected y or n, got {text!r}")
