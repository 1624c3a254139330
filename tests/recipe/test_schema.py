"""The JSON schema of recipe files."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from llavactl.core.registry import Options, Registration, registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.schema import schema
from llavactl.recipe.specs import Spec


def choices(spec: str) -> dict[str, Any]:
    return {each["title"]: each for each in schema()["$defs"][spec]["oneOf"] if "enum" not in each}


def names(spec: str) -> list[str]:
    """The components that a recipe may give by their name only."""
    return [name for each in schema()["$defs"][spec]["oneOf"] for name in each.get("enum", ())]


def test_the_schema_has_every_key_of_the_frame() -> None:
    document = json.loads(json.dumps(schema()))
    assert set(document["properties"]) == {*Recipe.model_fields, "extends"}
    assert document["additionalProperties"] is False
    assert document["anyOf"] == [{"required": ["name", "vision", "connector", "language"]}, {"required": ["extends"]}]


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_reference_is_defined() -> None:
    document = schema()
    assert {reference.removeprefix("#/$defs/") for reference in references(document)} <= set(document["$defs"])


@pytest.mark.parametrize("spec", Spec.__subclasses__())
def test_every_kind_lists_the_registered_components(spec: type[Spec]) -> None:
    if spec.__name__ not in schema()["$defs"]:
        pytest.skip("not in the frame")
    components = choices(spec.__name__)
    assert set(components) - {"changes to the parent recipe's component"} == set(registry().names(spec.kind))
    for name in registry().names(spec.kind):
        assert components[name]["properties"]["name"] == {"const": name}
        assert spec.frame_keys() <= set(components[name]["properties"])


def test_components_without_required_options_are_valid_as_names() -> None:
    assert {"linear", "mlp2x-gelu"} <= set(names("ConnectorSpec"))
    assert "clip" not in names("VisionSpec")
    assert names("Export") == []


def test_options_of_a_component() -> None:
    clip = choices("VisionSpec")["clip"]
    assert {"name", "model", "layer", "select", "image"} == set(clip["properties"])
    assert set(clip["required"]) == {"name", "model"}
    assert clip["additionalProperties"] is False


class Inner(BaseModel):
    deep: int


class Nested(Options):
    inner: Inner
    image: Literal["square", "pad"] = "pad"


def test_definitions_of_components_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Registration("vision", "nested", "x:y", "x:Nested", "", "plugin")
    monkeypatch.setitem(registry().entries["vision"], "nested", entry)
    monkeypatch.setattr(Registration, "options_model", lambda self: Nested if self.name == "nested" else Options)
    document = schema()
    assert "deep" in document["$defs"]["vision.nested.Inner"]["properties"]
    assert choices("VisionSpec")["nested"]["properties"]["inner"] == {"$ref": "#/$defs/vision.nested.Inner"}


def test_a_broken_component_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Registration("connectors", "broken", "x:y", "no.such:Options", "", "plugin")
    monkeypatch.setitem(registry().entries["connectors"], "broken", entry)
    components = choices("ConnectorSpec")
    assert "broken" not in components
    assert "linear" in components
