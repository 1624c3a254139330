"""Which plugin, component and line an exception comes from: its traceback has frames of the plugin's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavactl.core import plugins
from llavactl.core.component_calls import running
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.plugin_code import Place, fault_text, frame_places, places, plugin_of_module, plugin_packages
from llavactl.core.protocols import ALTERNATIVES, CAPABILITIES, KINDS
from llavactl.core.protocols.members import members
from llavactl.core.registry import Registration, registry

_METHODS_OF_RESULTS: Mapping[str, Sequence[str]] = {
    "vision": ("preprocess", "encode"),
    "connectors": ("forward",),
    "optimizers": ("step",),
}
"""Methods of the encoder, module or torch optimizer that a component of the kind returns."""


@dataclass(frozen=True)
class Fault:
    """An exception in the code of ``plugin``, in its ``component``, such as ``connector x of plugin acme``.

    ``place`` is the innermost function of the plugin with its line, ``forward (acme/x.py:41)``.
    """

    plugin: str
    component: str
    place: str

    def error(self, what: str, hint: str = "") -> PluginError:
        """The error that ``what`` happened there."""
        check = f"`{plugins.check_command(self.plugin)}` tests the plugin"
        text = f"{self.component}: {self.place}: {what}"
        return PluginError(text, hint=hint or f"`--verbose` shows the traceback; {check}")


def plugin_fault(error: BaseException) -> Fault | None:
    """The innermost code of a plugin that was running when ``error`` was raised; None without any.

    An exception of llavactl or of a library that a plugin's code called is the plugin's.
    """
    found = places(error, plugin_packages())
    frames = [place.frame for place in frame_places(error)]
    if (ran := running(frames)) is not None:
        inside = set(map(id, frames[ran[0] :]))
        own = [place for place in found if place.frame is None or id(place.frame) in inside]
        entry = ran[1].entry
        if own and plugin_of_module(own[-1].module) == entry.plugin:
            return Fault(entry.plugin, entry.label, _where(own[-1]))
        if not own and not ran[1].is_builtin:
            return Fault(entry.plugin, entry.label, ran[1].place)
    if not found:
        return None
    plugin = plugin_of_module(found[-1].module) or plugin_packages()[found[-1].package]
    named = _component(plugin, [place for place in found if plugin_of_module(place.module) == plugin])
    return Fault(plugin, named.label if named else f"plugin {plugin}", _where(found[-1]))


def _where(place: Place) -> str:
    """``function (file:line)``."""
    function = _function(place)
    return f"{function} ({place.where})" if function else place.where


def plugin_error(error: BaseException) -> PluginError | None:
    """``error`` in one line, if it was raised in the code of a plugin and isn't one of llavactl's errors."""
    if isinstance(error, LlavactlError):
        return None
    fault = plugin_fault(error)
    return fault.error(fault_text(error)) if fault else None


def described(error: BaseException) -> str:
    """``error`` without its hint, for warnings: an exception with its type, and if it is a plugin's, its location."""
    known = error if isinstance(error, LlavactlError) else plugin_error(error)
    return known.message if known else fault_text(error)


def _component(plugin: str, found: Sequence[Place]) -> Registration | None:
    """The component or command of ``plugin`` whose code is ``found``, outermost first; None if it is unclear."""
    entries = [entry for entry in registry() if entry.plugin == plugin and entry.kind != "recipes"]
    modules = {place.module for place in found}
    functions = {_function(place) for place in found}
    targets = {target for place in found for target in _targets(place)}
    rules: Sequence[Callable[[Registration], bool]] = (
        lambda entry: entry.target in targets,
        lambda entry: (entry.kind, entry.name) in registry().used,
        lambda entry: entry.target.partition(":")[0] in modules,
        lambda entry: not functions.isdisjoint(_methods(entry.kind)),
    )
    for rule in rules:
        entries = [entry for entry in entries if rule(entry)] or entries
    return entries[0] if len(entries) == 1 else None


def _function(place: Place) -> str:
    """The name of the function at ``place``: of lambdas and comprehensions, the function around them; "" outside."""
    names = place.frame.f_code.co_qualname.split(".") if place.frame else ()
    return next((name for name in reversed(names) if not name.startswith("<")), "")


def _targets(place: Place) -> Iterator[str]:
    """The targets, ``module:attr``, that ``place`` may belong to: enclosing functions and classes, ``self``'s class."""
    if (frame := place.frame) is None:
        return
    parts = frame.f_code.co_qualname.split(".")
    yield from (f"{place.module}:{'.'.join(parts[:end])}" for end in range(1, len(parts) + 1))
    first: Any = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
    owner = first if inspect.isclass(first) else type(first)
    yield f"{owner.__module__}:{owner.__qualname__}"


def _methods(kind: str) -> set[str]:
    """The methods that the Protocols of ``kind`` declare, and those of what its components return."""
    protocol = KINDS.get(kind)
    if protocol is None:
        return set()
    protocols = (protocol, ALTERNATIVES.get(protocol, protocol), *CAPABILITIES[kind])
    return {name for each in protocols for name in members(each)}.union(_METHODS_OF_RESULTS.get(kind, ()))
