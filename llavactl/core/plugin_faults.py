"""Which plugin, component and line an exception comes from: its traceback has frames of the plugin's code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.hook_rules import fault_text, frame_location, frames_in, function_name, package_of
from llavactl.core.protocols import ALTERNATIVES, CAPABILITIES, KINDS
from llavactl.core.protocols.members import members
from llavactl.core.registry import Registration, kind_label, registry

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
    plugin_of = _plugins_by_package()
    frames = frames_in(error, plugin_of)
    if not frames:
        return None
    innermost, line = frames[-1]
    plugin = plugin_of[package_of(innermost)]
    own = [frame for frame, _ in frames if plugin_of[package_of(frame)] == plugin]
    entry = _component(plugin, own)
    component = f"{kind_label(entry.kind)} {entry.name} of plugin {plugin}" if entry else f"plugin {plugin}"
    where, name = frame_location(innermost, line), function_name(innermost)
    return Fault(plugin, component, f"{name} ({where})" if name else where)


def plugin_error(error: BaseException) -> PluginError | None:
    """``error`` in one line, if it was raised in the code of a plugin and isn't one of llavactl's errors."""
    if isinstance(error, LlavactlError):
        return None
    fault = plugin_fault(error)
    return fault.error(fault_text(error)) if fault else None


def described(error: BaseException) -> str:
    """``error`` without its hint, for warnings: an exception with its type, and if it is a plugin's, its location."""
    return fault_text(plugin_error(error) or error)


def _plugins_by_package() -> dict[str, str]:
    """Plugin names by package: those of entry points, and those of components, which may be other packages."""
    components = {plugins.root_package(entry.target): entry.plugin for entry in registry()}
    points = {plugins.root_package(point.value): point.name for point in plugins.entry_points()}
    return {package: name for package, name in (components | points).items() if package != plugins.BUILTIN}


def _component(plugin: str, frames: Sequence[FrameType]) -> Registration | None:
    """The component or command of ``plugin`` whose code ``frames`` are, from the outermost; None if it is unclear."""
    found = [entry for entry in registry() if entry.plugin == plugin and entry.kind != "recipes"]
    modules = {frame.f_globals.get("__name__") for frame in frames}
    names = {function_name(frame) for frame in frames}
    owners = {owner for frame in frames for owner in _owners(frame)}
    rules: Sequence[Callable[[Registration], bool]] = (
        lambda entry: entry.target in owners,
        lambda entry: (entry.kind, entry.name) in registry().used,
        lambda entry: entry.target.partition(":")[0] in modules,
        lambda entry: not names.isdisjoint(_methods(entry.kind)),
    )
    for rule in rules:
        found = [entry for entry in found if rule(entry)] or found
    return found[0] if len(found) == 1 else None


def _owners(frame: FrameType) -> Iterator[str]:
    """The targets, ``module:attr``, that the code of ``frame`` may belong to: its class, or an enclosing function."""
    code, module = frame.f_code, frame.f_globals.get("__name__")
    parts = code.co_qualname.split(".")
    yield from (f"{module}:{'.'.join(parts[:end])}" for end in range(1, len(parts) + 1))
    first: Any = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    owner = first if inspect.isclass(first) else type(first)
    yield f"{owner.__module__}:{owner.__qualname__}"


def _methods(kind: str) -> set[str]:
    """The methods that the Protocols of ``kind`` declare, and those of what its components return."""
    protocol = KINDS.get(kind)
    if protocol is None:
        return set()
    protocols = (protocol, ALTERNATIVES.get(protocol, protocol), *CAPABILITIES[kind])
    return {name for each in protocols for name in members(each)}.union(_METHODS_OF_RESULTS.get(kind, ()))
