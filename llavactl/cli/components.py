"""``llavactl components``: list the registered components."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option
from llavactl.core.protocols import KINDS

if TYPE_CHECKING:
    from llavactl.core.registry import Registration


@click.command(
    cls=Command,
    examples=[
        "llavactl components",
        "llavactl components connectors",
    ],
)
@click.argument("kind", required=False, type=click.Choice(list(KINDS)), metavar="[KIND]")
@json_option
def command(kind: str | None, as_json: bool) -> None:
    """List the registered components and their plugins.

    With a KIND, list the options of its components as well. KINDs: sources, vision, connectors, languages, templates,
    teachers, tasks, formats.
    """
    from llavactl.core.registry import registry

    kinds = [kind] if kind else list(KINDS)
    entries = [registry().get(each, name) for each in kinds for name in registry().names(each)]
    if as_json:
        output.document([_entry(entry, with_options=kind is not None) for entry in entries])
    elif kind is None:
        rows = [(entry.kind, entry.name, entry.plugin, entry.summary) for entry in entries]
        output.table(rows, ("kind", "name", "plugin", "summary"))
    else:
        for entry in entries:
            output.table([(entry.name, f"({entry.plugin})", entry.summary)])
            output.table([(f"  {option}", description) for option, description in _options(entry).items()])


def _entry(entry: Registration, *, with_options: bool) -> dict[str, Any]:
    fields = {"kind": entry.kind, "name": entry.name, "plugin": entry.plugin, "summary": entry.summary}
    return {**fields, "options": _options(entry)} if with_options else fields


def _options(entry: Registration) -> dict[str, str]:
    """Descriptions of the options by name; empty if a plugin's options model is broken, which is logged."""
    from llavactl.core import plugins
    from llavactl.core.validation import describe_options

    with plugins.isolated(entry.plugin):
        return describe_options(entry.options_model())
    return {}
