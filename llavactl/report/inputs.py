"""Reading the files of a run folder: missing, truncated or malformed content is left out and never an error.

Reports are written during a run and after it failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.paths import read_json
from llavactl.files.json_stream import read_stream


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or {}."""
    return read_json(path)


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a JSON list or JSONL file; invalid ones, such as a truncated last line, are skipped."""
    try:
        return [entry.value for entry in read_stream(path) if isinstance(entry.value, dict)]
    except (OSError, DataError):
        return []


def read_recipe(run_dir: Path) -> tuple[str, dict[str, Any]]:
    """The resolved recipe of a run as text and as a dictionary; "" and {} before the first step."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = _text(run_dir / "recipe.yaml")
    try:
        recipe = YAML(typ="safe", pure=True).load(text) if text else None
    except (YAMLError, ValueError):
        recipe = None
    return text, dict(recipe) if isinstance(recipe, Mapping) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
