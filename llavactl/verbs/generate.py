"""``llavactl data generate``: instruction data in LLaVA's records, written by a teacher about a source's pictures."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import DataError, RecipeError
from llavactl.core.paths import write_atomic, write_json
from llavactl.core.registry import registry
from llavactl.core.schema import ImageFile, Sample
from llavactl.teaching import generate as teaching

if TYPE_CHECKING:
    from llavactl.recipe.frame import Generate, Recipe


@dataclass(frozen=True)
class GenerateReport:
    """What the teacher made: ``kinds`` counts the samples written, ``refused`` the replies that could not be used."""

    out: str
    pictures: int
    samples: int
    kinds: Mapping[str, int]
    refused: int
    refused_file: str
    seconds: float
    digest: str
    finished_before: bool = False


def generate(recipe: Recipe, *, dry_run: bool = False) -> GenerateReport:
    """Asks the recipe's teacher about every picture of ``generate.source`` and writes ``generate.out`` (JSONL).

    Pictures that are not files are written beside it, so that the records are whole in themselves.

    Raises:
        RecipeError: the recipe has no ``generate``.
        DataError: the source can't be read, or has no picture.
    """
    if (wanted := recipe.generate) is None:
        raise RecipeError("the recipe has no `generate`", hint="generate: {source: …, teacher: …, kinds: …, out: …}")
    began = time.perf_counter()
    pictures = list(registry().create("sources", wanted.source.spec()))
    if not pictures:
        raise DataError(f"generate.source {wanted.source.name}: there is no picture to ask about")
    digest = _digest(wanted, pictures, recipe.seed)
    refused = wanted.out.with_suffix(".refused.jsonl")
    if not dry_run and (done := _finished(wanted.out, digest)):
        return done
    asked = list(teaching.requests(pictures, wanted.kinds.weights(), wanted.samples, recipe.seed))
    if dry_run:
        kinds = dict(Counter(each.kind for each in asked))
        return GenerateReport(str(wanted.out), len(pictures), len(asked), kinds, 0, str(refused), 0.0, digest)
    teacher = registry().create("teachers", wanted.teacher.spec())
    found = []
    with progress.bar(len(asked), "generate", "sample") as bar:
        for request in asked:
            found.append(teaching.made(teacher, request))
            bar.show()
    _keep_pictures(wanted.out.parent, pictures)
    write_atomic(refused, _lines([{"id": m.request.id, "reason": m.reason} for m in found if m.record is None]))
    write_atomic(wanted.out, _lines([m.record for m in found if m.record is not None]))
    made = Counter(m.request.kind for m in found if m.record is not None)
    report = GenerateReport(
        out=str(wanted.out),
        pictures=len(pictures),
        samples=made.total(),
        kinds=dict(made),
        refused=len(found) - made.total(),
        refused_file=str(refused),
        seconds=round(time.perf_counter() - began, 3),
        digest=digest,
    )
    write_json(_memory(wanted.out), asdict(report))
    return report


def _keep_pictures(folder: Path, pictures: Sequence[Sample]) -> None:
    for image in {image.name: image for picture in pictures for image in picture.images}.values():
        if isinstance(image, ImageFile):
            continue
        file = ImageFile(str(folder), image.name).file
        if not file.is_file():
            write_atomic(file, image.read())


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _digest(wanted: Generate, pictures: Sequence[Sample], seed: int) -> str:
    """Changes with the teacher, what it is asked for and all that it is told."""
    total = hashlib.sha256(json.dumps([wanted.model_dump(mode="json", exclude={"out"}), seed], sort_keys=True).encode())
    for picture in pictures:
        total.update(repr((picture.id, picture.captions, picture.boxes)).encode())
    return total.hexdigest()


def _memory(out: Path) -> Path:
    return out.with_suffix(".report.json")


def _finished(out: Path, digest: str) -> GenerateReport | None:
    """The report of what was made before from the same settings, if it is still there."""
    try:
        report = json.loads(_memory(out).read_text())
    except (OSError, ValueError):
        return None
    if report.get("digest") != digest or not out.is_file():
        return None
    known = {field.name for field in fields(GenerateReport)}
    return GenerateReport(**{key: value for key, value in report.items() if key in known} | {"finished_before": True})
