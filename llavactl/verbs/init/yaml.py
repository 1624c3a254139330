"""YAML of a new recipe: values in one line, quoted if necessary, and lines with comments."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavactl.core.errors import RecipeError

Entry = tuple[str, Any, str]
"""A key, its value and a comment (may be empty)."""

_PLAIN = re.compile(r"[A-Za-z/_][A-Za-z0-9_./-]*|\.\.?/[A-Za-z0-9_./-]*")
_WORDS = frozenset("true false null yes no on off y n".split())  # noqa: SIM905
"""Words that YAML 1.2 or 1.1 reads as other values than strings."""

_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""Characters that JSON doesn't escape, but that a YAML string must not contain."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_COMMENT_COLUMN = 100


def value_text(value: Any) -> str:
    """``value`` in YAML's flow style, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return _number(value) if isinstance(value, float) else json.dumps(value)


def _string(text: str) -> str:
    if _SURROGATE.search(text):
        raise RecipeError(f"{text!r} is not valid Unicode", hint="rename this file or folder")
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def _number(value: float) -> str:
    """``value`` with few digits: ``2e-5``, ``0.03``."""
    text = f"{value:g}" if value >= 0.01 else f"{value:.3e}"
    text = re.sub(r"\.?0+e", "e", text)
    return re.sub(r"e([+-])0+", r"e\1", text).replace("e+", "e")


def lines(entries: Sequence[Entry], indent: str = "  ") -> Iterator[str]:
    """A line for each entry; a long comment is above its line."""
    for key, value, comment in entries:
        line = f"{indent}{key}: {value_text(value)}"
        if comment and len(line) + len(comment) > _COMMENT_COLUMN + len(indent) + 4:
            yield from (f"{indent}# {part}" for part in wrapped(comment))
        elif comment:
            line += f"  # {comment}"
        yield line


def wrapped(text: str) -> list[str]:
    """``text`` in lines of at most 100 characters."""
    import textwrap

    return textwrap.wrap(text, _COMMENT_COLUMN)


def path_in_recipe(path: str, folder: Path, *, absolute: bool) -> str:
    """The absolute ``path`` relative to a recipe in ``folder``.

    With ``absolute`` (the user wrote an absolute path), only if it is inside the folder.
    """
    if absolute and not Path(path).is_relative_to(folder):
        return path
    relative = os.path.relpath(path, folder).replace(os.sep, "/")
    return relative if relative in (".", "..") or relative.startswith("../") else f"./{relative}"
