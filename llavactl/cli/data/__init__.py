"""``llavactl data``: commands for training data, one module per command."""

from __future__ import annotations

import importlib

import click

from llavactl.cli.help import Group

COMMANDS = (
    "generate",
    "show",
    "check",
    "stats",
    "filter",
    "expand",
)
"""Modules with an attribute ``command``, in the order of typical use."""


@click.group(
    cls=Group,
    examples=[
        "llavactl data check",
        "llavactl data stats records.json",
        "llavactl data show --stage 2",
    ],
)
def command() -> None:
    """Generate, inspect, check and filter training data."""


for _name in COMMANDS:
    command.add_command(importlib.import_module(f"{__name__}.{_name}").command)
