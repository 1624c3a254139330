"""The registry of components, commands and recipes, by kind and exact name. Targets are imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from llavactl.core import component_calls, plugins, stopping
from llavactl.core.component_faults import component_fault, target_fault
from llavactl.core.errors import LlavactlError, PluginError, Problem, RecipeError
from llavactl.core.hook_rules import target_of
from llavactl.core.plugin_code import caller_location, located_fault, root_package
from llavactl.core.protocols import KINDS
from llavactl.core.streams import stdout_to_stderr
from llavactl.core.suggest import suggest
from llavactl.core.validation import KeyPath, explain

if TYPE_CHECKING:
    from llavactl.core.protocols import (
        Connector,
        Format,
        Judged,
        Language,
        Schedule,
        Source,
        Task,
        Teacher,
        Template,
        UpdateRule,
        Vision,
    )

log = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""Names of components, commands and recipes: recipes and the command line need no quotes around them."""

NAME_RULE = "lower-case letters, digits, `.`, `_` and `-`"

OF_PLUGIN = "if a plugin registers it, pass --plugin FILE, or install its package"

Spec = str | Mapping[str, Any]
"""A component in a recipe: its name, or ``{"name": …, its options}``."""


class Options(BaseModel):
    """Base class of a component's options: a frozen pydantic model in which unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Registration:
    """A registered component, command or recipe and its plugin; ``where``: the file and line that register it."""

    kind: str
    name: str
    target: str
    options: str | None
    summary: str
    plugin: str
    where: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """The component in messages about what it does: ``connector mean of plugin birds``."""
        return f"{kind_label(self.kind)} {self.name} of plugin {self.plugin}"

    @property
    def subject(self) -> str:
        """The component in messages: ``connector 'mean' of plugin birds (birds/__init__.py:8)``."""
        return f"{kind_label(self.kind)} {self.name!r} of plugin {self.plugin}{self._place}"

    @property
    def registered(self) -> str:
        """The registration in messages: ``plugin birds: connector 'mean' (birds/__init__.py:8)``."""
        return f"plugin {self.plugin}: {kind_label(self.kind)} {self.name!r}{self._place}"

    @property
    def _place(self) -> str:
        return f" ({self.where})" if self.where else ""

    @property
    def version(self) -> str:
        """The version of the plugin's results: finished steps and features of another version are not used."""
        return plugins.version_of(self.plugin)

    def load(self) -> Any:
        """Imports the target."""
        return _import(self.target, self)

    def options_model(self) -> type[BaseModel]:
        """The registered options model, else the class ``Options`` nested in the target, else one without fields."""
        if self.options is not None:
            model: type[BaseModel] = _import(self.options, self)
            return model
        nested = getattr(target, "Options", None) if isinstance(target := self.load(), type) else None
        return nested if isinstance(nested, type) and issubclass(nested, BaseModel) else Options

    def parse(self, options: Mapping[str, Any]) -> BaseModel:
        """``options`` validated by the options model, with defaults added.

        Raises:
            ValidationError: an unknown key or an invalid value; ``validation.explain`` converts it to messages.
        """
        return self.options_model().model_validate(dict(options))

    def path(self) -> Path:
        """The file of a recipe, whose target is ``package:path``.

        The path is relative to the package or to its parent folder: llavactl's own ``recipes/`` is at the top of a
        checkout and inside the package in a wheel.
        """
        package, _, inside = self.target.partition(":")
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for root in (Path(folder), Path(folder).parent):
                if (file := root / inside).is_file():
                    return file
        raise PluginError(
            f"{self.subject}: file {self.target} not found", hint="correct the path in `register`, package:path"
        )


@dataclass
class Registry:
    """Registrations by kind and name; the first registration of a name is kept.

    ``used``: the kinds and names of the components and commands that this process has created.
    """

    entries: dict[str, dict[str, Registration]] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)

    def add(self, entry: Registration) -> None:
        names = self.entries.setdefault(entry.kind, {})
        if (first := names.get(entry.name)) is not None:
            raise PluginError(
                f"{entry.registered}: the name is taken by plugin {first.plugin}, whose registration is kept",
                hint="register another name",
            )
        names[entry.name] = entry

    def names(self, kind: str) -> list[str]:
        return sorted(self.entries.get(kind, {}))

    def __iter__(self) -> Iterator[Registration]:
        return (entry for names in self.entries.values() for entry in names.values())

    def get(self, kind: str, name: str) -> Registration:
        """The registration of ``name``.

        Raises:
            RecipeError: unknown name; the hint suggests a similar one and lists all names.
        """
        names = self.entries.get(kind, {})
        if name not in names:
            of_plugin = f"; {OF_PLUGIN}" if kind in KINDS else ""
            raise RecipeError(f"unknown {kind_label(kind)} {name!r}", hint=f"{suggest(name, names)}{of_plugin}")
        return names[name]

    @overload
    def create(self, kind: Literal["sources"], spec: Spec, flag: str = "") -> Source: ...
    @overload
    def create(self, kind: Literal["vision"], spec: Spec, flag: str = "") -> Vision: ...
    @overload
    def create(self, kind: Literal["connectors"], spec: Spec, flag: str = "") -> Connector: ...
    @overload
    def create(self, kind: Literal["languages"], spec: Spec, flag: str = "") -> Language: ...
    @overload
    def create(self, kind: Literal["templates"], spec: Spec, flag: str = "") -> Template: ...
    @overload
    def create(self, kind: Literal["teachers"], spec: Spec, flag: str = "") -> Teacher: ...
    @overload
    def create(self, kind: Literal["tasks"], spec: Spec, flag: str = "") -> Task | Judged: ...
    @overload
    def create(self, kind: Literal["formats"], spec: Spec, flag: str = "") -> Format: ...
    @overload
    def create(self, kind: Literal["optimizers"], spec: Spec, flag: str = "") -> UpdateRule: ...
    @overload
    def create(self, kind: Literal["schedules"], spec: Spec, flag: str = "") -> Schedule: ...
    @overload
    def create(self, kind: str, spec: Spec, flag: str = "") -> object: ...
    def create(self, kind: str, spec: Spec, flag: str = "") -> object:
        """The component that ``spec`` describes; ``flag`` as in ``options``.

        Raises:
            RecipeError: an unknown name, an unknown option or an invalid value.
            PluginError: the target returned something that isn't a component of this kind.
        """
        options = self.options(kind, spec, flag)
        entry = self.get(kind, component_name(spec))
        self.used.add((kind, entry.name))
        target = entry.load()
        component: object = None
        if not (why := target_fault(target)):
            component = component_calls.created(target, options, entry)
            fault = component_fault(kind, component)
            why = f"returned {fault}" if fault else ""
        if why:
            raise PluginError(
                f"{entry.subject}: {entry.target} {why}",
                hint=f"`{plugins.check_command(entry.plugin)}` shows details",
            )
        if entry.plugin != plugins.BUILTIN:
            component_calls.check_calls(component, entry)
        return component

    def options(self, kind: str, spec: Spec, flag: str = "") -> BaseModel:
        """The validated options of the component that ``spec`` describes: a name, or {"name": …, options}.

        ``flag`` precedes the options in messages: ``-t `` if they are from the command line.

        Raises:
            RecipeError: an unknown name, an unknown option or an invalid value; lists all problems.
        """
        name = component_name(spec)
        entry = self.get(kind, name)
        options = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
        try:
            return entry.parse(options)
        except ValidationError as error:
            reasons = explain(error, entry.options_model(), options)
            where = f"{kind_label(kind)} {name}"
            problems = [Problem(where, f"{flag}{_dotted(path)}" if path else "", why) for path, why in reasons]
        hint = f"`llavactl components {kind}` lists the options of {name}"
        raise RecipeError.from_problems(problems, hint=hint)


def component_name(spec: Spec) -> str:
    """The name in ``spec``, which is a name or {"name": …, options}."""
    return spec if isinstance(spec, str) else str(spec["name"])


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def format_spec(spec: Spec) -> str:
    """The component ``spec`` in one line: its name and options."""
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def kind_label(kind: str) -> str:
    """The name of ``kind`` in messages: ``source`` for ``sources``, ``vision backbone`` for ``vision``."""
    return {"vision": "vision backbone", "languages": "language model"}.get(kind, kind.removesuffix("s"))


def _as_string(target: object) -> str:
    """The string that names ``target``, if it is a class or function instead of one."""
    return f"module:attr, the string {target_of(target)!r}" if hasattr(target, "__qualname__") else "module:attr"


def _argument_fault(name: object, target: object, options: object, summary: object) -> str:
    """The first invalid argument of ``register``; "" if all are valid."""
    valid = options is None or (isinstance(options, str) and ":" in options)
    checks = (
        (f"name: expected {NAME_RULE}", name, isinstance(name, str) and bool(NAME.fullmatch(name))),
        (f"target: expected {_as_string(target)}", target, isinstance(target, str) and ":" in target),
        (f"options: expected {_as_string(options)}", options, valid),
        ("summary: expected a string", summary, isinstance(summary, str)),
    )
    return next((f"{what}, got {value!r:.60}" for what, value, valid in checks if not valid), "")


@cache
def registry() -> Registry:
    """The registrations of the built-in plugin and of all installed plugins."""
    filled = Registry()
    for kind in (*KINDS, "recipes", "commands"):
        for plugin, implementation in plugins.implementations(f"register_{kind}"):
            hint = f"edit that line, or {plugins.without(plugin)}"

            def register(
                name: str,
                target: str,
                *,
                options: str | None = None,
                summary: str = "",
                kind: str = kind,
                plugin: str = plugin,
                hint: str = hint,
            ) -> None:
                entry = Registration(kind, name, target, options, summary, plugin, caller_location())
                with plugins.isolated(plugin, hint=hint):
                    if why := _argument_fault(name, target, options, summary):
                        raise PluginError(f"{entry.registered}: {why}", hint=hint)
                    filled.add(entry)

            with plugins.isolated(plugin, f"register_{kind}", hint=hint), stdout_to_stderr():
                implementation(register=register)
    return filled


def _import(target: str, entry: Registration) -> Any:
    try:
        return import_target(target)
    except LlavactlError:
        raise
    except BaseException as error:  # a plugin may call sys.exit at import
        if stopping.interrupted(error):
            raise
        what = f"{entry.subject} can't be loaded from {target!r}"
        raise PluginError(
            f"{what}: {located_fault(error, [root_package(target)])}",
            hint=f"`{plugins.check_command(entry.plugin)}` shows details",
        ) from error


def import_target(target: str) -> Any:
    """The object that ``target``, ``module:attr``, refers to."""
    module, _, attribute = target.partition(":")
    with stdout_to_stderr():
        target_object: Any = importlib.import_module(module)
    for part in attribute.split("."):
        target_object = getattr(target_object, part)
    return target_object
