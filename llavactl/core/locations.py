"""Paths and URLs as strings: distinguishes them and shortens them for messages."""

from __future__ import annotations

import hashlib
import re
from os.path import exists, realpath
from pathlib import Path
from urllib.parse import unquote

LONGEST = 200
"""The maximum length of a name in messages."""

_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
"""The start of an absolute POSIX or Windows path; records may come from another system."""


def shortened(name: str) -> str:
    """``name`` with at most ``LONGEST`` characters for messages; different names stay different."""
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    if name[:5].lower() == "data:":
        return f"{name.partition(',')[0]:.40},…{digest}…"
    return f"{name[:120]}…{digest}…{name[-60:]}"


def shown_path(path: Path) -> str:
    """``path`` for messages: relative to the working directory if it is inside; absolute paths without ``..``.

    Only the folder before the last ``..`` is resolved, because ``link/..`` contains the target of the link, not the
    link; other links keep their names.
    """
    parts = path.absolute().parts
    above = len(parts) - parts[::-1].index("..") if ".." in parts else 0
    direct = Path(realpath(Path(*parts[:above])), *parts[above:]) if above else Path(*parts)
    folder = Path.cwd()
    if direct.is_relative_to(folder):
        return str(direct.relative_to(folder))
    return str(direct if path.is_absolute() else path)


def is_absolute(path: str) -> bool:
    """Whether ``path`` is absolute on any system (starts with a root or a drive)."""
    return _ABSOLUTE.match(path) is not None


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL."""
    return "://" in text


def is_file_url(text: str) -> bool:
    """Whether ``text`` is a ``file:`` URL."""
    return text[:7].lower() == "file://"


def local_path(text: str) -> str:
    """The path of a ``file:`` URL; other strings unchanged."""
    if not is_file_url(text):
        return text
    path = text[7:].removeprefix("localhost")
    return path if exists(path) else unquote(path)  # noqa: PTH110 - strings for speed: there may be millions
