"""Copying a registered recipe to where it can be edited."""

from __future__ import annotations

import json
import re
from pathlib import Path

from llavactl.core.errors import RecipeError
from llavactl.core.paths import write_atomic
from llavactl.recipe.document import content, display
from llavactl.recipe.resolve import DEFAULT, find, is_path

_EXTENDS = re.compile(r"^extends:[ \t]*(['\"]?)(?P<parent>[^'\"#\n]+?)\1(?=[ \t]*(#.*)?$)", re.MULTILINE)


def copy(name: str, destination: Path | None = None, *, force: bool = False) -> Path:
    """Writes the recipe ``name`` to ``destination`` (a file or a folder; default ``./recipe.yaml``) and returns it.

    Comments are kept. A parent named by path is named absolutely in the copy, so that the copy finds it too.

    Raises:
        RecipeError: there is no such recipe, or the file exists and ``force`` isn't set.
    """
    place = find(name)
    destination = destination or Path(DEFAULT)
    file = destination / DEFAULT if destination.is_dir() else destination
    if file.exists() and not force:
        raise RecipeError(f"{display(file)} exists", hint="--force overwrites it, or name another file")
    text = content(place.file)
    try:
        write_atomic(file, _EXTENDS.sub(lambda line: _extends(line["parent"], place.file.parent), text))
    except OSError as error:
        raise RecipeError(f"{display(file)} can't be written: {error.strerror}") from error
    return file


def _extends(parent: str, folder: Path) -> str:
    return f"extends: {json.dumps(str(folder / parent)) if is_path(parent) else parent}"
