"""What all checks have in common: members of Protocols, shared capabilities, and exceptions as problems."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from llavactl.core import protocols
from llavactl.core.component_faults import component_fault
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.identity import examined_identity
from llavactl.core.plugin_code import fault_text, located_fault, places, plugin_packages, root_package
from llavactl.core.protocols import Checkable, Identifiable, check_component
from llavactl.core.protocols.members import call_fault, members, value_fault
from llavactl.core.protocols.returned import returned_fault

C = TypeVar("C")
P = ParamSpec("P")
Check = Callable[Concatenate[C, P], list[str]]

_OWN = ("llavactl.testing", "llavactl.core.registry")
"""Modules between a check and the component."""


def conformance_check(kind: str) -> Callable[[Check[C, P]], Check[C, P]]:
    """Decorates a check of components of ``kind``.

    The check runs if the component has the members of its Protocols, with their parameters, and if its identity, if it
    has one, can be used; ``check`` of a ``Checkable`` is called first. An exception is a problem: one line with the
    method and line where it was raised.
    """

    def decorate(check: Check[C, P]) -> Check[C, P]:
        @functools.wraps(check)
        def checked(component: C, /, *args: P.args, **options: P.kwargs) -> list[str]:
            try:
                if problems := member_problems(kind, component):
                    return problems
                if Checkable in protocols.CAPABILITIES[kind]:
                    check_component(component)
                why = examined_identity(component)[1] if isinstance(component, Identifiable) else ""
                problems = [why] if why else check(component, *args, **options)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
                problems = [describe_exception(error, component_packages(component))]
            return [" ".join(problem.split()) for problem in problems]

        return checked

    return decorate


def member_problems(kind: str, component: object) -> list[str]:
    """The members that ``component`` lacks of its kind's Protocol, and those that can't be used as declared."""
    if why := component_fault(kind, component):
        return [f"got {why}"]
    implemented = [
        each for each in (protocols.KINDS[kind], *protocols.CAPABILITIES[kind]) if isinstance(component, each)
    ]
    problems = (problem for protocol in implemented for problem in protocol_problems(component, protocol))
    return list(dict.fromkeys(problems))


def protocol_problems(component: object, protocol: type) -> Iterator[str]:
    """The members of ``component`` that aren't what ``protocol`` declares: a method with parameters, or a value."""
    for name in members(protocol):
        declared, member = inspect.getattr_static(protocol, name, None), getattr(component, name)
        if not inspect.isfunction(declared):
            if inspect.ismethod(member) and not isinstance(declared, property):
                yield f"{name} is a method, {protocol.__name__} declares an attribute"
            elif why := value_fault(component, name, protocol, evaluate=True):
                yield why
        elif not callable(member):
            yield f"{name} is not a method, got {member!r:.60}"
        elif why := call_fault(component, name, protocol):
            yield why


def describe_exception(error: BaseException, packages: Collection[str]) -> str:
    """``error`` in one line; one that isn't llavactl's, with the function of ``packages`` that was called and its line.

    The line is the innermost one in ``packages``, those of the plugin: it may be called by llavactl or by a library.
    """
    if isinstance(error, LlavactlError):  # the hint of a PluginError is to check the plugin
        return error.message if isinstance(error, PluginError) else error.with_hint()
    found = [place for place in places(error, packages) if not place.module.startswith(_OWN)]
    if not found or found[0].function.startswith("<"):  # "<module>": an import failed
        return located_fault(error, packages)
    return f"{found[0].function}() failed ({found[-1].where}): {fault_text(error)}"


def component_packages(component: object) -> set[str]:
    """The top-level packages with the code of ``component``: its own, and those of all plugins."""
    return {root_package(type(component).__module__), *plugin_packages()}


def wrong_type(what: str, value: object, expected: str) -> str:
    """The problem that ``what`` has another type than ``expected``."""
    return f"{what}: expected {expected}, got {type(value).__name__}"


def returned_problem(kind: str, method: str, value: object, *arguments: object, **keywords: object) -> str:
    """Why a component of ``kind`` may not return ``value`` from ``method`` for the arguments; "" if it may."""
    why = returned_fault(kind, method, value, *arguments, **keywords)
    return f"{method}() {why}" if why else ""
