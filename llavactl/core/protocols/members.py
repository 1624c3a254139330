"""What a Protocol declares, and what an object lacks of it."""

from __future__ import annotations

from functools import cache

_SPECIAL = frozenset({"__call__", "__iter__"})


@cache
def members(protocol: type) -> tuple[str, ...]:
    """The attributes and methods that ``protocol`` and the Protocols it extends declare, in order."""
    declared = (
        name
        for each in reversed(protocol.__mro__)
        if each.__module__ != "typing"
        for name in (*vars(each).get("__annotations__", {}), *vars(each))
        if name in _SPECIAL or not name.startswith("_")
    )
    return tuple(dict.fromkeys(declared))


def missing_members(instance: object, protocol: type) -> list[str]:
    """The ``members`` of ``protocol`` that ``instance`` lacks."""
    return [name for name in members(protocol) if not hasattr(instance, name)]
