"""Reading others' files of records: a JSON list, or an object a line (JSONL), whatever the suffix says.

Published benchmark files come as either, with or without a byte order mark, with any line ends. What is
wrong is said with the file and its line. Lines end at ``\\n`` alone: a text may hold any other separator
of Unicode.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.core.errors import DataError

IMAGE_KEYS = ("image", "images")
"""Keys for a record's images; LLaMA-Factory, ms-swift and others write the second."""


@dataclass(frozen=True)
class Record:
    """One object of a file; ``where`` names it for messages (``file.jsonl:17``)."""

    where: str
    fields: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of ``names`` that is there, which has to be text."""
        value = self._first(names)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: `{names[0]}` is {value!r:.60}, not text")
        return value

    def name(self, *names: str) -> str:
        """The first of ``names`` that is there, which has to be an id: text or an integer."""
        value = self._first(names)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{self.where}: `{names[0]}` is {value!r:.60}, not an id")
        return str(value)

    def get(self, *names: str) -> Any:
        """The first of ``names`` that is there, else None."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def _first(self, names: Sequence[str]) -> Any:
        value = self.get(*names)
        if value is None:
            raise DataError(f"{self.where}: there is no `{'` or `'.join(names)}`")
        return value


def given_id(record: Mapping[str, Any]) -> str | None:
    """The ``id`` of ``record`` as text; None if it is missing, null, empty, or neither a string nor a number."""
    found = record.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        return None
    if isinstance(found, float) and not math.isfinite(found):
        return None
    return str(found) if str(found).strip() else None


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The images that ``record`` names: a path or a list of paths under ``image`` or ``images``.

    Raises:
        DataError: the value is something else, or the two keys differ.
    """
    found: dict[str, list[str]] = {}
    for key in IMAGE_KEYS:
        value = record.get(key)
        paths = [] if value is None or value == "" else value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) for path in paths):
            raise DataError(f"`{key}`: expected a path or a list of paths, found {value!r:.60}")
        if paths:
            found[key] = paths
    if len(found) == len(IMAGE_KEYS) and found["image"] != found["images"]:
        raise DataError("`image` and `images` name different images")
    return next(iter(found.values()), [])


def read_records(path: Path, *, cut: bool = False) -> list[Record]:
    """The objects of ``path`` in order; with ``cut`` a last line may be half written and is left out.

    Raises:
        DataError: a file that can't be read, isn't JSON, or holds something else than objects.
    """
    return [_record(where, value) for where, value in _values(path, cut)]


def read_document(path: Path) -> Any:
    """The one JSON value in ``path``, or a list of those in its lines."""
    values = [value for _, value in _values(path, cut=False, whole=True)]
    return values[0] if len(values) == 1 else values


def read_table(path: Path, *columns: str, delimiter: str = ",") -> list[Record]:
    """The rows of a table with a line of names, which has to have ``columns``."""
    lines = read_text(path).split("\n")
    try:
        # A cell may be a whole picture (base64): the module's limit of 128 kB is for other files.
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader([line + "\n" for line in lines if line.strip()], delimiter=delimiter, strict=True)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a table: {error}") from error
    if missing:
        raise DataError(
            f"{path}: there is no column {missing[0]!r}", hint=f"its columns: {', '.join(reader.fieldnames or ())}"
        )
    for number, row in enumerate(rows, 2):
        if None in row or any(row[column] is None for column in columns):
            raise DataError(f"{path}:{number}: not as many cells as the first line names", hint="is the file cut?")
    return [Record(f"{path}:{number}", row) for number, row in enumerate(rows, 2)]


def unique(records: Sequence[Record], *names: str, what: str = "question") -> dict[str, Record]:
    """``records`` by their id.

    Raises:
        DataError: an id twice; all of them are counted, the first is named.
    """
    found: dict[str, Record] = {}
    twice: list[tuple[str, Record]] = []
    for record in records:
        name = record.name(*names)
        if name in found:
            twice.append((name, record))
        found.setdefault(name, record)
    if twice:
        name, record = twice[0]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise DataError(f"{record.where}: {what} {name!r} is there twice, first at {found[name].where}{more}")
    return found


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: not an object but {value!r:.60}")
    return Record(where, value)


def _values(path: Path, cut: bool, whole: bool = False) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    start = text.lstrip()[:1]
    lines = text.split("\n")
    if start == "[" or (start == "{" and _is_one(lines)):
        try:
            document = json.loads(text, object_pairs_hook=_once)
        except ValueError as error:
            raise _not_json(path, error, 0) from error
        if isinstance(document, list) and not whole:
            yield from ((f"{path} record {index}", value) for index, value in enumerate(document))
        else:
            yield str(path), document
        return
    filled = [number for number, line in enumerate(lines, 1) if line.strip()]
    for number in filled:
        try:
            yield f"{path}:{number}", json.loads(lines[number - 1], object_pairs_hook=_once)
        except ValueError as error:
            if cut and number == filled[-1]:
                return
            raise _not_json(path, error, number) from error


def _is_one(lines: Sequence[str]) -> bool:
    """Whether an object runs over several lines: then the first of them is no object."""
    first = next((line for line in lines if line.strip()), "").strip()
    return not first.endswith("}") and any(line.strip() for line in lines[1:])


def _not_json(path: Path, error: ValueError, line: int) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"{path}{f':{line}' if line else ''}: {error}")
    where = line or error.lineno
    return DataError(f"{path}:{where}: not JSON: {error.msg} (column {error.colno})", hint="is the file cut?")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys, of which json would silently keep only the last."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return made


def read_text(path: Path) -> str:
    """The file's text without a byte order mark.

    Raises:
        DataError: it can't be read, or isn't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint="is it the right file?") from error
