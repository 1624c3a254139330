"""``llavactl plugins``: lists the installed plugins and certifies one."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata

from llavactl import __version__
from llavactl.core import plugins
from llavactl.core.errors import RecipeError
from llavactl.core.plugin_code import package_files, packages_of
from llavactl.core.plugin_points import excluded, package_of
from llavactl.core.plugin_probe import IMPORT_TIMEOUT_S, Import, import_in_process
from llavactl.testing.plugin_check import Check, plugin_checks

_LIBRARIES = ("torch", "transformers", "pydantic", "pluggy", "numpy")


@dataclass(frozen=True)
class Certificate:
    """The result of ``plugins check``: versions, the sha256 of each file of the plugin, and all checks."""

    plugin: str
    package: str
    version: str
    llavactl: str
    python: str
    versions: dict[str, str]
    files: dict[str, str]
    checks: tuple[Check, ...]
    ok: bool


def list_plugins(timeout_s: float = IMPORT_TIMEOUT_S) -> list[plugins.Plugin]:
    """The built-in plugin and the selected ones, each imported in its own process first.

    A plugin whose import doesn't end within ``timeout_s`` seconds has the status ``hangs``. It is not imported in this
    process, and neither is one whose import ends the process.
    """
    points = plugins.entry_points()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        imports = list(pool.map(lambda point: import_in_process(point, timeout_s), points))
    unusable = [point for point, imported in zip(points, imports, strict=True) if imported.seconds is None]
    with _without(unusable):
        builtin, *others = plugins.installed()
    loaded = {(plugin.name, plugin.module): plugin for plugin in others}
    return [builtin, *(_listed(*each, loaded) for each in zip(points, imports, strict=True))]


def _listed(
    point: metadata.EntryPoint, imported: Import, loaded: dict[tuple[str, str], plugins.Plugin]
) -> plugins.Plugin:
    plugin = loaded.get((point.name, point.value))
    if plugin is None:
        package, version = package_of(point)
        plugin = plugins.Plugin(point.name, package, version, point.value)
        ways = f"{imported.remedy}, or {plugins.without(point.name)}"
        error = f"plugin {point.name} can't be loaded: {imported.error}; {ways}"
        return replace(plugin, error=error, status="hangs" if imported.hangs else "broken")
    return replace(plugin, import_s=imported.seconds)


@contextmanager
def _without(points: Sequence[metadata.EntryPoint]) -> Iterator[None]:
    """Leaves out the plugins ``points`` within the context; others of the same name stay."""
    if not points:
        yield
        return
    try:
        with excluded(points):
            plugins.reload()
            yield
    finally:
        plugins.reload()


def check(name: str, overrides: Sequence[str] = (), timeout_s: float = IMPORT_TIMEOUT_S) -> Certificate:
    """Checks the plugin ``name``, also given as its package or as a file that was added to the plugins.

    ``overrides`` are options of its components, ``component.key=value``. ``timeout_s`` limits the import of its module.

    Raises:
        RecipeError: an override can't be parsed.
    """
    from llavactl.recipe.resolve import overridden

    options, problems = overridden(overrides)
    if problems:
        raise RecipeError.from_problems(problems)
    name = next((point.name for point in plugins.entry_points() if name in package_of(point)[:1]), name)
    checks = tuple(plugin_checks(name, options.plain(), timeout_s))
    hangs = checks[0].check == "import" and checks[0].ok is False
    package, version = ("llavactl", __version__) if name == plugins.BUILTIN else plugins.package_named(name)
    return Certificate(
        plugin=name,
        package=package,
        version=version,
        llavactl=__version__,
        python=platform.python_version(),
        versions={library: metadata.version(library) for library in _LIBRARIES},
        files={} if hangs else _hashes(name),
        checks=checks,
        ok=all(each.ok is not False for each in checks),
    )


def _hashes(name: str) -> dict[str, str]:
    """The sha256 of each file of the packages of the plugin ``name``."""
    files = (each for package in packages_of(name) for each in package_files(package))
    return {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in files}
