"""The rules of hook implementations, checked when a plugin is loaded, and locations in the code of plugins."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pluggy

from llavactl.core.errors import LlavactlError
from llavactl.core.locations import shown_path
from llavactl.core.suggest import suggest

MARK = "llavactl_impl"
"""The attribute that ``hookimpl`` sets."""

LONGEST_FAULT = 500
"""The maximum length of an exception in messages: those of pydantic and torch may list every field or weight."""

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def hook_problems(manager: pluggy.PluginManager, module: Any) -> list[str]:
    """What is wrong with the hook implementations in ``module``, one line each with file and line."""
    specs = {name: caller.spec for name, caller in vars(manager.hook).items() if getattr(caller, "spec", None)}
    problems = []
    for name, function, settings in implementations_in(module):
        hook = settings.get("specname") or name
        why = ""
        if hook not in specs:
            why = "" if settings.get("optionalhook") else f"unknown hook; {suggest(hook, specs)}"
        elif not inspect.isroutine(function):
            why = f"expected a function, got {type(function).__name__}"
        elif inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            why = "the body of a generator or async function never runs; write a plain function"
        else:
            why = _signature_problem(function, specs[hook].argnames)
        if why:
            problems.append(f"{hook} ({location(function)}): {why}")
    return problems


def implementations_in(module: Any) -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Name, function and settings of everything in ``module`` that is decorated with ``hookimpl``."""
    for name in dir(module):
        value = inspect.getattr_static(module, name)
        function = getattr(module, name) if isinstance(value, staticmethod | classmethod) else value
        settings = getattr(function, MARK, None)
        if isinstance(settings, dict):
            yield name, getattr(module, name), settings


def _signature_problem(function: Callable[..., Any], declared: Collection[str]) -> str:
    """Why ``function`` can't be called with keyword arguments of the names ``declared``; "" if it can."""
    for each in inspect.signature(function).parameters.values():
        required = each.default is inspect.Parameter.empty and each.kind not in VARIADIC
        if required and each.name not in declared:
            expected = f"available: {', '.join(declared)}" if declared else "the hook has no parameters"
            return f"unknown parameter {each.name!r}; {expected}"
        if required and each.kind is inspect.Parameter.POSITIONAL_ONLY:
            return f"parameter {each.name!r} is positional-only; arguments are passed by name"
    return ""


def accepted(function: Callable[..., Any], available: Collection[str]) -> list[str]:
    """The names in ``available`` that ``function`` takes as parameters; all of them if it has ``**kwargs``."""
    parameters = inspect.signature(function).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return list(available)
    return [name for name in available if name in parameters]


def location(function: Any) -> str:
    """``file:line`` of the definition of ``function``; "" without one."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{shown_path(Path(code.co_filename))}:{code.co_firstlineno}" if code else ""


def located_fault(error: BaseException, packages: Collection[str]) -> str:
    """``file:line: Type: message`` of ``error``; without the location if no frame is in ``packages``."""
    where = fault_location(error, packages)
    return f"{where}: {fault_text(error)}" if where else fault_text(error)


def fault_text(error: BaseException) -> str:
    """``Type: message`` of ``error``, shortened; llavactl's own errors are their message."""
    if isinstance(error, LlavactlError):
        return error.message
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return text if len(text) <= LONGEST_FAULT else f"{text[:LONGEST_FAULT]}…"


def fault_location(error: BaseException, packages: Collection[str]) -> str:
    """``file:line`` of the innermost frame of ``error`` in one of ``packages``; "" if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown_path(Path(error.filename))}:{error.lineno}"
    places = frames_in(error, packages)
    return frame_location(*places[-1]) if places else ""


def frames_in(error: BaseException, packages: Collection[str]) -> list[tuple[FrameType, int]]:
    """The frames of ``error`` in the code of ``packages`` with their lines, from the outermost; else of its cause.

    Python converts a StopIteration in a generator to a RuntimeError, whose traceback doesn't have the generator.
    """
    frames = traceback.walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in frames if package_of(frame) in packages]
    return own or (frames_in(error.__cause__, packages) if error.__cause__ else [])


def package_of(frame: FrameType) -> str:
    """The top-level package of the module whose code ``frame`` runs."""
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def frame_location(frame: FrameType, line: int) -> str:
    """``file:line`` of ``line`` in the code of ``frame``."""
    return f"{shown_path(Path(frame.f_code.co_filename))}:{line}"


def function_name(frame: FrameType) -> str:
    """The function that ``frame`` runs: of lambdas and comprehensions, the function around them; "" outside of one."""
    names = (name for name in reversed(frame.f_code.co_qualname.split(".")) if not name.startswith("<"))
    return next(names, "")
