"""Captions and boxes, a picture a record: ``{"id", "image", "captions": […], "instances": [{"category", "bbox"}]}``.

The layout of LLaVA's own files; ``bbox`` is (left, top, right, bottom) as shares of width and height.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pydantic import Field

from llavactl.components.sources.captioned import CaptionedOptions, captioned, place_of, present, refuse, wanted
from llavactl.core.errors import DataError
from llavactl.core.options import RecipePath
from llavactl.core.schema import Box, Sample
from llavactl.files.json_stream import read_stream
from llavactl.files.records import given_id, image_names
from llavactl.images.references import ImageRoot, image_in

HINT = 'a record is {"id", "image", "captions": […], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}, 0 to 1'


class CapsBoxesOptions(CaptionedOptions):
    """Options of the source ``caps-boxes``."""

    path: RecipePath = Field(description="JSONL, or a JSON list")


def caps_boxes(options: CapsBoxesOptions) -> Iterator[Sample]:
    """One sample a record, in the file's order.

    Raises:
        DataError: the file can't be read; all its wrong records at once.
    """
    if not options.path.is_file():
        raise DataError(f"{options.path}: no such file", hint=HINT)
    place = place_of(options, options.path)
    problems, found = [], []
    for entry in read_stream(options.path):
        where = f"{options.path}:{entry.location}"
        if entry.problem:
            problems.append(f"{where}: {entry.problem}")
            continue
        try:
            found.append(_sample(entry.value, where, place, options))
        except DataError as error:
            problems.append(f"{where}: {error.message}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{where}: not such a record: {type(error).__name__}: {error}")
    refuse(problems, HINT)
    yield from present(iter(found), options)


def _sample(record: Any, where: str, place: ImageRoot, options: CapsBoxesOptions) -> Sample:
    named = image_names(record)
    if len(named) != 1:
        raise DataError(f"expected one image, found {len(named)}" if named else "no `image`")
    image = image_in(place, named[0])
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise DataError("`captions` is not a list of texts")
    boxes = [_box(each) for each in record.get("instances", [])]
    if not captions and not boxes:
        raise DataError("neither captions nor instances")
    name = given_id(record) or PurePosixPath(image.name).stem
    return captioned(name, image, captions, wanted(boxes, options), where)


def _box(row: Any) -> Box:
    left, top, right, bottom = map(float, row["bbox"])
    if not all(-0.01 <= edge <= 1.01 for edge in (left, top, right, bottom)):
        raise DataError(f"bbox {row['bbox']} is not in shares of width and height, 0 to 1")
    if right < left or bottom < top:  # or left, top, width, height: another layout, of which all would be wrong
        raise DataError(f"bbox {row['bbox']} is not left, top, right, bottom")
    return Box(str(row["category"]), (left, top, right, bottom), bool(row.get("crowd") or row.get("iscrowd")))
