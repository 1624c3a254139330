"""COCO annotations: captions of images, and boxes of the objects in them, from its two JSON files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from llavactl.components.sources.captioned import (
    CaptionedOptions,
    captioned_sample,
    image_root,
    present,
    raise_problems,
    selected_boxes,
)
from llavactl.core.errors import DataError
from llavactl.core.options import RecipePath
from llavactl.core.schema import Box, Sample
from llavactl.files.json_parse import read_json_document
from llavactl.images.references import image_in

HINT = "`captions` and `instances` are COCO's captions_….json and instances_….json"


class CocoOptions(CaptionedOptions):
    """Options of the source ``coco``."""

    captions: RecipePath = Field(description="captions_….json")
    instances: RecipePath | None = Field(None, description="instances_….json; null: no boxes")


def coco(options: CocoOptions) -> Iterator[Sample]:
    """One sample per image that has captions, in the order of the file's ``images``.

    COCO's boxes are (left, top, width, height) in pixels; they become shares of width and height.

    Raises:
        DataError: a file can't be read or isn't COCO's, or has invalid entries, all listed at once.
    """
    root = image_root(options, options.captions)
    problems: list[str] = []
    document = _read(options.captions, ("images", "annotations"))
    captions = _by_image(document, options.captions, _caption, problems)
    boxes: Mapping[int, list[Box]] = {}
    if options.instances is not None:
        boxes = _boxes(_read(options.instances, ("images", "annotations", "categories")), options.instances, problems)
    samples = []
    for index, entry in enumerate(document["images"]):
        where = f"{options.captions} image {index}"
        try:
            key, image = entry["id"], image_in(root, entry["file_name"])
        except (KeyError, TypeError, AttributeError, DataError) as error:
            reason = error.message if isinstance(error, DataError) else "missing `id` or `file_name`"
            problems.append(f"{where}: {reason}")
            continue
        if key in captions:
            selected = selected_boxes(boxes.get(key, []), options)
            samples.append(captioned_sample(PurePosixPath(image.name).stem, image, captions[key], selected, where))
    raise_problems(problems, HINT)
    yield from present(iter(samples), options)


def _boxes(document: Mapping[str, Any], file: Path, problems: list[str]) -> Mapping[int, list[Box]]:
    try:
        names = {category["id"]: str(category["name"]) for category in document["categories"]}
        sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: a category or an image without {error}", hint=HINT) from error

    def box(row: Mapping[str, Any]) -> Box:
        left, top, width, height = map(float, row["bbox"])
        image_width, image_height = sizes[row["image_id"]]
        edges = (left / image_width, top / image_height, (left + width) / image_width, (top + height) / image_height)
        if not all(abs(edge) < float("inf") for edge in edges):
            raise ValueError("a number that is not finite")
        return Box(names[row["category_id"]], edges, bool(row.get("iscrowd")))

    return _by_image(document, file, box, problems)


def _caption(row: Mapping[str, Any]) -> str:
    if not isinstance(row["caption"], str):
        raise TypeError("caption")
    return row["caption"]


def _by_image(
    document: Mapping[str, Any], file: Path, parse: Callable[[Mapping[str, Any]], Any], problems: list[str]
) -> dict[int, list[Any]]:
    """The parsed annotations by image id; adds invalid ones to ``problems``."""
    by_image: dict[int, list[Any]] = {}
    for index, row in enumerate(document["annotations"]):
        try:
            by_image.setdefault(row["image_id"], []).append(parse(row))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            reason = f"missing or unknown {error}" if isinstance(error, KeyError) else f"invalid: {error}"
            problems.append(f"{file} annotation {index}: {reason}")
    return by_image


def _read(file: Path, lists: tuple[str, ...]) -> dict[str, Any]:
    # Outlines are most of instances_train2017.json, and of the memory it would need.
    document = read_json_document(file, ignored_keys=("segmentation",))
    if not isinstance(document, dict) or not all(isinstance(document.get(name), list) for name in lists):
        raise DataError(f"{file}: not a COCO file: expected the lists {', '.join(lists)}", hint=HINT)
    return document
