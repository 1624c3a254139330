"""Checking the fields of dataclasses that plugins make: a wrong type would be found late, or never."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any], bool]


class Typed:
    """A dataclass whose fields have the types of their annotations.

    Raises:
        TypeError: one has another; the message names it.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(made: Any) -> None:
    """Raises TypeError if a field of the dataclass ``made`` hasn't the type of its annotation."""
    kind: Any = type(made)
    for name, annotation, check in _checks(kind):
        if not check(value := getattr(made, name)):
            raise TypeError(f"{type(made).__name__}.{name} must be {annotation}, not {value!r:.80}")


@cache
def _checks(kind: Any) -> tuple[tuple[str, str, Check], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, str(field.type), _check(hints[field.name])) for field in fields(kind))


def _check(hint: Any) -> Check:
    """Whether a value has the type ``hint``; items of mappings are not looked at."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda _value: True
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        options = [_check(each) for each in arguments]
        return lambda value: any(option(value) for option in options)
    if origin is tuple:
        return _tuple_check(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return lambda value: isinstance(value, Mapping)
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False):
        wanted = [name for name, each in vars(hint).items() if not name.startswith("_") and callable(each)]
        return lambda value: _has(value, *wanted)
    return lambda value: isinstance(value, hint)


def _tuple_check(arguments: tuple[Any, ...]) -> Check:
    if arguments[-1] is Ellipsis:
        each = _check(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(each, value))
    checks = [_check(argument) for argument in arguments]
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(checks)
        and all(check(part) for check, part in zip(checks, value, strict=True))
    )


def _has(value: Any, *wanted: str) -> bool:
    kind: Any = type(value)
    return behaves(kind, *wanted)


@cache
def behaves(kind: Any, *wanted: str) -> bool:
    """Whether objects of ``kind`` are hashable and have the methods ``wanted``; names are not looked up again."""
    return kind.__hash__ is not None and all(callable(getattr(kind, name, None)) for name in wanted)
