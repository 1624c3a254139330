"""Converts pydantic's validation errors to messages, and describes the options of a model.

Expected types come from the model's JSON schema, which editors use as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from llavactl.core.suggest import suggest

Key = str | int
KeyPath = tuple[Key, ...]
KeyProblem = tuple[KeyPath, str]
"""A path in a document and what is wrong there."""

Schema = Mapping[str, Any]

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
# Suffixes of pydantic's errors about a wrong type or range; other errors keep pydantic's message.
_TYPE_ERRORS = ("_type", "_parsing", "_error", "from_float", "_than", "_than_equal", "finite_number", "_mismatch")

RENAMED = {
    "blind_twin": "blind_baseline",
    "final": "restore_best",
    "fold": "pixel_shuffle",
    "grounding_steps": "box_alignment_steps",
    "micro_tokens": "micro_batch_tokens",
    "only": "trainable_modules",
    "stage1": "stage1_baseline",
    "turns": "split_turns",
}
"""Keys of earlier versions and their current names."""


def explain(
    error: ValidationError, model: type[BaseModel], data: Any, also: Iterable[str] = ()
) -> Iterator[KeyProblem]:
    """The path of each invalid value in ``data``, once, with the reason.

    ``model`` is the model that rejected ``data``; ``also`` are valid top-level keys that it doesn't define.
    """
    schema = schema_of(model)
    reported = set()
    for detail in error.errors(include_url=False):
        path = _existing_path(detail["loc"], data)
        if detail["type"] == "missing":
            path = (*path, detail["loc"][-1])
        if path not in reported:
            reported.add(path)
            yield path, _reason(detail, path, schema, data, also if len(path) == 1 else ())


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """The JSON schema of ``model``; empty if it has none."""
    try:
        return model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        return {}


def _reason(detail: Mapping[str, Any], path: Sequence[Key], schema: Schema, data: Any, also: Iterable[str]) -> str:
    kind = detail["type"]
    if kind in ("value_error", "assertion_error"):
        return str(detail["ctx"]["error"])
    if kind == "extra_forbidden" and len(path) == len(detail["loc"]):
        properties = _resolve(_schema_at(schema, path[:-1], schema), schema).get("properties", {})
        known = {*properties, *also}
        if (now := RENAMED.get(str(path[-1]))) in known:
            expected = describe(properties.get(now, {}), schema)
            return f"unknown key; renamed to {now!r}: {expected}".removesuffix(": ")
        return f"unknown key; {_suggestion(str(path[-1]), known)}".removesuffix("; ")
    expected = describe(_schema_at(schema, path, schema), schema)
    if kind == "missing":
        return f"missing, expected {expected}" if expected else "missing"
    if expected and (len(path) < len(detail["loc"]) or kind.endswith(_TYPE_ERRORS)):
        return f"expected {expected}, got {_shortened(_value_at(data, path))}"
    return str(detail["msg"])


def _suggestion(key: str, known: Iterable[str]) -> str:
    """The most similar key, else all keys."""
    similar, _, available = suggest(key, known).rpartition("available: ")
    return similar.strip() or f"available: {available}" if available else ""


def describe(field: Schema, schema: Schema) -> str:
    """The expected value of ``field``, such as ``an integer ≥ 1``; empty if the schema doesn't define it."""
    field = _resolve(field, schema)
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(filter(None, (describe(option, schema) for option in options)))
    if "enum" in field:
        return f"one of {', '.join(map(repr, field['enum']))}"
    if "const" in field:
        return repr(field["const"])
    if "pattern" in field:
        return str(field.get("description", f"a string matching {field['pattern']}"))
    if field.get("format") == "date":
        return "a date such as 2024-07-26"
    if field.get("format") in ("path", "file-path", "directory-path"):
        return "a file or folder"
    if "name" in field.get("required", ()):
        return "a component, {name: …} or its name"
    if item := describe(field["items"], schema) if "items" in field else "":
        return f"a list, each item {item}"
    bounds = " and ".join(f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field)
    return f"{_TYPES.get(field.get('type', ''), '')} {bounds}".strip()


def describe_options(model: type[BaseModel]) -> dict[str, str]:
    """The options of ``model`` by name: expected value, default and description."""
    schema = schema_of(model)
    described = {}
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else f"default {json.dumps(field.get('default'))}"
        expected = describe(field, schema) or "any value"
        about = f"; {field['description']}" if "description" in field and "pattern" not in field else ""
        described[name] = f"{expected}; {default}{about}"
    return described


def _schema_at(field: Schema, path: Sequence[Key], schema: Schema) -> Schema:
    """The schema of the value at ``path`` in ``field``."""
    if not path:
        return field
    field = _resolve(field, schema)
    for option in field.get("anyOf", [field]):
        option = _resolve(option, schema)
        others = option.get("items" if isinstance(path[0], int) else "additionalProperties")
        inner = option.get("properties", {}).get(path[0], others)
        if isinstance(inner, Mapping):
            return _schema_at(inner, path[1:], schema)
    return {}


def _resolve(field: Schema, schema: Schema) -> Schema:
    reference = field.get("$ref", "")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else field


def _existing_path(loc: Sequence[Key], data: Any) -> KeyPath:
    """The part of pydantic's ``loc`` that exists in ``data``: pydantic appends the branch of a union."""
    path: list[Key] = []
    for key in loc:
        exists = len(data) > key if isinstance(data, list) and isinstance(key, int) else key in _keys(data)
        if not exists:
            break
        data = data[key]
        path.append(key)
    return tuple(path)


def _keys(data: Any) -> Iterable[Key]:
    return data if isinstance(data, Mapping) else ()


def _value_at(data: Any, path: Sequence[Key]) -> Any:
    for key in path:
        data = data[key]
    return data


def _shortened(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
