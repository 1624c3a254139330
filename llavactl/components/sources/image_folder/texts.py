"""Text files of unknown encoding: captions are written by many programs."""

from __future__ import annotations

import codecs
from pathlib import Path

from llavactl.core.errors import DataError

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decoded(file: Path) -> tuple[str, bool]:
    r"""The text of ``file`` with ``\n`` as line ends, and whether it is Unicode; other text is read as Windows-1252.

    Windows-1252 contains the printable characters of Latin-1.

    Raises:
        DataError: the file can't be read.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}", hint="make the file readable, or move it") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text, unicode = data.decode(encoding), True
    except UnicodeDecodeError:
        text, unicode = data.decode("cp1252", "replace"), False
    return text.replace("\r\n", "\n").replace("\r", "\n"), unicode
