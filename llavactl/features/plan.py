"""Plans an extraction: which images each feature store needs, and which of them are missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING

from llavactl.core import progress
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.keys import ContentKeys, error_reason
from llavactl.features.parts import WHOLE, Part
from llavactl.features.reader import stage_fingerprint, stage_vision
from llavactl.features.store import FeatureStore
from llavactl.images.sniffing import curable

if TYPE_CHECKING:
    from llavactl.core.protocols import Vision
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.stages import StageNumber


@dataclass(frozen=True)
class ExtractionTarget:
    """The distinct ``images`` of all ``stages`` whose features have the same ``fingerprint``.

    ``image`` is the preprocessing option (``square`` or ``pad``) that these stages share.
    """

    vision: Vision
    fingerprint: Fingerprint
    image: str
    stages: tuple[StageNumber, ...]
    images: tuple[ImageRef, ...]


@dataclass(frozen=True)
class ExtractionPlan:
    """The work for one store.

    ``keys`` [N] are the content keys of ``target.images``, or the errors raised on reading them. ``missing`` maps each
    content key without features to one image with that content, in the order of the records. ``undecodable`` maps
    content keys that an earlier extract couldn't decode to the reasons.
    """

    target: ExtractionTarget
    keys: Sequence[str | OSError]
    missing: Mapping[str, ImageRef]
    undecodable: Mapping[str, str]

    @property
    def unique(self) -> int:
        """The number of distinct contents among the readable images."""
        return len({key for key in self.keys if isinstance(key, str)})

    @property
    def stored(self) -> int:
        """The number of distinct contents that need no work: stored, or known to be undecodable."""
        return self.unique - len(self.missing)

    def skipped(self, failures: Mapping[str, str]) -> dict[ImageRef, str]:
        """The reason for every image without features: unreadable, undecodable, or in ``failures`` by content key."""
        reasons = {**self.undecodable, **failures}
        skipped = {}
        for image, key in zip(self.target.images, self.keys, strict=True):
            reason = error_reason(key) if isinstance(key, OSError) else reasons.get(key)
            if reason is not None:
                skipped[image] = reason
        return skipped


def extraction_targets(
    recipe: VisionRecipe, images: Mapping[StageNumber, Collection[ImageRef]]
) -> list[ExtractionTarget]:
    """The distinct ``images`` of each stage, grouped by the fingerprint of their features."""
    images_by_option: dict[str, dict[ImageRef, None]] = {}
    stages_by_option: dict[str, tuple[StageNumber, ...]] = {}
    for stage in recipe.stages():
        if images[stage.number]:
            images_by_option.setdefault(stage.image, {}).update(dict.fromkeys(images[stage.number]))
            stages_by_option[stage.image] = (*stages_by_option.get(stage.image, ()), stage.number)
    return [
        ExtractionTarget(
            stage_vision(recipe, stages[0]),
            stage_fingerprint(recipe, stages[0]),
            option,
            stages,
            tuple(images_by_option[option]),
        )
        for option, stages in stages_by_option.items()
    ]


def plan_extraction(
    target: ExtractionTarget,
    keys: ContentKeys,
    advance: Callable[[int], object] = lambda _count: None,
    part: Part = WHOLE,
) -> ExtractionPlan:
    """The images of ``target`` that belong to ``part`` and are not stored. Hashes images whose key is not cached.

    Raises:
        StoreError: the store is damaged or has another fingerprint.
    """
    image_keys = keys.keys_of(target.images, advance)
    store = FeatureStore.find(target.fingerprint)
    if store is not None:
        image_keys = store.known_keys(target.images, image_keys)
    if not part.whole:
        # Split by content, so that the same content under two names is encoded once; unreadable images by name.
        names = [
            key if isinstance(key, str) else image.name for image, key in zip(target.images, image_keys, strict=True)
        ]
        owned = [part.owns(name) for name in names]
        target = replace(target, images=tuple(compress(target.images, owned)))
        image_keys = list(compress(image_keys, owned))
    images_by_key: dict[str, ImageRef] = {}
    for image, key in zip(target.images, image_keys, strict=True):
        if isinstance(key, str):
            images_by_key.setdefault(key, image)
    if store is None:
        return ExtractionPlan(target, image_keys, images_by_key, {})
    undecodable = {
        key: store.skipped[key] for key in images_by_key if key in store.skipped and not curable(store.skipped[key])
    }
    return ExtractionPlan(target, image_keys, missing_images(images_by_key, store), undecodable)


def plan_extractions(
    recipe: VisionRecipe, images: Mapping[StageNumber, Collection[ImageRef]], part: Part, *, remember: bool
) -> list[ExtractionPlan]:
    """One plan per store for the ``images`` of each stage; ``remember`` caches their content keys.

    Raises:
        StoreError: see ``plan_extraction``.
    """
    targets = extraction_targets(recipe, images)
    keys = ContentKeys(remember=remember, workers=recipe.features.workers)
    with progress.bar(sum(len(target.images) for target in targets), "hashing", "image") as bar:
        return [plan_extraction(target, keys, bar.advance, part) for target in targets]


def missing_images(images: Mapping[str, ImageRef], store: FeatureStore) -> dict[str, ImageRef]:
    """The ``images`` by content key that are not in ``store``, including failures that a retry may resolve."""
    stored = store.holds(list(images))
    return {
        key: image
        for (key, image), is_stored in zip(images.items(), stored, strict=True)
        if not is_stored and (key not in store.skipped or curable(store.skipped[key]))
    }
