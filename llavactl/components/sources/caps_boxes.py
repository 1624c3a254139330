"""Captions and boxes, an image per record: ``{"id", "image", "captions": […], "instances": [{"category", "bbox"}]}``.

This is the layout of LLaVA's own files; ``bbox`` is (left, top, right, bottom) as shares of width and height.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
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
from llavactl.files.json_stream import read_stream
from llavactl.files.records import given_id, image_names
from llavactl.images.references import ImageRoot, image_in

HINT = 'a record is {"id", "image", "captions": […], "instances": [{"category", "bbox": [x1, y1, x2, y2]}]}, 0 to 1'


class CapsBoxesOptions(CaptionedOptions):
    """Options of the source ``caps-boxes``."""

    path: RecipePath = Field(description="JSONL or a JSON list")


def caps_boxes(options: CapsBoxesOptions) -> Iterator[Sample]:
    """One sample per record, in the file's order.

    Raises:
        DataError: the file can't be read, or has invalid records, all listed at once.
    """
    if not options.path.is_file():
        raise DataError(f"{options.path}: no such file", hint=HINT)
    root = image_root(options, options.path)
    problems, samples = [], []
    for entry in read_stream(options.path):
        where = f"{options.path}:{entry.location}"
        if entry.problem:
            problems.append(f"{where}: {entry.problem}")
            continue
        try:
            samples.append(_sample(entry.value, where, root, options))
        except DataError as error:
            problems.append(f"{where}: {error.message}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{where}: invalid record: {type(error).__name__}: {error}")
    raise_problems(problems, HINT)
    yield from present(iter(samples), options)


def _sample(record: Any, where: str, root: ImageRoot, options: CapsBoxesOptions) -> Sample:
    paths = image_names(record)
    if len(paths) != 1:
        raise DataError(f"expected one image, got {len(paths)}" if paths else "missing `image`")
    image = image_in(root, paths[0])
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise DataError("`captions`: expected a list of strings")
    boxes = [_box(row) for row in record.get("instances", [])]
    if not captions and not boxes:
        raise DataError("neither captions nor instances")
    name = given_id(record) or PurePosixPath(image.name).stem
    return captioned_sample(name, image, captions, selected_boxes(boxes, options), where)


def _box(row: Any) -> Box:
    left, top, right, bottom = map(float, row["bbox"])
    if not all(-0.01 <= edge <= 1.01 for edge in (left, top, right, bottom)):
        raise DataError(f"bbox {row['bbox']}: expected shares of width and height, 0 to 1")
    if right < left or bottom < top:  # perhaps left, top, width, height, which would make every box wrong
        raise DataError(f"bbox {row['bbox']}: expected left, top, right, bottom")
    return Box(str(row["category"]), (left, top, right, bottom), bool(row.get("crowd") or row.get("iscrowd")))
