"""Reading files and URLs in ranges, and stamps that change with their content; fsspec opens URLs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from llavactl.core.locations import is_url
from llavactl.core.paths import file_stamp

_STAMP_KEYS = "ETag", "etag", "mtime", "LastModified", "updated", "created"
"""Names that fsspec's file systems use for a value that changes with the content."""


def open_binary(location: str) -> AbstractContextManager[IO[bytes]]:
    """The file or URL ``location``, opened for reading."""
    if is_url(location):
        opened: AbstractContextManager[IO[bytes]] = fsspec_module().open(location, "rb")
        return opened
    return Path(location).open("rb")


def read_range(location: str, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset`` of the file or URL ``location``; raises OSError."""
    if is_url(location):
        filesystem, path = fsspec_module().core.url_to_fs(location)
        data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
        return data
    with Path(location).open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def stamp_of(location: str) -> str:
    """A value that changes with the file or URL ``location``; "" if the URL has none. Raises OSError."""
    if not is_url(location):
        return file_stamp(Path(location).stat())
    filesystem, path = fsspec_module().core.url_to_fs(location)
    info: Mapping[str, Any] = filesystem.info(path)
    values = [info[key] for key in _STAMP_KEYS if key in info]
    return f"{info.get('size')} {values[0]}" if values else ""


def fsspec_module() -> Any:
    """fsspec, imported on first use."""
    import fsspec

    return fsspec
