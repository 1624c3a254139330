"""Option types for files and models, resolved relative to the recipe that contains them.

A string from a recipe file has that file's folder as its base (``Located``). Strings from ``-o`` and from recipes given
by name are relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llavactl.core.locations import is_file_url, is_url, local_path


class Located(str):
    """A string from a recipe; relative paths in it start at the folder ``base``."""

    base: Path

    def __new__(cls, text: str, base: Path) -> Located:
        located = super().__new__(cls, text)
        located.base = base
        return located


def _base(value: str) -> Path:
    return getattr(value, "base", None) or Path.cwd()


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError(f"expected a file or folder, got {str(value)!r}")
    try:
        path = Path(value).expanduser() if value.startswith("~") else Path(value)  # Path("./~") is Path("~")
        return Path(_base(value), path).absolute()
    except RuntimeError as error:  # ~name of an unknown user
        raise ValueError(f"{value}: {error}") from error


def _model(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    folder = _path(value)
    looks_local = value.startswith((".", "~")) or Path(value).is_absolute()
    return str(folder) if folder.is_dir() or looks_local else str(value)


def _path_or_url(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return str(value) if is_url(value) and not is_file_url(value) else _path(Located(local_path(value), _base(value)))


RecipePath = Annotated[Path, BeforeValidator(_path)]
"""A file or folder, relative to the recipe that contains it; made absolute."""

ModelId = Annotated[str, BeforeValidator(_model)]
"""A model's id or folder; made absolute if the folder exists or the value starts with ``.``, ``~`` or ``/``."""


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


RecipePaths = Annotated[tuple[RecipePath, ...], BeforeValidator(_paths)]
"""One file or folder, or a list of them."""

RecipePlace = Annotated[str | Path, BeforeValidator(_path_or_url)]
"""A file, a folder or a glob pattern, relative to the recipe that contains it; or a URL, unchanged."""

FollowLinks = Annotated[bool, Field(description="true: follow symbolic links that point outside `images`")]
"""Whether symbolic links to images may point outside the image folder, which may itself be a link."""
