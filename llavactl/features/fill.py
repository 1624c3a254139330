"""Encodes missing images and stores their features.

Images are read, decoded and preprocessed in threads ahead of the backbone; features are written in another thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core import progress
from llavactl.core.component_calls import call_error
from llavactl.core.errors import PluginError
from llavactl.core.quantities import gigabytes
from llavactl.features.backbone import OVERFLOW, Backbone, BatchFeatures
from llavactl.features.checked_encoder import load_encoder, unchecked
from llavactl.features.conditions import conditions
from llavactl.features.parts import WHOLE, Part
from llavactl.features.plan import ExtractionPlan, missing_images
from llavactl.features.prepare import Failure, map_ordered, prepare
from llavactl.features.recorded import recorded
from llavactl.features.shards import bytes_of
from llavactl.features.store import FeatureStore
from llavactl.features.writer import StoreWriter

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.sections import Features

_MAX_PENDING_BATCHES = 4
"""The number of batches that may wait to be written while the fsync and checksum of a full shard block the writer."""

MAX_NOT_FINITE = 64
"""The number of images without finite features, before any with, after which extraction stops: a broken encoder."""

Advance = Callable[[int, int], object]


@dataclass(frozen=True)
class ExtractionJob:
    """A ``plan`` with the loaded ``backbone`` and the ``settings`` to carry it out in this process.

    ``recipe`` is recorded in the store, see ``features.recorded``.
    """

    plan: ExtractionPlan
    backbone: Backbone
    settings: Features
    part: Part = WHOLE
    recipe: Mapping[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """The bytes that the missing features will take on disk."""
        shape = self.backbone.encoder.shape
        return bytes_of(shape, len(self.plan.missing), self.settings.shard_images, self.settings.dtype)


def load_jobs(plans: Sequence[ExtractionPlan], recipe: VisionRecipe, device: str, part: Part) -> list[ExtractionJob]:
    """A job for each of the ``plans`` of ``recipe`` with missing images, its backbone loaded on ``device``.

    Raises:
        ModelError, PluginError: see ``load_encoder``.
    """
    settings, record = recipe.features, recorded(recipe)
    jobs = []
    for plan in plans:
        if plan.missing:
            encoder = load_encoder(plan.target.vision, device, settings.compute)
            jobs.append(ExtractionJob(plan, Backbone(encoder, device, settings.batch_size), settings, part, record))
    return jobs


@dataclass(frozen=True)
class EncodedImages:
    """The result for a batch: ``features`` [n, P, Dv] float16 of the contents ``keys``, and failures by key."""

    keys: list[str]
    features: np.ndarray
    failures: dict[str, Failure] = field(default_factory=dict)


def encode_images(images: Mapping[str, ImageRef], backbone: Backbone, workers: int) -> Generator[EncodedImages]:
    """The features of ``images`` by content key, one backbone batch at a time; each image is in one result.

    A GPU receives the next batch before the result of the last one is awaited.
    """
    pending: deque[Callable[[], EncodedImages]] = deque()
    keys: list[str] = []
    pixels: list[np.ndarray] = []
    failures: dict[str, Failure] = {}

    def prepare_item(item: tuple[str, ImageRef]) -> np.ndarray | Failure:
        key, image = item
        return prepare(backbone.encoder, image, key)

    ahead = 2 * backbone.batch_size + workers
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool,
        contextlib.closing(map_ordered(pool, prepare_item, images.items(), ahead)) as prepared,
    ):
        batch_size = backbone.batch_size
        for (key, _), image_pixels in prepared:
            if isinstance(image_pixels, Failure):
                failures[key] = image_pixels
                continue
            keys.append(key)
            pixels.append(image_pixels)
            if len(keys) == batch_size:
                pending.append(partial(_encoded_images, keys, backbone.encode_async(pixels), failures))
                keys, pixels, failures = [], [], {}
                if len(pending) > backbone.batches_ahead:
                    yield pending.popleft()()
    if keys:
        pending.append(partial(_encoded_images, keys, backbone.encode_async(pixels), failures))
    elif failures:
        shape = backbone.encoder.shape
        pending.append(lambda: EncodedImages([], np.empty((0, shape.patches, shape.width), np.float16), failures))
    for wait in pending:
        yield wait()


def _encoded_images(keys: list[str], wait: Callable[[], BatchFeatures], failures: dict[str, Failure]) -> EncodedImages:
    """The awaited batch; images whose features are not finite are moved to ``failures``."""
    features, finite = wait()
    if not finite.all():
        overflow = Failure(OVERFLOW, permanent=True)
        failures |= {key: overflow for key, is_finite in zip(keys, finite, strict=True) if not is_finite}
        keys = [key for key, is_finite in zip(keys, finite, strict=True) if is_finite]
        features = features[finite]
    return EncodedImages(keys, features, failures)


@dataclass(frozen=True)
class FillResult:
    """The number of images ``encoded``, the ``bytes`` of new shards, and the reasons for failures by content key."""

    encoded: int
    bytes: int
    seconds: float
    failures: Mapping[str, str]


def fill_store(job: ExtractionJob, advance: Advance = lambda _images, _bytes: None) -> FillResult:
    """Encodes and stores the missing images of ``job``. ``advance`` is called with the images and bytes of each batch.

    If an exception or Ctrl-C ends it, the features encoded so far are stored.

    Raises:
        StoreError: the store can't be written, or another process is writing to it.
        PluginError: the encoder returns no finite features.
    """
    started = time.perf_counter()
    count = 0
    failures: dict[str, str] = {}
    fingerprint, backbone, settings = job.plan.target.fingerprint, job.backbone, job.settings
    with StoreWriter(
        fingerprint,
        backbone.encoder.shape,
        settings.shard_images,
        job.part,
        conditions=conditions(backbone.device, settings.batch_size, unchecked(backbone.encoder)),
        recipe=job.recipe,
    ) as writer:
        # Another process, or recovery after an interrupted one, may have stored some images since the plan was made.
        missing = missing_images(job.plan.missing, FeatureStore.open(fingerprint))
        with (
            ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
            contextlib.closing(encode_images(missing, backbone, settings.workers)) as batches,
        ):
            pending: deque[Future[None]] = deque()
            max_pending = _MAX_PENDING_BATCHES * settings.batch_size // backbone.batch_size
            for batch in _until_finite(batches, backbone.encoder):
                pending.append(pool.submit(_write_batch, writer, batch))
                if len(pending) > max_pending:
                    pending.popleft().result()
                count += len(batch.keys)
                failures |= {key: failure.reason for key, failure in batch.failures.items()}
                advance(len(batch.keys) + len(batch.failures), batch.features.nbytes)
            for future in pending:
                future.result()
    return FillResult(count, writer.bytes_written, time.perf_counter() - started, failures)


def _until_finite(batches: Iterable[EncodedImages], encoder: Encoder) -> Iterator[EncodedImages]:
    """``batches``; those before the first finite features wait for them, so that no image is skipped for a fault of
    the encoder.

    Raises:
        PluginError: none of several images, of the first ``MAX_NOT_FINITE`` or of all, has finite features.
    """
    waiting: list[EncodedImages] = []
    not_finite, finite = 0, False
    for batch in batches:
        waiting.append(batch)
        not_finite += sum(failure.reason == OVERFLOW for failure in batch.failures.values())
        finite = finite or bool(batch.keys)
        if finite:
            yield from waiting
            waiting.clear()
        elif not_finite >= MAX_NOT_FINITE:
            break
    if not finite and not_finite > 1:
        what = f"returned features that are not finite in float16 for all of {not_finite} images"
        error = call_error(unchecked(encoder), "encode", what)
        raise PluginError(error.message, hint=error.hint or "set `features.compute: float32`")
    yield from waiting


def fill_stores(jobs: Sequence[ExtractionJob]) -> dict[str, FillResult]:
    """Runs ``jobs`` one after another; the results by fingerprint id.

    Raises:
        StoreError: see ``fill_store``.
    """
    written = 0

    def advance(images: int, size: int) -> None:
        nonlocal written
        written += size
        bar.advance(images, written=gigabytes(written))

    with progress.bar(sum(len(job.plan.missing) for job in jobs), "encoding", "image", memory=True) as bar:
        return {job.plan.target.fingerprint.id: fill_store(job, advance) for job in jobs}


def _write_batch(writer: StoreWriter, batch: EncodedImages) -> None:
    for key, failure in batch.failures.items():
        if failure.permanent:
            writer.skip(key, failure.reason)
    writer.append(batch.keys, batch.features)


def estimated_seconds(jobs: Sequence[ExtractionJob]) -> float:
    """The estimated encoding time of ``jobs``, from the speed of one batch each; stores nothing."""
    return sum(len(job.plan.missing) / _images_per_second(job) for job in jobs)


def _images_per_second(job: ExtractionJob) -> float:
    """The speed on one batch of images spread over ``job``, including reading and decoding."""
    missing, batch_size = job.plan.missing, job.settings.batch_size
    sample = dict(list(missing.items())[:: max(1, len(missing) // batch_size)][:batch_size])
    warm_up = dict(list(sample.items())[: job.backbone.batch_size])
    for _ in encode_images(warm_up, job.backbone, job.settings.workers):
        pass
    started = time.perf_counter()
    for _ in encode_images(sample, job.backbone, job.settings.workers):
        pass
    return len(sample) / (time.perf_counter() - started)
