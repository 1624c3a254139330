"""``chat --web``: invokes the command ``web`` of the plugin llavactl-web."""

from __future__ import annotations

import click
from click.core import ParameterSource

_WEB = "web"
"""The command of the plugin llavactl-web."""

_OF_WEB = ("source", "overrides", "model", "template")
"""Options that ``--web`` passes on."""


def chat_in_browser(context: click.Context) -> None:
    """Invokes the command ``web`` with the options of ``_OF_WEB``.

    Raises:
        PluginError: no plugin has this command.
    """
    given = [
        option.opts[-1]
        for option in context.command.params
        if option.name in context.params
        and option.name not in (*_OF_WEB, _WEB)
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"--web can't be combined with {given[0]}; `llavactl web --help` lists its options")
    root = context.find_root()
    web = root.command.get_command(root, _WEB) if isinstance(root.command, click.Group) else None
    if web is None:
        from llavactl.cli.root import FIRST_PARTY_COMMANDS, missing_command

        raise missing_command(_WEB, FIRST_PARTY_COMMANDS[_WEB])
    arguments = []
    for option in context.command.params:
        if option.name in _OF_WEB:
            value = context.params[option.name]
            for each in value if isinstance(value, tuple) else [value] * (value is not None):
                arguments += [option.opts[0], each]
    with web.make_context(_WEB, arguments, parent=root) as inner:
        web.invoke(inner)
