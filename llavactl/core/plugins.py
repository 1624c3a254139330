"""Loads plugins in isolation: a broken plugin is reported in one line on stderr and doesn't affect others.

Plugins are installed packages with an entry point, and single files (``core.plugin_files``). Output of a plugin during
import and registration goes to stderr. ``LLAVACTL_PLUGINS`` selects both by name (comma-separated; empty: none; unset:
all). ``LLAVACTL_STRICT_PLUGINS=1`` turns warnings about plugins into errors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from llavactl.core import builtin_plugin, hookspecs, plugin_files
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.hook_rules import accepted, hook_problems
from llavactl.core.locations import shown_path
from llavactl.core.plugin_code import fault_text, located_fault, raised_at, root_package
from llavactl.core.streams import stdout_to_stderr
from llavactl.core.suggest import suggest

if TYPE_CHECKING:
    from pydantic import BaseModel

log = logging.getLogger(__name__)

GROUP = "llavactl"
BUILTIN = "llavactl"
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

_import_s: dict[str, float] = {}
"""Import times by module."""

_failures: Counter[tuple[str, str]] = Counter()
"""Failed calls of observers by plugin and hook; only the first is logged."""


@contextlib.contextmanager
def isolated(plugin: str, hook: str = "", *, once: bool = False) -> Iterator[None]:
    """Logs any exception of ``plugin`` in one line; in strict mode, raises it as a PluginError.

    The line names the ``hook`` that was called and the plugin's line that failed; with ``--verbose``, the traceback
    follows. With ``once``, only the first exception of a hook is logged (see ``log_failures``). Exceptions of the
    built-in plugin always propagate: they are bugs of llavactl.
    """
    try:
        yield
    except BaseException as error:
        if plugin == BUILTIN or isinstance(error, KeyboardInterrupt | GeneratorExit):
            raise
        message = str(error) if isinstance(error, PluginError) else _fault(plugin, hook, error)
        line = " ".join(message.split())
        if strict():
            raise PluginError(line) from error
        _failures[plugin, hook] += once
        if once and _failures[plugin, hook] > 1:
            return
        _errors.setdefault(plugin, []).append(line)
        log.warning("%s", line, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)


def _fault(plugin: str, hook: str, error: BaseException) -> str:
    """The exception in one line: plugin, hook, file and line in the plugin's code."""
    place = raised_at(error, [root_package(point.value) for point in entry_points() if point.name == plugin])
    where = f"{hook} ({place.where})" if hook and place else hook or (place.where if place else "")
    return ": ".join(filter(None, (f"plugin {plugin}", where, fault_text(error))))


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


@cache
def entry_points() -> tuple[metadata.EntryPoint, ...]:
    """The plugins selected by ``LLAVACTL_PLUGINS``: installed packages sorted by name, then files."""
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    for file in plugin_files.listed():
        with isolated(str(file)):
            points.append(plugin_files.entry_point(file, GROUP))
    selection = os.environ.get("LLAVACTL_PLUGINS")
    if selection is None:
        return tuple(points)
    names = {name.strip() for name in selection.split(",") if name.strip()}
    for missing in sorted(names - {BUILTIN, *(point.name for point in points)}):
        with isolated(missing):
            raise PluginError(f"LLAVACTL_PLUGINS: plugin {missing!r} is not installed")
    for left_out in (point for point in points if plugin_files.is_file(point) and point.name not in names):
        log.warning("plugin %s is not loaded: LLAVACTL_PLUGINS doesn't select it", left_out.name)
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
                f"of package {package_of(point)[0]}; the first is kept"
            )
        try:
            with _stalled_import_logged(point.name):
                module = point.load()
                _import_s[point.value] = time.perf_counter() - started
            _register(plugin_manager, module, point.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may call sys.exit at import
            fault = located_fault(error, [root_package(point.value)])
            reason = "; ".join(filter(None, (fault, version_conflict(point))))
            raise PluginError(f"plugin {point.name} can't be loaded: {reason}") from error
    seconds = time.perf_counter() - started
    log.debug("plugin %s: imported %s in %.2f s", point.name, point.value, seconds)
    if seconds > SLOW_S:
        advice = "pass module:attr strings to `register`, so that components are imported on first use"
        log.warning("plugin %s took %.1f s to import; %s", point.name, seconds, advice)


@contextlib.contextmanager
def _stalled_import_logged(plugin: str) -> Iterator[None]:
    """Logs one line if the import of ``plugin`` takes longer than ``STALLED_S``: it can't be stopped from here."""
    others = ",".join(point.name for point in entry_points() if point.name != plugin)
    text = "plugin %s is still being imported after %g s; to run without it, press Ctrl-C and set LLAVACTL_PLUGINS=%s"
    timer = threading.Timer(STALLED_S, log.warning, (text, plugin, STALLED_S, others))
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
        raise PluginError("; ".join(problems))
    with warnings.catch_warnings(record=True) as caught:  # of parameters that will be removed (``hookspecs``)
        warnings.simplefilter("always")
        plugin_manager.register(module, name)
    for each in caught:
        log.warning("plugin %s: %s:%d: %s", name, each.filename, each.lineno, each.message)


def implementations(hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The implementations of ``hook`` with their plugin names: built-in first, then sorted by name.

    Each accepts all arguments of the hook as keywords and passes on those that the plugin's function declares.
    """
    for implementation in getattr(manager().hook, hook).get_hookimpls():
        yield implementation.plugin_name, _by_keyword(implementation)


def _by_keyword(implementation: Any) -> Callable[..., Any]:
    function = implementation.function

    def call(**arguments: Any) -> Any:
        available = [*arguments, "options"] if "recipe" in arguments else list(arguments)
        values = {name: arguments[name] for name in accepted(function, available) if name in arguments}
        if "options" in accepted(function, available) and "options" not in values:
            sections = (arguments["recipe"] or {}).get("plugins", {})
            plugin = implementation.plugin_name
            values["options"] = parse_options(plugin, sections.get(plugin, {}))
        return function(**values)

    return call


def notify(hook: str, **arguments: Any) -> None:
    """Calls an observer hook of all plugins; exceptions are logged, once per plugin and hook.

    ``arguments`` may include the resolved ``recipe``; an implementation that declares ``options`` gets its plugin's
    options from it.
    """
    for plugin, implementation in implementations(hook):
        with isolated(plugin, hook, once=True):
            implementation(**arguments)


def check_loaded(plugin: str) -> None:
    """Checks that a plugin of this name is loaded.

    Raises:
        PluginError: it is not installed, not selected or broken.
    """
    if manager().get_plugin(plugin) is None:
        names = {point.name for point in entry_points()}
        if plugin in names:
            raise PluginError(f"plugin {plugin} can't be loaded", hint=f"run `{check_command(plugin)}`")
        why = "is not selected by LLAVACTL_PLUGINS" if "LLAVACTL_PLUGINS" in os.environ else "is not installed"
        raise PluginError(f"plugin {plugin} {why}", hint=suggest(plugin, names))


def options_model(plugin: str) -> type[BaseModel] | None:
    """The model of the options in a recipe's section ``plugins`` that ``plugin`` declares (hook ``plugin_options``).

    Raises:
        PluginError: it can't be imported or is not an options model.
    """
    from llavactl.core.registry import Options, import_target

    for name, implementation in implementations("plugin_options"):
        if name == plugin:
            with raised_as_plugin_error(plugin, "plugin_options"):
                target = implementation()
                model = None if target is None else import_target(target)
            if model is None:
                continue
            if not (isinstance(model, type) and issubclass(model, Options)):
                raise PluginError(f"plugin {plugin}: plugin_options: {target} is not a subclass of llavactl.Options")
            return model
    return None


@contextlib.contextmanager
def raised_as_plugin_error(plugin: str, hook: str) -> Iterator[None]:
    """Raises any exception of the plugin's ``hook`` as a PluginError with its location."""
    try:
        yield
    except (LlavactlError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(_fault(plugin, hook, error)) from error


def parse_options(plugin: str, section: Mapping[str, Any]) -> BaseModel | None:
    """The validated options in ``section``, with defaults; None if ``plugin`` declares no options.

    Raises:
        ValidationError: an unknown key or an invalid value.
        PluginError: the options model can't be imported.
    """
    model = options_model(plugin)
    return None if model is None else model.model_validate(dict(section))


def installed() -> list[Plugin]:
    """The built-in plugin and the selected ones, with errors from loading and registering them."""
    from llavactl import __version__
    from llavactl.core.registry import registry

    registry()
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


def package_of(point: metadata.EntryPoint) -> tuple[str, str]:
    """The package of a plugin and its version; for a file, its path and a hash of its contents."""
    if file := plugin_files.file_of(point):
        return shown_path(file), plugin_files.version(file)
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def check_command(plugin: str) -> str:
    """The command that tests the plugin of this name: a file is given by its path."""
    files = (plugin_files.file_of(point) for point in entry_points() if point.name == plugin)
    file = next(filter(None, files), None)
    return f"llavactl plugins check {shown_path(file) if file else plugin}"


def version_conflict(point: metadata.EntryPoint) -> str:
    """The versions of llavactl that a plugin's package requires, if this one isn't among them; otherwise ""."""
    from packaging.requirements import Requirement

    from llavactl import __version__

    package, version = package_of(point)
    for text in (point.dist.requires if point.dist else None) or ():
        requirement = Requirement(text)
        required = requirement.name == "llavactl" and not (requirement.marker and not requirement.marker.evaluate())
        if required and not requirement.specifier.contains(__version__, prereleases=True):
            return f"{package} {version} requires {requirement}, installed is {__version__}"
    return ""
