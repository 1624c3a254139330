"""Checks of options models: descriptions, defaults and what a recipe can hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema

from llavactl.core.plugin_code import attribute_location
from llavactl.core.registry import Options
from llavactl.core.validation import explain


def model_problems(model: Any) -> list[str]:
    """Problems of an options model: its class, descriptions and defaults."""
    if not (isinstance(model, type) and issubclass(model, Options)):
        return [f"{model!r:.60} is not a subclass of llavactl.Options"]
    problems = ["unknown keys are ignored (extra)"] if model.model_config.get("extra") == "ignore" else []
    for name, field in model.model_fields.items():
        faults = [] if field.description else ["no description"]
        faults += [*_default_faults(model, name), *_schema_faults(model, name)]
        where = attribute_location(model, name)
        problems += [f"{name} ({where}): {fault}" if where else f"{name}: {fault}" for fault in faults]
    return problems


def _default_faults(model: type[BaseModel], name: str) -> Iterator[str]:
    """Why the option ``name`` can't have its own default: a recipe is saved with the defaults and loaded again."""
    field = model.model_fields[name]
    if field.is_required() or field.default_factory_takes_validated_data:
        return
    default = {field.alias or name: field.get_default(call_default_factory=True)}
    try:
        model.model_validate(default)
    except ValidationError as error:
        for path, why in explain(error, model, default):
            if path[:1] == tuple(default):
                yield f"the default is invalid: {why}"


def _schema_faults(model: type[BaseModel], name: str) -> Iterator[str]:
    """Why the option ``name`` can't be described to users and editors."""
    field = model.model_fields[name]
    fields: dict[str, Any] = {name: (field.annotation, field)}
    try:
        create_model("Alone", __config__=model.model_config, **fields).model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        yield f"the type has no JSON schema: {error.message}"
