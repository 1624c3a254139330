"""``llavactl extract``: the vision features of every image of a recipe, made once into the store."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core import plugins, progress
from llavactl.core.errors import DataError, RecipeError, StoreError
from llavactl.core.hashes import read_only_cache
from llavactl.core.paths import json_text, write_atomic
from llavactl.data.records import distinct_images
from llavactl.features.backbone import Backbone
from llavactl.features.checked import load_encoder
from llavactl.features.extraction import (
    Extraction,
    ExtractionPlan,
    Filled,
    fill,
    images_per_second,
    plan,
    wanted_features,
)
from llavactl.features.keys import ContentKeys
from llavactl.features.manifest import store_dir, stores_dir
from llavactl.features.parts import Part, device_of, part_of_this_process
from llavactl.features.prepare import default_device
from llavactl.features.shards import bytes_of

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreReport:
    """One store that the recipe needs; stages with different ``image`` options have one each."""

    fingerprint: str
    path: str
    image: str
    stages: tuple[int, ...]
    images: int
    unique: int
    stored_before: int
    to_encode: int


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted, or with ``dry_run`` what would be.

    ``images`` are the distinct images that records name, ``unique`` their distinct contents, ``skipped`` the
    images without features (``skipped_file`` has a line for each). Work is counted a store: ``stored_before``
    are contents that needed none, ``to_encode`` those that did, ``encoded`` those that got features. ``bytes``
    were written, in a dry run will be. ``images_per_s`` is the rate of encoding, in a dry run measured on one batch. Of
    several ``parts`` that share the work, all numbers are those of this ``part`` (from 0).
    """

    images: int
    unique: int
    stored_before: int
    to_encode: int
    skipped: int
    free_bytes: int
    device: str
    stores: tuple[StoreReport, ...]
    encoded: int = 0
    bytes: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    estimated_seconds: float | None = None
    skipped_file: str | None = None
    dry_run: bool = False
    part: int = 0
    parts: int = 1


Job = tuple[ExtractionPlan, Extraction]


def extract(
    recipe: VisionRecipe, *, dry_run: bool = False, max_skipped: int | None = None, part: Part | None = None
) -> ExtractReport:
    """Makes the features that ``recipe`` needs and the store doesn't have yet; interrupted, it goes on next time.

    An image that can't be read is skipped and listed with its reason in ``<run_dir>/skipped.jsonl``. A dry
    run writes nothing at all. With ``part`` (default: what torchrun, accelerate or srun tell this process) only that
    share of the images is made, beside the other parts.

    Raises:
        DataError: a record can't be used (before any work), or more than ``max_skipped`` images were
            skipped (after all others are stored).
        StoreError: too little disk (before any work), the store can't be written or another process writes to it.
    """
    if not recipe.stages_with_data():
        raise RecipeError("data.stage1 and data.stage2 name no source", hint="there is nothing to extract features of")
    began = time.perf_counter()
    part = part or part_of_this_process()
    with read_only_cache() if dry_run else nullcontext():
        plans, device = _plans(recipe, part, remember=not dry_run), device_of(part, default_device())
        jobs = [(each, _work(each, recipe, device, part)) for each in plans if each.todo]
    report = _before(plans, device, part)
    needed = sum(_bytes(each, work) for each, work in jobs)
    if dry_run:
        return _planned(report, jobs, needed, began)
    if needed > report.free_bytes:
        raise StoreError(
            f"{stores_dir()}: the features take {needed / 1e9:.1f} GB, {report.free_bytes / 1e9:.1f} GB are free",
            hint="free some disk, or set LLAVACTL_HOME to a folder on a larger one",
        )
    filled = _fill(jobs)
    skipped = _skipped(plans, {each.wanted.fingerprint.id: done for (each, _), done in zip(jobs, filled, strict=True)})
    name = "skipped.jsonl" if part.alone else f"skipped-{part.index}-of-{part.count}.jsonl"
    file = _list(recipe.run_dir / name, skipped)
    if max_skipped is not None and len(skipped) > max_skipped:
        raise DataError(
            f"{len(skipped)} images were skipped, more than {max_skipped}; the features of all others are stored",
            hint=f"{file} says which and why",
        )
    report = _after(report, filled, len(skipped), file, began)
    plugins.notify("extract_finished", report=asdict(report))
    return report


def _plans(recipe: VisionRecipe, part: Part, *, remember: bool) -> list[ExtractionPlan]:
    """One plan per store. Every record is read before the first image, so that a bad record stops the run here."""
    wanted = wanted_features(recipe, {stage.number: distinct_images(stage.sources) for stage in recipe.stages()})
    keys = ContentKeys(remember=remember, workers=recipe.features.workers)
    with progress.bar(sum(len(each.images) for each in wanted), "hashing", "image") as bar:
        return [plan(each, keys, bar.advance, part) for each in wanted]


def _work(each: ExtractionPlan, recipe: VisionRecipe, device: str, part: Part) -> Extraction:
    settings = recipe.features
    encoder = load_encoder(each.wanted.vision, device, settings.compute)
    return Extraction(Backbone(encoder, device, settings.batch_size), settings, part)


def _bytes(each: ExtractionPlan, work: Extraction) -> int:
    return bytes_of(work.encoder.shape, len(each.todo), work.settings.shard_images, work.settings.dtype)


def _before(plans: Sequence[ExtractionPlan], device: str, part: Part) -> ExtractReport:
    keys = {key for each in plans for key in each.keys if isinstance(key, str)}
    return ExtractReport(
        images=len({image for each in plans for image in each.wanted.images}),
        unique=len(keys),
        stored_before=sum(each.stored for each in plans),
        to_encode=sum(len(each.todo) for each in plans),
        skipped=len(_skipped(plans, {})),
        free_bytes=_free_bytes(),
        device=device,
        stores=tuple(_store_report(each) for each in plans),
        part=part.index,
        parts=part.count,
    )


def _store_report(each: ExtractionPlan) -> StoreReport:
    wanted = each.wanted
    return StoreReport(
        fingerprint=wanted.fingerprint.id,
        path=str(store_dir(wanted.fingerprint)),
        image=wanted.image,
        stages=wanted.stages,
        images=len(wanted.images),
        unique=each.unique,
        stored_before=each.stored,
        to_encode=len(each.todo),
    )


def _planned(report: ExtractReport, jobs: Sequence[Job], needed: int, began: float) -> ExtractReport:
    """The report of a dry run: what it will take, going by how fast one batch was."""
    encoding_s = sum(len(each.todo) / images_per_second(each.todo, work) for each, work in jobs)
    return replace(
        report,
        bytes=needed,
        seconds=round(time.perf_counter() - began, 3),
        images_per_s=round(report.to_encode / encoding_s, 2) if jobs else 0.0,
        estimated_seconds=round(encoding_s, 1),
        dry_run=True,
    )


def _fill(jobs: Sequence[Job]) -> list[Filled]:
    written = 0

    def advance(images: int, size: int) -> None:
        nonlocal written
        written += size
        bar.advance(images, GB=f"{written / 1e9:.2f}")

    with progress.bar(sum(len(each.todo) for each, _ in jobs), "encoding", "image") as bar:
        return [fill(each.todo, each.wanted, work, advance) for each, work in jobs]


def _skipped(plans: Sequence[ExtractionPlan], filled: Mapping[str, Filled]) -> dict[ImageRef, str]:
    """Every image without features and why; one that two stores want is there once. ``filled`` by fingerprint id."""
    reasons: dict[ImageRef, str] = {}
    for each in plans:
        done = filled.get(each.wanted.fingerprint.id)
        reasons |= each.skipped(done.failures if done else {})
    return reasons


def _list(file: Path, skipped: Mapping[ImageRef, str]) -> Path:
    """Writes a line for each skipped image; an empty file says that there was none."""
    lines = (json_text({"image": image.name, "reason": why}) for image, why in skipped.items())
    try:
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise StoreError(
            f"{file} can't be written: {error.strerror or error}", hint="the features are stored; mend `run_dir`"
        ) from error
    if skipped:
        log.warning("%d images were skipped; %s says which and why", len(skipped), file)
    return file


def _after(report: ExtractReport, filled: Sequence[Filled], skipped: int, file: Path, began: float) -> ExtractReport:
    encoded, encoding_s = sum(done.encoded for done in filled), sum(done.seconds for done in filled)
    return replace(
        report,
        encoded=encoded,
        bytes=sum(done.bytes for done in filled),
        skipped=skipped,
        skipped_file=str(file),
        seconds=round(time.perf_counter() - began, 3),
        images_per_s=round(encoded / encoding_s, 2) if encoded else 0.0,
    )


def _free_bytes() -> int:
    """Free disk where the stores are, or will be."""
    folder = stores_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
