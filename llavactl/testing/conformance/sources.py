"""Checks of sources."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.core.protocols import OtherFindings, RawRecord, RecordSource, RepairingSource
from llavactl.core.protocols.returned import item_fault, returned_fault
from llavactl.core.schema import ImageRef, Sample
from llavactl.testing.conformance.boundary import conformance_check, wrong_type

if TYPE_CHECKING:
    from llavactl.core.protocols import Source


@conformance_check("sources")
def check_source(source: Source, *, at_most: int = 50) -> list[str]:
    """Checks that the first ``at_most`` items are samples with alternating turns and usable image references.

    Iterating again must yield the same samples. For a RecordSource, also that its findings agree with its samples and
    that repaired records are usable. Its samples end at the first record that can't be used.
    """
    problems = _record_problems(source, at_most) if isinstance(source, RecordSource) else []
    samples = list(_first_samples(source, at_most))
    for index, item in enumerate(samples):
        if why := item_fault("sources", "__iter__", item):
            return [*problems, f"item {index}: {why}"]
    if not samples and not isinstance(source, RecordSource):
        problems.append("it yields no samples")
    for sample in samples:
        problems += _sample_problems(sample)
    # A generator function's result can be iterated only once; create() then makes another.
    if iter(source) is not source and [sample.id for sample in _first_samples(source, at_most)] != [
        sample.id for sample in samples
    ]:
        problems.append("iterating again yields other samples")
    return problems


def _sample_problems(sample: Sample) -> list[str]:
    where = f"sample {sample.id!r}"
    problems: list[str] = []
    roles = [turn.role for turn in sample.turns if turn.role != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        problems.append(f"{where}: expected turns user, assistant, …, got {', '.join(roles) or 'none'}")
    for image in sample.images:
        if pickle.loads(pickle.dumps(image)) != image:  # noqa: S301 - own data
            problems.append(f"{where}: image {image.name!r} differs after pickling")
        problems += [f"{where}: image {image.name!r}: {problem}" for problem in _image_problems(image)]
    return problems


def _image_problems(image: ImageRef) -> Iterator[str]:
    """Wrong types of an image reference; an image that can't be read is no problem of its source."""
    if not isinstance(image.name, str):
        yield wrong_type("name", image.name, "a string")
    try:
        data, stamp = image.read(), image.stamp()
    except (OSError, DataError):
        return
    if not isinstance(data, bytes):
        yield wrong_type("read()", data, "bytes")
    if stamp is not None and not isinstance(stamp, str):
        yield wrong_type("stamp()", stamp, "a string or None")


def _first_samples(source: Source, at_most: int) -> Iterator[Any]:
    """At most ``at_most`` samples; those of a RecordSource end at the first record that can't be used."""
    try:
        yield from itertools.islice(source, at_most)
    except DataError:
        if not isinstance(source, RecordSource) or all(_is_usable(source, record) for record in source.records()):
            raise


def _is_usable(source: RecordSource, record: RawRecord) -> bool:
    try:
        source.sample(record)
    except DataError:
        return False
    return True


def _record_problems(source: RecordSource, at_most: int) -> list[str]:
    problems: list[str] = []
    for index, record in enumerate(itertools.islice(source.records(), at_most)):
        if why := item_fault("sources", "records", record):
            return [*problems, f"records(): item {index}: {why}"]
        if not record.problem:
            problems += _examination_problems(source, record)
    if isinstance(source, OtherFindings):
        from llavactl.curation.scan import finding_fault

        found = itertools.islice(source.other_findings(), at_most)
        for item in found:
            if why := item_fault("sources", "other_findings", item) or finding_fault([item[1]]):
                return [*problems, f"other_findings() {why}"]
    return problems


def _examination_problems(source: RecordSource, record: RawRecord) -> list[str]:
    """Problems of ``examine``, ``sample`` and ``repair`` for one record."""
    from llavactl.curation.problems import KINDS
    from llavactl.curation.scan import finding_fault

    original = copy.deepcopy(record.value)
    examined = source.examine(record)
    if why := returned_fault("sources", "examine", examined, record) or finding_fault(examined[0]):
        return [f"{record.where}: examine() {why}"]
    findings, images = examined
    problems: list[str] = []
    refused = any(KINDS[finding.kind].effect == "stops" for finding in findings)
    try:
        sample = source.sample(record)
    except DataError as error:
        if not refused:
            problems.append(f"{record.where}: sample() rejects the record, examine() accepts it: {error.message}")
    else:
        if refused:
            problems.append(f"{record.where}: examine() rejects the record, sample() accepts it")
        elif why := returned_fault("sources", "sample", sample, record):
            problems.append(f"{record.where}: sample() {why}")
        elif set(sample.images) != set(images):
            problems.append(f"{record.where}: the images of examine() differ from those of sample()")
    if isinstance(source, RepairingSource):
        problems += _repair_problems(source, record)
    if record.value != original:
        problems.append(f"{record.where}: the record was modified in place")
    return problems


def _repair_problems(source: RepairingSource, record: RawRecord) -> list[str]:
    repaired = source.repair(record)
    if why := returned_fault("sources", "repair", repaired, record):
        return [f"{record.where}: repair() {why}"]
    value, changes = repaired
    if value is None:
        return [] if changes else [f"{record.where}: repair() drops the record without a reason"]
    if not changes and value is not record.value:
        return [f"{record.where}: repair() returns a new value but no changes"]
    try:
        source.sample(replace(record, value=value))
    except DataError as error:
        return [f"{record.where}: sample() rejects the repaired record: {error.message}"]
    return []
