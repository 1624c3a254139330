"""Type checks for the fields of dataclasses that plugins create, so that a wrong type is detected at once."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

Predicate = Callable[[Any], bool]


class Typed:
    """Base of dataclasses whose fields are checked against their annotations.

    Raises:
        TypeError: a field has the wrong type.
    """

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(instance: Any) -> None:
    """Raises TypeError if a field of the dataclass ``instance`` doesn't have the annotated type."""
    kind: Any = type(instance)
    for name, annotation, matches in _field_predicates(kind):
        if not matches(value := getattr(instance, name)):
            raise TypeError(f"{type(instance).__name__}.{name}: expected {annotation}, got {value!r:.80}")


@cache
def _field_predicates(kind: Any) -> tuple[tuple[str, str, Predicate], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, str(field.type), predicate(hints[field.name])) for field in fields(kind))


def predicate(hint: Any) -> Predicate:
    """A check for values of the type ``hint``; items of mappings are not checked."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda _value: True
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if origin in (Union, types.UnionType):
        options = [predicate(argument) for argument in arguments]
        return lambda value: any(option(value) for option in options)
    if origin is tuple:
        return _tuple_predicate(arguments)
    if origin is not None and issubclass(origin, Mapping):
        return lambda value: isinstance(value, Mapping)
    if origin in (list, Sequence, Iterable):
        item = predicate(arguments[0])
        return lambda value: (
            isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(map(item, value))
        )
    if hint is int:
        return lambda value: isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    if getattr(hint, "_is_protocol", False) and "__hash__" in vars(hint):
        methods = [name for name, member in vars(hint).items() if not name.startswith("_") and callable(member)]
        return lambda value: _has(value, *methods)
    return lambda value: isinstance(value, hint)


def _tuple_predicate(arguments: tuple[Any, ...]) -> Predicate:
    if arguments[-1] is Ellipsis:
        item = predicate(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(item, value))
    predicates = [predicate(argument) for argument in arguments]
    return lambda value: (
        isinstance(value, tuple)
        and len(value) == len(predicates)
        and all(predicate(part) for predicate, part in zip(predicates, value, strict=True))
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _has(value: Any, *methods: str) -> bool:
    kind: Any = type(value)
    return has_methods(kind, *methods)


@cache
def has_methods(kind: Any, *methods: str) -> bool:
    """Whether instances of the class ``kind`` are hashable and have ``methods``."""
    return kind.__hash__ is not None and all(callable(getattr(kind, name, None)) for name in methods)
