"""Types for a component's options that name files: relative to the recipe that says so.

A string read from a recipe file remembers that file's folder (``Located``), one from ``-o`` or from a
recipe given by name the working directory; these types use it while the options are validated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from llavactl.core.locations import is_file_url, is_url, local_path


class Located(str):
    """A string that knows which folder its paths are relative to."""

    base: Path

    def __new__(cls, text: str, base: Path) -> Located:
        made = super().__new__(cls, text)
        made.base = base
        return made


def _base(value: str) -> Path:
    return getattr(value, "base", None) or Path.cwd()


def _path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value or "\0" in value:
        raise ValueError(f"must be a file or folder, not {str(value)!r}")
    try:
        return Path(_base(value), Path(value).expanduser()).absolute()
    except RuntimeError as error:  # ~name of nobody
        raise ValueError(f"{value}: {error}") from error


def _model(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    folder = _path(value)
    looks_local = value.startswith((".", "~")) or Path(value).is_absolute()
    return str(folder) if folder.is_dir() or looks_local else str(value)


def _place(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return str(value) if is_url(value) and not is_file_url(value) else _path(Located(local_path(value), _base(value)))


RecipePath = Annotated[Path, BeforeValidator(_path)]
"""A file or folder: relative to the recipe that names it, made absolute."""

ModelId = Annotated[str, BeforeValidator(_model)]
"""A model's id, or its folder: made absolute where the folder exists or is written like a path."""


def _paths(value: Any) -> Any:
    return [value] if isinstance(value, str | Path) else value


RecipePaths = Annotated[tuple[RecipePath, ...], BeforeValidator(_paths)]
"""One file or folder, or a list of them."""

RecipePlace = Annotated[str | Path, BeforeValidator(_place)]
"""A file, a folder or a pattern of files, relative to the recipe that names it; or a URL, as it is."""

FollowLinks = Annotated[bool, Field(description="true: follow symbolic links that point outside `images`")]
"""Whether links among the images may point outside their folder; the folder itself may always be a link."""
