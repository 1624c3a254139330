"""Checks a loaded plugin and everything that it registers: ``llavactl plugins check`` and the tests of plugins."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from pydantic import BaseModel, ValidationError

from llavactl.core import plugin_options, plugins, stopping
from llavactl.core.component_faults import component_fault, target_fault
from llavactl.core.errors import LlavactlError
from llavactl.core.hook_rules import MARK
from llavactl.core.locations import shown_path
from llavactl.core.plugin_code import location, packages_of
from llavactl.core.plugin_points import not_available, version_conflict
from llavactl.core.plugin_probe import IMPORT_TIMEOUT_S, import_in_process
from llavactl.core.protocols import KINDS
from llavactl.core.registry import Registration, kind_label, registry
from llavactl.core.streams import stdout_to_stderr
from llavactl.core.validation import explain
from llavactl.recipe.specs import hidden_options
from llavactl.testing.conformance import CHECKS
from llavactl.testing.conformance.boundary import describe_exception
from llavactl.testing.options_check import model_problems

OptionsByName = Mapping[str, Mapping[str, Any]]
"""Options of components by component name."""

_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_PLUGIN = "plugin"
_MOST = 5
"""The number of problems that a check names."""

_PLACE = re.compile(r"\.py:\d")


@dataclass(frozen=True)
class Check:
    """One check of the component ``name`` of ``kind`` (``plugin``: the plugin itself).

    ``ok`` is None if the check was skipped; ``problem`` is the reason, or what is wrong.
    """

    kind: str
    name: str
    check: str
    ok: bool | None = True
    problem: str = ""


def check_plugin(name: str, options: OptionsByName | None = None) -> list[str]:
    """Checks the plugin ``name`` and everything that it registers; returns the problems, one line each.

    Components with required options are checked with ``options`` by component name, or with those that the plugin
    returns from its hook ``check_examples``; without either, they are only imported.
    """
    failed = (each for each in plugin_checks(name, options or {}) if each.ok is False)
    return [f"{each.kind} {each.name}: {each.check}: {each.problem}" for each in failed]


def plugin_checks(name: str, options: OptionsByName, timeout_s: float = IMPORT_TIMEOUT_S) -> Iterator[Check]:
    """All checks of the plugin ``name``, as they are made; see ``check_plugin``. ``timeout_s`` limits its import."""
    points = [point for point in plugins.entry_points() if point.name == name]
    if not points and name != plugins.BUILTIN:
        yield Check(_PLUGIN, name, "import", False, not_available(name, plugins.entry_points()).with_hint())
        return
    for point in points:
        imported = import_in_process(point, timeout_s)
        conflict = list(filter(None, [version_conflict(point)]))
        yield _result(_PLUGIN, name, "import", [imported.error, *conflict, imported.remedy] if imported.error else [])
        if imported.error:
            return
        yield _result(_PLUGIN, name, "version of llavactl", conflict)
        heavy = f"importing {point.value} imports {', '.join(imported.heavy)}; every command would be slow"
        yield _result(_PLUGIN, name, "light import", [heavy, imported.remedy] if imported.heavy else [])
    (plugin,) = (each for each in plugins.installed() if each.name == name)
    yield _result(_PLUGIN, name, "registration", [plugin.error] if plugin.error else [])
    module = plugins.manager().get_plugin(name)
    if module is None:
        return
    yield _result(_PLUGIN, name, "hooks", list(_unregistered(module, plugins.manager())))
    packages = packages_of(name)
    yield _outcome(_PLUGIN, name, "options", lambda: _plugin_options_problems(name), packages)
    entries = [entry for entry in registry() if entry.plugin == name]
    with tempfile.TemporaryDirectory() as folder, stdout_to_stderr():
        examples: dict[str, dict[str, dict[str, Any]]] = {}
        yield _outcome(
            _PLUGIN, name, "examples", lambda: _add_examples(examples, name, entries, Path(folder)), packages
        )
        for entry in entries:
            given = {**examples.get(entry.kind, {}).get(entry.name, {}), **options.get(entry.name, {})}
            yield from _entry_checks(entry, given, packages)


def _result(kind: str, name: str, check: str, problems: Sequence[str]) -> Check:
    lines = [" ".join(problem.split()) for problem in problems]
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return Check(kind, name, check, not problems, "; ".join([*lines[:_MOST], *more]))


def _outcome(
    kind: str, name: str, check: str, problems: Callable[[], Sequence[str]], packages: Collection[str]
) -> Check:
    """The result of the function ``problems``; an exception is a problem too, located in ``packages``."""
    try:
        found = problems()
    except BaseException as error:  # plugins may raise anything
        if stopping.interrupted(error):
            raise
        found = [describe_exception(error, packages)]
    return _result(kind, name, check, found)


def _unregistered(module: Any, manager: pluggy.PluginManager) -> Iterator[str]:
    """Functions of a plugin's module that look like hooks but aren't, or that there are none at all."""
    hooks = [name for name, caller in vars(manager.hook).items() if getattr(caller, "spec", None)]
    if not manager.get_hookcallers(module):
        where = module.__file__ if isinstance(module, ModuleType) else None
        what = shown_path(Path(where)) if where else f"{module!r:.80}"
        yield f"{what} implements no hook: decorate a function of the module with @hookimpl"
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if function.__module__ != getattr(module, "__name__", None) or hasattr(function, MARK):
            continue
        if near := difflib.get_close_matches(name, hooks, n=1, cutoff=0.85):
            what = "" if near[0] == name else f"; did you mean {near[0]!r}?"
            yield f"{name} ({location(function)}) is not decorated with @hookimpl, so it is never called{what}"


def _plugin_options_problems(name: str) -> list[str]:
    """Problems of the options that a recipe sets in its section ``plugins``."""
    model = plugin_options.options_model(name)
    if model is None:
        return []
    required = [f"{key} has no default; recipes without a section for the plugin need one" for key in _required(model)]
    return [*required, *model_problems(model)]


def _options_problems(entry: Registration) -> list[str]:
    model = entry.options_model()
    if problems := model_problems(model):
        return problems
    return [f"{name}: recipes use this key themselves; rename it" for name in hidden_options(entry.kind, model)]


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def _add_examples(
    examples: dict[str, dict[str, dict[str, Any]]], plugin: str, entries: Sequence[Registration], folder: Path
) -> list[str]:
    """Adds the results of the hook ``check_examples`` to ``examples``; returns problems."""
    known = {(entry.kind, entry.name) for entry in entries}
    problems = []
    for name, implementation in plugins.implementations("check_examples"):
        if name != plugin:
            continue
        returned: Any = implementation(folder=folder) or {}
        for kind, by_name in returned.items():
            for component, options in by_name.items():
                if (kind, component) not in known:
                    hook = f"check_examples ({location(implementation)})"
                    problems.append(f"{hook}: the plugin registers no {kind_label(kind)} {component!r}")
                examples.setdefault(kind, {})[component] = dict(options)
    return problems


def _entry_checks(entry: Registration, given: Mapping[str, Any], packages: Collection[str]) -> Iterator[Check]:
    """The checks of one registration with the options ``given``; ``packages`` are those of the plugin."""

    def outcome(check: str, problems: Callable[[], Sequence[str]]) -> Check:
        result = _outcome(entry.kind, entry.name, check, problems, packages)
        if result.ok or _PLACE.search(result.problem):
            return result
        return replace(result, problem=f"{_definition(entry)}: {result.problem}")

    yield outcome("name", lambda: _name_problems(entry))
    if entry.kind == "recipes":
        yield outcome("recipe", lambda: _recipe_problems(entry))
        return
    imported = outcome("import", lambda: _import_problems(entry))
    yield imported
    if not imported.ok:
        return
    if entry.kind == "commands":
        yield outcome("command", lambda: _command_problems(entry))
        return
    options = outcome("options", lambda: _options_problems(entry))
    yield options
    signature = outcome("signature", lambda: _signature_problems(entry))
    yield signature
    if not (options.ok and signature.ok):
        return
    if missing := _missing_options(entry, given):
        reason = f"needs options: {missing}; pass -o {entry.name}.KEY=VALUE, or implement the hook check_examples"
        yield Check(entry.kind, entry.name, "conformance", None, reason)
        return
    conformance = outcome("conformance", lambda: _component_problems(entry, given))
    yield conformance
    if conformance.ok and (files := _files(entry.parse(given))):
        yield outcome("missing file", lambda: _missing_file_problems(entry, given, files, packages))


def _definition(entry: Registration) -> str:
    """``file:line`` of the class or function that is registered, else of the registration."""
    try:
        return location(entry.load()) or entry.where
    except Exception:  # noqa: BLE001 - the check of the import reports it
        return entry.where


def _import_problems(entry: Registration) -> list[str]:
    entry.load()
    return []


def _missing_options(entry: Registration, given: Mapping[str, Any]) -> str:
    """The required options that are not ``given``, or why the options are invalid together; "" if none are missing."""
    missing = [name for name in _required(entry.options_model()) if name not in given]
    if missing or given:
        return ", ".join(missing)
    try:
        entry.parse({})
    except ValidationError as error:
        return "; ".join(why for _, why in explain(error, entry.options_model(), {}))
    return ""


def _name_problems(entry: Registration) -> list[str]:
    problems = [] if _NAME.fullmatch(entry.name) else ["expected lower-case words with hyphens"]
    if not entry.summary.strip():
        problems.append("no summary: pass `summary` to register")
    return [f"{entry.where}: {problem}" for problem in problems]


def _signature_problems(entry: Registration) -> list[str]:
    why = target_fault(entry.load())
    return [f"{entry.target} {why}"] if why else []


def _component_problems(entry: Registration, given: Mapping[str, Any]) -> list[str]:
    options = registry().options(entry.kind, {"name": entry.name, **given})
    if entry.parse(options.model_dump(mode="json")) != options:
        return ["the options differ after they are saved in a recipe as JSON and loaded again"]
    component = entry.load()(options)
    if why := component_fault(entry.kind, component):
        others = [kind_label(kind) for kind in KINDS if kind != entry.kind and not component_fault(kind, component)]
        return [f"returns {why}" + (f"; it is a {others[0]}" if others else "")]
    return CHECKS[entry.kind](component)


def _files(options: BaseModel) -> list[str]:
    """The options whose values are existing files or folders."""
    values = {name: getattr(options, name) for name in type(options).model_fields}
    return [name for name, value in values.items() if isinstance(value, Path) and value.exists()]


_USES: Mapping[str, Callable[[Any], object]] = {
    "sources": lambda source: next(iter(source), None),
    "vision": lambda vision: vision.load("cpu", "float32"),
    "languages": lambda language: (language.tokenizer(), language.load("float32")),
    "tasks": lambda task: next(iter(task.questions()), None),
}


def _missing_file_problems(
    entry: Registration, given: Mapping[str, Any], names: Sequence[str], packages: Collection[str]
) -> list[str]:
    """Options of files that don't exist must raise one of llavactl's errors, or OSError, which names the file."""
    if entry.kind not in _USES:
        return []
    problems = []
    for name in names:
        missing = f"/missing-{uuid.uuid4()}"
        try:
            _USES[entry.kind](registry().create(entry.kind, {"name": entry.name, **given, name: missing}))
        except (LlavactlError, OSError):
            continue
        except Exception as error:  # noqa: BLE001 - plugins may raise anything
            raised = describe_exception(error, packages)
            problems.append(f"`{name}` that doesn't exist raises {raised}; raise DataError or ModelError")
        else:
            problems.append(f"`{name}` that doesn't exist is not reported")
    return problems


def _command_problems(entry: Registration) -> list[str]:
    import click

    command = entry.load()
    if not isinstance(command, click.Command):
        return [f"{entry.target} is not a click command: {command!r:.60}"]
    problems = [] if command.help else ["the command has no help"]
    with contextlib.suppress(click.exceptions.Exit):
        click.Context(command, info_name=entry.name).get_help()
    return problems


def _recipe_problems(entry: Registration) -> list[str]:
    from llavactl.recipe.load import check

    entry.path()
    return [str(problem) for problem in check(entry.name)]
