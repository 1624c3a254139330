"""Encodes stored images again, with the backbone and the images of a recipe, and reports how the features compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import LlavactlError, StoreError
from llavactl.core.paths import json_text, write_json
from llavactl.features.checked_encoder import load_encoder
from llavactl.features.comparison import ImageDifference, RecomputedImages, choose, compare
from llavactl.features.device import default_device
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.keys import ContentKeys
from llavactl.features.manifest import RECOMPUTED, Manifest, read_fingerprint, read_manifest
from llavactl.features.reader import stage_fingerprint, stage_vision
from llavactl.features.recorded import recorded_recipe
from llavactl.features.store import FeatureStore
from llavactl.features.writer import is_writable
from llavactl.recipe.frame import VisionRecipe
from llavactl.recipe.stages import StageNumber

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

StageImages = Callable[[VisionRecipe, StageNumber], "Sequence[ImageRef]"]
"""The distinct images of a stage, in the order of the records."""

Encoding = tuple[VisionRecipe, StageNumber]
"""A stage whose features have the fingerprint of the store."""

_CHUNK = 4096
_NOT_FOUND = "no readable image of the recipe has this content"
_NOTHING = RecomputedImages([], [], {}, [])


@dataclass(frozen=True)
class Recomputed:
    """``selected`` images of ``store`` that were encoded again and ``compared`` with the stored features.

    ``verdict``: ``equal`` to the bit; ``rounding``, where ``written_with`` and ``computed_with`` (device, threads,
    versions) are not the same; ``different``; ``none`` if no image could be compared. ``last_places``: the largest
    difference in units of the last place of ``dtype``. ``unavailable``: images that are not found any more or can't be
    read, with the reasons by content key. ``reason``: why not all images could be compared, such as the errors of
    recipes that the store records.
    """

    store: str
    verdict: str
    seed: int
    selected: int
    compared: int
    equal: int
    rounding: int
    different: int
    last_places: int
    largest: float
    differences: tuple[ImageDifference, ...]
    unavailable: Mapping[str, str]
    dtype: str
    compute: str
    written_with: tuple[Mapping[str, Any], ...]
    computed_with: tuple[Mapping[str, Any], ...]
    reason: str = ""


def recompute_store(
    folder: Path, recipe: VisionRecipe | None, count: int, seed: int, stage_images: StageImages
) -> Recomputed:
    """Encodes ``count`` images of the store in ``folder`` again; the result is kept in the store for model cards.

    Backbone and images are those of ``recipe``, or of the recipes that the store records, the latest first. Without
    any that can be used the verdict is ``none``.

    Raises:
        StoreError: the store has no features or can't be read.
        ModelError: the backbone can't be loaded.
    """
    manifest, fingerprint = read_manifest(folder), read_fingerprint(folder)
    if manifest is None or fingerprint is None:
        raise StoreError(f"{folder} has no features", hint="run `llavactl extract`")
    store = FeatureStore(folder, fingerprint, manifest)
    selected = choose(store, count, seed)
    encodings, reasons = _encodings(recipe, manifest, fingerprint)
    images = _images_of(selected, encodings, stage_images, reasons)
    if not images:
        reason = "; ".join(dict.fromkeys(reasons)) or "no readable image of the recipe is among those selected"
        report = _comparison(folder, fingerprint, _NOTHING, seed, len(selected))
        return replace(report, reason=reason if selected else "", unavailable=dict.fromkeys(selected, _NOT_FOUND))
    used, stage = encodings[0]
    device = default_device()
    with progress.bar(len(images), "recomputing", "image") as bar:
        encoder = load_encoder(stage_vision(used, stage), device, used.features.compute)
        found = compare(store, images, encoder, device, used.features, manifest.conditions, bar.advance)
    written = {store.shard_of(key): None for key in selected}
    missing = dict.fromkeys([key for key in selected if key not in images], _NOT_FOUND)
    report = _comparison(folder, fingerprint, found, seed, len(selected))
    report = replace(
        report,
        unavailable={**missing, **found.failed},
        reason="; ".join(dict.fromkeys(reasons)) if missing else "",
        written_with=_distinct(manifest.conditions.get(file, {}) for file in written),
        computed_with=_distinct(found.conditions),
    )
    if report.compared and is_writable(folder):
        compared = {store.shard_of(key) for key in images if key not in found.failed}
        shards = {entry.file: entry.sha256 for entry in manifest.shards if entry.file in compared}
        write_json(folder / RECOMPUTED, {**asdict(report), "differences": [], "unavailable": {}, "shards": shards})
    return report


def not_recomputed(folder: Path, reason: str, seed: int) -> Recomputed:
    """The result for the store in ``folder`` if none of its images can be encoded."""
    return replace(_comparison(folder, Fingerprint({}), _NOTHING, seed, 0), reason=reason)


def _encodings(
    recipe: VisionRecipe | None, manifest: Manifest, expected: Fingerprint
) -> tuple[list[Encoding], list[str]]:
    """The stages with the fingerprint ``expected``, those of the latest recipe first; and why recipes have none."""
    found: list[Encoding] = []
    reasons: list[str] = []
    for record in [None] if recipe else reversed(manifest.recipes):
        try:
            each = recipe or recorded_recipe(record or {})
            found += [(each, stage) for stage in each.stages_with_data() if stage_fingerprint(each, stage) == expected]
        except LlavactlError as error:
            reasons.append(error.message)
    if not found:
        reasons.append("no recipe has a backbone with this fingerprint: pass one with -r, with unchanged weights")
    return found, reasons


def _images_of(
    keys: Sequence[str], encodings: Sequence[Encoding], stage_images: StageImages, reasons: list[str]
) -> dict[str, ImageRef]:
    """An image with each of the content ``keys`` that the stages of recipes have, in the order of the keys.

    Adds to ``reasons`` why the images of a stage can't be listed.
    """
    wanted = set(keys)
    found: dict[str, ImageRef] = {}
    content_keys = ContentKeys()
    for recipe, stage in encodings:
        if len(found) == len(wanted):
            break
        try:
            images = stage_images(recipe, stage)
        except LlavactlError as error:
            reasons.append(error.message)
            continue
        with progress.bar(len(images), "hashing", "image") as bar:
            for start in range(0, len(images), _CHUNK):
                if len(found) == len(wanted):
                    break
                chunk = images[start : start + _CHUNK]
                for image, key in zip(chunk, content_keys.keys_of(chunk, bar.advance), strict=True):
                    if isinstance(key, str) and key in wanted:
                        found.setdefault(key, image)
    return {key: found[key] for key in keys if key in found}


def _comparison(
    folder: Path, fingerprint: Fingerprint, found: RecomputedImages, seed: int, selected: int
) -> Recomputed:
    differences = tuple(found.differences)
    kinds = Counter(difference.verdict for difference in differences)
    compared = len(found.equal) + len(differences)
    verdict = next((kind for kind in ("different", "rounding") if kinds[kind]), "equal" if compared else "none")
    return Recomputed(
        store=folder.name,
        verdict=verdict,
        seed=seed,
        selected=selected,
        compared=compared,
        equal=len(found.equal),
        rounding=kinds["rounding"],
        different=kinds["different"],
        last_places=max((difference.last_places for difference in differences), default=0),
        largest=max((difference.largest for difference in differences), default=0.0),
        differences=differences,
        unavailable={},
        dtype=fingerprint.dtype,
        compute=str(fingerprint.fields.get("compute")),
        written_with=(),
        computed_with=(),
    )


def _distinct(values: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple({json_text(value): value for value in values}.values())
