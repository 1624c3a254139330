"""Where training gets features from: the store or the backbone, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llavactl.core.errors import DataError, StoreError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, ImageContents
from llavactl.features.backbone import OVERFLOW, Backbone
from llavactl.features.checked import load_encoder
from llavactl.features.fingerprint import Fingerprint, fingerprint
from llavactl.features.keys import ContentKeys, error_reason
from llavactl.features.prepare import Failure, default_device, map_ordered, pixels_of, prepare
from llavactl.features.quantize import as_stored
from llavactl.features.store import FeatureStore
from llavactl.images.decode import read

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder, Vision
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.stages import StageNumber


_NAMED = 3
RECENT = 16


class FeatureReader(Protocol):
    """Features by image. The same image gives the same bits, cached or live."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What the features are made with."""

    @property
    def shape(self) -> FeatureShape:
        """What ``load`` gives."""

    def load(self, image: ImageRef) -> np.ndarray:
        """The features [P, Dv] float16 of ``image``, an array of the caller's own.

        Raises:
            DataError: it can't be read any more.
            StoreError: its content has no features in the store.
        """

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        """What ``load`` would be made of: features [P, Dv]; where these are int8 also scales [P + Dv]. Raises as it."""

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        """The content keys of ``images``, and those that ``load`` has no features for; called once, before training.

        Raises:
            StoreError: readable images were not extracted yet.
        """


class CachedFeatures:
    """Features from a store; the backbone is never loaded. Can be pickled, and used after a fork."""

    def __init__(self, store: FeatureStore, keys: ContentKeys) -> None:
        self.store = store
        self.keys = keys

    @property
    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint

    @property
    def shape(self) -> FeatureShape:
        return self.store.shape

    def load(self, image: ImageRef) -> np.ndarray:
        return self.store.read(self._key(image))

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return self.store.stored(self._key(image))

    def _key(self, image: ImageRef) -> str:
        try:
            return self.keys.key(image)
        except OSError as error:
            raise DataError(f"image {image.name} can't be read any more: {error_reason(error)}") from error

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        found = list(zip(images, self.keys.hold(images), strict=True))
        reasons = {image: error_reason(key) for image, key in found if isinstance(key, OSError)}
        read = [(image, key) for image, key in found if isinstance(key, str)]
        stored = self.store.holds([key for _, key in read])
        absent = [pair for pair, here in zip(read, stored, strict=True) if not here]
        reasons |= {image: self.store.skipped[key] for image, key in absent if key in self.store.skipped}
        if missing := {key: image.name for image, key in absent if key not in self.store.skipped}:
            named = ", ".join(list(missing.values())[:_NAMED]) + (", …" if len(missing) > _NAMED else "")
            raise StoreError(f"{len(missing)} images have no features yet: {named}", hint="run `llavactl extract`")
        return ImageContents(dict(read), reasons)


class LiveFeatures:
    """Features of ``fingerprint`` encoded when they are asked for, rounded as the store rounds them."""

    def __init__(
        self,
        encoder: Encoder,
        fingerprint: Fingerprint,
        device: str = "cpu",
        *,
        workers: int = 2,
        batch_size: int = 16,
    ) -> None:
        self.encoder = encoder
        self.fingerprint = fingerprint
        self.backbone = Backbone(encoder, device, batch_size)
        self.workers = workers
        self._recent = lru_cache(maxsize=RECENT)(self._encoded)

    @property
    def shape(self) -> FeatureShape:
        return self.encoder.shape

    def load(self, image: ImageRef) -> np.ndarray:
        """Keeps the features of the last RECENT contents: several questions about one picture follow each other."""
        try:
            found = self._recent(read(image))
        except OSError as error:
            raise DataError(f"image {image.name} can't be read: {error_reason(error)}") from error
        if isinstance(found, Failure):
            hint = "`features.mode: cached` leaves such images out" if found.reason == OVERFLOW else ""
            raise DataError(f"image {image.name} can't be read: {found.reason}", hint=hint)
        return found.copy()

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return (self.load(image),)

    def _encoded(self, data: bytes) -> np.ndarray | Failure:
        pixels = pixels_of(self.encoder, data)
        if isinstance(pixels, Failure):
            return pixels
        features, fine = self.backbone.start([pixels])()
        return as_stored(features[0], self.fingerprint.dtype) if fine[0] else Failure(OVERFLOW)

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        """Decodes every image once, the price of doing without a store; an overflow shows only in ``load``."""
        with ThreadPoolExecutor(self.workers) as pool:
            done = map_ordered(pool, partial(prepare, self.encoder), images, 4 * self.workers)
            reasons = {image: found.reason for image, found in done if isinstance(found, Failure)}
        keys = dict(zip(images, ContentKeys(workers=self.workers).many(images), strict=True))
        reasons = {image: error_reason(key) for image, key in keys.items() if isinstance(key, OSError)} | reasons
        return ImageContents({image: key for image, key in keys.items() if isinstance(key, str)}, reasons)


def stage_vision(recipe: VisionRecipe, stage: StageNumber) -> Vision:
    """The vision backbone of ``stage``, no weights loaded."""
    made: Vision = registry().create("vision", recipe.stage(stage).vision)
    return made


def stage_fingerprint(recipe: VisionRecipe, stage: StageNumber) -> Fingerprint:
    """What the features of ``stage`` are made with."""
    return fingerprint(recipe.stage(stage).vision, recipe.features)


def recipe_fingerprints(recipe: VisionRecipe) -> list[Fingerprint]:
    """The fingerprints that the stages with data need; stages whose images are made alike share one."""
    stages = {stage.image: stage for stage in recipe.stages() if stage.sources}
    return [fingerprint(stage.vision, recipe.features) for stage in stages.values()]


def open_features(recipe: VisionRecipe, stage: StageNumber, device: str | None = None) -> FeatureReader:
    """The features of ``stage`` as ``features.mode`` says: from the store, or encoded on ``device``.

    Raises:
        StoreError: cached, and nothing was extracted for this fingerprint.
        ModelError: the backbone can't be read.
    """
    vision = stage_vision(recipe, stage)
    made_with = stage_fingerprint(recipe, stage)
    if recipe.features.mode == "cached":
        return CachedFeatures(FeatureStore.open(made_with), ContentKeys())
    device = device or default_device()
    settings = recipe.features
    encoder = load_encoder(vision, device, settings.compute)
    return LiveFeatures(encoder, made_with, device, workers=settings.workers, batch_size=settings.batch_size)
