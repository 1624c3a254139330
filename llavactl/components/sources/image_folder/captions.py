"""The captions of the images in a folder, from text files beside the images and from tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llavactl.components.sources.image_folder.listing import Listing
from llavactl.components.sources.image_folder.tables import (
    TABLE_SUFFIXES,
    CaptionRow,
    CocoFileError,
    Columns,
    is_table,
    read_table,
)
from llavactl.components.sources.image_folder.texts import decoded
from llavactl.core.errors import DataError
from llavactl.core.locations import shown_path
from llavactl.core.protocols import Finding

_EXAMINED = 20
SIDECAR_SUFFIXES = (".txt", ".caption")
_DOCUMENTS = frozenset("readme license licence notice changelog requirements classes url urls sources".split())  # noqa: SIM905
"""Stems of text files that are no captions."""


@dataclass(frozen=True)
class FoundCaptions:
    """The ``rows`` of all files with captions, and ``findings`` about the files: each a location and a finding."""

    rows: tuple[CaptionRow, ...]
    findings: tuple[tuple[str, Finding], ...]


def table_captions(file: Path, files: Listing, columns: Columns, *, certain: bool) -> FoundCaptions:
    """The captions in the table ``file``, by the path of the image."""
    rows, unicode = read_table(file, columns, certain=certain)
    folder = file.parent.relative_to(files.root).as_posix() if file.is_relative_to(files.root) else "."
    found = (
        CaptionRow(row.where, files.image(folder, row.image) if row.image else "", row.captions, row.problem)
        for row in rows
    )
    return FoundCaptions(tuple(found), () if unicode or not rows else ((f"{file}:1", Finding("encoding")),))


def tables(files: Listing) -> list[Path]:
    """The tables of captions that are stored among the images, by their names."""
    beside_images = {_without_suffix(image).lower() for image in files.images}
    return [
        files.root / text
        for text in files.texts
        if is_table(PurePosixPath(text).name)
        and not (text.lower().endswith(".txt") and _without_suffix(text).lower() in beside_images)
    ]


class UnusedTable(NamedTuple):
    """A table without captions that are used: why, and a hint ("" for an empty table)."""

    name: str
    why: str
    hint: str


def unused_tables(files: Listing, columns: Columns) -> Iterator[UnusedTable]:
    """The tables among the images, if none of them has captions that are used."""
    for name in _possible_tables(files):
        file, named = files.root / name, is_table(PurePosixPath(name).name)
        set_captions = f"set `captions` to this file (in `llavactl init`: -t captions={shlex.quote(shown_path(file))})"
        try:
            rows, _ = read_table(file, columns, certain=True)
        except CocoFileError as error:
            yield UnusedTable(name, "annotations in COCO's format", error.hint)
            continue
        except DataError as error:
            if named or file.suffix.lower() in (".csv", ".tsv"):  # other JSON files may have any content
                why = re.sub(rf"^{re.escape(str(file))}(:\d+)?: ", "", error.message)
                yield UnusedTable(name, why, f"{set_captions} and {error.hint.removeprefix('set ')}")
            continue
        if not rows:
            yield UnusedTable(name, "no rows", "")
        elif not named and not any(row.problem for row in rows):
            yield UnusedTable(
                name, "its name is not that of a table of captions", f"{set_captions}, or call it metadata"
            )


def _possible_tables(files: Listing) -> Sequence[str]:
    """At most 20 files that may be tables, those with the name of a table first: there may be one beside each image."""
    names = [name for name in files.texts if is_table(PurePosixPath(name).name)]
    others = [name for name in files.texts if PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES]
    return list(dict.fromkeys([*names, *others]))[:_EXAMINED]


def sidecar_captions(files: Listing) -> FoundCaptions:
    """The captions in text files that are named like an image; every line with text is a caption."""
    by_name = {text.lower(): text for text in files.texts if text.lower().endswith(SIDECAR_SUFFIXES)}
    used: set[str] = set()
    rows: list[CaptionRow] = []
    findings: list[tuple[str, Finding]] = []
    for image in files.images:
        stems = dict.fromkeys((_without_suffix(image).lower(), image.lower()))
        names = [by_name[name] for stem in stems for suffix in SIDECAR_SUFFIXES if (name := stem + suffix) in by_name]
        for name in names:
            text, unicode = decoded(files.root / name)
            if not unicode and name not in used:
                findings.append((f"{files.root / name}:1", Finding("encoding")))
            used.add(name)
            rows += _lines(image, files.root / name, text)
    orphans = sorted(set(by_name.values()) - used)
    findings += [(f"{files.root / name}:1", Finding("no-image")) for name in orphans if used and _is_caption(name)]
    return FoundCaptions(tuple(rows), tuple(findings))


def _lines(image: str, file: Path, text: str) -> Iterator[CaptionRow]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines or [(1, "")]:
        yield CaptionRow(f"{file}:{number}", image, (line,))


def _is_caption(name: str) -> bool:
    path = PurePosixPath(name.lower())
    return path.stem not in _DOCUMENTS and not is_table(path.name)


def _without_suffix(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
