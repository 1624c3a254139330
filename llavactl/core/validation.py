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
# Errors that say "this kind of value was expected"; for others pydantic's own words are better.
_EXPECTED = ("_type", "_parsing", "_error", "from_float", "_than", "_than_equal", "finite_number", "_mismatch")


def explain(
    error: ValidationError, model: type[BaseModel], given: Any, also: Iterable[str] = ()
) -> Iterator[tuple[KeyPath, str]]:
    """Each place in ``given`` that ``model`` refused, once, and why; ``also`` are keys known beside the model's."""
    schema = schema_of(model)
    seen = set()
    for found in error.errors(include_url=False):
        path = _said(found["loc"], given)
        if found["type"] == "missing":
            path = (*path, found["loc"][-1])
        if path not in seen:
            seen.add(path)
            yield path, _why(found, path, schema, given, also if len(path) == 1 else ())


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """The model's JSON schema; empty for a model that has none."""
    try:
        return model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        return {}


def _why(found: Mapping[str, Any], path: Sequence[Key], schema: Schema, given: Any, also: Iterable[str]) -> str:
    kind = found["type"]
    if kind in ("value_error", "assertion_error"):
        return str(found["ctx"]["error"])
    if kind == "extra_forbidden" and len(path) == len(found["loc"]):
        known = {*_resolve(_at(schema, path[:-1], schema), schema).get("properties", {}), *also}
        return f"unknown key; {_meant(str(path[-1]), known)}".removesuffix("; ")
    expected = describe(_at(schema, path, schema), schema)
    if kind == "missing":
        return f"is missing: {expected}" if expected else "is missing"
    if expected and (len(path) < len(found["loc"]) or kind.endswith(_EXPECTED)):
        return f"must be {expected}, not {_shown(_value(given, path))}"
    return str(found["msg"])


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
"""Keys of earlier versions, and their names now."""


def _meant(key: str, known: Iterable[str]) -> str:
    """The nearest key; all of them only when none is near."""
    if (now := RENAMED.get(key, "")) in {*known}:
        return f"renamed to {now!r}"
    near, _, every = suggest(key, known).rpartition("available: ")
    return near.strip() or f"available: {every}" if every else ""


def describe(field: Schema, schema: Schema) -> str:
    """``an integer ≥ 1``: what a value of ``field`` is; nothing when the schema doesn't say."""
    field = _resolve(field, schema)
    if options := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(filter(None, (describe(option, schema) for option in options)))
    if "enum" in field:
        return f"one of {', '.join(map(repr, field['enum']))}"
    if "const" in field:
        return repr(field["const"])
    if "pattern" in field:
        return str(field.get("description", f"text like {field['pattern']}"))
    if field.get("format") == "date":
        return "a date such as 2024-07-26"
    if field.get("format") in ("path", "file-path", "directory-path"):
        return "a file or folder"
    if "name" in field.get("required", ()):
        return "a component, {name: …}"
    if each := describe(field["items"], schema) if "items" in field else "":
        return f"a list, each {each}"
    bounds = " and ".join(f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field)
    return f"{_TYPES.get(field.get('type', ''), '')} {bounds}".strip()


def describe_options(model: type[BaseModel]) -> dict[str, str]:
    """Every option of a component in words: what it holds, its default, what it is for."""
    schema = schema_of(model)
    described = {}
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else f"default {json.dumps(field.get('default'))}"
        what = describe(field, schema) or "any value"
        about = f"; {field['description']}" if "description" in field and "pattern" not in field else ""
        described[name] = f"{what}; {default}{about}"
    return described


def _at(field: Schema, path: Sequence[Key], schema: Schema) -> Schema:
    """The schema of what lies at ``path`` in ``field``."""
    if not path:
        return field
    field = _resolve(field, schema)
    for option in field.get("anyOf", [field]):
        option = _resolve(option, schema)
        others = option.get("items" if isinstance(path[0], int) else "additionalProperties")
        inner = option.get("properties", {}).get(path[0], others)
        if isinstance(inner, Mapping):
            return _at(inner, path[1:], schema)
    return {}


def _resolve(field: Schema, schema: Schema) -> Schema:
    reference = field.get("$ref", "")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else field


def _said(loc: Sequence[Key], given: Any) -> tuple[Key, ...]:
    """The part of ``loc`` that is in ``given``: pydantic adds which branch of a union it tried."""
    path: list[Key] = []
    for key in loc:
        known = len(given) > key if isinstance(given, list) and isinstance(key, int) else key in _keys(given)
        if not known:
            break
        given = given[key]
        path.append(key)
    return tuple(path)


def _keys(given: Any) -> Iterable[Key]:
    return given if isinstance(given, Mapping) else ()


def _value(given: Any, path: Sequence[Key]) -> Any:
    for key in path:
        given = given[key]
    return given


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
