"""``llavactl plugins``: list, check and create plugins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from llavactl.cli import completion, output
from llavactl.cli.help import Group
from llavactl.cli.options import json_option
from llavactl.core.plugin_probe import IMPORT_TIMEOUT_S


@click.group(
    cls=Group,
    examples=[
        "llavactl plugins list",
        "llavactl plugins check demo",
        "llavactl plugins new birds --kind source",
    ],
)
def command() -> None:
    """List, check and create plugins.

    LLAVACTL_PLUGINS selects plugins by name (comma-separated; empty: none). With LLAVACTL_STRICT_PLUGINS=1 a broken
    plugin is an error; by default it is a warning.
    """


_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=IMPORT_TIMEOUT_S,
    metavar="SECONDS",
    show_default=True,
    help="Report a plugin whose import takes longer.",
)


@command.command(
    "list",
    examples=[
        "llavactl plugins list",
        "llavactl plugins list --json",
    ],
)
@_timeout
@json_option
def list_(timeout_s: float, as_json: bool) -> None:
    """List the plugins: package, hooks, import time and status.

    Each plugin is imported in its own process, so one that hangs is reported.
    """
    from dataclasses import asdict

    from llavactl.verbs.plugins import list_plugins

    plugins = list_plugins(timeout_s)
    if as_json:
        output.document([asdict(plugin) for plugin in plugins])
        return
    rows = [
        (
            plugin.name,
            f"{plugin.package} {plugin.version}",
            ", ".join(hook.removeprefix("register_") for hook in plugin.hooks) or "-",
            "-" if plugin.import_s is None else f"{plugin.import_s:.2f} s",
            plugin.error or plugin.status,
        )
        for plugin in plugins
    ]
    styles = {plugin.error: "bold red" for plugin in plugins if plugin.error} | {"ok": "green"}
    output.table(rows, ("name", "package", "hooks", "import", "status"), styles)


@command.command(
    examples=[
        "llavactl plugins check demo",
        "llavactl plugins check ./my_plugin.py",
        "llavactl plugins check birds -o birds.path=birds.csv --json",
    ]
)
@click.argument("plugin", metavar="PLUGIN|FILE", shell_complete=completion.plugin_names)
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="NAME.KEY=VALUE",
    help="Set an option of a component for the check (repeatable).",
)
@_timeout
@json_option
def check(plugin: str, options: Sequence[str], timeout_s: float, as_json: bool) -> None:
    """Check a plugin and everything that it registers.

    PLUGIN is the name of an installed plugin or of its package, FILE a single file. The checks: import, hooks, options,
    and the rules of each kind of component. Components with required options need them, from -o or the plugin's hook
    check_examples. Exit with 1 if a check fails. With --json, print a certificate: versions, hashes of the plugin's
    files and all checks.
    """
    from llavactl.core import plugin_files, plugins
    from llavactl.core.errors import PluginError
    from llavactl.core.quantities import quantity
    from llavactl.verbs.plugins import check as certify

    if plugin.endswith(".py"):
        file = Path(plugin).absolute()
        if not file.is_file():
            what = "is a folder; pass a file" if file.is_dir() else "not found; pass an existing file"
            raise click.BadParameter(f"{plugin} {what}", param_hint="PLUGIN|FILE")
        plugin_files.add([file])
        plugins.reload()
        plugin = file.stem
    certificate = certify(plugin, options, timeout_s)
    if as_json:
        output.document(certificate)
    elif not certificate.ok and len(certificate.checks) == 1:
        subject = "" if certificate.package == "?" else f"plugin {certificate.plugin}: "
        raise PluginError(f"{subject}{certificate.checks[0].problem}")
    else:
        results = {True: "ok", False: "failed", None: "skipped"}
        rows = [
            (each.kind, each.name, each.check, ": ".join(filter(None, (results[each.ok], each.problem))))
            for each in certificate.checks
        ]
        styles = {row[-1]: "bold red" for row, each in zip(rows, certificate.checks, strict=True) if each.ok is False}
        output.table(rows, ("kind", "name", "check", "result"), styles | {"ok": "green"})
    if not certificate.ok:
        failed = sum(each.ok is False for each in certificate.checks)
        raise PluginError(f"plugin {certificate.plugin}: {quantity(failed, 'check')} failed, listed above")


@command.command(
    examples=[
        "llavactl plugins new birds --kind source",
        "llavactl plugins new shuffle --kind connector --kind vision --to plugins/",
    ]
)
@click.argument("name")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    required=True,
    callback=lambda _context, _option, values: _kinds(values),
    metavar="KIND",
    help="Write an example of this kind (repeatable): source, vision, connector, language, template, teacher, task, "
    "format, optimizer, schedule, command or observer.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    metavar="DIR",
    help="Write the package into this folder.  [default: the working directory]",
)
@json_option
def new(name: str, kinds: tuple[str, ...], to: Path, as_json: bool) -> None:
    """Create the package of a new plugin: llavactl-NAME.

    The package is a working example with tests, a README and a recipe: install it, then change it. Nothing is
    overwritten. With --json, list the files.
    """
    from llavactl.core.locations import shown_path
    from llavactl.verbs.new_plugin import new_plugin

    plugin = new_plugin(name, kinds, to)
    if as_json:
        output.document(plugin)
        return
    folder = shown_path(Path(plugin.folder).absolute())
    output.lines([f"{folder}/{file}" for file in plugin.files])
    output.lines(["", f"next: pip install -e {folder} && pytest {folder} && llavactl plugins check {name}"])


def _kinds(values: Sequence[str]) -> tuple[str, ...]:
    """The kinds that the user named, singular or plural."""
    from llavactl.core.suggest import suggest
    from llavactl.verbs.new_plugin import KINDS, kind_of

    kinds = [kind_of(value) for value in values]
    for value, kind in zip(values, kinds, strict=True):
        if kind is None:
            raise click.BadParameter(f"unknown kind {value!r}; {suggest(value, KINDS)}", param_hint="--kind")
    return tuple(kind for kind in kinds if kind)
