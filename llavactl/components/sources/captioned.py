"""Common parts of the sources of captioned images: options, filters for images and boxes, collected errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePlace
from llavactl.core.registry import Options
from llavactl.core.schema import Box, ImageRef, Sample, Turn
from llavactl.images.known import known_key
from llavactl.images.references import ImageRoot, check_image_root

log = logging.getLogger(__name__)

MAX_PROBLEMS = 20
QUESTION = "\nDescribe the image briefly."


class CaptionedOptions(Options):
    """Options of every source of captioned images."""

    images: RecipePlace | None = Field(
        None, description="what image paths are relative to: a folder, a .zip or .tar, a pattern of these, or a URL"
    )
    follow_links: FollowLinks = False
    missing: bool = Field(False, description="true: keep images that are not in `images`")
    crowds: bool = Field(False, description="true: keep boxes around crowds")
    min_area: float = Field(0.0, ge=0, lt=1, description="skip boxes with a smaller share of the image's area")


def image_root(options: CaptionedOptions, records: Path) -> ImageRoot:
    """The root of image paths: ``images``, or the folder of the file ``records``.

    Raises:
        DataError: ``images`` doesn't exist.
    """
    if options.images is not None:
        check_image_root(str(options.images))
    return ImageRoot(str(options.images or records.parent), options.follow_links)


def present(samples: Iterator[Sample], options: CaptionedOptions) -> Iterator[Sample]:
    """``samples`` without those whose image is missing, unless the options keep them; logs the number of the former."""
    total = absent = 0
    for sample in samples:
        total += 1
        if options.images is not None and not options.missing and not all(map(_exists, sample.images)):
            absent += 1
        else:
            yield sample
    if absent:
        log.warning("%d of %d images are not in %s and are skipped", absent, total, options.images)


def _exists(image: ImageRef) -> bool:
    try:
        image.stamp()
    except (FileNotFoundError, NotADirectoryError):
        return known_key(image) is not None
    except (OSError, DataError):
        return True  # the error is reported when the image is read
    return True


def captioned_sample(name: str, image: ImageRef, captions: Sequence[str], boxes: Sequence[Box], where: str) -> Sample:
    """An image with its captions and boxes; as a training record, the first caption answers a fixed question."""
    texts = tuple(text for text in (" ".join(caption.split()) for caption in captions) if text)
    turns = (Turn("user", (image, QUESTION)), Turn("assistant", texts[:1]))
    return Sample(name, turns, where, captions=texts, boxes=tuple(boxes))


def is_captioned(sample: Sample) -> bool:
    """Whether ``captioned_sample`` made ``sample``: its answer is a caption, however short."""
    return bool(sample.turns) and sample.turns[0].content[1:] == (QUESTION,)


def selected_boxes(boxes: Sequence[Box], options: CaptionedOptions) -> list[Box]:
    """The ``boxes`` that the options keep, clipped to the image; boxes without area are removed."""
    selected = []
    for box in boxes:
        left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in box.xyxy)
        area = (right - left) * (bottom - top)
        if right > left and bottom > top and area >= options.min_area and (options.crowds or not box.crowd):
            selected.append(Box(box.category, (left, top, right, bottom), box.crowd))
    return selected


def raise_problems(problems: Sequence[str], hint: str = "") -> None:
    """Raises a DataError with one line per problem, if there are any."""
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise DataError("\n".join([*problems[:MAX_PROBLEMS], *more]), hint=hint)
