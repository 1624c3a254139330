"""Loading plugins one at a time, in isolation: a broken plugin is reported in one line on stderr and affects no other.

What a plugin prints while it is imported or registered goes to stderr.

``LLAVACTL_PLUGINS`` selects by entry-point name (comma-separated; empty: none; unset: all).
``LLAVACTL_STRICT_PLUGINS=1`` raises where otherwise a line would be logged.
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

from llavactl.core import builtins, hookspecs
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.paths import cache_dir, write_json
from llavactl.core.streams import stdout_to_stderr

log = logging.getLogger(__name__)

GROUP = "llavactl"
BUILTIN = "llavactl"
SLOW_S = 1.0


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, loaded or not."""

    name: str
    package: str
    version: str
    module: str
    error: str = ""


_faults: dict[str, list[str]] = {}
"""What each plugin did wrong so far, one line each: while loading by its module, later by its name."""


@contextlib.contextmanager
def isolated(plugin: str) -> Iterator[None]:
    """Turns what ``plugin`` raises into one logged line, or into a PluginError when strict.

    The built-in plugin is never excused: its faults are ours.
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
        _faults.setdefault(plugin, []).append(line)
        log.warning("%s", line)


def strict() -> bool:
    return os.environ.get("LLAVACTL_STRICT_PLUGINS", "") not in ("", "0")


@cache
def entry_points() -> tuple[metadata.EntryPoint, ...]:
    """The installed plugins that ``LLAVACTL_PLUGINS`` selects, in order of name."""
    found = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    chosen = os.environ.get("LLAVACTL_PLUGINS")
    if chosen is None:
        return tuple(found)
    names = {name.strip() for name in chosen.split(",") if name.strip()}
    for missing in sorted(names - {point.name for point in found}):
        with isolated(missing):
            raise PluginError(f"LLAVACTL_PLUGINS names {missing!r}, which is not installed")
    return tuple(point for point in found if point.name in names)


@cache
def manager() -> pluggy.PluginManager:
    """The one plugin manager: the built-in plugin first, then every installed one that loads."""
    made = pluggy.PluginManager("llavactl")
    made.add_hookspecs(hookspecs)
    made.register(builtins, BUILTIN)
    for point in entry_points():
        _load(made, point)
    return made


def _load(made: pluggy.PluginManager, point: metadata.EntryPoint) -> None:
    started = time.perf_counter()
    with isolated(point.value), stdout_to_stderr():
        if first := made.get_plugin(point.name):
            kept = "llavactl itself" if point.name == BUILTIN else getattr(first, "__name__", "?")
            raise PluginError(
                f"plugin name {point.name!r} is taken by {kept} and again by {point.value} "
                f"of package {_package(point)[0]}; the first is kept"
            )
        try:
            _register(made, point.load(), point.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # one may even call sys.exit at import
            raise PluginError(f"plugin {point.name} can't be loaded: {type(error).__name__}: {error}") from error
    if (took := time.perf_counter() - started) > SLOW_S:
        advice = "`register` takes module:attr strings, so that nothing heavy is imported at start-up"
        log.warning("plugin %s took %.1f s to import; %s", point.name, took, advice)


def _register(made: pluggy.PluginManager, module: Any, name: str) -> None:
    """All of the plugin's hooks or none: a wrong one is found while others are registered already."""
    try:
        made.register(module, name)
        made.check_pending()
    except Exception:
        if made.get_plugin(name) is module:
            made.unregister(module, name)
        raise


def implementations(hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Each plugin's implementation of ``hook``, by plugin name, built-in first then in order of name."""
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        yield implementation.plugin_name, _by_keyword(implementation)


def _by_keyword(implementation: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        return implementation.function(**{name: arguments[name] for name in implementation.argnames})

    return call


def notify(hook: str, **arguments: Any) -> None:
    """Calls an observer hook on every plugin; one that raises is a logged line and nothing more."""
    for plugin, implementation in implementations(hook):
        with isolated(plugin):
            implementation(**arguments)


def installed() -> list[Plugin]:
    """The built-in plugin and the selected ones, with what went wrong while loading and registering them."""
    from llavactl import __version__
    from llavactl.core.registry import registry

    registry()
    found = [Plugin(BUILTIN, "llavactl", __version__, "llavactl.core.builtins")]
    for point in entry_points():
        package, version = _package(point)
        faults = dict.fromkeys([*_faults.get(point.value, ()), *_faults.get(point.name, ())])
        found.append(Plugin(point.name, package, version, point.value, "; ".join(faults)))
    return found


def version_of(plugin: str) -> str:
    """The version of the package of ``plugin``; for the built-in plugin, the version of its components' results."""
    if plugin == BUILTIN:
        return builtins.NUMBERS
    return next((_package(point)[1] for point in entry_points() if point.name == plugin), "?")


def _package(point: metadata.EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def commands() -> dict[str, str]:
    """Names and summaries of the commands that plugins add, without importing plugins seen before.

    ``llavactl --help`` lists them. What a plugin registers is remembered by its module file's time and
    size, so a plugin that is slow to import makes the help slow once, not every time. Nothing is
    remembered while any plugin is at fault: its line is to be seen every time.
    """
    points = entry_points()
    if not points:
        return {}
    memory: Path | None = None
    with contextlib.suppress(LlavactlError, OSError, ValueError, KeyError, TypeError):
        memory = cache_dir() / "plugin-commands.json"
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        if remembered["key"] == _key(points):
            return dict(remembered["commands"])
    from llavactl.core.registry import registry

    entries = registry().entries.get("commands", {}).values()
    found = {entry.name: entry.summary for entry in entries if entry.plugin != BUILTIN}
    if memory is not None and not _faults:
        with contextlib.suppress(OSError, ValueError):
            write_json(memory, {"key": _key(points), "commands": found})
    return found


def _key(points: Sequence[metadata.EntryPoint]) -> list[Any]:
    from llavactl import __version__

    return [__version__, list(sys.version_info), *map(_stamp, points)]


def _stamp(point: metadata.EntryPoint) -> list[Any]:
    """Changes when the plugin's code may have changed; finds its module without importing it."""
    spec = importlib.util.find_spec(point.value.partition(":")[0].partition(".")[0])
    files = [Path(spec.origin)] if spec and spec.origin else []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files += sorted(Path(folder).rglob("*.py"))
    stats = [[file.stat().st_mtime_ns, file.stat().st_size] for file in files]
    return [point.name, point.value, stats]
