"""The JSON schema that editors get."""

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
    return {each["title"]: each for each in schema()["$defs"][spec]["oneOf"]}


def test_it_is_one_json_document_with_every_key_of_the_frame() -> None:
    made = json.loads(json.dumps(schema()))
    assert set(made["properties"]) == {*Recipe.model_fields, "extends"}
    assert made["additionalProperties"] is False
    assert made["anyOf"] == [{"required": ["name", "vision", "connector", "language"]}, {"required": ["extends"]}]


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_reference_leads_somewhere() -> None:
    made = schema()
    assert {reference.removeprefix("#/$defs/") for reference in references(made)} <= set(made["$defs"])


@pytest.mark.parametrize("spec", Spec.__subclasses__())
def test_every_kind_offers_what_is_registered(spec: type[Spec]) -> None:
    if spec.__name__ not in schema()["$defs"]:
        pytest.skip("not in the frame")
    found = choices(spec.__name__)
    assert set(found) - {"the parent recipe's component, changed"} == set(registry().names(spec.kind))
    for name in registry().names(spec.kind):
        assert found[name]["properties"]["name"] == {"const": name}
        assert spec.frame_keys() <= set(found[name]["properties"])


def test_options_are_those_of_the_component() -> None:
    clip = choices("VisionSpec")["clip"]
    assert {"name", "model", "layer", "select", "image"} == set(clip["properties"])
    assert set(clip["required"]) == {"name", "model"}
    assert clip["additionalProperties"] is False


class Inner(BaseModel):
    deep: int


class Nested(Options):
    inner: Inner
    image: Literal["square", "pad"] = "pad"


def test_a_components_own_definitions_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Registration("vision", "nested", "x:y", "x:Nested", "", "stranger")
    monkeypatch.setitem(registry().entries["vision"], "nested", entry)
    monkeypatch.setattr(Registration, "options_model", lambda self: Nested if self.name == "nested" else Options)
    made = schema()
    assert "deep" in made["$defs"]["vision.nested.Inner"]["properties"]
    assert choices("VisionSpec")["nested"]["properties"]["inner"] == {"$ref": "#/$defs/vision.nested.Inner"}


def test_a_broken_component_costs_its_own_entry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Registration("connectors", "broken", "x:y", "no.such:Options", "", "stranger")
    monkeypatch.setitem(registry().entries["connectors"], "broken", entry)
    found = choices("ConnectorSpec")
    assert "broken" not in found
    assert "linear" in found
