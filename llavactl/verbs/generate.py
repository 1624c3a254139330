"""``llavactl data generate``: LLaVA instruction records, written by a teacher from captions and boxes."""

from __future__ import annotations

import hashlib
import logging
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
from llavactl.data.records import source_samples
from llavactl.files.json_stream import write_stream
from llavactl.images.image_file import ImageFile, RelativeImage
from llavactl.report.instructions import write_instructions
from llavactl.teaching.estimate import Estimate
from llavactl.teaching.generate import GeneratedRecord, build_requests, generate_record
from llavactl.teaching.journal import Journal, exclusive_output
from llavactl.teaching.messages import Prompts, load_prompts
from llavactl.teaching.session import GenerationOptions, GenerationStats, TeacherSession, apply_gates
from llavactl.teaching.summary import GenerationSummary

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.sections import Generate

log = logging.getLogger(__name__)

_RENAMED = {"pictures": "images"}
"""Fields of reports written by earlier versions."""


@dataclass(frozen=True)
class GenerateReport:
    """Generated data: ``kinds`` counts the written samples, ``refused`` the replies that could not be used.

    ``reasons`` counts refused replies by category; ``page`` is an HTML report with random samples. For a language
    teacher, ``requests`` has the requests sent and their cost; for a dry run, ``estimate`` has the expected ones.
    """

    out: str
    images: int
    samples: int
    kinds: Mapping[str, int]
    refused: int
    refused_file: str
    seconds: float
    digest: str
    finished_before: bool = False
    reasons: Mapping[str, int] = field(default_factory=dict)
    page: str = ""
    requests: GenerationStats | None = None
    estimate: Estimate | None = None


def generate(recipe: Outline, *, dry_run: bool = False, options: GenerationOptions | None = None) -> GenerateReport:
    """Generates records about every image of ``generate.source`` and writes them to ``generate.out``.

    The output is JSONL, or a JSON list if ``out`` ends in ``.json``. Images that are not files (rendered scenes) are
    written beside it. A language teacher's replies are stored beside it, too, so an answered request is never repeated.

    Raises:
        RecipeError: the recipe has no ``generate``, or its prompts or prices are invalid.
        DataError: the source is unreadable or has no images, or another process is writing ``out``.
        TeacherError: the teacher can't answer, or no reply can be used; earlier replies are kept.
    """
    settings = recipe.generate
    if settings is None:
        raise RecipeError("the recipe has no `generate`", hint="generate: {source: …, teacher: …, kinds: …, out: …}")
    options = options or GenerationOptions()
    began = time.perf_counter()
    prompts = load_prompts(settings.prompts)
    images = list(source_samples(settings.source.spec()))
    if not images:
        raise DataError(f"generate.source {settings.source.name}: no images")
    with read_only_cache() if dry_run else nullcontext():
        digest = _digest(settings, images, recipe.seed, prompts)
    manual = options.retry_refused or options.batch_requests or options.batch_results
    if not dry_run and not manual and (finished := _finished(settings.out, digest)):
        log.debug("generate: %s is up to date (digest %s)", settings.out, digest)
        return finished
    requests = list(build_requests(images, settings.kinds.weights(), settings.samples, recipe.seed, prompts))
    teacher = registry().create("teachers", settings.teacher.spec())
    session = TeacherSession(settings, teacher, prompts, requests) if isinstance(teacher, LanguageTeacher) else None
    if session is None and options != GenerationOptions():
        raise RecipeError(
            f"the teacher {settings.teacher.name!r} is no language model: budget, retry and batch options are invalid"
        )
    report = GenerateReport(
        out=str(settings.out),
        images=len(images),
        samples=len(requests),
        kinds=dict(Counter(request.kind for request in requests)),
        refused=0,
        refused_file=str(_sibling(settings.out, "refused.jsonl")),
        seconds=0.0,
        digest=digest,
    )
    if dry_run:
        return replace(report, estimate=session.estimate(options) if session else None)
    with exclusive_output(settings.out):
        if session is None:
            records = apply_gates(teacher, settings, _generated(teacher, requests, prompts))
            summary, stats = _write(settings.out, records, recipe.seed), None
        else:
            summary, stats = _run(session, options, recipe.seed)
        _write_images(settings.out.parent, images)
        report = replace(
            report,
            samples=summary.kinds.total(),
            kinds=dict(summary.kinds),
            refused=sum(summary.reasons.values()),
            reasons=summary.reasons,
            page=str(_write_page(settings.out, summary)),
            requests=stats,
            seconds=round(time.perf_counter() - began, 3),
        )
        if report.refused and not report.samples and not (stats and stats.unanswered):
            _sibling(settings.out, "report.json").unlink(missing_ok=True)
            raise _nothing_usable(report, retry=session is not None)
        _save_report(settings.out, report)
    return report


def _nothing_usable(report: GenerateReport, *, retry: bool) -> TeacherError:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in report.reasons.items())
    again = ", then pass --retry-refused" if retry else ""
    return TeacherError(
        f"no reply of the teacher could be used ({reasons}); {report.refused_file} lists them",
        hint=f"check the teacher and its prompts{again}",
    )


def _run(session: TeacherSession, options: GenerationOptions, seed: int) -> tuple[GenerationSummary, GenerationStats]:
    """Sends the pending requests and writes all records so far."""
    out = session.settings.out
    with Journal(session.journal_file) as journal:
        try:
            stats = session.run(options, journal)
        except TeacherError:
            if journal.answered_keys():  # they are paid for: write the records so far
                _write(out, session.records(journal), seed)
            raise
        return _write(out, session.records(journal), seed), stats


def _generated(teacher: Teacher, requests: Sequence[Request], prompts: Prompts) -> Iterator[GeneratedRecord]:
    """Records of a teacher whose replies are free and therefore not stored."""
    with progress.bar(len(requests), "generate", "sample") as bar:
        for request in requests:
            yield generate_record(teacher, request, prompts)
            bar.advance()


def _write(out: Path, records: Iterable[GeneratedRecord], seed: int) -> GenerationSummary:
    """Streams records and refusals to their files."""
    summary = GenerationSummary(seed)
    with write_stream(out) as write_record, write_stream(_sibling(out, "refused.jsonl")) as write_refusal:
        for each in records:
            summary.add(each)
            if each.record is not None:
                write_record(each.record)
            else:
                write_refusal(
                    {"id": each.request.id, "sort": each.category, "reason": each.reason, "reply": each.reply}
                )
    return summary


def _write_images(folder: Path, samples: Sequence[Sample]) -> None:
    """Writes the images that are not files yet."""
    for image in {image.name: image for sample in samples for image in sample.images}.values():
        if isinstance(image, RelativeImage):
            continue
        file, data = ImageFile(str(folder), image.name).file, image.read()
        if not file.is_file() or file.read_bytes() != data:
            write_atomic(file, data)


def _write_page(out: Path, summary: GenerationSummary) -> Path:
    examples = [(each.request.kind, each.request.sample.images, each.record) for each in summary.examples]
    return write_instructions(_sibling(out, "report.html"), out.stem, summary.document(), examples)


def _digest(settings: Generate, images: Sequence[Sample], seed: int, prompts: Prompts) -> str:
    """A hash of the teacher, the settings, the prompts and the images with their captions and boxes."""
    options = settings.model_dump(mode="json", exclude={"out", "max_cost", "prices", "source", "teacher", "prompts"})
    teacher = component_identity("teachers", settings.teacher.spec())
    source = component_identity("sources", settings.source.spec())
    digest = hashlib.sha256(hash_json([options, [teacher, source], seed, prompts.digest]).encode())
    for image in images:
        names = [each.name for each in image.images]
        digest.update(repr((image.id, names, image.captions, image.boxes)).encode())
    return digest.hexdigest()


def _sibling(out: Path, suffix: str) -> Path:
    return out.with_suffix(f".{suffix}")


def _save_report(out: Path, report: GenerateReport) -> None:
    """Saves the report of finished data; while requests are unanswered, the next run continues."""
    _sibling(out, "report.json").unlink(missing_ok=True)
    if report.requests is None or not report.requests.unanswered:
        write_json(_sibling(out, "report.json"), asdict(report))


def _finished(out: Path, digest: str) -> GenerateReport | None:
    """The saved report of ``out`` if it was generated with the same settings."""
    report = {_RENAMED.get(key, key): value for key, value in read_json(_sibling(out, "report.json")).items()}
    if report.get("digest") != digest or not out.is_file():
        return None
    names = {each.name for each in fields(GenerateReport)}
    values: dict[str, Any] = {key: value for key, value in report.items() if key in names}
    return GenerateReport(**values | {"finished_before": True, "requests": None, "estimate": None})
