"""Features for training and inference, read from the store or encoded live, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llavactl.core.component_calls import call_error
from llavactl.core.errors import DataError, PluginError, StoreError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, ImageContents
from llavactl.features.backbone import OVERFLOW, Backbone
from llavactl.features.checked_encoder import load_encoder, unchecked
from llavactl.features.device import default_device
from llavactl.features.fingerprint import Fingerprint, fingerprint
from llavactl.features.keys import ContentKeys, error_reason
from llavactl.features.prepare import Failure, map_ordered, pixels_of, prepare
from llavactl.features.quantize import as_stored
from llavactl.features.store import FeatureStore
from llavactl.images.decode import read
from llavactl.images.known import known_key

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder, Vision
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.stages import StageNumber


_MAX_LISTED = 3
CACHED_IMAGES = 16
"""The number of images whose features ``LiveFeatures`` keeps in memory."""


class FeatureReader(Protocol):
    """Features by image: bit-identical whether cached or live."""

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the features."""

    @property
    def shape(self) -> FeatureShape:
        """The shape of the arrays that ``load`` returns."""

    def load(self, image: ImageRef) -> np.ndarray:
        """The features [P, Dv] float16 of ``image``, as an array that the caller may modify.

        Raises:
            DataError: the image can't be read any more.
            StoreError: its content has no features in the store.
        """

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        """The features of ``image`` before dequantization: [P, Dv] float16, or int8 and their scales [P + Dv].

        Raises:
            DataError, StoreError: see ``load``.
        """

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        """The content keys of ``images``, and the images that have no features; called once, before training.

        Raises:
            StoreError: readable images have not been extracted.
        """


class CachedFeatures:
    """Features from a store, without loading the backbone. Can be pickled, and used after a fork."""

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

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return self.store.stored(self._key(image))

    def _key(self, image: ImageRef) -> str:
        try:
            return self.keys.key(image)
        except OSError as error:
            if (key := known_key(image)) is not None and key in self.store:
                return key
            raise DataError(f"image {image.name} can't be read any more: {error_reason(error)}") from error

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        keys = dict(zip(images, self.store.known_keys(images, self.keys.preload(images)), strict=True))
        reasons = {image: error_reason(key) for image, key in keys.items() if isinstance(key, OSError)}
        readable = {image: key for image, key in keys.items() if isinstance(key, str)}
        stored = self.store.holds(list(readable.values()))
        absent = [pair for pair, is_stored in zip(readable.items(), stored, strict=True) if not is_stored]
        reasons |= {image: self.store.skipped[key] for image, key in absent if key in self.store.skipped}
        if missing := {key: image.name for image, key in absent if key not in self.store.skipped}:
            names = ", ".join(list(missing.values())[:_MAX_LISTED]) + (", …" if len(missing) > _MAX_LISTED else "")
            raise StoreError(f"{len(missing)} images have no cached features: {names}", hint="run `llavactl extract`")
        return ImageContents(readable, reasons)


class LiveFeatures:
    """Features of ``fingerprint`` encoded on demand, rounded like those of a store."""

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
        self._recent = lru_cache(maxsize=CACHED_IMAGES)(self._encode)

    @property
    def shape(self) -> FeatureShape:
        return self.encoder.shape

    def load(self, image: ImageRef) -> np.ndarray:
        """See ``FeatureReader.load``. The features of recent images are kept, since questions often share an image."""
        try:
            features = self._recent(read(image))
        except OSError as error:
            raise DataError(f"image {image.name} can't be read: {error_reason(error)}") from error
        if isinstance(features, Failure):
            if features.reason == OVERFLOW:
                what = f"returned features of image {image.name} that are not finite in float16"
                fault = call_error(unchecked(self.encoder), "encode", what)
                hint = "`features.mode: cached` skips such images; if all are, the encoder is broken"
                raise PluginError(fault.message, hint=fault.hint or hint)
            raise DataError(f"image {image.name} can't be read: {features.reason}")
        return features.copy()

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return (self.load(image),)

    def _encode(self, data: bytes) -> np.ndarray | Failure:
        pixels = pixels_of(self.encoder, data)
        if isinstance(pixels, Failure):
            return pixels
        features, finite = self.backbone.encode_async([pixels])()
        return as_stored(features[0], self.fingerprint.dtype) if finite[0] else Failure(OVERFLOW)

    def contents(self, images: Sequence[ImageRef]) -> ImageContents:
        """See ``FeatureReader.contents``. Decodes every image once; features beyond float16 are found by ``load``."""
        with ThreadPoolExecutor(self.workers) as pool:
            prepared = map_ordered(pool, partial(prepare, self.encoder), images, 4 * self.workers)
            reasons = {image: pixels.reason for image, pixels in prepared if isinstance(pixels, Failure)}
        keys = dict(zip(images, ContentKeys(workers=self.workers).keys_of(images), strict=True))
        reasons = {image: error_reason(key) for image, key in keys.items() if isinstance(key, OSError)} | reasons
        return ImageContents({image: key for image, key in keys.items() if isinstance(key, str)}, reasons)


def stage_vision(recipe: VisionRecipe, stage: StageNumber) -> Vision:
    """The vision backbone of ``stage``, without weights."""
    return registry().create("vision", recipe.stage(stage).vision)


def stage_fingerprint(recipe: VisionRecipe, stage: StageNumber) -> Fingerprint:
    """The fingerprint of the features of ``stage``."""
    return fingerprint(recipe.stage(stage).vision, recipe.features)


def recipe_fingerprints(recipe: VisionRecipe) -> list[Fingerprint]:
    """The distinct fingerprints of the stages that have data."""
    stages = {stage.image: stage for stage in recipe.stages() if stage.sources}
    return [fingerprint(stage.vision, recipe.features) for stage in stages.values()]


def open_features(recipe: VisionRecipe, stage: StageNumber, device: str | None = None) -> FeatureReader:
    """The features of ``stage`` according to ``features.mode``: from the store, or encoded live on ``device``.

    Raises:
        StoreError: the mode is cached, and nothing has been extracted for this fingerprint.
        ModelError: the backbone can't be read.
    """
    vision = stage_vision(recipe, stage)
    expected = stage_fingerprint(recipe, stage)
    if recipe.features.mode == "cached":
        return CachedFeatures(FeatureStore.open(expected), ContentKeys())
    device = device or default_device()
    settings = recipe.features
    encoder = load_encoder(vision, device, settings.compute)
    return LiveFeatures(encoder, expected, device, workers=settings.workers, batch_size=settings.batch_size)
