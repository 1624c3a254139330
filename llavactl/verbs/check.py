"""``llavactl data check``: every problem of the training records at once, before anything is trained; and mended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError
from llavactl.curation.inputs import counted_lengths, inputs, with_bar
from llavactl.curation.problems import KINDS, Finding, Tally
from llavactl.curation.repair import Repairer
from llavactl.curation.scan import Decode, ImageChecks, scan
from llavactl.files.json_stream import never_onto, write_stream
from llavactl.images.references import ImageRoot

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.stages import StageNumber


@dataclass(frozen=True)
class ProblemCount:
    """A kind of problem, its effect on a run, how often it was found and the first places."""

    problem: str
    effect: str
    count: int
    what: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class RepairedFile:
    """What ``--fix`` wrote: ``log`` has a line for each record that was changed or dropped."""

    out: str
    log: str
    written: int
    changed: int
    dropped: int


@dataclass(frozen=True)
class CheckReport:
    """What was found in ``records``; ``ok``: nothing of it hurts training.

    ``images`` counts the distinct ones, ``decode`` says how they were looked at, ``lengths`` by which stage's
    template and tokenizer tokens were counted, or why they were not.
    """

    ok: bool
    records: int
    images: int
    decode: str
    lengths: str
    hurts: int
    problems: tuple[ProblemCount, ...]
    seconds: float
    mended: RepairedFile | None = None


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
    write the repaired records to.

    Raises:
        DataError: a file or folder doesn't exist, or ``fix`` can't be written.
        RecipeError: there is nothing to check.
    """
    began = time.perf_counter()
    given = inputs(recipe, file, images, stage, follow_links=follow_links)
    looked = ImageChecks("no" if file is not None and images is None else decode, workers=os.cpu_count() or 1)
    tally, said, records = Tally(), [], 0
    with _mender(file, fix, given[0].root) as mender:
        for each in given:
            lengths, how = counted_lengths(recipe, each.stage)
            said.append(how)
            before = records + tally.counts.total()
            for examined in with_bar(scan(each.records(lengths is not None), looked, lengths), each, "check"):
                records += not any(finding.kind in ("json", "source") for finding in examined.findings)
                tally.add(examined.where, examined.findings)
                if mender is not None:
                    mender.take(examined.where, examined.record, examined.findings)
            if records + tally.counts.total() == before:
                tally.add(str(each.file or f"a source of stage {each.stage}"), [Finding("empty")])
    return CheckReport(
        ok=not tally.hurts,
        records=records,
        images=len(looked.seen),
        decode=looked.decode,
        lengths="; ".join(dict.fromkeys(said)),
        hurts=tally.hurts,
        problems=_problems(tally),
        seconds=round(time.perf_counter() - began, 3),
        mended=None
        if mender is None or fix is None
        else RepairedFile(str(fix), str(_log(fix)), mender.written, mender.changed, mender.dropped),
    )


def _problems(tally: Tally) -> tuple[ProblemCount, ...]:
    found = [(name, kind, tally.counts[name]) for name, kind in KINDS.items() if tally.counts[name]]
    return tuple(ProblemCount(name, kind.effect, n, kind.what, tuple(tally.places[name])) for name, kind, n in found)


def _log(out: Path) -> Path:
    return out.with_suffix(".fixes.jsonl")


@contextmanager
def _mender(file: Path | None, out: Path | None, root: ImageRoot) -> Iterator[Repairer | None]:
    if out is None:
        yield None
        return
    if file is None:
        raise DataError("one file is mended at a time", hint="`llavactl data check FILE --fix OUT`")
    never_onto(file, out)
    with write_stream(out) as write, write_stream(_log(out)) as note:
        yield Repairer(root, write, note)
