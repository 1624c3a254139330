"""The root command. Commands are listed from a table and imported on first use."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from llavactl import __version__
from llavactl.cli.help import Group
from llavactl.core import plugin_commands, plugin_files, plugins
from llavactl.core.builtin_plugin import COMMAND_GROUPS, COMMANDS
from llavactl.core.errors import PluginError
from llavactl.core.streams import stdout_to_stderr

_WIDTH = max(map(len, COMMANDS))
"""Of the names of commands, so that the columns of all groups are aligned."""

FIRST_PARTY_COMMANDS = {
    "lm-eval": "llavactl-harnesses[lm-eval]",
    "serve": "llavactl-serve",
    "web": "llavactl-web[gradio]",
}
"""The commands of first-party plugins and their packages, to name the package if it is missing."""


def missing_command(name: str, package: str) -> PluginError:
    """The error that the command ``name`` of a first-party ``package`` is missing."""
    return PluginError(
        f"`llavactl {name}` is a command of a plugin that is not installed, or not in LLAVACTL_PLUGINS",
        hint=f"in a checkout of llavactl: pip install -e 'plugins/{package}'",
    )


class LazyGroup(Group):
    """The built-in commands, then the commands of plugins; ``--help`` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [*COMMANDS, *sorted(plugin_commands.commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name in COMMANDS:
            return _builtin(cmd_name)
        return _from_plugin(cmd_name) if cmd_name in plugin_commands.commands() else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from llavactl.core.suggest import suggest

            if package := FIRST_PARTY_COMMANDS.get(args[0]):
                raise missing_command(args[0], package) from error
            raise click.UsageError(
                f"{error.message.removesuffix('.')}; {suggest(args[0], self.list_commands(ctx))}", ctx
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, rows in (*COMMAND_GROUPS.items(), ("Commands of plugins", plugin_commands.commands())):
            if rows:
                with formatter.section(title):
                    formatter.write_dl([(name.ljust(_WIDTH), summary) for name, summary in rows.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes commands without importing them, and options."""
        commands = COMMANDS | plugin_commands.commands()
        names = [CompletionItem(name, help=text) for name, text in commands.items() if name.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


@cache
def _builtin(name: str) -> click.Command:
    """A built-in command. Output of plugins and libraries goes to stderr; only results go to stdout."""
    command: click.Command = importlib.import_module(f"llavactl.cli.{name}").command
    for each in [command, *(command.commands.values() if isinstance(command, click.Group) else ())]:
        if each.callback is not None:
            each.callback = stdout_to_stderr()(each.callback)
    return command


def _from_plugin(name: str) -> click.Command:
    from llavactl.core.component_calls import component_error
    from llavactl.core.plugin_code import location
    from llavactl.core.registry import registry

    entry = registry().get("commands", name)
    registry().used.add((entry.kind, entry.name))
    command = entry.load()
    code, what = command, ""
    if not isinstance(command, click.Command):
        what = f"is {command!r:.60}, expected a click command"
    elif inspect.isgeneratorfunction(command.callback) or inspect.iscoroutinefunction(command.callback):
        code, what = command.callback, "the body of a generator or async function never runs"
    if what:
        raise component_error(entry, f"{entry.target} ({location(code) or entry.where}): {what}")
    return command


def _add_plugins(files: Sequence[Path]) -> Sequence[Path]:
    if files:
        plugin_files.add(files)
        plugins.reload()
    return files


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=[
        "llavactl init --data photos/",
        "llavactl run",
        'llavactl chat --image photo.jpg --prompt "What is in this image?"',
    ],
)
@click.option(
    "--plugin",
    "plugin_files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,  # before --help, which lists the commands of plugins
    callback=lambda _context, _option, files: _add_plugins(files),
    help="Load this Python file as a plugin (repeatable).",
)
@click.version_option(__version__, prog_name="llavactl")
def root(plugin_files: Sequence[Path]) -> None:
    """Build LLaVA-type vision-language assistants.

    Cache vision features, train a connector, fine-tune the language model, evaluate, chat and export.
    """
    for file in plugin_files:
        if not file.is_file():
            raise click.BadParameter(f"{file} not found", param_hint="--plugin")
