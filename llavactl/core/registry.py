"""What is registered, by kind and exact name; imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, PluginError, Problem, RecipeError
from llavactl.core.protocols import KINDS
from llavactl.core.streams import stdout_to_stderr
from llavactl.core.suggest import suggest
from llavactl.core.validation import KeyPath, explain

log = logging.getLogger(__name__)


class Options(BaseModel):
    """Base of a component's options: frozen, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Registration:
    """One registered thing and the plugin it came from."""

    kind: str
    name: str
    target: str
    options: str | None
    summary: str
    plugin: str

    @property
    def version(self) -> str:
        """The version of the plugin that registered it; another version may give other results."""
        return plugins.version_of(self.plugin)

    def load(self) -> Any:
        """The target, imported now."""
        return _import(self.target, self)

    def options_model(self) -> type[BaseModel]:
        """The model of its options; without one, a model that takes none."""
        return Options if self.options is None else _import(self.options, self)

    def parse(self, options: Mapping[str, Any]) -> BaseModel:
        """``options`` validated by the options model, with defaults added.

        Raises:
            ValidationError: an unknown key or an invalid value; ``validation.explain`` converts it to messages.
        """
        return self.options_model().model_validate(dict(options))

    def path(self) -> Path:
        """The file that a recipe's target (``package:path``) names.

        Inside the package, or beside it: our own ``recipes/`` lies at the top of a checkout and inside
        the package in a wheel.
        """
        package, _, inside = self.target.partition(":")
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for root in (Path(folder), Path(folder).parent):
                if (file := root / inside).is_file():
                    return file
        raise PluginError(f"{self.kind} {self.name!r} of plugin {self.plugin}: there is no file {self.target}")


@dataclass
class Registry:
    """Entries by kind and name; the first to take a name keeps it."""

    entries: dict[str, dict[str, Registration]] = field(default_factory=dict)

    def add(self, entry: Registration) -> None:
        names = self.entries.setdefault(entry.kind, {})
        if (first := names.get(entry.name)) is not None:
            raise PluginError(
                f"{entry.kind} {entry.name!r} is registered by plugin {first.plugin} and again by plugin "
                f"{entry.plugin}; the one of {first.plugin} is kept"
            )
        names[entry.name] = entry

    def names(self, kind: str) -> list[str]:
        return sorted(self.entries.get(kind, {}))

    def __iter__(self) -> Iterator[Registration]:
        return (entry for names in self.entries.values() for entry in names.values())

    def get(self, kind: str, name: str) -> Registration:
        """The entry ``name`` of ``kind``.

        Raises:
            RecipeError: there is none; the hint has the nearest name and all the others.
        """
        names = self.entries.get(kind, {})
        if name not in names:
            raise RecipeError(f"there is no {kind_label(kind)} named {name!r}", hint=suggest(name, names))
        return names[name]

    def create(self, kind: str, spec: str | Mapping[str, Any], flag: str = "") -> Any:
        """The component that ``spec`` describes; ``flag`` as in ``options``.

        Raises:
            RecipeError: an unknown name, an unknown option or an invalid value.
        """
        options = self.options(kind, spec, flag)
        return self.get(kind, component_name(spec)).load()(options)

    def options(self, kind: str, spec: str | Mapping[str, Any], flag: str = "") -> BaseModel:
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
            problems = [Problem(f"{kind_label(kind)} {name}", f"{flag}{_dotted(path)}", why) for path, why in reasons]
        hint = f"`llavactl components {kind}` lists the options of {name}"
        raise RecipeError.from_problems(problems, hint=hint)


def component_name(spec: str | Mapping[str, Any]) -> str:
    """The name in ``spec``, which is a name or {"name": …, options}."""
    return spec if isinstance(spec, str) else str(spec["name"])


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def format_spec(spec: str | Mapping[str, Any]) -> str:
    """A component in one line: its name, with its options if it has any."""
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{key}: {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def kind_label(kind: str) -> str:
    """``sources`` → ``source``; ``vision`` → ``vision backbone``."""
    return "vision backbone" if kind == "vision" else kind.removesuffix("s")


@cache
def registry() -> Registry:
    """Everything that the built-in plugin and the installed ones register."""
    found = Registry()
    for kind in (*KINDS, "recipes", "commands"):
        for plugin, implementation in plugins.implementations(f"register_{kind}"):

            def register(
                name: str,
                target: str,
                *,
                options: str | None = None,
                summary: str = "",
                kind: str = kind,
                plugin: str = plugin,
            ) -> None:
                with plugins.isolated(plugin):
                    if ":" not in target:
                        raise PluginError(f"plugin {plugin}: {kind} {name!r}: {target!r} is not module:attr")
                    found.add(Registration(kind, name, target, options, summary, plugin))

            with plugins.isolated(plugin), stdout_to_stderr():
                implementation(register=register)
    return found


def plugin_of(component: Any) -> str:
    """The plugin whose package defines the class of ``component``; its module if there is none."""
    module = type(component).__module__
    package = module.partition(".")[0]
    found = (entry.plugin for entry in registry() if entry.target.partition(":")[0].partition(".")[0] == package)
    return next(found, module)


def _import(target: str, entry: Registration) -> Any:
    module, _, attribute = target.partition(":")
    try:
        with stdout_to_stderr():
            found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (LlavactlError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(
            f"{kind_label(entry.kind)} {entry.name!r} of plugin {entry.plugin} can't be loaded from {target!r}: "
            f"{type(error).__name__}: {error}",
            hint=f"`llavactl plugins check {entry.plugin}` shows more",
        ) from error
    return found
