"""Paths and URLs as texts: which of them a text is, and its short form for messages."""

from __future__ import annotations

import hashlib
import re
from os.path import exists
from urllib.parse import unquote

LONGEST = 200
"""How many characters of a name a message shows."""

_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
"""The beginning of an absolute path, also of Windows: records are moved between systems."""


def shortened(name: str) -> str:
    """``name`` for messages: at most ``LONGEST`` characters, and still distinct for different names."""
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:120]}…{digest}…{name[-60:]}"


def is_absolute(path: str) -> bool:
    """Whether ``path`` is absolute on this or another system (root or drive)."""
    return _ABSOLUTE.match(path) is not None


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL."""
    return "://" in text


def is_file_url(text: str) -> bool:
    """Whether ``text`` is a URL of a file on this machine."""
    return text[:7].lower() == "file://"


def local_path(text: str) -> str:
    """The path of a ``file:`` URL; any other ``text`` unchanged."""
    if not is_file_url(text):
        return text
    path = text[7:].removeprefix("localhost")
    return path if exists(path) else unquote(path)  # noqa: PTH110 - strings throughout: there may be millions of names
