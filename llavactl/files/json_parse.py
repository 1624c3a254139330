"""Strict JSON parsing: duplicate keys, excessive nesting and text that isn't UTF-8 are errors with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llavactl.core.errors import DataError
from llavactl.files.text import read_text

TRUNCATED_HINT = "the file may be truncated"

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_UNDECODED_BYTE = re.compile("[\udc80-\udcff]")
"""A byte that the error handler ``surrogateescape`` kept."""


class JsonParser:
    """A JSON parser that sets ``duplicate_key``, since json silently keeps only the last of several equal keys.

    ``ignored_keys`` are dropped from every object, to save memory.
    """

    def __init__(self, ignored_keys: Collection[str] = ()) -> None:
        self.duplicate_key = ""
        self._ignored_keys = frozenset(ignored_keys)
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def parse(self, text: str) -> Any:
        """The value of ``text``; raises as json, see ``parse_error``."""
        self.duplicate_key = ""
        return self._decoder.decode(text)

    def parse_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at ``start``, and its end; raises as json, see ``parse_error``."""
        self.duplicate_key = ""
        return self._decoder.raw_decode(text, start)

    def value_error(self, text: str, value: Any) -> str:
        """Why the ``value`` that was parsed from ``text`` can't be used, or ""."""
        return text_error(text, value) or (f"duplicate key {self.duplicate_key!r}" if self.duplicate_key else "")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            self.duplicate_key = next(name for name in names if names.count(name) > 1)
        for key in self._ignored_keys & value.keys():
            del value[key]
        return value


def parse_json(text: str, path: Path, line: int = 1, *, ignored_keys: Collection[str] = ()) -> Any:
    """The JSON value ``text``, which begins at ``line`` of ``path``.

    Raises:
        DataError: ``text`` isn't JSON, or has a duplicate key; names the file and line.
    """
    parser = JsonParser(ignored_keys)
    try:
        value = parser.parse(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise DataError(f"{where}: {parse_error(error)} (column {error.colno})", hint=TRUNCATED_HINT) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{line}: {parse_error(error)}") from error
    if reason := parser.value_error(text, value):
        raise DataError(f"{path}:{line}: {reason}")
    return value


def parse_error(error: Exception) -> str:
    """The reason of an exception of json, which raises a plain ValueError for an integer of too many digits."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')}"
    if isinstance(error, RecursionError):
        return "not valid: JSON nested too deeply"
    return "not valid: a number with thousands of digits"


def text_error(text: str, value: Any = None) -> str:
    """Why JSON ``text``, parsed as ``value``, can't be encoded as UTF-8, as tokenizers need it; "" if it can."""
    if not text.isascii() and (match := _UNDECODED_BYTE.search(text)):
        return f"not UTF-8: byte 0x{ord(match[0]) - 0xDC00:02x} (character {match.start() + 1})"
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"not valid Unicode: lone surrogate \\u{ord(error.object[error.start]):04x}"
    return ""


def read_json_document(path: Path, *, ignored_keys: Collection[str] = ()) -> Any:
    """The one JSON value of a file.

    Raises:
        DataError: the file can't be read or isn't JSON; names the line.
    """
    return parse_json(read_text(path), path, ignored_keys=ignored_keys)
