"""COCO's annotations: captions of pictures, and boxes of what is in them, from its two JSON files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from llavactl.components.sources.captioned import CaptionedOptions, captioned, place_of, present, refuse, wanted
from llavactl.core.errors import DataError
from llavactl.core.options import RecipePath
from llavactl.core.schema import Box, Sample
from llavactl.files.json_parse import read_json_document
from llavactl.images.references import image_in

HINT = "`captions` and `instances` name COCO's captions_….json and instances_….json"


class CocoOptions(CaptionedOptions):
    """Options of the source ``coco``."""

    captions: RecipePath = Field(description="captions_….json")
    instances: RecipePath | None = Field(None, description="instances_….json; null: no boxes")


def coco(options: CocoOptions) -> Iterator[Sample]:
    """One sample a picture that has captions, in the order of the file's ``images``.

    COCO's boxes are (left, top, width, height) in pixels; they become shares of width and height.

    Raises:
        DataError: a file that can't be read or isn't COCO's; all its wrong entries at once.
    """
    place = place_of(options, options.captions)
    problems: list[str] = []
    told = _read(options.captions, ("images", "annotations"))
    captions = _by_image(told, options.captions, _caption, problems)
    boxes: Mapping[int, list[Box]] = {}
    if options.instances is not None:
        boxes = _boxes(_read(options.instances, ("images", "annotations", "categories")), options.instances, problems)
    found = []
    for number, image in enumerate(told["images"]):
        where = f"{options.captions} image {number}"
        try:
            key, picture = image["id"], image_in(place, image["file_name"])
        except (KeyError, TypeError, AttributeError, DataError) as error:
            problems.append(
                f"{where}: {error.message if isinstance(error, DataError) else 'it needs id and file_name'}"
            )
            continue
        if key in captions:
            name = PurePosixPath(picture.name).stem
            found.append(captioned(name, picture, captions[key], wanted(boxes.get(key, []), options), where))
    refuse(problems, HINT)
    yield from present(iter(found), options)


def _boxes(document: Mapping[str, Any], file: Path, problems: list[str]) -> Mapping[int, list[Box]]:
    try:
        names = {each["id"]: str(each["name"]) for each in document["categories"]}
        sizes = {each["id"]: (each["width"], each["height"]) for each in document["images"]}
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: a category or an image without {error}", hint=HINT) from error

    def box(row: Mapping[str, Any]) -> Box:
        left, top, width, height = map(float, row["bbox"])
        across, down = sizes[row["image_id"]]
        edges = (left / across, top / down, (left + width) / across, (top + height) / down)
        if not all(abs(edge) < float("inf") for edge in edges):
            raise ValueError("a number that is not finite")
        return Box(names[row["category_id"]], edges, bool(row.get("iscrowd")))

    return _by_image(document, file, box, problems)


def _caption(row: Mapping[str, Any]) -> str:
    if not isinstance(row["caption"], str):
        raise TypeError("caption")
    return row["caption"]


def _by_image(
    document: Mapping[str, Any], file: Path, read: Callable[[Mapping[str, Any]], Any], problems: list[str]
) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for number, row in enumerate(document["annotations"]):
        try:
            found.setdefault(row["image_id"], []).append(read(row))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            what = f"nothing known under {error}" if isinstance(error, KeyError) else f"not COCO's: {error}"
            problems.append(f"{file} annotation {number}: {what}")
    return found


def _read(file: Path, lists: tuple[str, ...]) -> dict[str, Any]:
    # Outlines are most of instances_train2017.json, and of the memory it would need.
    document = read_json_document(file, ignored_keys=("segmentation",))
    if not isinstance(document, dict) or not all(isinstance(document.get(name), list) for name in lists):
        raise DataError(f"{file}: not a COCO file: expected the lists {', '.join(lists)}", hint=HINT)
    return document
