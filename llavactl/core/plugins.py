"""Loads plugins in isolation: a broken plugin is reported in one line on stderr and doesn't affect others.

Plugins are installed packages with an entry point, and single files (``core.plugin_points``). Output of a plugin during
import and registration goes to stderr. ``LLAVACTL_STRICT_PLUGINS=1`` turns warnings about plugins into errors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy

from llavactl.core import builtin_plugin, hookspecs, plugin_points, stopping
from llavactl.core.errors import PluginError
from llavactl.core.hook_rules import accepted, hook_problems, result_fault
from llavactl.core.plugin_code import Place, fault_text, location, raised_at, root_package, running_at
from llavactl.core.plugin_points import package_of, version_conflict
from llavactl.core.streams import stdout_to_stderr

log = logging.getLogger(__name__)

BUILTIN = plugin_points.BUILTIN
SLOW_S = 1.0
STALLED_S = 3.0


@dataclass(frozen=True)
class Plugin:
    """A selected plugin: its ``hooks``, the time of its import in seconds, and what failed while loading it.

    ``status`` is ``ok``, ``broken`` (see ``error``), or ``hangs`` if the import doesn't end.
    """

    name: str
    package: str
    version: str
    module: str
    hooks: tuple[str, ...] = ()
    import_s: float | None = None
    error: str = ""
    status: str = "ok"


_errors: dict[str, list[str]] = {}
"""Errors of plugins, one line each: by module while loading, later by plugin name."""

_returned = False
"""Whether the caller of ``installed`` reports the errors, so that each is printed once."""

_import_s: dict[str, float] = {}
"""Import times by module."""

_failures: Counter[tuple[str, str]] = Counter()
"""Failed calls of observers by plugin and hook; only the first is logged."""


@contextlib.contextmanager
def isolated(plugin: str, hook: str = "", *, once: bool = False, hint: str = "") -> Iterator[None]:
    """Logs any exception of ``plugin`` in one line; in strict mode, raises it as a PluginError.

    The line names the ``hook`` that was called and the plugin's line that failed, and ends with ``hint`` or that of a
    PluginError; with ``--verbose``, the traceback follows. With ``once``, only the first exception of a hook is logged
    (see ``log_failures``). Ctrl-C propagates, and the hook that was interrupted is logged; a KeyboardInterrupt that the
    plugin raises is an exception like others. Exceptions of the built-in plugin always propagate: they are bugs of
    llavactl.
    """
    try:
        yield
    except BaseException as error:
        closed = isinstance(error, GeneratorExit) and _raised_at(plugin, error) is None  # a generator around this block
        if plugin == BUILTIN or closed:
            raise
        if stopping.interrupted(error):
            if hook and _raised_at(plugin, error):
                log.warning("%s", "; ".join(filter(None, (fault(plugin, hook, error), hint))))
            raise
        known = error if isinstance(error, PluginError) else PluginError(fault(plugin, hook, error), hint=hint)
        one_line = PluginError(" ".join(known.message.split()), hint=" ".join(known.hint.split()))
        if strict():
            raise one_line from error
        line = one_line.with_hint()
        _failures[plugin, hook] += once
        if once and _failures[plugin, hook] > 1:
            return
        _errors.setdefault(plugin, []).append(line)
        level = logging.DEBUG if _returned else logging.WARNING
        log.log(level, "%s", line, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)


def fault(plugin: str, hook: str, error: BaseException) -> str:
    """The exception in one line: plugin, hook, file and line in the plugin's code."""
    place = _raised_at(plugin, error)
    where = f"{hook} ({place.where})" if hook and place else hook or (place.where if place else "")
    return ": ".join(filter(None, (f"plugin {plugin}", where, fault_text(error))))


def _raised_at(plugin: str, error: BaseException) -> Place | None:
    return raised_at(error, [root_package(point.value) for point in entry_points() if point.name == plugin])


def log_failures() -> None:
    """Logs how often observers failed that failed more than once, and resets the counts: called at the end of a run."""
    for (plugin, hook), count in sorted(_failures.items()):
        if count > 1:
            log.warning("plugin %s: %s failed %d times; only the first error is logged", plugin, hook, count)
    _failures.clear()


def any_failed() -> bool:
    """Whether any plugin has failed so far."""
    return bool(_errors)


def strict() -> bool:
    return os.environ.get("LLAVACTL_STRICT_PLUGINS", "") not in ("", "0")


@functools.cache
def entry_points() -> tuple[metadata.EntryPoint, ...]:
    """The selected plugins: installed packages sorted by name, then files; faults of the selection are logged."""
    selection = plugin_points.selected()
    for plugin, fault in selection.faults:
        with isolated(plugin):
            raise fault
    for left_out in selection.left_out:
        log.warning("%s", left_out)
    return selection.points


@functools.cache
def manager() -> pluggy.PluginManager:
    """The plugin manager, with the built-in plugin first, then all installed plugins that load."""
    plugin_manager = pluggy.PluginManager("llavactl")
    plugin_manager.add_hookspecs(hookspecs)
    plugin_manager.register(builtin_plugin, BUILTIN)
    for point in entry_points():
        _load(plugin_manager, point)
    return plugin_manager


def reload() -> None:
    """Makes the next use load all plugins again: after changes of the environment."""
    from llavactl.core.registry import registry

    _errors.clear()
    for cached in (entry_points, manager, registry):
        cached.cache_clear()


def _load(plugin_manager: pluggy.PluginManager, point: metadata.EntryPoint) -> None:
    log.debug("plugin %s: importing %s", point.name, point.value, extra={"importing": point.name})
    started = time.perf_counter()
    with isolated(point.value), stdout_to_stderr():
        if first := plugin_manager.get_plugin(point.name):
            owner = "llavactl" if point.name == BUILTIN else getattr(first, "__name__", "?")
            raise PluginError(
                f"plugin name {point.name!r} is used by {owner} and again by {point.value} "
                f"of package {package_of(point)[0]}; the first is kept",
                hint=plugin_points.removal(point),
            )
        try:
            with _stalled_import_logged(point.name):
                module = plugin_points.loaded(point)
                _import_s[point.value] = time.perf_counter() - started
            _register(plugin_manager, module, point.name)
        except BaseException as error:  # a plugin may call sys.exit at import
            if stopping.interrupted(error):
                log.warning("the import of plugin %s was interrupted; to skip it, %s", point.name, without(point.name))
                raise
            raise load_error(point, error) from error
    seconds = time.perf_counter() - started
    log.debug("plugin %s: imported %s in %.2f s", point.name, point.value, seconds)
    if seconds > SLOW_S:
        log.warning("plugin %s took %.1f s to import; %s", point.name, seconds, lighter(module))


def lighter(module: Any) -> str:
    """How to make the import of a plugin's ``module`` faster."""
    import llavactl

    if set(llavactl.__all__) <= getattr(module, "__dict__", {}).keys():
        return "replace `from llavactl import *`, which imports torch, by the names that it uses"
    return (
        "import heavy packages inside functions, or in modules of components: strings such as module:attr are imported "
        "on first use"
    )


def load_error(point: metadata.EntryPoint, error: BaseException) -> PluginError:
    """``error``, raised while a plugin was loaded, with its line and what to do about it."""
    what, remedy = plugin_points.load_fault(point, error)
    reason = "; ".join(filter(None, (what, version_conflict(point))))
    return PluginError(f"plugin {point.name} can't be loaded: {reason}", hint=f"{remedy}, or {without(point.name)}")


def without(plugin: str) -> str:
    """How to run without ``plugin``: the option to leave out or the variable to set."""
    return plugin_points.without(plugin, entry_points())


@contextlib.contextmanager
def _stalled_import_logged(plugin: str) -> Iterator[None]:
    """Logs one line if the import of ``plugin`` takes longer than ``STALLED_S``: it can't be stopped from here."""

    def warn() -> None:
        place = running_at([root_package(point.value) for point in entry_points() if point.name == plugin])
        text = "plugin %s is still being imported after %g s%s; to run without it, press Ctrl-C and %s"
        log.warning(text, plugin, STALLED_S, f", at {place.where}" if place else "", without(plugin))

    timer = threading.Timer(STALLED_S, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _register(plugin_manager: pluggy.PluginManager, module: Any, name: str) -> None:
    """Registers all hooks of a plugin, or none if one of them is invalid."""
    problems = hook_problems(plugin_manager, module)
    if not isinstance(version := getattr(module, "RESULTS_VERSION", ""), str):
        problems = [*problems, f"RESULTS_VERSION is {version!r:.60}, expected a string"]
    if problems:
        raise PluginError("; ".join(problems), hint="edit the plugin's module")
    with warnings.catch_warnings(record=True) as caught:  # of parameters that will be removed (``hookspecs``)
        warnings.simplefilter("always")
        plugin_manager.register(module, name)
    for each in caught:
        log.warning("plugin %s: %s:%d: %s", name, each.filename, each.lineno, each.message)


def implementations(hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The implementations of ``hook`` with their plugin names: built-in first, then sorted by name.

    Each accepts all arguments of the hook as keywords and passes on those that the plugin's function declares. It
    raises PluginError if the function returns another type than the hook.
    """
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        yield implementation.plugin_name, _by_keyword(implementation, hook)


def _by_keyword(implementation: Any, hook: str) -> Callable[..., Any]:
    from llavactl.core import plugin_options

    function, plugin = implementation.function, implementation.plugin_name

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        available = [*arguments, "options"] if "recipe" in arguments else list(arguments)
        values = {name: arguments[name] for name in accepted(function, available) if name in arguments}
        if "options" in accepted(function, available) and "options" not in values:
            sections = (arguments["recipe"] or {}).get("plugins", {})
            if plugin not in sections and plugin_options.missing_section(plugin):
                return None  # reported when the recipe was loaded
            values["options"] = plugin_options.parsed(plugin, sections.get(plugin, {}))
        result = function(**values)
        if why := result_fault(hook, result):
            raise PluginError(f"plugin {plugin}: {hook} ({location(function)}): {why}")
        return result

    return call


def notify(hook: str, **arguments: Any) -> None:
    """Calls an observer hook of all plugins; exceptions are logged, once per plugin and hook.

    ``arguments`` may include the resolved ``recipe``; an implementation that declares ``options`` gets its plugin's
    options from it. Each gets copies: what it changes in them affects nothing else.
    """
    for plugin, implementation in implementations(hook):
        with isolated(plugin, hook, once=True):
            implementation(**deepcopy(arguments))


def check_loaded(plugin: str) -> None:
    """Checks that a plugin of this name is loaded.

    Raises:
        PluginError: it is not installed, not selected or broken.
    """
    if manager().get_plugin(plugin) is None:
        names = {point.name for point in entry_points()}
        if plugin in names:
            raise PluginError(f"plugin {plugin} can't be loaded", hint=f"run `{check_command(plugin)}`")
        raise plugin_points.not_available(plugin, entry_points())


def check_command(plugin: str) -> str:
    """The command that tests the plugin of this name: a file is given by its path."""
    return plugin_points.check_command(plugin, entry_points())


def installed() -> list[Plugin]:
    """The built-in plugin and the selected ones, with errors from loading and registering them, which aren't logged."""
    from llavactl import __version__
    from llavactl.core.registry import registry

    global _returned
    _returned = True
    try:
        registry()
    finally:
        _returned = False
    hooks = {
        name: tuple(caller.name for caller in manager().get_hookcallers(plugin) or ())
        for name, plugin in manager().list_name_plugin()
    }
    plugins = [Plugin(BUILTIN, "llavactl", __version__, "llavactl.core.builtin_plugin", tuple(sorted(hooks[BUILTIN])))]
    for point in entry_points():
        package, version = package_of(point)
        errors = dict.fromkeys([*_errors.get(point.value, ()), *_errors.get(point.name, ())])
        loaded = tuple(sorted(hooks.get(point.name, ())))
        seconds, status = _import_s.get(point.value), "broken" if errors else "ok"
        plugins.append(Plugin(point.name, package, version, point.value, loaded, seconds, "; ".join(errors), status))
    return plugins


def version_of(plugin: str) -> str:
    """The ``RESULTS_VERSION`` of the plugin's module, which most releases don't change; else its package version."""
    declared: str | None = getattr(manager().get_plugin(plugin), "RESULTS_VERSION", None)
    return package_named(plugin)[1] if declared is None else declared


def package_named(plugin: str) -> tuple[str, str]:
    """The package of the plugin of this name and its version, ``?`` if they are unknown."""
    return next((package_of(point) for point in entry_points() if point.name == plugin), ("?", "?"))
