"""Single files as plugins, without packaging: ``llavactl --plugin ./my.py``.

The paths are in the environment variable ``LLAVACTL_PLUGIN_FILES``, so that child processes load the same plugins. The
name of the plugin and of its module is the file's name without ``.py``; nothing else in its folder becomes importable.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from llavactl.core.errors import PluginError

VARIABLE = "LLAVACTL_PLUGIN_FILES"

_modules: dict[str, Path] = {}
"""Files by the names of their modules."""


def add(files: Iterable[Path]) -> None:
    """Adds ``files`` to those of this process and its future child processes."""
    paths = dict.fromkeys([*listed(), *(file.absolute() for file in files)])
    os.environ[VARIABLE] = os.pathsep.join(map(str, paths))


def listed() -> list[Path]:
    """The files in ``LLAVACTL_PLUGIN_FILES``."""
    return [Path(path).absolute() for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def entry_point(file: Path, group: str) -> metadata.EntryPoint:
    """The entry point of the plugin ``file``; its module can be imported afterwards.

    Raises:
        PluginError: the file doesn't exist, or its name can't be used.
    """
    name = file.stem
    if file.suffix != ".py" or not re.fullmatch(r"[\w-]+", name):
        hint = "rename it: letters, digits, `_` and `-`, then .py"
        raise PluginError(f"plugin file {file}: its name can't be that of a module", hint=hint)
    if not file.is_file():
        raise PluginError(f"plugin file {file} not found", hint=f"leave out --plugin, or correct {VARIABLE}")
    if _modules.get(name) != file:
        spec = _spec_of_other(name)
        origin = spec.origin if spec is not None else None
        if spec is not None and not (origin and Path(origin).absolute() == file):
            raise PluginError(f"plugin file {file}: module {name} exists already ({origin})", hint="rename the file")
        if _FileFinder not in sys.meta_path:
            sys.meta_path.append(_FileFinder)
        if name in _modules:  # of another file with this name, in an earlier command of this process
            sys.modules.pop(name, None)
        _modules[name] = file
    return metadata.EntryPoint(name, name, group)


def _spec_of_other(name: str) -> ModuleSpec | None:
    """The spec of an importable module ``name``, other than a plugin file."""
    for finder in sys.meta_path:
        if finder is not _FileFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec if spec.origin else None  # without origin: a folder that isn't a package
    return None


class _FileFinder:
    """Imports plugin files by name, after all other modules."""

    @classmethod
    def find_spec(
        cls, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, _modules[name]) if name in _modules else None


def file_of(point: metadata.EntryPoint) -> Path | None:
    """The file of a plugin that is one, else None."""
    return None if point.dist else _modules.get(point.value)


def is_file(point: metadata.EntryPoint) -> bool:
    """Whether ``point`` is a plugin file."""
    return file_of(point) is not None


def version(file: Path) -> str:
    """A hash of the contents, so that results of a changed file are computed again; ``?`` if it can't be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    except OSError:
        return "?"
