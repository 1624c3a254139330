"""Where a conversation's images are placed relative to the text of their turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from llavactl.core.schema import Content, Turn

ImageOrder = Literal["first", "random", "as-data"]


def arrange(turns: Sequence[Turn], order: ImageOrder, seed: str) -> tuple[Turn, ...]:
    """Applies ``image_order`` to ``turns``.

    ``first`` moves the images of each user turn before its text, as LLaVA v1.5 does. ``random`` moves the images of the
    first user turn before or after the question with equal probability, seeded with ``seed`` (LLaVA paper, equation 2),
    and those of later turns before their text. ``as-data`` keeps the order of the record.
    """
    if order == "as-data":
        return tuple(turns)
    return _arranged(turns, after=bool(arrangement(order, seed)))


def arrangement(order: ImageOrder, seed: str) -> int:
    """The index into ``arrangements`` of what ``arrange`` returns."""
    return int(order == "random" and random.Random(seed).random() < 0.5)


def arrangements(turns: Sequence[Turn], order: ImageOrder) -> tuple[tuple[Turn, ...], ...]:
    """All results that ``arrange`` can return for ``turns``, over all seeds."""
    if order == "as-data":
        return (tuple(turns),)
    return tuple(_arranged(turns, after=after) for after in ((False, True) if order == "random" else (False,)))


def _arranged(turns: Sequence[Turn], *, after: bool) -> tuple[Turn, ...]:
    """``turns`` with images before the text, or in the first user turn after it if ``after``."""
    arranged = []
    for turn in turns:
        if turn.role == "user":
            arranged.append(Turn("user", _reordered_content(turn, after)) if turn.images else turn)
            after = False
        else:
            arranged.append(turn)
    return tuple(arranged)


def _reordered_content(turn: Turn, after: bool) -> tuple[Content, ...]:
    text = turn.text.strip()
    if after:
        return (text, *(part for image in turn.images for part in ("\n", image)))
    images: tuple[Content, ...] = tuple(part for image in turn.images for part in (image, "\n"))
    return (*images, text) if text else images[:-1]
