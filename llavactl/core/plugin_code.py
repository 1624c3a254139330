"""The code of plugins: their packages and files, and where in it an exception was raised."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import sys
import textwrap
import threading
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from llavactl.core.errors import LlavactlError
from llavactl.core.locations import shown_path

LONGEST_FAULT = 500
"""The maximum length of an exception in messages: those of pydantic and torch may list every field or weight."""


def root_package(target: str) -> str:
    """The top-level package of ``target``, a module or ``module:attr``."""
    return target.partition(":")[0].partition(".")[0]


def plugin_packages() -> dict[str, str]:
    """The plugins by top-level package: of their modules, and of what they register; without llavactl's own.

    A target in the standard library or in another distribution's package, such as torch, isn't the plugin's code.
    """
    from llavactl.core import plugins
    from llavactl.core.registry import registry

    packages = {root_package(point.value): point.name for point in plugins.entry_points()}
    for entry in registry():
        package = root_package(entry.target)
        if entry.plugin != plugins.BUILTIN and package not in packages and _provides(entry.plugin, package):
            packages[package] = entry.plugin
    packages.pop(root_package(__name__), None)
    return packages


def _provides(plugin: str, package: str) -> bool:
    """Whether the top-level ``package`` belongs to the distribution of ``plugin``, or to none."""
    from llavactl.core import plugins

    if package in sys.stdlib_module_names:
        return False
    others = distributions_of(package)
    return not others or plugins.package_named(plugin)[0] in others


def distributions_of(package: str) -> list[str]:
    """The names of the installed distributions with the top-level ``package``; reads all distributions once."""
    return _distributions().get(package, [])


_distributions = functools.cache(metadata.packages_distributions)


def plugin_of_module(module: str) -> str | None:
    """The plugin that ``module`` belongs to: of several in one package, the one whose module it is or is inside of."""
    from llavactl.core import plugins

    package = root_package(module)
    owner = plugin_packages().get(package)
    points = [point for point in plugins.entry_points() if root_package(point.value) == package]
    around = [point for point in points if f"{module}.".startswith(f"{point.module}.")]
    return max(around, key=lambda point: len(point.module)).name if len(points) > 1 and around else owner


def packages_of(plugin: str) -> list[str]:
    """The top-level packages of the code of ``plugin``, sorted."""
    owners = {root_package(__name__): root_package(__name__), **plugin_packages()}
    return sorted(package for package, owner in owners.items() if owner == plugin)


def package_files(package: str, pattern: str = "*") -> Iterator[tuple[str, Path]]:
    """The files of ``package`` with their names relative to the folder that contains it; nothing is imported.

    ``pattern`` selects files of a folder by name; a module that is a single file is that file.
    """
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        files = (file for file in sorted(folder.rglob(pattern)) if "__pycache__" not in file.parts and file.is_file())
        yield from ((file.relative_to(folder.parent).as_posix(), file) for file in files)
    if spec and spec.origin and not folders:
        yield Path(spec.origin).name, Path(spec.origin)


@dataclass(frozen=True)
class Place:
    """A line of code: its ``module``, its ``function``, and ``where`` it is, ``file:line``; ``frame`` if it runs."""

    module: str
    function: str
    where: str
    frame: FrameType | None = field(default=None, repr=False, compare=False)

    @property
    def package(self) -> str:
        return root_package(self.module)


def places(error: BaseException, packages: Collection[str]) -> list[Place]:
    """The frames of ``error`` in one of ``packages``, innermost last; a syntax error is in the last place."""
    found = [place for place in frame_places(error) if place.package in packages]
    for each in _chain(error):
        if isinstance(each, SyntaxError) and each.filename and Path(each.filename).is_file():
            where = f"{shown_path(Path(each.filename))}:{each.lineno}"
            found.append(Place(found[-1].module if found else "", "<module>", where))
    return found


def frame_places(error: BaseException) -> list[Place]:
    """The frames of ``error``, innermost last; frames of its causes are within its own."""
    return [_place(*each) for error in _chain(error) for each in traceback.walk_tb(error.__traceback__)]


def _chain(error: BaseException) -> list[BaseException]:
    """``error`` and its causes.

    A generator that raises StopIteration isn't in the traceback of the RuntimeError that replaces it.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _place(frame: FrameType, line: int) -> Place:
    where = f"{shown_path(Path(frame.f_code.co_filename))}:{line}"
    return Place(str(frame.f_globals.get("__name__")), frame.f_code.co_name, where, frame)


def raised_at(error: BaseException, packages: Collection[str]) -> Place | None:
    """The innermost place of ``error`` in one of ``packages``; None if it wasn't raised by their code."""
    return next(reversed(places(error, packages)), None)


def running_at(packages: Collection[str]) -> Place | None:
    """The innermost place of the main thread in one of ``packages``; None if it isn't in their code."""
    stack = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident or 0])
    found = (_place(frame, line) for frame, line in stack)
    return next((place for place in found if place.package in packages), None)


def located_fault(error: BaseException, packages: Collection[str]) -> str:
    """``file:line: Type: message`` of ``error``; without the location if no frame is in ``packages``."""
    place = raised_at(error, packages)
    return f"{place.where}: {fault_text(error)}" if place else fault_text(error)


def fault_text(error: BaseException) -> str:
    """``Type: message`` of ``error``, shortened; llavactl's own errors are their message and hint."""
    if isinstance(error, LlavactlError):
        return error.with_hint()
    try:
        message = str(error)
    except Exception as other:  # noqa: BLE001 - a plugin's exception may raise another one
        message = f"(its message raises {type(other).__name__})"
    text = f"{type(error).__name__}: {message}".removesuffix(": ")
    return text if len(text) <= LONGEST_FAULT else f"{text[:LONGEST_FAULT]}…"


def caller_location() -> str:
    """``file:line`` of the call of the function that calls this one."""
    frame = sys._getframe(2)
    return f"{shown_path(Path(frame.f_code.co_filename))}:{frame.f_lineno}"


def attribute_location(cls: type, name: str) -> str:
    """``file:line`` where the body of ``cls``, or of a class it inherits from, annotates ``name``; "" if unknown."""
    for each in cls.__mro__:
        if name not in vars(each).get("__annotations__", {}):
            continue
        try:
            file, (lines, first) = inspect.getfile(each), inspect.getsourcelines(each)
            (body,) = ast.parse(textwrap.dedent("".join(lines))).body
        except (OSError, TypeError, ValueError, SyntaxError):  # made by a function, or without source
            return ""
        for node in body.body if isinstance(body, ast.ClassDef) else ():
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
                return f"{shown_path(Path(file))}:{first + node.lineno - 1}"
    return ""


def location(function: Any) -> str:
    """``file:line`` of the definition of ``function``, which may be a class; "" if it isn't written in Python."""
    if inspect.isclass(function):
        with contextlib.suppress(OSError, TypeError):
            return f"{shown_path(Path(inspect.getfile(function)))}:{inspect.getsourcelines(function)[1]}"
        return ""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{shown_path(Path(code.co_filename))}:{code.co_firstlineno}" if code else ""
