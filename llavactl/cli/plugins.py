"""``llavactl plugins``: the installed plugins."""

from __future__ import annotations

import click

from llavactl.cli import output
from llavactl.cli.options import json_option


@click.group()
def command() -> None:
    """The installed plugins.

    LLAVACTL_PLUGINS selects by name (comma-separated; empty: none); with LLAVACTL_STRICT_PLUGINS=1
    a plugin at fault is an error instead of a line.
    """


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Each plugin's package, version and module, and what is wrong with it."""
    from dataclasses import asdict

    from llavactl.core.plugins import installed

    found = installed()
    if as_json:
        output.document([asdict(plugin) for plugin in found])
    else:
        output.table([(p.name, f"{p.package} {p.version}", p.module, p.error or "ok") for p in found])


@command.command()
@click.argument("name")
@json_option
def check(name: str, as_json: bool) -> None:
    """Import all that plugin NAME registers and say what is wrong. Exit 1 if anything is.

    Components that need options are checked by `llavactl.testing` in the plugin's own tests.
    """
    from llavactl.core.errors import PluginError
    from llavactl.testing import check_plugin

    faults = check_plugin(name)
    output.report({"plugin": name, "faults": faults}, as_json)
    if faults:
        raise PluginError(f"plugin {name}: {len(faults)} faults, listed above")
