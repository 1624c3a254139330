"""``llavactl data check``: every problem of the training records at once, before training; and ``--fix``."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Finding, RepairableFile, RepairingSource
from llavactl.curation.inputs import Input, inputs, repairing_source, stored_features, token_lengths, with_progress
from llavactl.curation.problems import KINDS, OF_COMPLETE_SOURCES, Tally
from llavactl.curation.repair import RepairWriter
from llavactl.curation.scan import Decode, ImageChecks, scan
from llavactl.files.json_stream import write_stream
from llavactl.files.text import refuse_overwriting

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.stages import StageNumber


NOT_RECORDS = OF_COMPLETE_SOURCES | {"json"}
"""Problems of what doesn't count as a record."""


@dataclass(frozen=True)
class ProblemCount:
    """A kind of problem with its effect on a run, its count and its first locations."""

    problem: str
    effect: str
    count: int
    description: str
    locations: tuple[str, ...]


@dataclass(frozen=True)
class RepairedFile:
    """The output of ``--fix``: ``log`` has a line for each changed or dropped record."""

    out: str
    log: str
    written: int
    changed: int
    dropped: int


@dataclass(frozen=True)
class CheckReport:
    """The problems of ``records``; ``ok``: none of them affects training (``errors`` is 0).

    ``trains``: despite the problems, training works; it leaves out ``left_out`` records, and images without a caption.

    ``images`` counts distinct images, ``decode`` is how they were checked, ``token_counting`` the stages whose
    template and tokenizer counted tokens, or why they didn't. ``repairs`` are the options of this command, or complete
    commands, that repair the records with problems, for one source each.
    """

    ok: bool
    records: int
    images: int
    decode: str
    token_counting: str
    errors: int
    problems: tuple[ProblemCount, ...]
    seconds: float
    trains: bool = True
    left_out: int = 0
    repairs: tuple[str, ...] = ()
    repaired: RepairedFile | None = None


def check(
    recipe: Outline | None,
    file: Path | None = None,
    images: Path | str | None = None,
    *,
    follow_links: bool = False,
    stage: StageNumber | None = None,
    decode: Decode = "header",
    fix: Path | None = None,
) -> CheckReport:
    """Checks the records of ``recipe``, or of ``file`` with images in ``images``; only those of ``stage`` if given.

    Without ``images``, those of ``file`` are not checked; ``follow_links`` is as in a recipe. ``fix`` is the file to
    write the repaired records of the only source to.

    Raises:
        DataError: a file or folder doesn't exist, ``fix`` can't be written, or its source can't repair records.
        RecipeError: no source to check, or several to repair.
    """
    began = time.perf_counter()
    sources = inputs(recipe, file, images, stage, follow_links=follow_links)
    checks = ImageChecks("no" if file is not None and images is None else decode, workers=os.cpu_count() or 1)
    tally, token_counting, repairs, records, left_out = Tally(), [], [], 0, 0
    usable: Counter[StageNumber] = Counter()
    with _repair_writer(sources, fix) as writer:
        for source in sources:
            counted = [token_lengths(recipe, number) for number in source.stages]
            token_counting += [how for _, how in counted]
            lengths = [of_stage for of_stage, _ in counted if of_stage is not None]
            checks.has_features = stored_features(recipe, source.stages)
            before, repairable_before = records + tally.counts.total(), tally.repairable
            for record in with_progress(scan(source.scan(bool(lengths)), checks, lengths), source.records, "check"):
                effects = {KINDS[finding.kind].effect for finding in record.findings}
                is_record = not any(finding.kind in NOT_RECORDS for finding in record.findings)
                records += is_record
                left_out += "lost" in effects
                if is_record and not effects & {"lost", "stops"}:
                    usable.update(source.stages)
                tally.add(record.where, record.findings)
                if writer is not None and record.raw is not None:
                    writer.add(record.raw, record.findings)
            if records + tally.counts.total() == before:
                name = f"source {source.name} of stage {' and '.join(map(str, source.stages))}"
                tally.add(str(source.records.path if source.records else name), [Finding("empty")])
            if tally.repairable > repairable_before:
                repairs += _repair_options(source, sources)
    return CheckReport(
        ok=not tally.errors,
        records=records,
        images=len(checks.hashes),
        decode=checks.decode,
        token_counting="; ".join(dict.fromkeys(token_counting)),
        errors=tally.errors,
        problems=_problems(tally),
        seconds=round(time.perf_counter() - began, 3),
        trains=not tally.affected("stops") and all(usable[number] for each in sources for number in each.stages),
        left_out=left_out,
        repairs=tuple(repairs),
        repaired=None
        if writer is None or fix is None
        else RepairedFile(str(fix), str(_log(fix)), writer.written, writer.changed, writer.dropped),
    )


def _problems(tally: Tally) -> tuple[ProblemCount, ...]:
    return tuple(
        ProblemCount(name, kind.effect, count, kind.description, tuple(tally.locations[name]))
        for name, kind in KINDS.items()
        if (count := tally.counts[name])
    )


def _repair_options(source: Input, sources: Sequence[Input]) -> list[str]:
    """The options, or the complete command, that repair only the records of ``source``, for each of its stages.

    ``--fix`` accepts one of the recipe's ``sources`` in one stage, for which it counts lengths: a stage's only one, or
    else a file.
    """
    if not isinstance(source.records, RepairingSource):
        return []
    if _only_source(sources) is not None:
        return ["--fix OUT"]
    alone = [stage for stage in source.stages if sum(stage in other.stages for other in sources) == 1]
    options = [f"--stage {stage} --fix OUT" for stage in alone]
    if len(alone) < len(source.stages) and isinstance(source.records, RepairableFile):
        options.append(source.records.repair_command)
    return options


def _only_source(sources: Sequence[Input]) -> Input | None:
    """The only one of ``sources`` if it is read by one stage."""
    return sources[0] if len(sources) == 1 and len(sources[0].stages) == 1 else None


def in_code(texts: Sequence[str]) -> str:
    """``texts`` for a message, each in backticks."""
    return ", ".join(f"`{text}`" for text in texts)


def _log(out: Path) -> Path:
    return out.with_suffix(".fixes.jsonl")


@contextmanager
def _repair_writer(sources: Sequence[Input], out: Path | None) -> Iterator[RepairWriter | None]:
    if out is None:
        yield None
        return
    if (only := _only_source(sources)) is None:
        ways = [options for source in sources for options in _repair_options(source, sources)]
        raise RecipeError(
            f"--fix repairs the records of one source in one stage, got {sum(len(each.stages) for each in sources)}",
            hint=f"repair one source at a time: {in_code(ways)}" if ways else "none of these sources can be repaired",
        )
    source = repairing_source(only)
    refuse_overwriting(source.path, out)
    with write_stream(out) as write, write_stream(_log(out)) as log:
        yield RepairWriter(source, write, log)
