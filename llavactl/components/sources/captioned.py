"""What sources of captioned pictures share: which of them to leave out, boxes within the picture, problems at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePlace
from llavactl.core.registry import Options
from llavactl.core.schema import Box, ImageRef, Sample, Turn
from llavactl.images.references import ImageRoot, check_place

log = logging.getLogger(__name__)

SHOWN = 20
QUESTION = "\nDescribe the image briefly."


class CaptionedOptions(Options):
    """Options of every source of captioned pictures."""

    images: RecipePlace | None = Field(
        None, description="what image paths are relative to: a folder, a .zip or .tar, a pattern of these, or a URL"
    )
    follow_links: FollowLinks = False
    missing: bool = Field(False, description="true: pictures that aren't in `images` are there, too")
    crowds: bool = Field(False, description="true: boxes around crowds are there, too")
    min_area: float = Field(0.0, ge=0, lt=1, description="boxes below this share of the picture are left out")


def place_of(options: CaptionedOptions, records: Path) -> ImageRoot:
    """What image paths are relative to: ``images``, else the folder of the ``records``.

    Raises:
        DataError: there is no such place.
    """
    if options.images is not None:
        check_place(str(options.images))
    return ImageRoot(str(options.images or records.parent), options.follow_links)


def present(samples: Iterator[Sample], options: CaptionedOptions) -> Iterator[Sample]:
    """``samples`` without those whose picture isn't there; how many is said once, in a line of the log."""
    total = absent = 0
    for sample in samples:
        total += 1
        if options.images is not None and not options.missing and not all(map(_exists, sample.images)):
            absent += 1
        else:
            yield sample
    if absent:
        log.warning("%d of %d pictures are not in %s and are left out", absent, total, options.images)


def _exists(image: ImageRef) -> bool:
    try:
        image.stamp()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, DataError):
        return True  # whoever reads it is told what is wrong with it
    return True


def captioned(name: str, image: ImageRef, captions: Sequence[str], boxes: Sequence[Box], where: str) -> Sample:
    """A picture with what is known of it; as a record its first caption answers a plain question."""
    said = tuple(caption for caption in (" ".join(each.split()) for each in captions) if caption)
    turns = (Turn("user", (image, QUESTION)), Turn("assistant", said[:1]))
    return Sample(name, turns, where, captions=said, boxes=tuple(boxes))


def wanted(boxes: Sequence[Box], options: CaptionedOptions) -> list[Box]:
    """The ``boxes`` that the options leave, cut at the picture's edges; one without an area is none."""
    found = []
    for box in boxes:
        left, top, right, bottom = (min(max(value, 0.0), 1.0) for value in box.xyxy)
        area = (right - left) * (bottom - top)
        if right > left and bottom > top and area >= options.min_area and (options.crowds or not box.crowd):
            found.append(Box(box.category, (left, top, right, bottom), box.crowd))
    return found


def refuse(problems: Sequence[str], hint: str = "") -> None:
    """Raises DataError with all ``problems``, a line each, if there are any."""
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError("\n".join([*problems[:SHOWN], *more]), hint=hint)
