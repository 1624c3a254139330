"""What prompts begin with in common need be read only once: an earlier turn, or one picture asked about often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llavactl.core.schema import IMAGE_TOKEN, Encoded

Signature = Sequence[Any]


def signature(encoded: Encoded, per_image: int) -> list[Any]:
    """The tokens, each image token as (which image, place in it): equal for the same image alone."""
    places: list[Any] = []
    count = 0
    for token in encoded.ids:
        if token == IMAGE_TOKEN:
            places.append((encoded.images[count // per_image], count % per_image))
            count += 1
        else:
            places.append(token)
    return places


def shared(read: Signature, wanted: Signature) -> int:
    """How many tokens ``wanted`` begins with that ``read`` begins with too.

    Never all of them, as the last one gives the next; and no image ends halfway.
    """
    keep = 0
    while keep < min(len(read), len(wanted) - 1) and read[keep] == wanted[keep]:
        keep += 1
    while keep and isinstance(wanted[keep], tuple) and wanted[keep][1] > 0:
        keep -= 1
    return keep


def split(encoded: Encoded, keep: int, per_image: int) -> tuple[Encoded, Encoded]:
    """The first ``keep`` tokens, which end no image halfway, and the rest, each with its images."""
    seen = sum(token == IMAGE_TOKEN for token in encoded.ids[:keep]) // max(per_image, 1)
    return (
        Encoded(encoded.ids[:keep], encoded.labels[:keep], encoded.images[:seen]),
        Encoded(encoded.ids[keep:], encoded.labels[keep:], encoded.images[seen:]),
    )
