"""``llavactl data``: instruction data. One file a command."""

from __future__ import annotations

import importlib

import click

COMMANDS = (
    "generate",
    "show",
    "check",
    "stats",
    "filter",
    "expand",
)
"""Each the ``command`` of a module of its name, in the order that they are used."""


@click.group()
def command() -> None:
    """Generate, inspect, check and filter training data."""


for _name in COMMANDS:
    command.add_command(importlib.import_module(f"{__name__}.{_name}").command)
