"""The JSON schema of recipe files, for editors. It includes the options of all registered components."""

from __future__ import annotations

from typing import Any

from llavactl.core import plugins
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
    required = [key for key in recipe.pop("required") if key != "run_dir"]
    recipe["properties"]["extends"] = {"type": "string", "description": "parent recipe: a name or a path"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **recipe,
        "anyOf": [{"required": required}, {"required": ["extends"]}],
    }


def _choice(spec: type[Component], shared: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """``oneOf`` the registered components of ``spec``'s kind; ``shared`` is the schema of the keys of all of them."""
    options = [{"title": "changes to the parent recipe's component", "not": {"required": [spec.named_by]}}]
    for entry in registry().entries.get(spec.kind, {}).values():
        with plugins.isolated(entry.plugin):
            options.append(_component(entry, spec, shared, definitions))
    return {"title": spec.kind, "type": "object", "oneOf": options}


def _component(
    entry: Registration, spec: type[Component], shared: dict[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    where = f"{entry.kind}.{entry.name}"
    own = entry.options_model().model_json_schema(ref_template=f"#/$defs/{where}.{{model}}")
    for name, definition in own.get("$defs", {}).items():
        definitions[f"{where}.{name}"] = definition
    return {
        "title": entry.name,
        "description": entry.summary,
        "type": "object",
        "properties": {**own.get("properties", {}), **shared["properties"], spec.named_by: {"const": entry.name}},
        "required": [*shared["required"], *own.get("required", ())],
        "additionalProperties": own.get("additionalProperties", False),
    }
