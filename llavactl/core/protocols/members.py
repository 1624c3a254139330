"""What a Protocol declares, what an object lacks of it, and which of its members differ from the declaration."""

from __future__ import annotations

import inspect
from functools import cache
from typing import get_type_hints

from llavactl.core.plugin_code import location
from llavactl.core.typed import Predicate, predicate

_SPECIAL = frozenset({"__call__", "__iter__"})


@cache
def members(protocol: type) -> tuple[str, ...]:
    """The attributes and methods that ``protocol`` and the Protocols it extends declare, in order."""
    declared = (
        name
        for each in reversed(protocol.__mro__)
        if each.__module__ not in ("typing", "typing_extensions")
        for name in (*vars(each).get("__annotations__", {}), *vars(each))
        if name in _SPECIAL or not name.startswith("_")
    )
    return tuple(dict.fromkeys(declared))


def missing_members(instance: object, protocol: type) -> list[str]:
    """The ``members`` of ``protocol`` that ``instance`` lacks. Properties are not evaluated."""
    missing = object()
    return [name for name in members(protocol) if inspect.getattr_static(instance, name, missing) is missing]


def call_fault(instance: object, name: str, protocol: type) -> str:
    """Why the method ``name`` of ``instance`` can't be called as ``protocol`` declares; "" if it can."""
    declared = inspect.getattr_static(protocol, name, None)
    if not inspect.isfunction(declared):  # a property isn't evaluated: it may read files, and raise
        return ""
    method = getattr(instance, name)
    if not callable(method):
        return f"{name} = {method!r:.60}; {protocol.__name__} declares a method"
    parameters = list(inspect.signature(declared).parameters.values())[1:]
    keywords = {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    try:
        signature = inspect.signature(method)
        signature.bind(*(each for each in parameters if each.name not in keywords), **keywords)
    except TypeError as error:
        expected = _without_annotations(inspect.signature(declared).replace(parameters=parameters))
        where = f" ({place})" if (place := location(method)) else ""
        return f"{name}{_without_annotations(signature)}{where}: {error}; {protocol.__name__} declares {name}{expected}"
    except ValueError:  # built-in functions have no signature
        return ""
    return ""


def value_fault(instance: object, name: str, protocol: type, *, evaluate: bool = False) -> str:
    """Why the attribute ``name`` of ``instance`` isn't of the type that ``protocol`` declares; "" if it is.

    Methods aren't attributes. A property of ``instance``, which may read files, is only evaluated with ``evaluate``.
    """
    annotation, matches = _attributes(protocol).get(name, ("", None))
    static = inspect.getattr_static(instance, name)
    if matches is None or (not evaluate and hasattr(static, "__get__") and not inspect.isfunction(static)):
        return ""
    value = getattr(instance, name)
    return "" if matches(value) else f"{name} = {value!r:.60}; {protocol.__name__} declares {annotation}"


@cache
def _attributes(protocol: type) -> dict[str, tuple[str, Predicate]]:
    """The types of the attributes that ``protocol`` declares, as text and as a check."""
    texts = {name: text for each in protocol.__mro__ for name, text in vars(each).get("__annotations__", {}).items()}
    return {name: (str(texts[name]), predicate(hint)) for name, hint in get_type_hints(protocol).items()}


def _without_annotations(signature: inspect.Signature) -> str:
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
