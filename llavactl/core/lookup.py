"""Finding an image by the name that a record gives it: how names may be spelled, and where links may lead."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from os.path import exists, islink, lexists, realpath
from unicodedata import normalize
from urllib.parse import unquote

from llavactl.core.errors import DataError

LONGEST = 200
"""Characters of a name that a message shows."""

_ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:[/\\]")
"""What begins like an absolute path, of Windows too: records are carried from one system to another."""

_HUB_SNAPSHOT = re.compile(r"(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")
_HUB_BLOB = re.compile(r"/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


class LinkOutsideError(DataError):
    """A symbolic link leads out of the folder of the images, and nobody said that it may."""


def shortened(name: str) -> str:
    """``name`` as messages show it: at most ``LONGEST`` characters, and still different for different names."""
    if len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[:120]}…{digest}…{name[-60:]}"


def is_absolute(path: str) -> bool:
    """Whether ``path`` begins at a root or a drive, of this system or another."""
    return _ABSOLUTE.match(path) is not None


def is_url(text: str) -> bool:
    """Whether ``text`` is a URL."""
    return "://" in text


def is_file_url(text: str) -> bool:
    """Whether ``text`` is a URL of a file on this machine."""
    return text[:7].lower() == "file://"


def local_path(text: str) -> str:
    """``text``; where it is a URL of a file on this machine, that file's path."""
    if not is_file_url(text):
        return text
    path = text[7:].removeprefix("localhost")
    return path if exists(path) else unquote(path)  # noqa: PTH110 - strings throughout: there may be millions of names


def stays_below(root: str, path: str) -> None:
    """Raises a DataError where ``path``, however it may be spelled, leads outside ``root``."""
    bare = path.strip()
    parts = bare.replace("\\", "/").split("/")
    if ".." in parts or is_absolute(bare) or not any(part not in ("", ".") for part in parts) or "\0" in path:
        raise DataError(
            f"image path {shortened(path)!r} leads outside its root {root}",
            hint="image paths are relative to the source's `images` folder and stay below it",
        )


def canonical(path: str) -> str:
    """One spelling of all that mean the same file on some system: slashes, composed characters, no space around."""
    return normalize("NFC", path.strip().replace("\\", "/"))


def spellings(path: str) -> Iterator[str]:
    """Other ways to write ``path``: no space around it, the slashes of Windows or those of everybody else."""
    bare = path.strip()
    slashes = bare.replace("\\", "/")
    yield from dict.fromkeys(each for each in (bare, slashes, slashes.replace("/", "\\")) if each != path)


def find_file(root: str, path: str) -> str:
    """The file below ``root`` that ``path`` means where there is none of exactly this name.

    Raises:
        FileNotFoundError: there is none; the reason names a file whose name differs only in case.
    """
    for each in spellings(path):
        if exists(f"{root}/{each}"):  # noqa: PTH110
            return f"{root}/{each}"
    if islink(f"{root}/{path}"):  # noqa: PTH114
        raise FileNotFoundError(2, "it is a broken symbolic link")
    reason = "No such file or directory"
    for each in (path, *spellings(path)):
        found, same = _walk(root, each)
        if same:
            return found
        if found:
            twin = shortened(found.removeprefix(root).lstrip("/"))
            reason = f"No such file or directory, but one that differs in case: {twin}"
    raise FileNotFoundError(2, reason)


def _walk(root: str, path: str) -> tuple[str, bool]:
    """The file at ``path`` in another Unicode normal form, and True; in other case, and False; else "" and False."""
    where, same = root, True
    for part in path.split("/"):
        name: str | None = part
        if not lexists(f"{where}/{part}"):
            try:
                composed, folded = _listing(where, os.stat(where).st_mtime_ns)  # noqa: PTH116
            except OSError:
                return "", False
            if (name := composed.get(normalize("NFC", part))) is None:
                same, name = False, folded.get(normalize("NFC", part).casefold())
            if name is None:
                return "", False
        where = f"{where}/{name}"
    return where, same


@lru_cache(maxsize=16)
def _listing(folder: str, _modified: int) -> tuple[dict[str, str], dict[str, str]]:
    """The names in ``folder`` by their composed form, where that may be another, and by that without case."""
    names = os.listdir(folder)  # noqa: PTH208
    composed = {normalize("NFC", name): name for name in names if not name.isascii()}
    return composed, {normalize("NFC", name).casefold(): name for name in names}


def refuse_outside(root: str, target: str, name: str) -> None:
    """Raises a LinkOutsideError where ``target``, a real path, is not below ``root``.

    What a snapshot of the hub's cache links to belongs to it: the blobs of the same repository.
    """
    top = realpath(root)
    if target.startswith(top.rstrip(os.sep) + os.sep):
        return
    hub = _HUB_SNAPSHOT.fullmatch(top)
    if hub and target.startswith(hub[1]) and _HUB_BLOB.fullmatch(target[len(hub[1]) :]):
        return
    raise LinkOutsideError(
        f"image {name}: a symbolic link leads out of {root}",
        hint="`follow_links: true` beside `images` of the source (a task: -t follow_links=true) follows such links",
    )
