"""Checks that components conform to their Protocols, for tests of plugins.

Each check returns a list of problems, one line each; an empty list means that the component conforms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llavactl.core import plugins
from llavactl.core.errors import PluginError
from llavactl.core.registry import registry
from llavactl.testing.conformance.formats import check_format
from llavactl.testing.conformance.models import check_connector, check_language, check_vision
from llavactl.testing.conformance.sources import check_source
from llavactl.testing.conformance.tasks import check_task
from llavactl.testing.conformance.teachers import check_teacher
from llavactl.testing.conformance.templates import check_template

__all__ = [
    "CHECKS",
    "check_connector",
    "check_format",
    "check_language",
    "check_plugin",
    "check_source",
    "check_task",
    "check_teacher",
    "check_template",
    "check_vision",
]

CHECKS: Mapping[str, Callable[[Any], list[str]]] = {
    "sources": check_source,
    "vision": check_vision,
    "connectors": check_connector,
    "languages": check_language,
    "templates": check_template,
    "teachers": check_teacher,
    "tasks": check_task,
    "formats": check_format,
}
"""The check of a component of each kind."""


def check_plugin(name: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Checks that everything registered by the plugin ``name`` can be imported.

    Components with ``options`` (by component name) are also created and checked.
    """
    failed = {plugin.name: plugin.error for plugin in plugins.installed()}
    if name not in failed:
        return [f"plugin {name!r} is not installed or not selected by LLAVACTL_PLUGINS"]
    problems = [failed[name]] if failed[name] else []
    for entry in registry():
        if entry.plugin != name:
            continue
        try:
            if entry.kind == "recipes":
                entry.path()
                continue
            entry.load(), entry.options_model()
        except PluginError as error:
            problems.append(error.message)
            continue
        if options is not None and entry.name in options and entry.kind in CHECKS:
            component = registry().create(entry.kind, {"name": entry.name, **options[entry.name]})
            problems += [f"{entry.kind} {entry.name}: {problem}" for problem in CHECKS[entry.kind](component)]
    return problems
