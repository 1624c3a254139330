"""Tables of captions: CSV, TSV, JSON and JSONL files that name an image and its caption in each row."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llavactl.components.sources.image_folder.listing import is_image
from llavactl.components.sources.image_folder.texts import decoded
from llavactl.core.errors import DataError
from llavactl.core.locations import shown_path
from llavactl.files.json_parse import JsonParser
from llavactl.files.json_stream import parse_stream

TABLE_NAMES = frozenset("metadata captions caption labels annotations descriptions results".split())  # noqa: SIM905
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".json", ".jsonl"})

IMAGE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_name", "image_path", "img", "path", "filepath", "file_path"),
    *("name", "photo", "picture"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "captions", "comment", "description", "title", "sentence", "alt", "alt_text", "label"),
    *("raw", "sentences", "prompt"),
)
"""Names of columns in lower case, in order of preference; the first ones are those of Hugging Face's imagefolder."""

_DELIMITERS = ",;\t|"
_CERTAIN = frozenset({"metadata", "captions"})
"""Tables that must be readable; files with the other names may have other contents."""


class CocoFileError(DataError):
    """The file has annotations in COCO's format, which another source reads."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns of a table, as the recipe says; None: recognized by their names."""

    image: str | None = None
    caption: str | None = None


@dataclass(frozen=True)
class CaptionRow:
    """The ``captions`` of the image ``image`` (as written) in a table, at ``where``; or a ``problem`` of the row."""

    where: str
    image: str
    captions: Sequence[str]
    problem: str = ""


def is_table(name: str) -> bool:
    """Whether a file ``name`` in the folder of images may be a table of captions."""
    path = PurePosixPath(name.lower())
    return path.stem in TABLE_NAMES and (path.suffix in TABLE_SUFFIXES or name.lower() == "captions.txt")


def read_table(file: Path, columns: Columns, *, certain: bool) -> tuple[list[CaptionRow], bool]:
    """The rows of the table ``file``, and whether its text is Unicode.

    No rows, unless ``certain``, if a file whose name is only likely to be that of a table is none.

    Raises:
        DataError: the file can't be read, or has no columns of images and captions.
    """
    text, unicode = decoded(file)
    certain = certain or file.stem.lower() in _CERTAIN
    try:
        rows = _json_rows if file.suffix.lower() in (".json", ".jsonl") else _csv_rows
        return list(rows(text, file, columns)), unicode
    except DataError:
        if certain:
            raise
        return [], unicode


def _csv_rows(text: str, file: Path, columns: Columns) -> Iterator[CaptionRow]:
    delimiter = _delimiter(text, file)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    image = caption = width = 0
    line = 1
    try:
        for index, cells in enumerate(reader):
            start, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if index == 0 or not width:
                width = len(cells)
                if is_image(cells[0].strip()) and not (columns.image or columns.caption) and width > 1:
                    image, caption = 0, 1  # no header
                else:
                    image, caption = _column_numbers(cells, file, columns)
                    continue
            where = f"{file}:{start}"
            if len(cells) > width and caption == width - 1:  # unquoted delimiters in the last column
                cells = [*cells[: width - 1], delimiter.join(cells[width - 1 :])]
            if len(cells) != width:
                yield CaptionRow(where, "", (), f"the row has {len(cells)} cells, the first one {width}")
            else:
                yield CaptionRow(where, cells[image].strip(), (cells[caption],))
    except csv.Error as error:
        yield CaptionRow(f"{file}:{line}", "", (), f"not a table: {error}")


def _delimiter(text: str, file: Path) -> str:
    """The delimiter of the first line: tab in a .tsv, otherwise the most frequent one."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if file.suffix.lower() == ".tsv" and "\t" in first:
        return "\t"
    return max(_DELIMITERS, key=first.count)


def _column_numbers(header: Sequence[str], file: Path, columns: Columns) -> tuple[int, int]:
    names = [name.strip() for name in header]
    return tuple(  # type: ignore[return-value]
        names.index(_column(names, file, given, known, option))
        for given, known, option in (
            (columns.image, IMAGE_COLUMNS, "image_column"),
            (columns.caption, CAPTION_COLUMNS, "caption_column"),
        )
    )


def _column(names: Sequence[str], file: Path, given: str | None, known: Sequence[str], option: str) -> str:
    """The one of ``names`` that is ``given`` or, without it, the first of ``known``."""
    lower = {name.lower().replace(" ", "_"): name for name in reversed(names)}
    if given is None and option == "caption_column" and {"question", "answer"} <= lower.keys():
        raise DataError(
            f"{file}:1: questions and answers, not captions; columns: {', '.join(names)}",
            hint="set `caption_column` if another column has captions; a record of questions and answers is {id, "
            "image, conversations: [{from: human, value}, {from: gpt, value}]}",
        )
    if given is not None:
        found = given if given in names else lower.get(given.lower())
    else:
        found = next((lower[name] for name in known if name in lower), None)
    if found is None:
        what = f"no column {given!r}" if given else f"no column of {'images' if 'image' in option else 'captions'}"
        raise DataError(
            f"{file}:1: {what}; columns: {', '.join(names)}",
            hint=f"set `{option}` to one of the columns (in `llavactl init`: -t {option}=NAME), or name the columns "
            "file_name and text",
        )
    return found


def _json_rows(text: str, file: Path, columns: Columns) -> Iterator[CaptionRow]:
    """The rows of a JSON list or JSONL of objects, or of an object {image: caption or list of captions}."""
    document = _document(text)
    if {"images", "annotations"} <= document.keys():
        given = f"captions={shlex.quote(shown_path(file))}"
        raise CocoFileError(
            f"{file}: annotations in COCO's format",
            hint=f"use the source `coco`: `llavactl init --data coco -t {given} -t images=FOLDER`",
        )
    if document and all(map(is_image, document)):
        position = 0
        for name, value in document.items():
            position = max(position, text.find(json.dumps(name, ensure_ascii=False), position))
            yield _json_row(f"{file}:{text.count(chr(10), 0, position) + 1}", name, value)
        return
    for entry in parse_stream(io.StringIO(text)):
        where = f"{file}:{entry.location}"
        if entry.problem or not isinstance(entry.value, dict):
            yield CaptionRow(where, "", (), entry.problem or f"expected an object, got {entry.value!r:.60}")
            continue
        names = [str(name) for name in entry.value]
        image = entry.value[_column(names, file, columns.image, IMAGE_COLUMNS, "image_column")]
        if not isinstance(image, str):
            yield CaptionRow(where, "", (), f"the name of an image is not a string: {image!r:.60}")
            continue
        caption = entry.value[_column(names, file, columns.caption, CAPTION_COLUMNS, "caption_column")]
        yield _json_row(where, image, caption)


def _document(text: str) -> Mapping[str, Any]:
    """The JSON object that is all of ``text``; empty if there are several values, or invalid ones."""
    try:
        value = JsonParser().parse(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json_row(where: str, image: str, caption: Any) -> CaptionRow:
    captions = caption if isinstance(caption, list) else [caption]
    captions = [each.get("raw") if isinstance(each, dict) else each for each in captions]
    if not all(each is None or isinstance(each, str) for each in captions):
        return CaptionRow(where, image, (), f"a caption is not a string: {caption!r:.60}")
    return CaptionRow(where, image.strip(), [each or "" for each in captions])
