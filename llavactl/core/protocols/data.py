"""Sources of training samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.schema import ImageRef, Sample
from llavactl.core.typed import Typed


@runtime_checkable
class Source(Protocol):
    """An iterable of samples, in the same order on every iteration. A generator function is a valid target.

    Implement ``RecordSource`` as well if samples are read from a file record by record, ``RepairingSource`` if records
    can be repaired, ``OtherFindings`` if there are problems outside of records, ``Checkable`` if the data can be
    checked before the first record, and ``Identifiable`` to cache the samples.
    """

    def __iter__(self) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class RawRecord(Typed):
    """The ``index``-th record (from 0) as its source stores it; ``where`` is its location for messages, ``file:line``.

    ``problem`` is the reason why the record can't be parsed, otherwise "". ``position`` is the number of characters
    (or bytes) of the source's file that have been read, for the progress bar.
    """

    where: str
    value: Any
    index: int
    problem: str = ""
    position: int = 0


@dataclass(frozen=True)
class Finding(Typed):
    """A problem of one record: one of the kinds of ``llavactl data check`` (docs/reference/data.md), and details."""

    kind: str
    detail: str = ""


@runtime_checkable
class RecordSource(Source, Protocol):
    """A source that reads a file record by record: ``llavactl data`` can report and select single records.

    Iteration yields ``sample(record)`` for each record in ``records()``.
    """

    path: Path
    """The file that holds the records, whose size is the total of progress bars, or a folder."""

    def records(self) -> Iterator[RawRecord]:
        """Every record in order, including those that can't be parsed or used."""

    def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
        """All problems of a parsed record at once, and its images, which are not opened."""

    def sample(self, record: RawRecord) -> Sample:
        """The record as a sample.

        Raises:
            DataError: the record can't be used; the message begins with ``record.where``.
        """


@runtime_checkable
class RepairingSource(RecordSource, Protocol):
    """A record source that can repair records for ``llavactl data check --fix``.

    Implement ``RepairableFile`` as well if the command line can name its file.
    """

    def repair(self, record: RawRecord) -> tuple[Mapping[str, Any] | None, list[str]]:
        """The record's repaired value, which is written as JSON (None: dropped), and a list of the changes.

        ``record.value`` is not modified; without changes it is returned.
        """


@runtime_checkable
class RepairableFile(RepairingSource, Protocol):
    """A repairing source of a file that the command line can name."""

    @property
    def repair_command(self) -> str:
        """The ``llavactl data check FILE --fix OUT`` that repairs the records of its file."""


@runtime_checkable
class OtherFindings(Protocol):
    """A record source with findings about what isn't in any record, such as images without captions."""

    def other_findings(self) -> Iterator[tuple[str, Finding]]:
        """Their locations, for messages, and the findings."""
