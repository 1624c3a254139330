"""The JSON schema of recipe files, for editors. It includes the options of all registered components."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llavactl.core import plugin_options, plugins
from llavactl.core.registry import Registration, registry
from llavactl.recipe.frame import Recipe
from llavactl.recipe.specs import Component, Export, Spec


def schema() -> dict[str, Any]:
    """The JSON schema. A component is one of the registered components of its kind, selected by ``name``.

    No key is required in a recipe with ``extends``, not even the ``name`` of a component.
    """
    recipe = Recipe.model_json_schema()
    definitions = recipe["$defs"]
    kinds: tuple[type[Component], ...] = (*Spec.__subclasses__(), Export)
    for spec in kinds:
        if spec.__name__ in definitions:
            definitions[spec.__name__] = _choice(spec, definitions[spec.__name__], definitions)
    recipe["properties"]["plugins"] |= {
        "properties": dict(_plugin_sections(definitions)),
        "additionalProperties": False,
    }
    required = [key for key in recipe.pop("required") if key != "run_dir"]
    recipe["properties"]["extends"] = {"type": "string", "description": "parent recipe: a name or a path"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "anyOf": [{"required": required}, {"required": ["extends"]}],
    }


def _choice(spec: type[Component], shared: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """``oneOf`` the registered components of ``spec``'s kind; ``shared`` is the schema of the keys of all of them."""
    named: list[str] = []
    options = [
        {"title": "changes to the parent recipe's component", "type": "object", "not": {"required": [spec.named_by]}}
    ]
    for entry in registry().entries.get(spec.kind, {}).values():
        with plugins.isolated(entry.plugin):
            options.append(component := _component(entry, spec, shared, definitions))
            named += [entry.name] * (component["required"] == [spec.named_by])
    by_name = [{"title": "without options", "enum": named}] if named else []
    return {"title": spec.kind, "oneOf": [*options, *by_name]}


def _plugin_sections(definitions: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema of every plugin's section in ``plugins``."""
    for name, _ in plugins.implementations("plugin_options"):
        with plugins.isolated(name, "plugin_options"):
            if (model := plugin_options.options_model(name)) is not None:
                yield name, _own_schema(model, f"plugins.{name}", definitions)


def _own_schema(model: type[BaseModel], where: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of ``model``; its definitions are added to ``definitions`` with the prefix ``where``."""
    own = model.model_json_schema(ref_template=f"#/$defs/{where}.{{model}}")
    for name, definition in own.pop("$defs", {}).items():
        definitions[f"{where}.{name}"] = definition
    return own


def _component(
    entry: Registration, spec: type[Component], shared: dict[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    own = _own_schema(entry.options_model(), f"{entry.kind}.{entry.name}", definitions)
    return {
        "title": entry.name,
        "description": entry.summary,
        "type": "object",
        "properties": {**own.get("properties", {}), **shared["properties"], spec.named_by: {"const": entry.name}},
        "required": [*shared["required"], *own.get("required", ())],
        "additionalProperties": own.get("additionalProperties", False),
    }
