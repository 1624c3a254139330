"""``llavactl extract``: the vision features of every image of a recipe, made once into the store."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core import plugins
from llavactl.core.errors import DataError, RecipeError, StoreError
from llavactl.core.paths import write_atomic
from llavactl.core.schema import Skipped
from llavactl.features.extraction import Filled, Plan, Work, fill, images_per_second, plan, row_bytes, wanted_features
from llavactl.features.keys import ContentKeys
from llavactl.features.manifest import store_dir, stores_dir
from llavactl.features.prepare import default_device
from llavactl.features.progress import Progress

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe

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

    ``images`` are the distinct images that records name, ``unique`` their distinct contents, ``stored_before``
    those of the contents that needed no work, all summed over ``stores``. ``skipped`` counts images, and
    ``skipped_file`` has a line for each. ``bytes`` were written (in a dry run: will be).
    """

    images: int
    unique: int
    stored_before: int
    to_encode: int
    encoded: int
    skipped: int
    bytes: int
    free_bytes: int
    seconds: float
    images_per_s: float
    estimated_seconds: float | None
    device: str
    stores: tuple[StoreReport, ...]
    skipped_file: str | None
    dry_run: bool


def extract(recipe: Recipe, *, dry_run: bool = False, max_skipped: int | None = None) -> ExtractReport:
    """Makes the features that ``recipe`` needs and the store doesn't have yet; interrupted, it goes on next time.

    An image that can't be read is skipped and listed with its reason in ``<run_dir>/skipped.jsonl``.

    Raises:
        DataError: a record can't be used (before any work), or more than ``max_skipped`` images were
            skipped (after all others are stored).
        StoreError: too little disk (before any work), the store can't be written or another process writes to it.
    """
    if not (recipe.data.stage1 or recipe.data.stage2):
        raise RecipeError("data.stage1 and data.stage2 name no source", hint="there is nothing to extract features of")
    began = time.perf_counter()
    plans = _plans(recipe, remember=not dry_run)
    device = default_device()
    jobs = [(each, _work(each, recipe, device)) for each in plans if each.todo]
    needed, free = sum(len(each.todo) * row_bytes(work.encoder.shape) for each, work in jobs), _free_bytes()
    if dry_run:
        seconds = sum(len(each.todo) / images_per_second(each.todo, work) for each, work in jobs)
        lines = [line for each in plans for line in each.skipped({})]
        return _report(plans, device, began, [], lines, size=needed, free=free, estimated=seconds)
    if needed > free:
        raise StoreError(
            f"{stores_dir()}: the features take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint="free some disk, or set LLAVACTL_HOME to a folder on a larger one",
        )
    filled = _fill(jobs)
    failures = {each.wanted.fingerprint.id: done.failures for (each, _), done in zip(jobs, filled, strict=True)}
    lines = [line for each in plans for line in each.skipped(failures.get(each.wanted.fingerprint.id, {}))]
    file = _list(recipe.run_dir / "skipped.jsonl", lines)
    report = _report(plans, device, began, filled, lines, size=sum(done.bytes for done in filled), free=free, file=file)
    if max_skipped is not None and len(lines) > max_skipped:
        raise DataError(
            f"{len(lines)} images were skipped, more than {max_skipped}; the features of all others are stored",
            hint=f"{file} says which and why",
        )
    plugins.notify("extract_finished", report=asdict(report))
    return report


def _plans(recipe: Recipe, *, remember: bool) -> list[Plan]:
    """One plan a store. All records are read before the first image is."""
    wanted = wanted_features(recipe)
    keys = ContentKeys(remember=remember, workers=recipe.features.workers)
    with Progress("hashing", sum(len(each.images) for each in wanted)) as progress:
        return [plan(each, keys, progress.advance) for each in wanted]


def _work(each: Plan, recipe: Recipe, device: str) -> Work:
    return Work(each.wanted.vision.load(device, recipe.features.compute), device, recipe.features)


def _fill(jobs: Sequence[tuple[Plan, Work]]) -> list[Filled]:
    with Progress("encoding", sum(len(each.todo) for each, _ in jobs)) as progress:
        return [fill(each.todo, each.wanted, work, progress.advance) for each, work in jobs]


def _list(file: Path, skipped: Sequence[Skipped]) -> Path:
    """Writes a line for each skipped image; an empty file says that there was none."""
    write_atomic(file, "".join(f"{json.dumps(asdict(each), ensure_ascii=False)}\n" for each in skipped))
    if skipped:
        log.warning("%d images were skipped; %s says which and why", len(skipped), file)
    return file


def _report(
    plans: Sequence[Plan],
    device: str,
    began: float,
    filled: Sequence[Filled],
    skipped: Sequence[Skipped],
    *,
    size: int,
    free: int,
    file: Path | None = None,
    estimated: float | None = None,
) -> ExtractReport:
    stores = tuple(_store_report(each) for each in plans)
    seconds, encoded = time.perf_counter() - began, sum(done.encoded for done in filled)
    return ExtractReport(
        images=sum(store.images for store in stores),
        unique=sum(store.unique for store in stores),
        stored_before=sum(store.stored_before for store in stores),
        to_encode=sum(store.to_encode for store in stores),
        encoded=encoded,
        skipped=len(skipped),
        bytes=size,
        free_bytes=free,
        seconds=round(seconds, 3),
        images_per_s=round(encoded / seconds, 2),
        estimated_seconds=estimated if estimated is None else round(estimated, 1),
        device=device,
        stores=stores,
        skipped_file=None if file is None else str(file),
        dry_run=file is None,
    )


def _store_report(each: Plan) -> StoreReport:
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


def _free_bytes() -> int:
    """Free disk where the stores are, or will be."""
    folder = stores_dir()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
