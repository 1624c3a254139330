"""``llavactl plugins``: list and check the installed plugins."""

from __future__ import annotations

import click

from llavactl.cli import completion, output
from llavactl.cli.help import Group
from llavactl.cli.options import json_option


@click.group(
    cls=Group,
    examples=[
        "llavactl plugins list",
        "llavactl plugins check demo",
    ],
)
def command() -> None:
    """List and check the installed plugins.

    LLAVACTL_PLUGINS selects plugins by name (comma-separated; empty: none). With LLAVACTL_STRICT_PLUGINS=1 a broken
    plugin is an error; by default it is a warning.
    """


@command.command(
    "list",
    examples=[
        "llavactl plugins list",
        "llavactl plugins list --json",
    ],
)
@json_option
def list_(as_json: bool) -> None:
    """List the plugins: package, version, module and errors."""
    from dataclasses import asdict

    from llavactl.core.plugins import installed

    plugins = installed()
    if as_json:
        output.document([asdict(plugin) for plugin in plugins])
    else:
        rows = [(p.name, f"{p.package} {p.version}", p.module, p.error or "ok") for p in plugins]
        styles = {p.error: "bold red" for p in plugins if p.error} | {"ok": "green"}
        output.table(rows, ("name", "package", "module", "status"), styles)


@command.command(
    examples=[
        "llavactl plugins check llavactl",
    ]
)
@click.argument("name", shell_complete=completion.plugin_names)
@json_option
def check(name: str, as_json: bool) -> None:
    """Import all components of the plugin NAME and list its problems.

    Exit with 1 if there are any. Components with required options are checked by `llavactl.testing` in the plugin's
    tests.
    """
    from llavactl.core.errors import PluginError
    from llavactl.testing import check_plugin

    problems = check_plugin(name)
    output.report({"plugin": name, "problems": problems}, as_json)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise PluginError(f"plugin {name}: {count}, listed above")
