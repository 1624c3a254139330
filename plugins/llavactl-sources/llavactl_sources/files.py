"""Files that one option names, their stamps, and optional packages."""

from __future__ import annotations

import glob
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llavactl import DataError

MAX_IMAGE_BYTES = 1 << 28
"""The largest image that is read into memory."""

_MAGIC = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def files_of(path: Path, suffix: str) -> list[Path]:
    """The files that ``path`` names: a file, all files with ``suffix`` in a folder and below, or a pattern.

    A pattern has wildcards (``*``, ``**``, ``?``) and ranges (``{00000..00331}``), of which all files must exist.

    Raises:
        DataError: no such files.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path}: no {suffix} files")
        return files
    files = []
    for pattern in _expanded(str(path)):
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - pathlib refuses absolute patterns
        found = sorted(file for file in map(Path, matches) if file.is_file())
        if not found:
            raise DataError(f"{pattern}: no such file", hint=f"name a {suffix} file, a folder, or a pattern of files")
        files += found
    return files


def folder_of(path: Path) -> Path:
    """The folder of the files that ``path`` names; the last one without wildcards."""
    if path.is_dir():
        return path
    while _MAGIC.search(str(path.parent)):
        path = path.parent
    return path.parent


def _expanded(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        name = f"{number:0{len(match[1])}}"
        yield from _expanded(pattern[: match.start()] + name + pattern[match.end() :])


def file_stamp(file: str | Path) -> str:
    """The size and modification time of ``file``; raises OSError."""
    status = Path(file).stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def stamps_of(files: Sequence[Path], folder: Path) -> list[list[str]]:
    """The relative name and the stamp of each of ``files``, as JSON."""
    return [[str(file.relative_to(folder)), file_stamp(file)] for file in files]


def optional_module(name: str, extra: str) -> Any:
    """The module ``name``, which the extra ``extra`` of this package installs.

    Raises:
        DataError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"{name.partition('.')[0]} can't be imported: {' '.join(str(error).split())}",
            hint=f"install it: pip install 'llavactl-sources[{extra}]'",
        ) from error
