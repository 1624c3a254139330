"""Text files named by the user: reading them, and refusing to overwrite them."""

from __future__ import annotations

from pathlib import Path

from llavactl.core.errors import DataError


def read_text(path: Path) -> str:
    r"""The text of a file without a byte order mark; every line ends with ``\n``.

    Raises:
        DataError: the file is missing, can't be read, or isn't UTF-8.
    """
    require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def require_file(path: Path) -> None:
    """Raises a DataError unless ``path`` is a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder", hint="name a file")
    if not path.is_file():
        raise DataError(f"{path}: no such file", hint="check the path")


def refuse_overwriting(source: Path, out: Path) -> None:
    """Raises a DataError if ``out`` is the file ``source``."""
    if out.exists() and source.exists() and out.samefile(source):
        raise DataError(f"{out}: the output is the input file", hint="choose another name for the output")
