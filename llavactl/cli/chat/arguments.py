"""Arguments of a command line as in a shell: quoted, or with escaped spaces, as terminals insert dropped files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.errors import LlavactlError
from llavactl.core.locations import is_file_url, local_path
from llavactl.core.paths import expand_user

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".ppm", ".tga",
    ".tif", ".tiff", ".webp",
)  # fmt: skip

LONGEST = 1 << 16
"""Characters of a line that may consist of file names: parsing names takes quadratic time."""

_ESCAPE = "" if os.name == "nt" else "\\"  # the separator of folders on Windows


@dataclass
class Argument:
    """An argument: its position in the line, its text without quotes, and its unclosed quote or "".

    ``ended``: space follows.
    """

    start: int
    text: str = ""
    quote: str = ""
    ended: bool = False


def words(line: str) -> list[Argument]:
    """The arguments in ``line``; quotes and backslashes as in a shell."""
    found: list[Argument] = []
    escaped = False
    for at, character in enumerate(line):
        if not found or found[-1].ended:
            if character.isspace():
                continue
            found.append(Argument(at))
        word = found[-1]
        if escaped:
            word.text += character
            escaped = False
        elif character == _ESCAPE and word.quote != "'":
            escaped = True
        elif word.quote:
            word.text, word.quote = (word.text, "") if character == word.quote else (word.text + character, word.quote)
        elif character in "'\"":
            word.quote = character
        elif character.isspace():
            word.ended = True
        else:
            word.text += character
    if escaped:
        found[-1].text += _ESCAPE
    return found


def quoted(name: str) -> str:
    """``name`` as one argument."""
    plain = bool(name) and not any(character.isspace() or character in "'\"\\" for character in name)
    return name if plain else "'" + name.replace("'", "'\\''") + "'"


def files(text: str) -> list[str]:
    """The file names in ``text``; all of it is one name if this file exists, so spaces need no quotes then.

    Raises:
        LlavactlError: a quote isn't closed, or a character can't be part of a name.
    """
    if len(text) > LONGEST:
        raise LlavactlError(f"{len(text):,} characters are too long for names of files")
    if "\0" in text:
        raise LlavactlError("a name can't contain the character NUL", hint="name a file")
    if _exists(text):
        return [_local(text)]
    found = words(text)
    if any(word.quote for word in found):
        raise LlavactlError(f"a quote isn't closed: {text:.100}", hint="close it, or use the other kind of quotes")
    return [_local(word.text) for word in found]


def file(text: str) -> Path:
    """The one file named in ``text``; spaces need no quotes.

    Raises:
        LlavactlError: no name, or a quote isn't closed.
    """
    names = files(text)
    if not any(names):
        raise LlavactlError("a file name is missing", hint="/save FILE or /load FILE")
    return Path(names[0] if len(names) == 1 else _local(text))


def dropped_images(line: str) -> list[str]:
    """The names in ``line`` if it consists of paths of existing image files; terminals insert them on a drop."""
    try:
        names = files(line)
    except LlavactlError:
        return []
    return names if names and all(_is_image(name) and _exists(name) for name in names) else []


def missing_images(line: str) -> list[str]:
    """The names in ``line`` if it consists of absolute paths of images, existing or not."""
    found = words(line) if len(line) <= LONGEST else []
    names = [_local(word.text) for word in found if not word.quote]
    absolute = len(names) == len(found) and all(name.startswith("/") and _is_image(name) for name in names)
    return names if absolute else []


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _local(name: str) -> str:
    if is_file_url(name):
        return local_path(name)
    with contextlib.suppress(LlavactlError):  # as in a shell, the ~ of an unknown user is part of the name
        return str(expand_user(name)) if name.startswith("~") else name
    return name


def _exists(name: str) -> bool:
    try:
        return Path(_local(name)).is_file()
    except (OSError, ValueError):  # too long, with a NUL
        return False


def completions(text: str) -> Iterator[tuple[int, str, str]]:
    """Completions of the last argument in ``text``: its start, its replacement, and the name to show."""
    found = words(text)
    word = found[-1] if found and not found[-1].ended else Argument(len(text))
    folder, slash, begin = word.text.rpartition("/")
    try:
        entries = sorted(os.scandir(_local(folder + slash) or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):
        return
    for entry in entries:
        if entry.name.startswith(begin) and (begin or not entry.name.startswith(".")):
            end = "/" if entry.is_dir() else ""
            here = "./" if entry.name.startswith("~") and not folder + slash else ""
            name = quoted(here + folder + slash + entry.name + end)
            yield word.start, name.removesuffix("'") if end else name, entry.name + end
