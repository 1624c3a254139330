"""Filling feature stores: which images a recipe wants, which of them are not stored yet, and making these.

Reading, decoding and preprocessing run in threads ahead of the backbone, writing in one beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from llavactl.features.backbone import OVERFLOW, Backbone, Result
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.keys import ContentKeys, error_reason
from llavactl.features.parts import WHOLE, Part
from llavactl.features.prepare import Failure, map_ordered, prepare
from llavactl.features.reader import stage_fingerprint, stage_vision
from llavactl.features.store import FeatureStore
from llavactl.features.writer import StoreWriter
from llavactl.images.sniffing import curable

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder, Vision
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.sections import Features
    from llavactl.recipe.stages import StageNumber

_BATCHES_WAITING = 4
"""How many batches may wait to be written: what fsync and checksum of a full shard take must stop nobody."""

Advance = Callable[[int, int], object]


@dataclass(frozen=True)
class Wanted:
    """The distinct images of the stages whose features have one fingerprint."""

    vision: Vision
    fingerprint: Fingerprint
    image: str
    stages: tuple[StageNumber, ...]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True)
class ExtractionPlan:
    """What is to be done for one fingerprint.

    ``keys`` [N] are the content keys of ``wanted.images``, or the errors that reading them raised; ``todo``
    has the contents without features, each with one image that holds it, in the records' order; ``known`` has
    the contents of which an earlier extract found out that they have none.
    """

    wanted: Wanted
    keys: Sequence[str | OSError]
    todo: Mapping[str, ImageRef]
    known: Mapping[str, str]

    @property
    def unique(self) -> int:
        """How many different contents could be read."""
        return len({key for key in self.keys if isinstance(key, str)})

    @property
    def stored(self) -> int:
        """How many of them need no work, stored or known to be undecodable."""
        return self.unique - len(self.todo)

    def skipped(self, failures: Mapping[str, str]) -> dict[ImageRef, str]:
        """Every image without features: unreadable, known from before, or among ``failures`` by content key."""
        reasons = {**self.known, **failures}
        found = {}
        for image, key in zip(self.wanted.images, self.keys, strict=True):
            reason = error_reason(key) if isinstance(key, OSError) else reasons.get(key)
            if reason is not None:
                found[image] = reason
        return found


def wanted_features(recipe: VisionRecipe, images: Mapping[StageNumber, Collection[ImageRef]]) -> list[Wanted]:
    """The distinct ``images`` of each stage, grouped by the fingerprint of their features."""
    by_option: dict[str, dict[ImageRef, None]] = {}
    stages: dict[str, tuple[StageNumber, ...]] = {}
    for stage in recipe.stages():
        if images[stage.number]:
            by_option.setdefault(stage.image, {}).update(dict.fromkeys(images[stage.number]))
            stages[stage.image] = (*stages.get(stage.image, ()), stage.number)
    return [
        Wanted(
            stage_vision(recipe, numbers[0]),
            stage_fingerprint(recipe, numbers[0]),
            option,
            numbers,
            tuple(by_option[option]),
        )
        for option, numbers in stages.items()
    ]


def plan(
    wanted: Wanted,
    keys: ContentKeys,
    advance: Callable[[int], object] = lambda _count: None,
    part: Part = WHOLE,
) -> ExtractionPlan:
    """What of ``wanted`` is this ``part``'s and not stored; hashes images never seen before.

    Raises:
        StoreError: the store is damaged or belongs to another fingerprint.
    """
    found = keys.many(wanted.images, advance)
    if not part.alone:
        # Dealt out by content, so that one content under two names is made once; without any, by name.
        named = [key if isinstance(key, str) else image.name for image, key in zip(wanted.images, found, strict=True)]
        mine = [part.owns(each) for each in named]
        wanted = replace(wanted, images=tuple(compress(wanted.images, mine)))
        found = list(compress(found, mine))
    by_key: dict[str, ImageRef] = {}
    for image, key in zip(wanted.images, found, strict=True):
        if isinstance(key, str):
            by_key.setdefault(key, image)
    store = FeatureStore.find(wanted.fingerprint)
    if store is None:
        return ExtractionPlan(wanted, found, by_key, {})
    known = {key: store.skipped[key] for key in by_key if key in store.skipped and not curable(store.skipped[key])}
    return ExtractionPlan(wanted, found, _absent(by_key, store), known)


def _absent(images: Mapping[str, ImageRef], store: FeatureStore) -> dict[str, ImageRef]:
    """Those of ``images`` that are not in ``store``, or whose listed failure may be resolved by now."""
    here = store.holds(list(images))
    return {
        key: image
        for (key, image), stored in zip(images.items(), here, strict=True)
        if not stored and (key not in store.skipped or curable(store.skipped[key]))
    }


@dataclass(frozen=True)
class Extraction:
    """What features are made with: a loaded backbone, the recipe's ``features``, and which part is made here."""

    backbone: Backbone
    settings: Features
    part: Part = WHOLE

    @property
    def encoder(self) -> Encoder:
        return self.backbone.encoder


@dataclass(frozen=True)
class EncodedImages:
    """What became of some images: ``features`` [n, P, Dv] float16 of the contents ``keys``, and failures by key."""

    keys: list[str]
    features: np.ndarray
    failures: dict[str, Failure] = field(default_factory=dict)


def encoded(todo: Mapping[str, ImageRef], work: Extraction) -> Generator[EncodedImages]:
    """The features of ``todo``, as many at a time as go through the backbone at once; each is in one ``EncodedImages``.

    A GPU is given the next images before what it made of the last ones is awaited.
    """
    size, workers = work.backbone.group, work.settings.workers
    under_way: deque[Callable[[], EncodedImages]] = deque()
    keys: list[str] = []
    pixels: list[np.ndarray] = []
    failures: dict[str, Failure] = {}

    def ready(item: tuple[str, ImageRef]) -> np.ndarray | Failure:
        return prepare(work.encoder, item[1], item[0])

    with (
        ThreadPoolExecutor(workers, thread_name_prefix="prepare") as pool,
        contextlib.closing(map_ordered(pool, ready, todo.items(), ahead=2 * size + workers)) as items,
    ):
        for (key, _), found in items:
            if isinstance(found, Failure):
                failures[key] = found
                continue
            keys.append(key)
            pixels.append(found)
            if len(keys) == size:
                under_way.append(partial(_made, keys, work.backbone.start(pixels), failures))
                keys, pixels, failures = [], [], {}
                if len(under_way) > work.backbone.ahead:
                    yield under_way.popleft()()
    if keys:
        under_way.append(partial(_made, keys, work.backbone.start(pixels), failures))
    elif failures:
        shape = work.encoder.shape
        under_way.append(lambda: EncodedImages([], np.empty((0, shape.patches, shape.width), np.float16), failures))
    for wait in under_way:
        yield wait()


def _made(keys: list[str], wait: Callable[[], Result], failures: dict[str, Failure]) -> EncodedImages:
    features, good = wait()
    if not good.all():
        failures |= {key: Failure(OVERFLOW, permanent=True) for key, fine in zip(keys, good, strict=True) if not fine}
        keys, features = [key for key, fine in zip(keys, good, strict=True) if fine], features[good]
    return EncodedImages(keys, features, failures)


@dataclass(frozen=True)
class Filled:
    """What ``fill`` did: images ``encoded``, ``bytes`` of new shards, and why contents have no features, by key."""

    encoded: int
    bytes: int
    seconds: float
    failures: Mapping[str, str]


def fill(todo: Mapping[str, ImageRef], wanted: Wanted, work: Extraction, advance: Advance) -> Filled:
    """Makes the features of ``todo`` and stores them; ``advance`` is told images and bytes.

    What was made when an exception or Ctrl-C ends it is stored.

    Raises:
        StoreError: the store can't be written, or another process writes to it.
    """
    began, count = time.perf_counter(), 0
    failures: dict[str, str] = {}
    with StoreWriter(wanted.fingerprint, work.encoder.shape, work.settings.shard_images, work.part) as writer:
        # Another process, or the recovery of what a dead one left, may have stored some since the plan was made.
        todo = _absent(todo, FeatureStore.open(wanted.fingerprint))
        with (
            ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
            contextlib.closing(encoded(todo, work)) as batches,
        ):
            waiting: deque[Future[None]] = deque()
            most = _BATCHES_WAITING * work.settings.batch_size // work.backbone.group
            for made in batches:
                waiting.append(pool.submit(_store, writer, made))
                if len(waiting) > most:
                    waiting.popleft().result()
                count += len(made.keys)
                failures |= {key: failure.reason for key, failure in made.failures.items()}
                advance(len(made.keys) + len(made.failures), made.features.nbytes)
            for future in waiting:
                future.result()
    return Filled(count, writer.bytes_written, time.perf_counter() - began, failures)


def _store(writer: StoreWriter, made: EncodedImages) -> None:
    for key, failure in made.failures.items():
        if failure.permanent:
            writer.skip(key, failure.reason)
    writer.append(made.keys, made.features)


def images_per_second(todo: Mapping[str, ImageRef], work: Extraction) -> float:
    """Measured on one batch of ``todo``, taken from all over it, reading and decoding included; stores nothing."""
    size = work.settings.batch_size
    some = dict(list(todo.items())[:: max(1, len(todo) // size)][:size])
    for _ in encoded(dict(list(some.items())[: work.backbone.group]), work):
        pass  # the first group pays for what is done once
    began = time.perf_counter()
    for _ in encoded(some, work):
        pass
    return len(some) / (time.perf_counter() - began)
