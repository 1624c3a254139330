r"""Records of benchmark and data files: JSON lists, JSONL and tables, with file and line in every error.

JSON or JSONL is detected from the content, not the suffix. A byte order mark and any line ends are accepted. Only
``\n`` ends a line of JSONL, since strings may contain the other line separators of Unicode.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.core.errors import DataError
from llavactl.files.json_parse import TRUNCATED_HINT, parse_json
from llavactl.files.json_stream import parse_stream
from llavactl.files.text import read_text

IMAGE_KEYS = ("image", "images")
"""Keys for a record's images; LLaMA-Factory, ms-swift and others write the second."""

_MAX_CELL = 1 << 30
"""Characters of a table's cell, which may hold an image as base64; the default of csv is 128 KiB."""


@dataclass(frozen=True)
class Record:
    """One object of a file; ``where`` is its location for messages, ``file.jsonl:17``."""

    where: str
    fields: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first present field of ``names``; raises DataError unless it is a string."""
        value = self._first(names)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: `{names[0]}`: expected a string, got {value!r:.60}")
        return value

    def name(self, *names: str) -> str:
        """The first present field of ``names``, an id; raises DataError unless it is a string or an integer."""
        value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{self.where}: `{names[0]}`: expected an id (a string or an integer), got {value!r:.60}")
        return str(value)

    def get(self, *names: str) -> Any:
        """The first field of ``names`` that is neither missing nor null; None without one."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def _first(self, names: Sequence[str]) -> Any:
        value = self.get(*names)
        if value is None:
            raise DataError(f"{self.where}: missing `{'` or `'.join(names)}`")
        return value


def given_id(record: Mapping[str, Any]) -> str | None:
    """The ``id`` of ``record`` as a string; None if it is missing, null, empty, or neither a string nor a number."""
    value = record.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if str(value).strip() else None


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The images that ``record`` names: a path or a list of paths under ``image`` or ``images``.

    Raises:
        DataError: the value is something else, or the two keys differ.
    """
    named: dict[str, list[str]] = {}
    for key in IMAGE_KEYS:
        value = record.get(key)
        paths = [] if value is None or value == "" else value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) for path in paths):
            raise DataError(f"`{key}`: expected a path or a list of paths, got {value!r:.60}")
        if paths:
            named[key] = paths
    if len(named) == len(IMAGE_KEYS) and named["image"] != named["images"]:
        raise DataError("`image` and `images` name different images")
    return next(iter(named.values()), [])


def read_records(path: Path, *, truncated: bool = False) -> list[Record]:
    """The objects of ``path`` in order; with ``truncated``, an incomplete last line is ignored.

    Raises:
        DataError: the file can't be read, or a value isn't JSON or not an object; names the line.
    """
    text = read_text(path)
    if _is_document(text):
        return [_record(str(path), parse_json(text, path))]
    return [_record(where, value) for where, value in _values(text, path, truncated)]


def read_document(path: Path) -> Any:
    """The JSON value of ``path``, or the list of the values in its lines if there are several.

    Raises:
        DataError: the file can't be read, or a value isn't JSON; names the line.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[" or _is_document(text):
        return parse_json(text, path)
    values = [value for _, value in _values(text, path, truncated=False)]
    return values[0] if len(values) == 1 else values


def _values(text: str, path: Path, truncated: bool) -> Iterator[tuple[str, Any]]:
    entries = list(parse_stream(io.StringIO(text)))
    for entry in entries:
        if entry.problem:
            if truncated and entry is entries[-1] and not entry.in_array:
                return
            raise DataError(f"{path}:{entry.line}: {entry.problem}", hint=TRUNCATED_HINT)
        yield f"{path}:{entry.location}", entry.value


def _is_document(text: str) -> bool:
    """Whether ``text`` is one object over several lines: then its first line isn't a complete object."""
    if text.lstrip()[:1] != "{":
        return False
    first, _, rest = text.lstrip().partition("\n")
    return not first.rstrip().endswith("}") and bool(rest.strip())


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {value!r:.60}")
    return Record(where, value)


def read_table(path: Path, *columns: str, delimiter: str = ",") -> list[Record]:
    """The rows of a table with a header, which must have ``columns``.

    Raises:
        DataError: the file can't be read, isn't a table, or lacks a column or cell.
    """
    lines = read_text(path).split("\n")
    try:
        csv.field_size_limit(_MAX_CELL)
        reader = csv.DictReader([line + "\n" for line in lines if line.strip()], delimiter=delimiter, strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a table: {error}") from error
    if missing:
        raise DataError(
            f"{path}:1: missing column {missing[0]!r}", hint=f"available: {', '.join(reader.fieldnames or ())}"
        )
    for number, row in enumerate(rows, 2):
        if None in row or any(row[column] is None for column in columns):
            raise DataError(f"{path}:{number}: the number of cells differs from the header's", hint=TRUNCATED_HINT)
    return [Record(f"{path}:{number}", row) for number, row in enumerate(rows, 2)]


def unique(records: Sequence[Record], *names: str, what: str = "question") -> dict[str, Record]:
    """``records`` by their id.

    Raises:
        DataError: a duplicate id; names the first and counts all.
    """
    by_id: dict[str, Record] = {}
    duplicates: list[tuple[str, Record]] = []
    for record in records:
        name = record.name(*names)
        if name in by_id:
            duplicates.append((name, record))
        by_id.setdefault(name, record)
    if duplicates:
        name, record = duplicates[0]
        more = f", and {len(duplicates) - 1} more" if len(duplicates) > 1 else ""
        raise DataError(f"{record.where}: duplicate {what} {name!r}, first at {by_id[name].where}{more}")
    return by_id
