"""Regions of images, to describe or to locate: Visual Genome, RefCOCO, RefCOCO+ and RefCOCOg.

Boxes are [left, top, right, bottom] as shares of the image padded to a square, in two decimals, as in the published
mix: LLaVA v1.5 pads images in stage 2.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from llavactl import DataError, RecipePath
from llavactl_sources.academic import (
    FAULTS,
    AcademicOptions,
    AcademicSource,
    Entry,
    UnusableError,
    list_in,
    named_by_id,
    problem_entry,
    read_json,
    seeded,
    text_of,
)

_DESCRIBE = "Please provide a short description for this region: {}."
_LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
_SEGMENT = 9
"""Questions per conversation of RefCOCO: fewer than 10."""


class RegionOptions(AcademicOptions):
    """Options of sources of regions."""

    padded: bool = Field(True, description="true: boxes in the image padded to a square; false: in the image itself")
    seed: int = Field(0, description="selects regions, and whether each is described or located")


def region_entry(key: str, image: str, phrase: str, box: str, rng: random.Random) -> Entry:
    """A question that asks for the phrase or for the box, with equal probability."""
    phrase = phrase.rstrip(". ")
    if not phrase:
        raise UnusableError("a phrase without words")
    if rng.random() < 1 / 2:
        return Entry(key, image, _DESCRIBE.format(box), phrase)
    return Entry(key, image, _LOCATE.format(phrase), box)


def box_text(xywh: Sequence[float], width: float, height: float, *, padded: bool) -> str:
    """``xywh`` (left, top, width, height in pixels) as text; raises UnusableError for one without area."""
    x, y, box_width, box_height = map(float, xywh)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height)
    if not (left < right and top < bottom):
        raise UnusableError("a box without an area in the image")
    side = max(width, height)
    across, down = ((side - width) // 2, (side - height) // 2) if padded else (0, 0)
    whole = (side, side) if padded else (width, height)
    corners = [((x + across) / whole[0], (y + down) / whole[1]) for x, y in ((left, top), (right, bottom))]
    return str([round(value, 2) for corner in corners for value in corner])


class VisualGenomeOptions(RegionOptions):
    """Options of the source ``visual-genome``."""

    regions: RecipePath = Field(description="region_descriptions.json")
    image_data: RecipePath = Field(description="image_data.json, which has the sizes and locations of images")
    per_image: int = Field(10, gt=0, description="regions of an image at most, selected at random")


class VisualGenome(AcademicSource):
    """Visual Genome's regions, one conversation per image. Images are in the folders VG_100K and VG_100K_2."""

    def __init__(self, options: VisualGenomeOptions) -> None:
        super().__init__(options, options.regions, options.image_data)
        self.options = options

    def entries(self) -> Iterator[Entry]:
        sizes: dict[Any, Mapping[str, Any]] = {}
        for row in list_in(self.options.image_data):
            if isinstance(row, Mapping):
                sizes[row.get("image_id", row.get("id"))] = row
        for number, row in enumerate(list_in(self.options.regions)):
            try:
                key, regions = row["id"], list(row["regions"])
                if key not in sizes:
                    raise ValueError(f"the image {key!r:.40} is not in {self.options.image_data.name}")
                image = "/".join(PurePosixPath(text_of(sizes[key]["url"], "url")).parts[-2:])
            except FAULTS as error:
                yield problem_entry(row, "id", number, error)
                continue
            rng = seeded(self.options.seed, str(key))
            entries = [self._entry(str(key), image, region, sizes[key], rng) for region in regions]
            yield from (entry for entry in entries if entry.problem)
            usable = [entry for entry in entries if not entry.problem]
            count = min(self.options.per_image, len(usable))
            yield from (usable[index] for index in sorted(rng.sample(range(len(usable)), count)))

    def _entry(self, key: str, image: str, region: Any, size: Mapping[str, Any], rng: random.Random) -> Entry:
        try:
            xywh = [region[name] for name in ("x", "y", "width", "height")]
            box = box_text(xywh, size["width"], size["height"], padded=self.options.padded)
            return region_entry(key, image, text_of(region["phrase"], "phrase"), box, rng)
        except FAULTS as error:
            return problem_entry(region, "region_id", -1, error)


class RefcocoOptions(RegionOptions):
    """Options of the source ``refcoco``."""

    refs: RecipePath = Field(description="refs(unc).p, refs(google).p or refs(umd).p; or the same as JSON")
    instances: RecipePath = Field(description="instances.json")
    split: str = Field("train", description="split of the references")
    image: str = Field("{:012d}.jpg", description="file name of an image; {} stands for its image_id")


class Refcoco(AcademicSource):
    """RefCOCO, RefCOCO+ or RefCOCOg: a question per expression, in conversations of at most nine about one image."""

    turns = _SEGMENT

    def __init__(self, options: RefcocoOptions) -> None:
        super().__init__(options, options.refs, options.instances)
        self.options = options

    def entries(self) -> Iterator[Entry]:
        instances = read_json(self.options.instances)
        try:
            sizes = {row["id"]: (row["width"], row["height"]) for row in instances["images"]}
            boxes = {row["id"]: row["bbox"] for row in instances["annotations"]}
        except FAULTS as error:
            raise DataError(f"{self.options.instances}: not RefCOCO's instances: {error}") from error
        for number, ref in enumerate(_references(self.options.refs)):
            try:
                if ref["split"] != self.options.split:
                    continue
                key = ref["image_id"]
                if ref["ann_id"] not in boxes or key not in sizes:
                    raise ValueError(f"not in {self.options.instances.name}")
                box = box_text(boxes[ref["ann_id"]], *sizes[key], padded=self.options.padded)
                image = named_by_id(self.options.image, key)
                rng = seeded(self.options.seed, f"{key} {ref['ref_id']}")
                phrases = [text_of(sentence["sent"], "sent") for sentence in ref["sentences"]]
                found = [region_entry(str(key), image, phrase, box, rng) for phrase in phrases]
            except FAULTS as error:
                yield problem_entry(ref, "ref_id", number, error)
            else:
                yield from found


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, objects, strings and numbers only: a pickle of anything else could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def _references(file: Path) -> list[Any]:
    """The references of a JSON file or a pickle.

    Raises:
        DataError: it can't be read, or has other contents.
    """
    if file.suffix == ".json":
        return list_in(file)
    try:
        refs = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="utf-8", errors="replace").load()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    except Exception as error:
        raise DataError(f"{file}: not a pickle of plain data: {error}") from error
    if not isinstance(refs, list):
        raise DataError(f"{file}: expected a list of references")
    return refs
