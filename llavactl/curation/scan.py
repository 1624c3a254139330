"""Going over training records a chunk at a time, finding every problem of each; only counts and hashes are kept."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llavactl.components.sources.llava_json import sample_of
from llavactl.core.errors import DataError, LlavactlError
from llavactl.core.schema import ImageRef, Sample
from llavactl.curation.lengths import Lengths
from llavactl.curation.problems import REFUSED, Finding
from llavactl.curation.record_checks import examine
from llavactl.features.keys import error_reason
from llavactl.files.json_stream import JsonEntry, read_stream
from llavactl.files.records import given_id
from llavactl.images.archives import DuplicateMemberError
from llavactl.images.decode import ImageError, inspect
from llavactl.images.references import ImageRoot

log = logging.getLogger(__name__)

CHUNK = 512
"""Records examined at a time: their texts are tokenised and their images opened together."""

Decode = Literal["no", "header", "full"]


@dataclass(frozen=True)
class Examined:
    """A record at ``where`` with its ``findings``; ``done`` grows with what is read of the source."""

    where: str
    record: Any
    sample: Sample | None
    images: Sequence[ImageRef]
    findings: list[Finding]
    done: int


@dataclass
class ImageChecks:
    """What is known of the images seen so far: a hash of each, and why some can't be used."""

    decode: Decode
    workers: int = 2
    seen: set[int] = field(default_factory=set)
    bad: dict[ImageRef, Finding] = field(default_factory=dict)

    def look(self, pool: ThreadPoolExecutor, images: Sequence[ImageRef]) -> None:
        """Opens those of ``images`` that were not seen before."""
        new = [image for image in dict.fromkeys(images) if hash(image) not in self.seen]
        self.seen.update(map(hash, new))
        if self.decode != "no":
            found = pool.map(partial(_inspected, whole=self.decode == "full"), new)
            self.bad.update({image: each for image, each in zip(new, found, strict=True) if each is not None})


def _inspected(image: ImageRef, *, whole: bool) -> Finding | None:
    try:
        inspect(image, whole=whole)
    except OSError as error:
        return Finding("image-missing", f"{image.name}: {error_reason(error)}")
    except ImageError as error:
        return Finding("image-broken", f"{image.name}: {error.reason}")
    except DuplicateMemberError as error:
        return Finding("image-twice", error.message)
    except DataError as error:
        return Finding("image-link", error.message)
    return None


def scan(records: Iterator[Examined], images: ImageChecks, lengths: Lengths | None) -> Iterator[Examined]:
    """``records`` with what their images, their lengths and their ids add to their findings, in order."""
    ids: set[int] = set()
    with ThreadPoolExecutor(images.workers) as pool:
        while chunk := list(itertools.islice(records, CHUNK)):
            images.look(pool, [image for each in chunk for image in each.images])
            usable = [each for each in chunk if each.sample is not None]
            if lengths is not None:
                usable = [each for each in usable if not _refused(each, lengths)]
                long = lengths.too_long([each.sample for each in usable if each.sample is not None])
                for each, is_long in zip(usable, long, strict=True):
                    if each.sample is not None and is_long:
                        each.findings.extend(lengths.findings(each.sample))
            for each in chunk:
                each.findings.extend(images.bad[image] for image in each.images if image in images.bad)
                if (name := _id(each)) is not None:
                    if hash(name) in ids:
                        each.findings.append(Finding("duplicate-id", name))
                    ids.add(hash(name))
                yield each


def _refused(each: Examined, lengths: Lengths) -> bool:
    """Whether the template refuses the sample of ``each``; adds the finding if so."""
    if why := lengths.refusal(each.sample) if each.sample is not None else "":
        each.findings.append(Finding("template", why))
    return bool(why)


def _id(each: Examined) -> str | None:
    if isinstance(each.record, dict):
        return given_id(each.record)
    return each.sample.id if each.sample is not None and each.record is None else None


def file_records(path: Path, root: ImageRoot | str, *, sampled: bool = True) -> Iterator[Examined]:
    """The LLaVA records in the file ``path``, with what is wrong with each by itself; ``sampled`` if lengths matter."""
    for entry in read_stream(path):
        yield _examined(entry, f"{path}:{entry.place}", root, sampled)


def _examined(entry: JsonEntry, where: str, root: ImageRoot | str, sampled: bool) -> Examined:
    if entry.problem:
        return Examined(where, None, None, (), [Finding("json", entry.problem)], entry.done)
    findings, images = examine(entry.value, root)
    fit = sampled and not any(finding.kind in REFUSED for finding in findings)
    sample = sample_of(entry.value, where, root, entry.index) if fit else None
    return Examined(where, entry.value, sample, images, findings, entry.done)


def source_records(name: str, make: Callable[[], Iterator[Sample]]) -> Iterator[Examined]:
    """The samples of a source that is no file of LLaVA records; where it fails, that is the last finding."""
    done = 0
    try:
        for done, sample in enumerate(make(), 1):
            answers = [turn.text.strip() for turn in sample.turns if turn.role == "assistant"]
            findings = []
            if not any(answers):
                findings.append(Finding("no-answer"))
            elif not all(answers):
                findings.append(Finding("empty-answer", f"answer {answers.index('') + 1} of {len(answers)}"))
            yield Examined(sample.where or sample.id, None, sample, sample.images, findings, done)
    except LlavactlError as error:
        yield Examined(f"source {name}", None, None, (), [Finding("source", error.message)], done)
