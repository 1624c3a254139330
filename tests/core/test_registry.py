"""Names, lazily imported targets, suggestions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.core import plugins
from llavactl.core.errors import PluginError, RecipeError
from llavactl.core.protocols import KINDS
from llavactl.core.registry import Options, Registration, Registry, kind_label, registry
from llavactl.core.suggest import suggest


def entry(name: str = "x", plugin: str = "p", target: str = "json:loads", options: str | None = None) -> Registration:
    return Registration("sources", name, target, options, "", plugin)


def test_the_first_keeps_a_name_and_both_are_named() -> None:
    made = Registry()
    made.add(entry(plugin="one"))
    with pytest.raises(PluginError, match=r"'x'.* plugin one .* plugin two"):
        made.add(entry(plugin="two"))
    assert made.get("sources", "x").plugin == "one"


def test_an_unknown_name_gets_what_there_is() -> None:
    made = Registry()
    made.add(entry("llava-json"))
    with pytest.raises(RecipeError, match="source 'llava_json'") as caught:
        made.get("sources", "llava_json")
    assert caught.value.hint == "did you mean 'llava-json'? available: llava-json"
    with pytest.raises(RecipeError, match="vision backbone 'x'") as caught:
        made.get("vision", "x")
    assert caught.value.hint == ""


def test_names_are_exact() -> None:
    made = Registry()
    made.add(entry("x"))
    with pytest.raises(RecipeError):
        made.get("sources", "X")


def test_a_target_is_imported_when_it_is_used() -> None:
    assert entry(target="json:decoder.JSONDecoder").load().__name__ == "JSONDecoder"
    assert entry().options_model() is Options
    assert entry(options="llavactl.core.registry:Options").options_model() is Options


@pytest.mark.parametrize("target", ["no.such.module:x", "json:nothing", "json:loads.nothing", "antigravity.nope:x"])
def test_a_target_that_is_not_there_names_plugin_and_reason(target: str) -> None:
    with pytest.raises(PluginError, match=r"source 'x' of plugin p can't be loaded from") as caught:
        entry(target=target).load()
    assert "llavactl plugins" in caught.value.hint


def test_a_target_that_exits_is_the_plugins_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves_at_once.py").write_text("import sys; sys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="SystemExit: 3"):
        entry(target="leaves_at_once:x").load()


def test_create_validates_options_and_calls_the_target() -> None:
    class Width(Options):
        width: int

    made = Registry()
    made.add(Registration("sources", "x", "t", "o", "", "p"))
    targets: dict[str, Any] = {"t": lambda options: ("made", options.width), "o": Width}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llavactl.core.registry._import", lambda target, _: targets[target])
        assert made.create("sources", {"name": "x", "width": "3"}) == ("made", 3)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"llavactl:recipes/none\.yaml"):
        Registration("recipes", "none", "llavactl:recipes/none.yaml", None, "", "llavactl").path()
    with pytest.raises(PluginError, match=r"no_such_package:none\.yaml"):
        Registration("recipes", "none", "no_such_package:none.yaml", None, "", "p").path()


def test_suggestions() -> None:
    assert suggest("linaer", ["linear", "mlp2x-gelu"]) == "did you mean 'linear'? available: linear, mlp2x-gelu"
    assert suggest("zzz", ["linear"]) == "available: linear"
    assert suggest("zzz", []) == ""


def test_singulars() -> None:
    assert [kind_label(kind) for kind in KINDS] == [
        "source",
        "vision backbone",
        "connector",
        "language",
        "template",
        "teacher",
        "task",
        "format",
    ]


@pytest.mark.parametrize(
    "one", [each for each in registry() if each.plugin == plugins.BUILTIN], ids=lambda one: f"{one.kind}-{one.name}"
)
def test_everything_built_in_can_be_loaded(one: Registration) -> None:
    assert one.summary, "what it is, in a line"
    if one.kind == "recipes":
        assert one.path().is_file()
        return
    assert callable(one.load())
    assert issubclass(one.options_model(), Options)


def test_names_are_kebab_case() -> None:
    assert [each.name for each in registry() if "_" in each.name or each.name != each.name.lower()] == []
