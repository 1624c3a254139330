"""Finding an image file by the path in a record: equivalent spellings and symbolic links."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import lru_cache
from os.path import exists, islink, lexists, realpath
from time import monotonic
from unicodedata import normalize

from llavactl.core.errors import DataError
from llavactl.core.locations import is_absolute, shortened

_HUB_SNAPSHOT = re.compile(r"(.*/(?:datasets|models|spaces)--[^/]+)/snapshots/[^/]+(?:/.*)?")
_HUB_BLOB = re.compile(r"/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


class LinkOutsideError(DataError):
    """A symbolic link points outside the folder of images without ``follow_links``."""


def refuse_leaving(root: str, path: str) -> None:
    """Raises a DataError if ``path``, in any spelling, leads outside ``root``."""
    bare = path.strip()
    parts = bare.replace("\\", "/").split("/")
    if ".." in parts or is_absolute(bare) or not any(part not in ("", ".") for part in parts) or "\0" in path:
        raise DataError(
            f"image path {shortened(path)!r} leads outside its root {root}",
            hint="image paths are relative to the source's `images` folder and must stay inside it",
        )


def canonical(path: str) -> str:
    """The canonical spelling of ``path``: forward slashes, composed characters (NFC), no surrounding space."""
    return normalize("NFC", path.strip().replace("\\", "/"))


def spellings(path: str) -> Iterator[str]:
    """Other spellings of ``path``: without surrounding space, and with slashes for backslashes or the reverse."""
    bare = path.strip()
    slashes = bare.replace("\\", "/")
    candidates = (bare, slashes, slashes.replace("/", "\\"))
    yield from dict.fromkeys(spelling for spelling in candidates if spelling != path)


def real_folder(folder: str) -> str:
    """The real path of ``folder``, remembered for a second.

    Resolving the links in a path takes a system call for each folder, and data sets have few folders with many images.
    """
    return _real_path(folder, int(monotonic()))


@lru_cache(maxsize=4096)
def _real_path(path: str, _second: int) -> str:
    return realpath(path)


def find_file(root: str, path: str) -> str:
    """The file below ``root`` whose name is an equivalent spelling of ``path``, if none has exactly this name.

    Raises:
        FileNotFoundError: no such file; the reason names a file that differs only in case, if any.
    """
    for spelling in spellings(path):
        if exists(f"{root}/{spelling}"):  # noqa: PTH110
            return f"{root}/{spelling}"
    if islink(f"{root}/{path}"):  # noqa: PTH114
        raise FileNotFoundError(2, "broken symbolic link")
    reason = "No such file or directory"
    for spelling in (path, *spellings(path)):
        file, same_case = _walk(root, spelling)
        if same_case:
            return file
        if file:
            name = shortened(file.removeprefix(root).lstrip("/"))
            reason = f"No such file or directory; did you mean {name} (different case)?"
    raise FileNotFoundError(2, reason)


def _walk(root: str, path: str) -> tuple[str, bool]:
    """The file at ``path`` in another Unicode normal form and True, in another case and False, or "" and False."""
    folder, same_case = root, True
    for part in path.split("/"):
        name: str | None = part
        if not lexists(f"{folder}/{part}"):
            try:
                composed, folded = _listing(folder, os.stat(folder).st_mtime_ns)  # noqa: PTH116
            except OSError:
                return "", False
            if (name := composed.get(normalize("NFC", part))) is None:
                same_case, name = False, folded.get(normalize("NFC", part).casefold())
            if name is None:
                return "", False
        folder = f"{folder}/{name}"
    return folder, same_case


@lru_cache(maxsize=16)
def _listing(folder: str, _modified: int) -> tuple[dict[str, str], dict[str, str]]:
    """The names in ``folder`` by their NFC form where it may differ, and by their case-folded form."""
    names = os.listdir(folder)  # noqa: PTH208
    composed = {normalize("NFC", name): name for name in names if not name.isascii()}
    return composed, {normalize("NFC", name).casefold(): name for name in names}


def refuse_outside(root: str, target: str, name: str) -> None:
    """Raises a LinkOutsideError if ``target``, a resolved path, is not below ``root``.

    Links from a snapshot in the hub's cache to the blobs of the same repository are allowed.
    """
    top = real_folder(root)
    if target.startswith(top.rstrip(os.sep) + os.sep):
        return
    hub = _HUB_SNAPSHOT.fullmatch(top)
    if hub and target.startswith(hub[1]) and _HUB_BLOB.fullmatch(target[len(hub[1]) :]):
        return
    raise LinkOutsideError(
        f"image {name}: a symbolic link points outside {root}",
        hint="`follow_links: true` beside the source's `images` (for a task: -t follow_links=true) allows such links",
    )
