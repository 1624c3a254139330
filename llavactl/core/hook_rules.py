"""The rules of hook implementations, checked when a plugin is loaded."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import pluggy

from llavactl.core.errors import Problem
from llavactl.core.plugin_code import location
from llavactl.core.suggest import suggest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MARK = "llavactl_impl"
"""The attribute that ``hookimpl`` sets."""

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


def result_fault(hook: str, value: object) -> str:
    """Why ``value`` can't be the result of ``hook``; "" if it can. Hooks that return nothing may return anything.

    Of a class where a string is expected, the string that names it.
    """
    from pydantic import ValidationError

    hint, adapter = _result_type(hook)
    try:
        if hint is not types.NoneType:
            adapter.validate_python(value, strict=True)
    except ValidationError:
        named = isinstance(value, type) and str in get_args(hint)
        expected = f"module:attr, the string {target_of(value)!r}" if named else _type_text(hint)
        return f"returned {value!r:.80}, expected {expected}"
    return ""


def target_of(value: Any) -> str:
    """The class or function ``value`` as ``module:attr``."""
    return f"{value.__module__}:{value.__qualname__}"


@cache
def _result_type(hook: str) -> tuple[Any, TypeAdapter[Any]]:
    """The return type of ``hook``, and what validates it."""
    from pydantic import TypeAdapter

    from llavactl.core import hookspecs
    from llavactl.core.registry import Options

    names = {"Problem": Problem, "Options": Options}
    hint = get_type_hints(getattr(hookspecs, hook), localns=names)["return"]
    return hint, TypeAdapter(hint)


def _type_text(hint: Any) -> str:
    """``hint`` as it is written in code."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(map(_type_text, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return "None" if hint is types.NoneType else hint.__name__
    return re.sub(r"[\w.]+\.(?=\w)", "", str(hint))


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
