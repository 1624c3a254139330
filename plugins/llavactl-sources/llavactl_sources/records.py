"""What the sources of this package have in common: records of any form, checked and converted by llavactl's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavactl import DataError, Finding, ImageLocation, ImageRef, RawRecord, Sample, llava_findings, llava_sample
from llavactl_sources.forms import Form, RecordError, llava_record


@dataclass(frozen=True)
class RecordWithImages(RawRecord):
    """A record whose images aren't paths: ``images`` are the references by the names in its value.

    ``image_error`` is the reason why an image of the record can't be referred to, else "".
    """

    images: Mapping[str, ImageRef] = field(default_factory=dict, compare=False)
    image_error: str = ""


class ConversationSource:
    """A ``RecordSource`` of conversations or captions; a subclass implements ``records`` and may override the rest."""

    path: Path
    form: Form = "auto"

    def __iter__(self) -> Iterator[Sample]:
        """Raises DataError with the location of the first record that can't be used."""
        self.check()
        for record in self.records():
            if record.problem:
                raise DataError(f"{record.where}: {record.problem}")
            yield self.sample(record)

    def records(self) -> Iterator[RawRecord]:
        raise NotImplementedError

    def check(self) -> None:
        """Raises DataError if the source can't be read at all."""

    def location(self, record: RawRecord) -> ImageLocation:
        """The location of the record's images."""
        return record.images if isinstance(record, RecordWithImages) else {}

    def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
        try:
            converted = self._converted(record)
        except RecordError as error:
            return [Finding(error.kind, error.detail)], []
        return llava_findings(converted, self.location(record))

    def sample(self, record: RawRecord) -> Sample:
        try:
            converted = self._converted(record)
        except RecordError as error:
            raise DataError(f"{record.where}: {error.detail}") from error
        return llava_sample(converted, record.where, self.location(record), record.index)

    def _converted(self, record: RawRecord) -> dict[str, Any]:
        if isinstance(record, RecordWithImages) and record.image_error:
            raise RecordError("image-path", record.image_error)
        return llava_record(record.value, self.form)


def unique_name(name: str, names: Mapping[str, Any]) -> str:
    """``name``, with a number if it is one of ``names``."""
    return next(each for each in _numbered(name) if each not in names)


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        number += 1
        yield f"{name}#{number}"
