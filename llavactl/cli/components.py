"""``llavactl components``: what is registered, and by which plugin."""

from __future__ import annotations

from typing import Any

import click

from llavactl.cli import output
from llavactl.cli.options import json_option
from llavactl.core.protocols import KINDS


@click.command()
@click.argument("kind", required=False, type=click.Choice(list(KINDS)))
@json_option
def command(kind: str | None, as_json: bool) -> None:
    """What is registered and by which plugin; with a KIND, each component's options too."""
    from llavactl.core.registry import Registration, registry

    found: list[Registration] = [
        registry().get(each, name) for each in KINDS if kind in (None, each) for name in registry().names(each)
    ]
    if as_json:
        output.document([_entry(entry, with_options=kind is not None) for entry in found])
    elif kind is None:
        output.table([(entry.kind, entry.name, entry.plugin, entry.summary) for entry in found])
    else:
        for entry in found:
            output.line(f"{entry.name}  ({entry.plugin})  {entry.summary}")
            output.table([(f"  {option}", what) for option, what in _options(entry).items()])


def _entry(entry: Any, *, with_options: bool) -> dict[str, Any]:
    shown = {"kind": entry.kind, "name": entry.name, "plugin": entry.plugin, "summary": entry.summary}
    return {**shown, "options": _options(entry)} if with_options else shown


def _options(entry: Any) -> dict[str, str]:
    """Each option in words; what a plugin's broken options model raises is that plugin's own line."""
    from llavactl.core import plugins
    from llavactl.core.validation import describe_options

    with plugins.isolated(entry.plugin):
        return describe_options(entry.options_model())
    return {}
