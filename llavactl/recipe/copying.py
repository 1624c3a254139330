"""Copies a recipe to an editable file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llavactl.core.errors import RecipeError
from llavactl.core.locations import shown_path
from llavactl.core.paths import write_atomic
from llavactl.recipe.document import content
from llavactl.recipe.resolve import DEFAULT, find, is_path

_EXTENDS = re.compile(r"^extends:[ \t]*(['\"]?)(?P<parent>[^'\"#\n]+?)\1(?=[ \t]*(#.*)?$)", re.MULTILINE)


def copy(name: str, destination: Path | None = None, *, force: bool = False) -> Path:
    """Copies the recipe ``name`` to ``destination`` (a file or a folder; default ``./recipe.yaml``); returns the file.

    Comments are kept. A relative path in ``extends`` becomes absolute.

    Raises:
        RecipeError: the recipe doesn't exist, the file can't be written, or it exists and ``force`` isn't set.
    """
    source = find(name).file
    destination = destination or Path(DEFAULT)
    file = destination / DEFAULT if destination.is_dir() else destination
    if file.exists() and not force:
        raise RecipeError(f"{shown_path(file)} exists", hint="pass --force to overwrite it, or another file")
    text = content(source)
    try:
        write_atomic(file, _EXTENDS.sub(lambda match: _extends(match["parent"], source.parent), text))
    except OSError as error:
        raise RecipeError(f"{shown_path(file)} can't be written: {error.strerror}") from error
    return file


def _extends(parent: str, folder: Path) -> str:
    return f"extends: {json.dumps(str(folder / parent)) if is_path(parent) else parent}"
