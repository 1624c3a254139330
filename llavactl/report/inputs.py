"""Reading a run folder as it is: what is missing, half written or not ours is left out, never an error.

A report is made while a run goes on and after it broke, so nothing here may stop it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.paths import read_json


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or {}."""
    return read_json(path)


def read_list(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of the list in ``path``, or []."""
    found = _json(_text(path))
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; a last line cut short by a kill is left out."""
    return [found for line in _text(path).split("\n") if isinstance(found := _json(line), dict)]


def read_recipe(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The resolved recipe of a run: its text, and what it says; "" and {} before the first step."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = _text(run_dir / "recipe.yaml")
    try:
        found = YAML(typ="safe", pure=True).load(text) if text else None
    except (YAMLError, ValueError):
        found = None
    return text, dict(found) if isinstance(found, Mapping) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
