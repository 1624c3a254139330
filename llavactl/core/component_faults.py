"""What is wrong with a registered target, or with the component that it returns."""

from __future__ import annotations

import inspect

from llavactl.core.protocols import ALTERNATIVES, CAPABILITIES, KINDS
from llavactl.core.protocols.members import call_fault, members, missing_members, value_fault
from llavactl.core.words import article


def target_fault(target: object) -> str:
    """Why ``target`` can't be called with options as its only argument; "" if it can."""
    if not callable(target):
        return f"is not callable: {target!r:.60}"
    try:
        inspect.signature(target).bind(None)
    except TypeError as error:
        return f"doesn't accept the options as its only argument: {error}"
    except ValueError:  # without a signature, such as a built-in function
        return ""
    return ""


_MEMBER_CHECKS = (call_fault, value_fault)


def component_fault(kind: str, component: object) -> str:
    """What ``component`` is and lacks, if it isn't a component of ``kind``; "" if it is.

    Methods that can't be called as the Protocols declare, and attributes of other types, are faults, too.
    """
    expected = KINDS[kind]
    alternative = ALTERNATIVES.get(expected, expected)
    if isinstance(component, (expected, alternative)):
        implemented = (each for each in (expected, alternative, *CAPABILITIES[kind]) if isinstance(component, each))
        checks = ((check, name, each) for each in implemented for name in members(each) for check in _MEMBER_CHECKS)
        faults = (check(component, name, each) for check, name, each in checks)
        return next((f"{type(component).__name__} with {fault}" for fault in faults if fault), "")
    missing = min((missing_members(component, each) for each in (expected, alternative)), key=len)
    lacks = f" (no {', '.join(missing)})" if missing and component is not None else ""
    return f"{type(component).__name__}, expected {article(expected.__name__)}{lacks}"
