"""The part of the feature stores that is exported: all of them, or what one recipe's stages need."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core import progress
from llavactl.core.errors import LlavactlError, StoreError
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.keys import ContentKeys, error_reason
from llavactl.features.manifest import Manifest, ShardEntry, read_fingerprint, read_manifest
from llavactl.features.plan import extraction_targets
from llavactl.features.recompute import StageImages
from llavactl.features.recorded import recorded_recipe
from llavactl.features.shard_copy import row_bytes
from llavactl.features.shards import Shard
from llavactl.features.store import FeatureStore
from llavactl.features.writer import exclusive, is_writable
from llavactl.images.image_file import RelativeImage
from llavactl.recipe.frame import VisionRecipe

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

log = logging.getLogger(__name__)

_MAX_LISTED = 3

Names = dict[tuple[str, str], str]
"""The content keys of images, by root and path."""


@dataclass(frozen=True)
class Selected:
    """What is exported: parts of ``stores``, and the ``names`` of their images.

    ``unreadable``: the reasons why images of the recipe can't be read; they are left out.
    """

    stores: Sequence[StoreSelection]
    names: Names
    unreadable: Mapping[ImageRef, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportedShard:
    """A shard of a store; ``rows`` [n] are the indices of its images to export, None for all."""

    entry: ShardEntry
    rows: np.ndarray | None
    images: int
    bytes: int

    @property
    def source(self) -> str:
        """A hash of the original shard and the rows."""
        rows = b"all" if self.rows is None else self.rows.astype("<i8").tobytes()
        return hashlib.sha256(self.entry.sha256.encode() + rows).hexdigest()


@dataclass(frozen=True)
class StoreSelection:
    """The part of the store in ``folder`` to export: the images with ``keys``, None for all.

    ``backbone`` is the backbone's model, "" if it is not known.
    """

    folder: Path
    fingerprint: Fingerprint
    manifest: Manifest
    keys: frozenset[bytes] | None
    backbone: str

    def shards(self) -> list[ExportedShard]:
        """The shards to export, with the rows of each."""
        plans = []
        for entry in self.manifest.shards:
            shard = Shard.open(self.folder / entry.file)
            chosen = [row for row, key in enumerate(shard.keys.tolist()) if self.keys is None or key in self.keys]
            if len(chosen) == len(shard.keys):
                plans.append(ExportedShard(entry, None, len(chosen), entry.bytes))
            elif chosen:
                plans.append(ExportedShard(entry, np.array(chosen), len(chosen), row_bytes(shard, len(chosen))))
        return plans

    def skipped(self) -> dict[str, str]:
        """The images without features, with the reasons."""
        return {
            key: reason
            for key, reason in self.manifest.skipped.items()
            if self.keys is None or key.encode() in self.keys
        }


def select_of_recipe(recipe: VisionRecipe, stage_images: StageImages) -> Selected:
    """The features that the stages of ``recipe`` need, and the names of their images.

    Raises:
        StoreError: images have no features yet, or a store can't be read or is being written to.
        DataError: a record is invalid.
    """
    images = {stage.number: stage_images(recipe, stage.number) for stage in recipe.stages()}
    selections, names = [], Names()
    unreadable: dict[ImageRef, str] = {}
    for target in extraction_targets(recipe, images):
        store = FeatureStore.open(target.fingerprint)
        known, errors = _known_keys(store, target.images)
        unreadable |= errors
        usable = _usable(store, known)
        missing = [image.name for image in known if image not in usable]
        if missing:
            listed = ", ".join(missing[:_MAX_LISTED]) + (", …" if len(missing) > _MAX_LISTED else "")
            raise StoreError(f"{len(missing)} images have no cached features: {listed}", hint="run `llavactl extract`")
        wanted = frozenset(key.encode() for key in known.values())
        backbone = recipe.stage(target.stages[0]).vision
        manifest = _settled_manifest(store.folder)
        selections.append(StoreSelection(store.folder, store.fingerprint, manifest, wanted, _model(backbone)))
        names |= _names(known)
    return Selected(selections, names, unreadable)


def select_stores(folders: Sequence[Path], stage_images: StageImages) -> Selected:
    """All features of the stores in ``folders``, and the names of images that the recipes they record still name.

    A recorded recipe that can't be used any more is a warning.

    Raises:
        StoreError: a store can't be read, or is being written to.
    """
    selections, names = [], Names()
    for folder in folders:
        fingerprint = read_fingerprint(folder)
        if fingerprint is None or read_manifest(folder) is None:
            continue
        manifest = _settled_manifest(folder)
        store = FeatureStore(folder, fingerprint, manifest)
        backbone = ""
        for record in manifest.recipes:
            # Records, images or plugins may be gone since; the features are exported all the same.
            try:
                recipe = recorded_recipe(record)
                backbone = _model(recipe.vision.spec())
                for stage in recipe.stages_with_data():
                    known, _ = _known_keys(store, stage_images(recipe, stage))
                    names |= _names(_usable(store, known))
            except LlavactlError as error:
                log.warning(
                    "store %s: images of the recorded recipe %s have no names in the pack: %s",
                    folder.name,
                    record.get("name", "without a name"),
                    error.message,
                )
        selections.append(StoreSelection(folder, fingerprint, manifest, None, backbone))
    return Selected(selections, names)


def _known_keys(store: FeatureStore, images: Sequence[ImageRef]) -> tuple[dict[ImageRef, str], dict[ImageRef, str]]:
    """The content keys of the ``images`` that can be read or are known, and why the others can't be read."""
    with progress.bar(len(images), "hashing", "image") as bar:
        keys = store.known_keys(images, ContentKeys().keys_of(images, bar.advance))
    known = {image: key for image, key in zip(images, keys, strict=True) if isinstance(key, str)}
    errors = {image: error_reason(key) for image, key in zip(images, keys, strict=True) if isinstance(key, OSError)}
    return known, errors


def _usable(store: FeatureStore, keys: Mapping[ImageRef, str]) -> dict[ImageRef, str]:
    """Those of ``keys`` with features in ``store``, or a reason why they have none."""
    stored = store.holds(list(keys.values()))
    return {
        image: key
        for (image, key), is_stored in zip(keys.items(), stored, strict=True)
        if is_stored or key in store.skipped
    }


def _settled_manifest(folder: Path) -> Manifest:
    """The manifest of the store in ``folder``.

    Its shards never change, so the export needs no lock; but the store must not be incomplete because another process
    is still writing to it.
    """
    with exclusive(folder) if is_writable(folder) else contextlib.nullcontext():
        manifest = read_manifest(folder)
    if manifest is None:
        raise StoreError(f"{folder} was removed meanwhile", hint="run `llavactl extract`")
    return manifest


def _names(keys: Mapping[ImageRef, str]) -> Names:
    return {(image.root, image.path): key for image, key in keys.items() if isinstance(image, RelativeImage)}


def _model(vision: Mapping[str, Any]) -> str:
    return str(vision.get("model") or vision.get("name"))
