"""Shell completion of names: recipes, components, plugins."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def names_of(kind: str, *, or_files: bool = False) -> Complete:
    """Completes the names of ``kind`` in the registry; with ``or_files``, a file name if none of them matches.

    bash can't show both: click's script replaces the names.
    """

    def complete(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from llavactl.core.registry import registry

        entries = (registry().get(kind, name) for name in registry().names(kind) if name.startswith(incomplete))
        names = [CompletionItem(entry.name, help=entry.summary) for entry in entries]
        return names or (file_names(context, option, incomplete) if or_files else [])

    return complete


def plugin_names(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes the names of installed plugins."""
    from llavactl.core import plugins

    names = [plugins.BUILTIN, *(point.name for point in plugins.entry_points())]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def file_names(_context: click.Context, _option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completes file names, for options that accept something else as well."""
    return [CompletionItem(incomplete, type="file")]
