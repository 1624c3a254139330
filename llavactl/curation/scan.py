"""Scans training records for problems, a chunk at a time; only counts and hashes stay in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from llavactl.core.component_calls import call_error
from llavactl.core.errors import DataError, LlavactlError, PluginError
from llavactl.core.protocols import Finding, OtherFindings, RawRecord
from llavactl.core.schema import Sample
from llavactl.curation.problems import KINDS
from llavactl.features.keys import error_reason
from llavactl.files.records import given_id
from llavactl.images.archive_index import DuplicateMemberError
from llavactl.images.decode import ImageError, inspect
from llavactl.images.known import known_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llavactl.core.protocols import RecordSource
    from llavactl.core.schema import ImageRef
    from llavactl.curation.lengths import Lengths

CHUNK = 512
"""Records per chunk, which are tokenized, and their images opened, together."""

Decode = Literal["no", "header", "full"]


@dataclass(frozen=True)
class ScannedRecord:
    """A record with its ``findings``; ``sample`` is None if it can't be used, or no sample was requested.

    ``raw`` is None for a source that yields samples only. ``position`` is the progress within the source.
    """

    where: str
    raw: RawRecord | None
    sample: Sample | None
    images: Sequence[ImageRef]
    findings: list[Finding]
    position: int


@dataclass
class ImageChecks:
    """Checks each distinct image once; stores a hash of each, and the problems of unusable ones.

    ``has_features``: whether the stores of the current source's stages can do without the image of a content key.
    """

    decode: Decode
    workers: int = 2
    has_features: Callable[[str], bool] = lambda _key: False
    hashes: set[int] = field(default_factory=set)
    findings: dict[ImageRef, Finding] = field(default_factory=dict)

    def check(self, pool: ThreadPoolExecutor, images: Sequence[ImageRef]) -> None:
        """Opens those of ``images`` that were not checked before."""
        new = [image for image in dict.fromkeys(images) if hash(image) not in self.hashes]
        self.hashes.update(map(hash, new))
        if self.decode != "no":
            find = partial(_image_finding, whole=self.decode == "full", has_features=self.has_features)
            checked = zip(new, pool.map(find, new), strict=True)
            self.findings.update({image: finding for image, finding in checked if finding is not None})


def _image_finding(image: ImageRef, *, whole: bool, has_features: Callable[[str], bool]) -> Finding | None:
    try:
        inspect(image, whole=whole)
    except OSError as error:
        if (key := known_key(image)) is not None and has_features(key):
            return Finding("image-absent", image.name)
        return Finding("image-missing", f"{image.name}: {error_reason(error)}")
    except ImageError as error:
        return Finding("image-broken", f"{image.name}: {error.reason}")
    except DuplicateMemberError as error:
        return Finding("image-twice", error.message)
    except DataError as error:
        return Finding("image-link", error.message)
    return None


def scan(records: Iterator[ScannedRecord], images: ImageChecks, lengths: Sequence[Lengths]) -> Iterator[ScannedRecord]:
    """Adds the findings about images, lengths (in each stage) and duplicate ids to ``records``, in order."""
    ids: set[int] = set()
    with ThreadPoolExecutor(images.workers) as pool:
        while chunk := list(itertools.islice(records, CHUNK)):
            images.check(pool, [image for record in chunk for image in record.images])
            for of_stage in lengths:
                _add_length_findings(chunk, of_stage)
            for record in chunk:
                record.findings.extend(images.findings[image] for image in record.images if image in images.findings)
                if (name := _id(record)) is not None:
                    if hash(name) in ids:
                        record.findings.append(Finding("duplicate-id", name))
                    ids.add(hash(name))
                yield record


def _add_length_findings(chunk: Sequence[ScannedRecord], lengths: Lengths) -> None:
    usable = []
    for record in chunk:
        if record.sample is None:
            continue
        if reason := lengths.refusal(record.sample):
            _add_new(record, [Finding("template", reason)])
        else:
            usable.append((record, record.sample))
    long = lengths.too_long([sample for _, sample in usable])
    for (record, sample), is_long in zip(usable, long, strict=True):
        if is_long:
            _add_new(record, lengths.findings(sample))


def _add_new(record: ScannedRecord, findings: Sequence[Finding]) -> None:
    """Adds those of ``findings`` that the record doesn't have from another stage with the same template."""
    record.findings.extend(finding for finding in findings if finding not in record.findings)


def _id(record: ScannedRecord) -> str | None:
    if record.raw is not None:
        return given_id(record.raw.value) if isinstance(record.raw.value, dict) else None
    return record.sample.id if record.sample is not None else None


def scan_records(source: RecordSource, *, with_samples: bool) -> Iterator[ScannedRecord]:
    """The records of ``source`` with their own findings; samples only if ``with_samples``, for their lengths.

    Raises:
        PluginError: a finding of an unknown kind.
    """
    for record in source.records():
        yield _scanned(source, record, with_samples)
    for where, finding in source.other_findings() if isinstance(source, OtherFindings) else ():
        _check_kinds(source, "other_findings", where, [finding])
        yield ScannedRecord(where, None, None, (), [finding], 0)


def _scanned(source: RecordSource, record: RawRecord, with_samples: bool) -> ScannedRecord:
    if record.problem:
        return ScannedRecord(record.where, record, None, (), [Finding("json", record.problem)], record.position)
    findings, images = source.examine(record)
    _check_kinds(source, "examine", record.where, findings)
    sample = None
    if with_samples:
        try:
            sample = source.sample(record)
        except DataError as error:
            if not any(KINDS[finding.kind].effect == "stops" for finding in findings):
                findings = [*findings, Finding("record", error.message.removeprefix(f"{record.where}: "))]
    return ScannedRecord(record.where, record, sample, images, list(findings), record.position)


def _check_kinds(source: RecordSource, method: str, where: str, findings: Iterable[Finding]) -> None:
    if why := finding_fault(findings):
        raise call_error(source, method, f"{where}: {why}")


def finding_fault(findings: Iterable[Finding]) -> str:
    """The first unknown kind of ``findings``; "" if all are known."""
    unknown = next((finding.kind for finding in findings if finding.kind not in KINDS), None)
    return "" if unknown is None else f"returned the unknown finding {unknown!r}; available: {', '.join(KINDS)}"


def scan_samples(name: str, samples: Iterable[Sample]) -> Iterator[ScannedRecord]:
    """The ``samples`` of a source without raw records; an error of its data is the last finding.

    Raises:
        PluginError: the source yields something other than samples.
    """
    count = 0
    try:
        for count, sample in enumerate(samples, 1):
            answers = [turn.text.strip() for turn in sample.turns if turn.role == "assistant"]
            findings = []
            if not any(answers):
                findings.append(Finding("no-answer"))
            elif not all(answers):
                findings.append(Finding("empty-answer", f"answer {answers.index('') + 1} of {len(answers)}"))
            yield ScannedRecord(sample.where or sample.id, None, sample, sample.images, findings, count)
    except PluginError:
        raise
    except LlavactlError as error:
        yield ScannedRecord(f"source {name}", None, None, (), [Finding("source", error.message)], count)
