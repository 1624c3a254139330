"""``llavactl data generate``: instruction data in LLaVA's records, written by a teacher about a source's pictures."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import DataError, RecipeError, TeacherError
from llavactl.core.hashes import hash_json, read_only_cache
from llavactl.core.identity import component_identity
from llavactl.core.paths import read_json, write_atomic, write_json
from llavactl.core.protocols import LanguageTeacher, Request, Teacher
from llavactl.core.registry import registry
from llavactl.core.schema import Sample
from llavactl.files.json_stream import write_stream
from llavactl.images.image_file import Below, ImageFile
from llavactl.report.instructions import write_instructions
from llavactl.teaching import generate as teaching
from llavactl.teaching.estimate import Estimate
from llavactl.teaching.journal import Journal, alone
from llavactl.teaching.messages import Prompts, prompts
from llavactl.teaching.session import GenerationOptions, GenerationStats, Session, gated
from llavactl.teaching.summary import GenerationSummary

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.sections import Generate


@dataclass(frozen=True)
class GenerateReport:
    """What the teacher made: ``kinds`` counts the samples written, ``refused`` the replies that could not be used.

    ``reasons`` counts those by sort, ``page`` shows it all with some of the samples. Of a language teacher also
    ``asking``: what was sent and spent, and what is still unanswered; or of a dry run the ``estimate``.
    """

    out: str
    pictures: int
    samples: int
    kinds: Mapping[str, int]
    refused: int
    refused_file: str
    seconds: float
    digest: str
    finished_before: bool = False
    reasons: Mapping[str, int] = field(default_factory=dict)
    page: str = ""
    asking: GenerationStats | None = None
    estimate: Estimate | None = None


def generate(recipe: Outline, *, dry_run: bool = False, wishes: GenerationOptions | None = None) -> GenerateReport:
    """Asks the recipe's teacher about every picture of ``generate.source`` and writes ``generate.out``.

    JSONL, or a JSON list where ``out`` ends in ``.json``. Pictures that are not files are written beside it, so that
    the records are whole in themselves. A language teacher's replies are kept beside it, too: what was answered once
    is never asked again.

    Raises:
        RecipeError: the recipe has no ``generate``, or prompts or prices that can't be used.
        DataError: the source can't be read, or has no picture; another process is at it.
        TeacherError: the teacher will not answer; what it answered before is kept.
    """
    if (wanted := recipe.generate) is None:
        raise RecipeError("the recipe has no `generate`", hint="generate: {source: …, teacher: …, kinds: …, out: …}")
    wishes = wishes or GenerationOptions()
    began = time.perf_counter()
    told = prompts(wanted.prompts)
    pictures = list(registry().create("sources", wanted.source.spec()))
    if not pictures:
        raise DataError(f"generate.source {wanted.source.name}: there is no picture to ask about")
    with read_only_cache() if dry_run else nullcontext():
        digest = _digest(wanted, pictures, recipe.seed, told)
    by_hand = wishes.retry_refused or wishes.batch_requests or wishes.batch_results
    if not dry_run and not by_hand and (done := _finished(wanted.out, digest)):
        return done
    asked = list(teaching.requests(pictures, wanted.kinds.weights(), wanted.samples, recipe.seed, told))
    teacher = registry().create("teachers", wanted.teacher.spec())
    session = Session(wanted, teacher, told, asked) if isinstance(teacher, LanguageTeacher) else None
    if session is None and wishes != GenerationOptions():
        raise RecipeError(
            f"the teacher {wanted.teacher.name!r} costs nothing: there is no budget, retry or batch for it"
        )
    plain = GenerateReport(
        out=str(wanted.out),
        pictures=len(pictures),
        samples=len(asked),
        kinds=dict(Counter(each.kind for each in asked)),
        refused=0,
        refused_file=str(_beside(wanted.out, "refused.jsonl")),
        seconds=0.0,
        digest=digest,
    )
    if dry_run:
        return replace(plain, estimate=session.estimate(wishes) if session else None)
    with alone(wanted.out):
        if session is None:
            summary, asking = _write(wanted, gated(teacher, wanted, _at_once(teacher, asked, told)), recipe.seed), None
        else:
            with Journal(session.kept_in) as journal:
                try:
                    asking = session.run(wishes, journal)
                except TeacherError:
                    if journal.answered():  # it is paid for: what there is of it can be looked at and used
                        _write(wanted, session.made(journal), recipe.seed)
                    raise
                summary = _write(wanted, session.made(journal), recipe.seed)
        _keep_pictures(wanted.out.parent, pictures)
        report = replace(
            plain,
            samples=summary.kinds.total(),
            kinds=dict(summary.kinds),
            refused=sum(summary.reasons.values()),
            reasons=summary.reasons,
            page=str(_page(wanted.out, summary)),
            asking=asking,
            seconds=round(time.perf_counter() - began, 3),
        )
        _remember(wanted.out, report)
    return report


def _at_once(teacher: Teacher, asked: Sequence[Request], told: Prompts) -> Iterator[teaching.GeneratedRecord]:
    """Replies that cost nothing need not be kept."""
    with progress.bar(len(asked), "generate", "sample") as bar:
        for request in asked:
            yield teaching.made(teacher, request, told)
            bar.advance()


def _write(wanted: Generate, found: Iterable[teaching.GeneratedRecord], seed: int) -> GenerationSummary:
    """Records and refusals to their files as they come: a hundred thousand need not be in memory at once."""
    summary = GenerationSummary(seed)
    with write_stream(wanted.out) as keep, write_stream(_beside(wanted.out, "refused.jsonl")) as refuse:
        for made in found:
            summary.add(made)
            if made.record is not None:
                keep(made.record)
            else:
                refuse({"id": made.request.id, "sort": made.sort, "reason": made.reason, "reply": made.reply})
    return summary


def _keep_pictures(folder: Path, pictures: Sequence[Sample]) -> None:
    for image in {image.name: image for picture in pictures for image in picture.images}.values():
        if isinstance(image, Below):
            continue  # it lies somewhere already
        file, data = ImageFile(str(folder), image.name).file, image.read()
        if not file.is_file() or file.read_bytes() != data:
            write_atomic(file, data)


def _page(out: Path, summary: GenerationSummary) -> Path:
    examples = [(made.request.kind, made.request.sample.images, made.record) for made in summary.examples]
    return write_instructions(_beside(out, "report.html"), out.stem, summary.document(), examples)


def _digest(wanted: Generate, pictures: Sequence[Sample], seed: int, told: Prompts) -> str:
    """Changes with the teacher, what it is asked for and all that it is told."""
    settings = wanted.model_dump(mode="json", exclude={"out", "max_cost", "prices", "source", "teacher", "prompts"})
    parts = [component_identity("teachers", wanted.teacher.spec()), component_identity("sources", wanted.source.spec())]
    total = hashlib.sha256(hash_json([settings, parts, seed, told.digest]).encode())
    for picture in pictures:
        names = [image.name for image in picture.images]
        total.update(repr((picture.id, names, picture.captions, picture.boxes)).encode())
    return total.hexdigest()


def _beside(out: Path, what: str) -> Path:
    return out.with_suffix(f".{what}")


def _remember(out: Path, report: GenerateReport) -> None:
    """What is whole is not made again; while requests are unanswered, the next run goes on."""
    _beside(out, "report.json").unlink(missing_ok=True)
    if report.asking is None or not report.asking.unanswered:
        write_json(_beside(out, "report.json"), asdict(report))


def _finished(out: Path, digest: str) -> GenerateReport | None:
    """The report of what was made before from the same settings, if it is still there."""
    report = read_json(_beside(out, "report.json"))
    if report.get("digest") != digest or not out.is_file():
        return None
    known = {each.name for each in fields(GenerateReport)}
    facts: dict[str, Any] = {key: value for key, value in report.items() if key in known}
    return GenerateReport(**facts | {"finished_before": True, "asking": None, "estimate": None})
