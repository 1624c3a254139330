"""The source ``image-folder``: a folder of images with captions beside them or in tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl.components.sources.captioned import captioned_sample, raise_problems
from llavactl.components.sources.image_folder.captions import (
    FoundCaptions,
    sidecar_captions,
    table_captions,
    tables,
    unused_tables,
)
from llavactl.components.sources.image_folder.listing import Listing, listing
from llavactl.components.sources.image_folder.tables import Columns
from llavactl.core.errors import DataError
from llavactl.core.hashes import hash_json
from llavactl.core.options import FollowLinks, RecipePath
from llavactl.core.protocols import Finding, RawRecord
from llavactl.core.quantities import quantity
from llavactl.core.registry import Options
from llavactl.core.schema import ImageRef, Json, Sample
from llavactl.files.text import require_file
from llavactl.images.image_file import RelativeImage
from llavactl.images.references import ImageRoot, image_in

log = logging.getLogger(__name__)

CAPTIONS_HINT = (
    "write a caption for photo.jpg to photo.txt, or for all images to metadata.csv with the columns file_name,text; "
    "a teacher can't write them, because it sees captions only, not images"
)
_SHOWN = 5


class ImageFolderOptions(Options):
    """Options of the source ``image-folder``."""

    path: RecipePath = Field(description="folder of images, with folders inside it")
    captions: RecipePath | None = Field(
        None, description="table of captions (CSV, TSV, JSON, JSONL); null: the captions in the folder"
    )
    image_column: str | None = Field(None, description="column of image names in tables; null: recognized by its name")
    caption_column: str | None = Field(None, description="column of captions in tables; null: recognized by its name")
    every_caption: bool = Field(
        False, description="true: a sample for each caption of an image; false: one per image, with its first caption"
    )
    follow_links: FollowLinks = False


@dataclass(frozen=True)
class _Contents:
    """Everything in the folder: ``records`` with captions, and ``findings`` about what is not in them.

    ``outputs`` are folders inside it that llavactl wrote.
    """

    images: int
    outputs: tuple[str, ...]
    records: tuple[RawRecord, ...]
    findings: tuple[tuple[str, Finding], ...]


class ImageFolder:
    """One sample per captioned image, or with ``every_caption`` per caption, sorted by the image's path.

    Captions are in text files beside the images (``photo.txt`` or ``photo.caption`` for ``photo.jpg``, a caption per
    line), and in tables (``metadata.csv``, ``captions.json``, …) in any folder, with image names relative to it.
    """

    def __init__(self, options: ImageFolderOptions) -> None:
        self.options = options
        self.path: Path = options.path
        self.root = ImageRoot(str(options.path), options.follow_links)

    def __iter__(self) -> Iterator[Sample]:
        """Raises DataError with all captions that can't be used."""
        self.check()
        raise_problems([problem for record in self.records() if (problem := self._problem(record))])
        self._log_findings()
        for record in self.records():
            yield self.sample(record)

    def identity(self) -> Mapping[str, Json]:
        """A hash of the image names and captions."""
        return {"images": str(self.path), "records": hash_json([record.value for record in self.records()])}

    def check(self) -> None:
        """Raises DataError if the folder or its captions are missing."""
        if not self.path.is_dir():
            reason = "a file, not a folder" if self.path.exists() else "no such folder"
            raise DataError(f"{self.path}: {reason}", hint="`path` is the folder of the images")
        if self.options.captions is not None:
            require_file(self.options.captions)
        contents = self._contents
        if not contents.images and not contents.records:
            raise DataError(f"{self.path}: no images", hint="supported are JPEG, PNG, WebP, GIF, BMP, TIFF and HEIC")
        if not contents.records:
            raise self._no_captions(contents.images)

    def _no_captions(self, images: int) -> DataError:
        """The error of a folder with ``images`` images only; it names the tables in it and why they aren't used."""
        message = f"{self.path}: {quantity(images, 'image')}, but no captions"
        if self.options.captions is not None:
            return DataError(f"{message}: {self.options.captions} has no rows", hint=CAPTIONS_HINT)
        unused = list(unused_tables(self._listing, self._columns))
        parts = [f"{each.name} is not used: {each.why}" for each in unused[:_SHOWN]]
        if len(unused) > _SHOWN:
            parts.append(f"and {len(unused) - _SHOWN} more")
        return DataError(
            "; ".join([message, *parts]), hint=next((each.hint for each in unused if each.hint), CAPTIONS_HINT)
        )

    def records(self) -> Iterator[RawRecord]:
        return iter(self._contents.records)

    def other_findings(self) -> Iterator[tuple[str, Finding]]:
        """Images without captions, captions without images, and text files in another encoding."""
        return iter(self._contents.findings)

    def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
        try:
            return [], [image_in(self.root, record.value["image"])]
        except DataError as error:
            return [Finding("image-path", error.message)], []

    def sample(self, record: RawRecord) -> Sample:
        if problem := self._problem(record):
            raise DataError(problem)
        image = image_in(self.root, record.value["image"])
        return captioned_sample(record.value["id"], image, record.value["captions"], (), record.where)

    def _problem(self, record: RawRecord) -> str:
        """The location and reason if ``record`` can't be used, or ""."""
        if record.problem:
            return f"{record.where}: {record.problem}"
        findings, _ = self.examine(record)
        return "".join(f"{record.where}: {finding.detail}" for finding in findings)

    def _log_findings(self) -> None:
        if outputs := self._contents.outputs:
            log.info("left out, because llavactl wrote it: %s", ", ".join(str(self.path / each) for each in outputs))
        for kind, unit, text in (
            ("no-caption", "image", "%s left out, without a caption: %s"),
            ("no-image", "caption", "%s left out, without an image: %s"),
            ("encoding", "file", "%s read as Windows-1252, not UTF-8: %s"),
        ):
            where = [where for where, finding in self._contents.findings if finding.kind == kind]
            if where:
                log.warning(
                    text, quantity(len(where), unit), ", ".join(where[:_SHOWN]) + (", …" if len(where) > _SHOWN else "")
                )

    @property
    def _columns(self) -> Columns:
        return Columns(self.options.image_column, self.options.caption_column)

    @cached_property
    def _listing(self) -> Listing:
        return listing(self.path, follow_links=self.options.follow_links)

    @cached_property
    def _contents(self) -> _Contents:
        files, columns, table = self._listing, self._columns, self.options.captions
        found = [
            table_captions(file, files, columns, certain=bool(table)) for file in ([table] if table else tables(files))
        ]
        if table is None:
            found.append(sidecar_captions(files))
        return _contents(files, found, self.root, every_caption=self.options.every_caption)


def _contents(files: Listing, found: Sequence[FoundCaptions], root: ImageRoot, *, every_caption: bool) -> _Contents:
    """The records of all ``found`` captions, sorted like ``images``; images that don't exist come last."""
    problems: list[RawRecord] = []
    findings = [finding for each in found for finding in each.findings]
    captions: dict[str, dict[str, str]] = {image: {} for image in files.images}
    """The location of each caption, by image and caption."""
    empty: dict[str, str] = {}
    for row in (row for each in found for row in each.rows):
        if row.problem or not row.image:
            problems.append(RawRecord(row.where, None, 0, row.problem or "no name of an image"))
            continue
        of_image = captions.setdefault(_path_below(root, row.image), {})
        for caption in (" ".join(text.split()) for text in row.captions):
            if not caption:
                empty.setdefault(row.image, row.where)
            elif caption in of_image:
                findings.append((row.where, Finding("duplicate-caption", row.image)))
            else:
                of_image[caption] = row.where
    records = list(problems)
    for image, of_image in captions.items():
        if not of_image:
            where = empty.get(image, str(Path(root.root, image)))
            findings.append((where, Finding("no-caption", "empty caption" if image in empty else "")))
        elif every_caption:
            records += [
                _record(where, f"{image}#{n}", image, [text]) for n, (text, where) in enumerate(of_image.items(), 1)
            ]
        else:
            records.append(_record(next(iter(of_image.values())), image, image, list(of_image)))
    numbered = (RawRecord(each.where, each.value, index, each.problem, index) for index, each in enumerate(records))
    return _Contents(len(files.images), tuple(files.outputs), tuple(numbered), tuple(findings))


def _record(where: str, name: str, image: str, captions: Sequence[str]) -> RawRecord:
    value: dict[str, Any] = {"id": name, "image": image, "caption": captions[0], "captions": list(captions)}
    return RawRecord(where, value, 0)


def _path_below(root: ImageRoot, image: str) -> str:
    """``image`` relative to ``root``, even if it is absolute; unchanged if outside, which ``examine`` finds."""
    try:
        reference = image_in(root, image)
    except DataError:
        return image
    return reference.path if isinstance(reference, RelativeImage) else image
