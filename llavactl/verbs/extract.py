"""``llavactl extract``: precompute the vision features of every image of a recipe."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from llavactl.core import plugins
from llavactl.core.errors import DataError, RecipeError
from llavactl.core.hashes import read_only_cache
from llavactl.data.tables import distinct_images
from llavactl.features.device import default_device, device_of
from llavactl.features.disk import check_free_space, free_bytes
from llavactl.features.fill import ExtractionJob, FillResult, estimated_seconds, fill_stores, load_jobs
from llavactl.features.manifest import store_dir
from llavactl.features.parts import Part, part_of_this_process
from llavactl.features.plan import ExtractionPlan, plan_extractions
from llavactl.features.skipped import skipped_images, write_skipped

if TYPE_CHECKING:
    from llavactl.recipe.frame import VisionRecipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreReport:
    """One store that the recipe needs; stages with different ``image`` options use different stores."""

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
    """The result of an extraction, or with ``dry_run`` its plan.

    ``images``: distinct images named by records. ``unique``: distinct contents among them. ``skipped``: images without
    features, listed in ``skipped_file``. Contents are counted per store: ``stored_before`` needed no work,
    ``to_encode`` were missing, ``encoded`` got features. ``bytes``: written, or in a dry run to be written.
    ``images_per_s``: encoding speed, in a dry run measured on one batch. If several ``parts`` share the work, all
    counts are for this ``part`` (from 0).
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


def extract(
    recipe: VisionRecipe, *, dry_run: bool = False, max_skipped: int | None = None, part: Part | None = None
) -> ExtractReport:
    """Encodes and stores the features that ``recipe`` needs and the store lacks; can be interrupted and resumed.

    An image that can't be read is skipped and listed with its reason in ``<run_dir>/skipped.jsonl``. A dry run writes
    nothing. With ``part`` (default: assigned by torchrun, accelerate or srun), only that part of the images is encoded;
    other processes encode the other parts.

    Raises:
        DataError: a record is invalid (before any work), or more than ``max_skipped`` images were skipped (after all
            others were stored).
        StoreError: too little disk space (before any work), the store can't be written, or another process is writing
            to it.
    """
    if not recipe.stages_with_data():
        raise RecipeError("data.stage1 and data.stage2 name no source", hint="add a source of records to either")
    started = time.perf_counter()
    part = part or part_of_this_process()
    with read_only_cache() if dry_run else nullcontext():
        # All records are read before the first image: an invalid record must stop the run before any work.
        images = {stage.number: distinct_images(stage.sources) for stage in recipe.stages()}
        plans = plan_extractions(recipe, images, part, remember=not dry_run)
        device = device_of(part, default_device())
        jobs = load_jobs(plans, recipe, device, part)
    report = _planned_report(plans, jobs, device, part)
    for store in report.stores:
        counts = (store.unique, store.stored_before, store.to_encode)
        log.debug("feature store %s: %d distinct images, %d stored, %d to encode", store.path, *counts)
    if dry_run:
        return _dry_run_report(report, jobs, started)
    check_free_space(report.bytes, report.free_bytes)
    results = fill_stores(jobs)
    skipped = skipped_images(plans, {store: result.failures for store, result in results.items()})
    file = write_skipped(recipe.run_dir, part, skipped)
    if max_skipped is not None and len(skipped) > max_skipped:
        raise DataError(
            f"{len(skipped)} images were skipped, more than --max-skipped {max_skipped}; "
            "the features of all others are stored",
            hint=f"see {file} for the images and reasons",
        )
    report = replace(_final_report(report, results, started), skipped=len(skipped), skipped_file=str(file))
    plugins.notify("extract_finished", recipe=recipe.model_dump(mode="json"), report=asdict(report))
    return report


def _planned_report(
    plans: Sequence[ExtractionPlan], jobs: Sequence[ExtractionJob], device: str, part: Part
) -> ExtractReport:
    return ExtractReport(
        images=len({image for plan in plans for image in plan.target.images}),
        unique=len({key for plan in plans for key in plan.keys if isinstance(key, str)}),
        stored_before=sum(plan.stored for plan in plans),
        to_encode=sum(len(plan.missing) for plan in plans),
        skipped=len(skipped_images(plans, {})),
        free_bytes=free_bytes(),
        device=device,
        stores=tuple(_store_report(plan) for plan in plans),
        bytes=sum(job.bytes for job in jobs),
        part=part.index,
        parts=part.count,
    )


def _store_report(plan: ExtractionPlan) -> StoreReport:
    target = plan.target
    return StoreReport(
        fingerprint=target.fingerprint.id,
        path=str(store_dir(target.fingerprint)),
        image=target.image,
        stages=target.stages,
        images=len(target.images),
        unique=plan.unique,
        stored_before=plan.stored,
        to_encode=len(plan.missing),
    )


def _dry_run_report(report: ExtractReport, jobs: Sequence[ExtractionJob], started: float) -> ExtractReport:
    encoding_s = estimated_seconds(jobs)
    return replace(
        report,
        seconds=round(time.perf_counter() - started, 3),
        images_per_s=round(report.to_encode / encoding_s, 2) if jobs else 0.0,
        estimated_seconds=round(encoding_s, 1),
        dry_run=True,
    )


def _final_report(report: ExtractReport, results: Mapping[str, FillResult], started: float) -> ExtractReport:
    encoded = sum(result.encoded for result in results.values())
    encoding_s = sum(result.seconds for result in results.values())
    return replace(
        report,
        encoded=encoded,
        bytes=sum(result.bytes for result in results.values()),
        seconds=round(time.perf_counter() - started, 3),
        images_per_s=round(encoded / encoding_s, 2) if encoded else 0.0,
    )
