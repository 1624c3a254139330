"""The commands of plugins, stored so that ``llavactl --help`` imports no plugin."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError
from llavactl.core.paths import cache_dir, write_json
from llavactl.core.plugin_code import package_files, root_package


def commands() -> dict[str, str]:
    """Names and summaries of plugin commands for ``llavactl --help``.

    Cached by the times and sizes of the plugins' files, so a plugin that is slow to import delays the help only once.
    Not cached while any plugin has an error, so that its warning is always shown.
    """
    points = plugins.entry_points()
    if not points:
        return {}
    cache_file: Path | None = None
    with contextlib.suppress(LlavactlError, OSError, ValueError, KeyError, TypeError):
        cache_file = cache_dir() / "plugin-commands.json"
        cached = json.loads(cache_file.read_text(encoding="utf-8"))
        if cached["key"] == _key(points):
            return dict(cached["commands"])
    from llavactl.core.registry import registry

    entries = registry().entries.get("commands", {}).values()
    summaries = {entry.name: entry.summary for entry in entries if entry.plugin != plugins.BUILTIN}
    if cache_file is not None and not plugins.any_failed():
        with contextlib.suppress(OSError, ValueError):
            write_json(cache_file, {"key": _key(points), "commands": summaries})
    return summaries


def _key(points: Sequence[metadata.EntryPoint]) -> list[Any]:
    from llavactl import __version__

    return [__version__, list(sys.version_info), *map(_stamp, points)]


def _stamp(point: metadata.EntryPoint) -> list[Any]:
    """Values that change when the plugin's code may have changed; its module is located without importing it."""
    files = [file.stat() for _, file in package_files(root_package(point.value), "*.py")]
    stats = [[file.st_mtime_ns, file.st_size] for file in files]
    return [point.name, point.value, stats]
