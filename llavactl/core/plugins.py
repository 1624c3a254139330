"""Loads plugins in isolation: a broken plugin is reported in one line on stderr and doesn't affect others.

Output of a plugin during import and registration goes to stderr. ``LLAVACTL_PLUGINS`` selects plugins by entry-point
name (comma-separated; empty: none; unset: all). ``LLAVACTL_STRICT_PLUGINS=1`` turns warnings about plugins into errors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy

from llavactl.core import builtin_plugin, hookspecs
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.paths import cache_dir, write_json
from llavactl.core.streams import stdout_to_stderr

log = logging.getLogger(__name__)

GROUP = "llavactl"
BUILTIN = "llavactl"
SLOW_S = 1.0


@dataclass(frozen=True)
class Plugin:
    """An installed plugin; ``error`` lists what failed while loading and registering it."""

    name: str
    package: str
    version: str
    module: str
    error: str = ""


_errors: dict[str, list[str]] = {}
"""Errors of plugins, one line each: by module while loading, later by plugin name."""


@contextlib.contextmanager
def isolated(plugin: str) -> Iterator[None]:
    """Logs any exception of ``plugin`` in one line; in strict mode, raises it as a PluginError.

    Exceptions of the built-in plugin always propagate: they are bugs of llavactl.
    """
    try:
        yield
    except BaseException as error:
        if plugin == BUILTIN or isinstance(error, KeyboardInterrupt | GeneratorExit):
            raise
        message = str(error) if isinstance(error, PluginError) else f"plugin {plugin}: {type(error).__name__}: {error}"
        line = " ".join(message.split())
        if strict():
            raise PluginError(line) from error
        _errors.setdefault(plugin, []).append(line)
        log.warning("%s", line)


def strict() -> bool:
    return os.environ.get("LLAVACTL_STRICT_PLUGINS", "") not in ("", "0")


@cache
def entry_points() -> tuple[metadata.EntryPoint, ...]:
    """The installed plugins selected by ``LLAVACTL_PLUGINS``, sorted by name."""
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    selection = os.environ.get("LLAVACTL_PLUGINS")
    if selection is None:
        return tuple(points)
    names = {name.strip() for name in selection.split(",") if name.strip()}
    for missing in sorted(names - {point.name for point in points}):
        with isolated(missing):
            raise PluginError(f"LLAVACTL_PLUGINS: plugin {missing!r} is not installed")
    return tuple(point for point in points if point.name in names)


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager, with the built-in plugin first, then all installed plugins that load."""
    plugin_manager = pluggy.PluginManager("llavactl")
    plugin_manager.add_hookspecs(hookspecs)
    plugin_manager.register(builtin_plugin, BUILTIN)
    for point in entry_points():
        _load(plugin_manager, point)
    return plugin_manager


def _load(plugin_manager: pluggy.PluginManager, point: metadata.EntryPoint) -> None:
    started = time.perf_counter()
    with isolated(point.value), stdout_to_stderr():
        if first := plugin_manager.get_plugin(point.name):
            owner = "llavactl" if point.name == BUILTIN else getattr(first, "__name__", "?")
            raise PluginError(
                f"plugin name {point.name!r} is used by {owner} and again by {point.value} "
                f"of package {_package(point)[0]}; the first is kept"
            )
        try:
            _register(plugin_manager, point.load(), point.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may call sys.exit at import
            raise PluginError(f"plugin {point.name} can't be loaded: {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - started
    log.debug("plugin %s: imported %s in %.2f s", point.name, point.value, seconds)
    if seconds > SLOW_S:
        advice = "pass module:attr strings to `register`, so that components are imported on first use"
        log.warning("plugin %s took %.1f s to import; %s", point.name, seconds, advice)


def _register(plugin_manager: pluggy.PluginManager, module: Any, name: str) -> None:
    """Registers all hooks of a plugin, or none if one of them is invalid."""
    try:
        plugin_manager.register(module, name)
        plugin_manager.check_pending()
    except Exception:
        if plugin_manager.get_plugin(name) is module:
            plugin_manager.unregister(module, name)
        raise


def implementations(hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The implementations of ``hook`` with their plugin names: built-in first, then sorted by name."""
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        yield implementation.plugin_name, _by_keyword(implementation)


def _by_keyword(implementation: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return implementation.function(**{name: arguments[name] for name in implementation.argnames})

    return call


def notify(hook: str, **arguments: Any) -> None:
    """Calls an observer hook of all plugins; exceptions are logged."""
    for plugin, implementation in implementations(hook):
        with isolated(plugin):
            implementation(**arguments)


def installed() -> list[Plugin]:
    """The built-in plugin and the selected ones, with errors from loading and registering them."""
    from llavactl import __version__
    from llavactl.core.registry import registry

    registry()
    plugins = [Plugin(BUILTIN, "llavactl", __version__, "llavactl.core.builtin_plugin")]
    for point in entry_points():
        package, version = _package(point)
        errors = dict.fromkeys([*_errors.get(point.value, ()), *_errors.get(point.name, ())])
        plugins.append(Plugin(point.name, package, version, point.value, "; ".join(errors)))
    return plugins


def version_of(plugin: str) -> str:
    """The package version of ``plugin``; for the built-in plugin, ``RESULTS_VERSION``."""
    if plugin == BUILTIN:
        return builtin_plugin.RESULTS_VERSION
    return next((_package(point)[1] for point in entry_points() if point.name == plugin), "?")


def _package(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def commands() -> dict[str, str]:
    """Names and summaries of plugin commands for ``llavactl --help``.

    Cached by the times and sizes of the plugins' files, so a plugin that is slow to import delays the help only once.
    Not cached while any plugin has an error, so that its warning is always shown.
    """
    points = entry_points()
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
    summaries = {entry.name: entry.summary for entry in entries if entry.plugin != BUILTIN}
    if cache_file is not None and not _errors:
        with contextlib.suppress(OSError, ValueError):
            write_json(cache_file, {"key": _key(points), "commands": summaries})
    return summaries


def _key(points: Sequence[metadata.EntryPoint]) -> list[Any]:
    from llavactl import __version__

    return [__version__, list(sys.version_info), *map(_stamp, points)]


def _stamp(point: metadata.EntryPoint) -> list[Any]:
    """Values that change when the plugin's code may have changed; its module is located without importing it."""
    spec = importlib.util.find_spec(point.value.partition(":")[0].partition(".")[0])
    files = [Path(spec.origin)] if spec and spec.origin else []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files += sorted(Path(folder).rglob("*.py"))
    stats = [[file.stat().st_mtime_ns, file.stat().st_size] for file in files]
    return [point.name, point.value, stats]
