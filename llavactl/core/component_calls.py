"""Calls of plugins' components: what they return is checked, and what they raise belongs to a registered name.

The methods of a component are replaced where the registry hands it out, so every caller gets checked values. The frame
of a call in a traceback tells which component ran (``core.plugin_faults``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from llavactl.core import plugins
from llavactl.core.errors import PluginError
from llavactl.core.plugin_code import location, plugin_of_module, root_package
from llavactl.core.protocols.returned import is_collection, is_lazy, item_fault, methods, returned_fault

if TYPE_CHECKING:
    from llavactl.core.protocols import Source
    from llavactl.core.registry import Registration
    from llavactl.core.schema import Sample

_METHODS_OF_RESULTS: Mapping[tuple[str, str], str] = {
    ("vision", "load"): "encode",
    ("connectors", "build"): "forward",
    ("optimizers", "build"): "step",
}
"""The method that does the work of the encoder, module or torch optimizer that a component's method returns."""


@dataclass(frozen=True, eq=False)
class ComponentCall:
    """The ``method`` ``name`` of the component that ``entry`` registers.

    ``made_at`` is the place of the component's code for a method without any, such as that of a layer of torch.
    """

    method: Callable[..., Any]
    name: str
    entry: Registration
    made_at: str = ""
    checked: bool = True

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        value = self.method(*arguments, **keywords)
        if not self.checked:
            return value
        kind = self.entry.kind
        if is_collection(kind, self.name) and isinstance(value, Iterator):
            value = list(value)
        if why := returned_fault(kind, self.name, value, *arguments, **keywords):
            if inspect.iscoroutine(value):
                value.close()  # otherwise Python warns that it was never awaited
            raise self.error(why)
        if is_lazy(kind, self.name):
            return self.items(value)
        if result := _METHODS_OF_RESULTS.get((kind, self.name)):
            _replace(value, result, self.entry, self.place, checked=False)
        return value

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method, for its signature and location."""
        return self.method

    def items(self, iterator: Any) -> Iterator[Any]:
        """The items of ``iterator``, which the method returned, checked one by one."""
        for item in iterator:
            if why := item_fault(self.entry.kind, self.name, item):
                raise self.error(why)
            yield item

    @property
    def place(self) -> str:
        """``function (file:line)`` of the method in the plugin's code, else of what made it or registers it."""
        if self.is_own or self.made_at:
            return _place(self.name, self.method) if self.is_own else self.made_at
        target = self.entry.load()
        if plugin_of_module(_module(target)) == self.entry.plugin:
            return _place(_attribute(self.entry), target)
        return f"{self.name} ({self.entry.where})"

    @property
    def is_own(self) -> bool:
        """Whether the plugin's code defines the method: not torch, nor llavactl, whose class it may inherit from."""
        return plugin_of_module(_module(self.method)) == self.entry.plugin

    @property
    def is_builtin(self) -> bool:
        """Whether llavactl's code defines the method."""
        return root_package(_module(self.method)) == root_package(__name__)

    def error(self, what: str) -> PluginError:
        """The error that the method did ``what``."""
        return component_error(self.entry, f"{self.place}: {what}")


def _place(name: str, function: Any) -> str:
    return f"{name} ({where})" if (where := location(function)) else name


def _attribute(entry: Registration) -> str:
    """The last name in the target of ``entry``."""
    return entry.target.rpartition(":")[2].rpartition(".")[2]


def _module(method: Any) -> str:
    return str(getattr(method, "__module__", None) or type(method).__module__)


def component_error(entry: Registration, what: str) -> PluginError:
    """The error for the component that ``entry`` registers, with the command that tests it."""
    return PluginError(f"{entry.label}: {what}", hint=f"`{plugins.check_command(entry.plugin)}` tests the plugin")


def call_error(component: object, method: str, what: str) -> PluginError:
    """The error that ``method`` of ``component``, or of what one of its methods returned, did ``what``."""
    call = _call_of(component, method)
    if call is not None:
        return call.error(what)
    return PluginError(f"{call_place(component, method)}: {what}")


def call_place(component: object, method: str) -> str:
    """``function (file:line)`` of ``method`` of a component, or of what one of its methods returned."""
    call = _call_of(component, method)
    if call is not None:
        return call.place
    return _place(f"{type(component).__name__}.{method}", getattr(component, method, None))


def _call_of(component: object, method: str) -> ComponentCall | None:
    """The call that replaced ``method`` of ``component``, if any."""
    with contextlib.suppress(TypeError):  # without attributes of its own
        call = vars(component).get(method)
        return call if isinstance(call, ComponentCall) else None
    return None


def created(target: Callable[..., Any], options: Any, entry: Registration) -> Any:
    """``target(options)``; an exception belongs to the component."""
    return ComponentCall(target, _attribute(entry), entry, checked=False)(options)


def check_calls(component: object, entry: Registration) -> None:
    """Checks the methods of ``component`` from now on. An object without a ``__dict__`` is left as it is."""
    for name in methods(entry.kind):
        if not name.startswith("_") and callable(getattr(component, name, None)):
            _replace(component, name, entry)


def _replace(component: object, name: str, entry: Registration, made_at: str = "", *, checked: bool = True) -> None:
    with contextlib.suppress(TypeError):  # without attributes of its own
        attributes = vars(component)
        method = getattr(component, name)
        method = method.method if isinstance(method, ComponentCall) else method
        attributes[name] = ComponentCall(method, name, entry, made_at, checked)


def samples_of(source: Source, entry: Registration) -> Iterator[Sample]:
    """The samples of ``source``, which ``entry`` registers: Python calls ``__iter__`` of its class only."""
    call = ComponentCall(source.__iter__, "__iter__", entry)
    return cast("Iterator[Sample]", call())


_CODES = (ComponentCall.__call__.__code__, ComponentCall.items.__code__)


def running(frames: Sequence[FrameType | None]) -> tuple[int, ComponentCall] | None:
    """The index in ``frames``, outermost first, of the innermost call of a component of a plugin, and the call."""
    for index, frame in reversed(list(enumerate(frames))):
        if frame is not None and frame.f_code in _CODES:
            call: ComponentCall = frame.f_locals["self"]
            if call.entry.plugin != plugins.BUILTIN:
                return index, call
    return None
