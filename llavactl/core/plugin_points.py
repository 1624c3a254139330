"""The entry points of plugins: which are selected, their packages, and how to run without one of them.

``LLAVACTL_PLUGINS`` selects installed packages and single files (``core.plugin_files``) by name (comma-separated;
empty: none; unset: all).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from llavactl.core import plugin_files
from llavactl.core.errors import PluginError
from llavactl.core.locations import shown_path
from llavactl.core.plugin_code import Place, located_fault, raised_at, root_package
from llavactl.core.suggest import suggest

GROUP = "llavactl"
BUILTIN = "llavactl"
SELECTION = "LLAVACTL_PLUGINS"
_ENTRY_POINT = f"correct the entry point (group {GROUP}) in the package's pyproject.toml, and install it again"
_PIP = f"{sys.executable} -m pip install"


_excluded: set[tuple[str, str]] = set()
"""The names and modules of plugins that this process can't import."""


@dataclass(frozen=True)
class SelectedPlugins:
    """The selected plugins: installed packages sorted by name, then files.

    ``faults``: names or files that can't be selected, with the reason; ``left_out``: files that are not selected.
    """

    points: tuple[metadata.EntryPoint, ...]
    faults: tuple[tuple[str, PluginError], ...] = ()
    left_out: tuple[str, ...] = ()


def selected() -> SelectedPlugins:
    """The selection of this process's environment."""
    points = sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    faults: list[tuple[str, PluginError]] = []
    for file in plugin_files.listed():
        try:
            points.append(plugin_files.entry_point(file, GROUP))
        except PluginError as error:
            faults.append((str(file), error))
    points = [point for point in points if (point.name, point.value) not in _excluded]
    selection = os.environ.get(SELECTION)
    if selection is None:
        return SelectedPlugins(tuple(points), tuple(faults))
    names = {name.strip() for name in selection.split(",") if name.strip()}
    known = {BUILTIN, *(point.name for point in points), *(name for name, _ in _excluded)}
    for missing in sorted(names - known):
        hint = f"install it, or remove it from {SELECTION}; {suggest(missing, known - {BUILTIN})}".removesuffix("; ")
        faults.append((missing, PluginError(f"{SELECTION}: plugin {missing!r} is not installed", hint=hint)))
    left_out = (
        f"plugin {point.name} is not loaded: {SELECTION} doesn't select it; "
        f"{_selecting(sorted({*names, point.name}))}, or unset it"
        for point in points
        if plugin_files.is_file(point) and point.name not in names
    )
    return SelectedPlugins(tuple(point for point in points if point.name in names), tuple(faults), tuple(left_out))


@contextlib.contextmanager
def excluded(points: Iterable[metadata.EntryPoint]) -> Iterator[None]:
    """Within the context, ``points`` aren't selected; others of the same name are. ``plugins.reload`` applies it."""
    _excluded.update((point.name, point.value) for point in points)
    try:
        yield
    finally:
        _excluded.clear()


def package_of(point: metadata.EntryPoint) -> tuple[str, str]:
    """The package of a plugin and its version; for a file, its path and a hash of its contents."""
    if file := plugin_files.file_of(point):
        return shown_path(file), plugin_files.version(file)
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def version_conflict(point: metadata.EntryPoint) -> str:
    """The versions of llavactl that a plugin's package requires, if this one isn't among them; otherwise ""."""
    from packaging.requirements import InvalidRequirement, Requirement

    from llavactl import __version__

    package, version = package_of(point)
    for text in (point.dist.requires if point.dist else None) or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # pip refuses to install such a package
            continue
        required = requirement.name == "llavactl" and not (requirement.marker and not requirement.marker.evaluate())
        if required and not requirement.specifier.contains(__version__, prereleases=True):
            return f"{package} {version} requires {requirement}, installed is {__version__}"
    return ""


def loaded(point: metadata.EntryPoint) -> Any:
    """The module, or the object in one, that ``point`` names.

    Raises:
        PluginError: it names none.
    """
    if plugin_files.is_file(point):  # its name need not be an identifier
        return importlib.import_module(point.value)
    names = f"entry point {point.name} of {package_of(point)[0]}"
    match = point.pattern.match(point.value)
    if match is None:
        raise PluginError(f"{names}: expected a module, got {point.value!r}", hint=_ENTRY_POINT)
    target = importlib.import_module(match["module"])
    for attribute in filter(None, (match["attr"] or "").split(".")):
        if not hasattr(target, attribute):
            raise PluginError(f"{names}: {point.value} has no {attribute!r}", hint=_ENTRY_POINT)
        target = getattr(target, attribute)
    return target


def check_command(plugin: str, points: Iterable[metadata.EntryPoint]) -> str:
    """The command that tests a plugin, one of the selected ``points``: a file is given by its path."""
    file = _file(plugin, points)
    return f"llavactl plugins check {shown_path(file) if file else plugin}"


def without(plugin: str, points: Iterable[metadata.EntryPoint]) -> str:
    """How to run without a plugin, one of the selected ``points``: the option to leave out or the variable to set."""
    if file := _file(plugin, points):
        return f"leave out --plugin {shown_path(file)}"
    return _selecting(point.name for point in points if point.name != plugin)


def _selecting(names: Iterable[str]) -> str:
    """How to select the plugins ``names`` in a shell."""
    value = ",".join(dict.fromkeys(names))
    return f"set {SELECTION}={shlex.quote(value) if value else ''}"


def _file(plugin: str, points: Iterable[metadata.EntryPoint]) -> Path | None:
    return next(filter(None, (plugin_files.file_of(point) for point in points if point.name == plugin)), None)


def removal(point: metadata.EntryPoint) -> str:
    """How to remove a plugin whose name is taken."""
    if file := plugin_files.file_of(point):
        return f"rename {shown_path(file)}"
    return f"run `{sys.executable} -m pip uninstall {package_of(point)[0]}`, or change the name of its entry point"


def not_available(plugin: str, points: Iterable[metadata.EntryPoint]) -> PluginError:
    """The error for a ``plugin`` that isn't one of the selected ``points``."""
    names = {point.name for point in points}
    if plugin in metadata.entry_points(group=GROUP).names:
        hint = _selecting(sorted({*names, plugin}))
        return PluginError(f"plugin {plugin} is not selected by {SELECTION}", hint=hint)
    if plugin and Path(plugin).is_dir():
        hint = f"pass a file FILE.py, or run `{_PIP} -e {plugin}` and pass the name of the plugin"
        return PluginError(f"{plugin} is a folder, not a plugin", hint=hint)
    if plugin and Path(plugin).is_file():
        return PluginError(f"{plugin} is not a Python file", hint="pass the name of a plugin, or a file FILE.py")
    if _is_installed(plugin):
        hint = f"pass the name of a plugin, or a file FILE.py; {suggest(plugin, names)}".removesuffix("; ")
        return PluginError(f"package {plugin} has no plugin: no entry point of the group {GROUP}", hint=hint)
    hint = f"install its package, or pass a file FILE.py; {suggest(plugin, names)}".removesuffix("; ")
    return PluginError(f"plugin {plugin or repr(plugin)} is not installed", hint=hint)


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except (metadata.PackageNotFoundError, ValueError):  # ValueError: not a name
        return False
    return True


def load_fault(point: metadata.EntryPoint, error: BaseException) -> tuple[str, str]:
    """``error``, raised while a plugin was loaded, in one line with its place, and what to do about it."""
    packages = [root_package(point.value)]
    what = error.message if isinstance(error, PluginError) else located_fault(error, packages)
    return what, _remedy(point, error, raised_at(error, packages))


def _remedy(point: metadata.EntryPoint, error: BaseException, place: Place | None) -> str:
    package = package_of(point)[0]
    if version_conflict(point):
        return f"run `{_PIP} --upgrade {package}`"
    missing = root_package(error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if missing and missing == root_package(point.value) and place is None:
        return f"run `{_PIP} --force-reinstall {package}`"
    if missing and missing not in (root_package(point.value), root_package(__name__)):
        return f"run `{_PIP} {missing}`"
    if isinstance(error, PluginError) and error.hint:
        return error.hint
    return "edit that line" if place else f"report this to the authors of {package}"
