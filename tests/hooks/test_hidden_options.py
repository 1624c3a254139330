"""A component's option with a name that recipes use themselves would never be set: it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.core.protocols import KINDS
from llavactl.core.registry import Options, registry
from llavactl.recipe.specs import hidden_options
from llavactl.testing import run_cli

HIDDEN = {
    "sources": {"name", "weight", "phase", "split_turns"},
    "vision": {"name"},
    "connectors": {"name"},
    "languages": {"name", "template"},
    "templates": {"name"},
    "teachers": {"name"},
    "tasks": {"name", "limit", "protocol"},
    "formats": {"format", "to", "verify", "allow_different"},
    "optimizers": {"name"},
    "schedules": {"name"},
}

CODE = """
from llavactl import Options, Sample, Turn, hookimpl
from pydantic import Field

@hookimpl
def register_sources(register):
    register("weighted", "weighted:weighted", options="weighted:Weighted", summary="one question")

class Weighted(Options):
    {field}

def weighted(options):
    yield Sample("1", (Turn("user", ("Who?",)), Turn("assistant", ("I.",))))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_recipes_is_hidden(kind: str) -> None:
    model = type("Some", (Options,), {"__annotations__": dict.fromkeys(sorted(set().union(*HIDDEN.values())), int)})
    assert set(hidden_options(kind, model)) == HIDDEN[kind]


def test_no_component_of_the_project_has_one() -> None:
    components = [entry for entry in registry() if entry.kind in KINDS]
    assert [entry for entry in components if hidden_options(entry.kind, entry.options_model())] == []


@pytest.mark.parametrize("field", ["weight: int = Field(3, description='w')", "w: int = Field(3, alias='weight')"])
def test_a_recipe_with_the_component_is_refused(tmp_path: Path, field: str) -> None:
    """Before, the recipe's own key got the value of the plugin's default."""
    (tmp_path / "weighted.py").write_text(CODE.format(field=field))
    recipe = "name: a\nvision: {name: clip, model: b/c}\nconnector: {name: linear}\nlanguage: {name: hf, model: d/e}\n"
    (tmp_path / "recipe.yaml").write_text(f"{recipe}data:\n  stage2: [{{name: weighted, weight: 2}}]\n")
    result = run_cli("--plugin", "weighted.py", "recipes", "check", "--json", cwd=tmp_path)
    assert result.exit_code == 1
    (problem,) = result.json()["problems"]
    assert problem["where"] == "recipe.yaml:6"
    assert problem["key"].startswith("data.stage2")
    assert "plugin weighted" in problem["why"]
    assert "`weight`" in problem["why"]
