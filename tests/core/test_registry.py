"""Names, lazily imported targets, options and suggestions."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import getattr_static, isfunction
from pathlib import Path
from typing import Any

import pytest

import llavactl
from llavactl.core import plugins, stopping
from llavactl.core.component_faults import component_fault
from llavactl.core.errors import PluginError, RecipeError
from llavactl.core.protocols import CAPABILITIES, KINDS
from llavactl.core.protocols.members import members
from llavactl.core.registry import Options, Registration, Registry, kind_label, registry
from llavactl.core.suggest import suggest


def entry(name: str = "x", plugin: str = "p", target: str = "json:loads", options: str | None = None) -> Registration:
    return Registration("sources", name, target, options, "", plugin)


def test_the_first_registration_of_a_name_is_kept() -> None:
    entries = Registry()
    entries.add(entry(plugin="one"))
    with pytest.raises(PluginError, match=r"plugin two: source 'x'.* plugin one"):
        entries.add(entry(plugin="two"))
    assert entries.get("sources", "x").plugin == "one"


def test_an_unknown_name_lists_the_available_ones() -> None:
    entries = Registry()
    entries.add(entry("llava-json"))
    with pytest.raises(RecipeError, match="source 'llava_json'") as caught:
        entries.get("sources", "llava_json")
    assert caught.value.hint.startswith("did you mean 'llava-json'? available: llava-json; ")
    with pytest.raises(RecipeError, match="vision backbone 'x'") as caught:
        entries.get("vision", "x")
    assert "llava-json" not in caught.value.hint


def test_names_are_exact() -> None:
    entries = Registry()
    entries.add(entry("x"))
    with pytest.raises(RecipeError):
        entries.get("sources", "X")


def test_targets_are_imported_on_load() -> None:
    assert entry(target="json:decoder.JSONDecoder").load().__name__ == "JSONDecoder"
    assert entry().options_model() is Options
    assert entry(options="llavactl.core.registry:Options").options_model() is Options


@pytest.mark.parametrize("target", ["no.such.module:x", "json:nothing", "json:loads.nothing", "antigravity.nope:x"])
def test_a_missing_target_is_an_error_of_its_plugin(target: str) -> None:
    with pytest.raises(PluginError, match=r"source 'x' of plugin p") as caught:
        entry(target=target).load()
    assert "llavactl plugins" in caught.value.hint


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit", "GeneratorExit"])
def test_a_target_that_exits_is_an_error_of_its_plugin(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"raises_{error}.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with stopping.signals_as_interrupts(), pytest.raises(PluginError, match=error):
        entry(target=f"raises_{error}:x").load()


def test_a_signal_while_a_target_is_imported_propagates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    monkeypatch.syspath_prepend(tmp_path)
    with stopping.signals_as_interrupts(), pytest.raises(KeyboardInterrupt):
        entry(target="slow_to_import:x").load()


def test_create_validates_options_and_calls_the_target() -> None:
    class Width(Options):
        width: int

    entries = Registry()
    entries.add(Registration("sources", "x", "t", "o", "", "p"))
    targets: dict[str, Any] = {"t": lambda options: ("component", options.width), "o": Width}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llavactl.core.registry._import", lambda target, _: targets[target])
        assert entries.create("sources", {"name": "x", "width": "3"}) == ("component", 3)


class WithOptions:
    """A source whose options model is nested in it."""

    class Options(llavactl.Options):
        width: int

    def __init__(self, options: WithOptions.Options) -> None:
        self.width = options.width

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.width))


class Inherited(WithOptions):
    """Has the options of its base class."""


@pytest.mark.parametrize("target", ["WithOptions", "Inherited"])
def test_options_nested_in_the_target(target: str) -> None:
    nested = entry(target=f"{__name__}:{target}")
    assert nested.options_model() is WithOptions.Options
    entries = Registry()
    entries.add(nested)
    assert list(entries.create("sources", {"name": "x", "width": "3"})) == [0, 1, 2]
    with pytest.raises(RecipeError, match="height"):
        entries.create("sources", {"name": "x", "width": 3, "height": 1})


def test_registering_does_not_import_the_target() -> None:
    entries = Registry()
    entries.add(entry(target="no_such_module:x"))
    assert entries.names("sources") == ["x"]


class Task:
    """Neither a ``Task`` nor a ``Judged``: without ``score``."""

    protocols = ("any",)

    def questions(self) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("kind", "component", "missing"),
    [
        ("sources", None, ()),
        ("sources", 3, ("__iter__",)),
        ("vision", registry().create("connectors", "linear"), ("identity", "load")),
        ("tasks", Task(), ("score",)),
        ("formats", object(), ("reload", "recognise", "read", "write")),
    ],
)
def test_a_target_that_returns_something_else(kind: str, component: Any, missing: tuple[str, ...]) -> None:
    entries = Registry()
    entries.add(Registration(kind, "x", "t", "o", "", "p"))
    targets: dict[str, Any] = {"t": lambda _: component, "o": Options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llavactl.core.registry._import", lambda target, _: targets[target])
        with pytest.raises(PluginError, match="of plugin p: t returned") as caught:
            entries.create(kind, "x")
    assert type(component).__name__ in caught.value.message
    assert caught.value.message.endswith(f"(no {', '.join(missing)})") == bool(missing)


def test_invalid_options_are_listed_at_once() -> None:
    spec = {"name": "scenes", "scenes": 0, "sceens": 4}
    with pytest.raises(RecipeError) as caught:
        registry().options("sources", spec)
    assert {problem.key for problem in caught.value.problems} == {"scenes", "sceens"}
    assert "llavactl components sources" in caught.value.hint
    with pytest.raises(RecipeError, match="-t scenes: "):
        registry().create("sources", spec, flag="-t ")


def test_options_of_a_name_are_the_defaults() -> None:
    assert registry().options("connectors", "linear") == registry().options("connectors", {"name": "linear"})


def test_a_missing_recipe_file() -> None:
    with pytest.raises(PluginError, match=r"llavactl:recipes/none\.yaml"):
        Registration("recipes", "none", "llavactl:recipes/none.yaml", None, "", "llavactl").path()
    with pytest.raises(PluginError, match=r"no_such_package:none\.yaml"):
        Registration("recipes", "none", "no_such_package:none.yaml", None, "", "p").path()


def test_suggestions() -> None:
    assert suggest("linaer", ["linear", "mlp2x-gelu"]) == "did you mean 'linear'? available: linear, mlp2x-gelu"
    assert suggest("zzz", ["linear"]) == "available: linear"
    assert suggest("zzz", []) == ""


def test_kind_labels() -> None:
    assert [kind_label(kind) for kind in KINDS] == [
        "source",
        "vision backbone",
        "connector",
        "language model",
        "template",
        "teacher",
        "task",
        "format",
        "optimizer",
        "schedule",
    ]


@pytest.mark.parametrize(
    "one", [each for each in registry() if each.plugin == plugins.BUILTIN], ids=lambda one: f"{one.kind}-{one.name}"
)
def test_everything_built_in_can_be_loaded(one: Registration) -> None:
    assert one.summary
    if one.kind == "recipes":
        assert one.path().is_file()
        return
    assert callable(one.load())
    assert issubclass(one.options_model(), Options)


def test_names_are_kebab_case() -> None:
    assert [each.name for each in registry() if "_" in each.name or each.name != each.name.lower()] == []


def test_a_problem_with_several_options_has_no_empty_key() -> None:
    spec = {"name": "judge-pairs", "questions": "q.jsonl", "against": "a.jsonl"}
    with pytest.raises(RecipeError) as caught:
        registry().options("tasks", spec, flag="-t ")
    (problem,) = caught.value.problems
    assert problem.key == ""
    assert "-t" not in str(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_checking_a_component_evaluates_no_property(kind: str) -> None:
    """A property may read files, and raise. On Python 3.11, ``isinstance`` with a Protocol of typing evaluates it."""

    def unreadable(_self: object) -> None:
        raise AssertionError("a property was evaluated")

    protocols = (KINDS[kind], *CAPABILITIES[kind])
    declared = {name: getattr_static(each, name, None) for each in protocols for name in members(each)}
    methods = {name: value if isfunction(value) else property(unreadable) for name, value in declared.items()}
    assert component_fault(kind, type("Component", (), methods)()) == ""
    assert component_fault(kind, type("Component", (), {"other": property(unreadable)})()) != ""
