"""Encoded conversations and their features to the batch that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from llavactl.core.schema import IGNORE, Batch, Encoded, Span
from llavactl.data.rows import filling

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef


class Loads(Protocol):
    """Where features come from, cached or live."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        """The features [P, Dv] of ``image``; where these are int8 also their scales [P + Dv]."""


def collate(
    items: Sequence[Encoded],
    features: Loads,
    *,
    side: Literal["left", "right"] = "right",
    names: Sequence[str] = (),
) -> Batch:
    """``items`` as one batch [B, T], padded at ``side``, with their images' features [I, P, Dv] in reading order."""
    longest = max(map(len, items))
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORE)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        at = slice(longest - len(item), longest) if side == "left" else slice(0, len(item))
        ids[row, at] = torch.tensor(item.ids)
        labels[row, at] = torch.tensor(item.labels)
        mask[row, at] = True
    images = [image for item in items for image in item.images]
    rows, scales = _stacked(images, features)
    return Batch(ids, mask, labels, rows, tuple(names), scales=scales)


def pack(families: Sequence[tuple[int, Sequence[Encoded]]], features: Loads, *, names: Sequence[str] = ()) -> Batch:
    """Conversations as one row [1, T], one behind the other, each seeing itself alone.

    ``families``: how many tokens its conversations begin with in common, one image and no target among them, and the
    conversations. Those tokens are in the row once. Padding ends the last span of a family, or every span where nothing
    is shared: behind all that is looked at.
    """
    parts: list[tuple[Encoded, int | None, int]] = []
    for shared, items in families:
        if not shared:
            parts += [(item, None, filling(len(item))) for item in items]
            continue
        first, place = items[0], len(parts)
        parts.append((Encoded(first.ids[:shared], first.labels[:shared], first.images[:1]), None, 0))
        rest = [Encoded(item.ids[shared:], item.labels[shared:], item.images[1:]) for item in items]
        parts += [(item, place, 0) for item in rest[:-1]]
        parts.append((rest[-1], place, filling(sum(map(len, rest)))))
    ids: list[int] = []
    labels: list[int] = []
    mask: list[bool] = []
    for part, after, padding in parts:
        # What begins a conversation follows on nothing in it, so nothing predicts it.
        first_label = part.labels[:1] if after is not None else (IGNORE,) * len(part.labels[:1])
        ids += (*part.ids, *(0,) * padding)
        labels += (*first_label, *part.labels[1:], *(IGNORE,) * padding)
        mask += (*(True,) * len(part), *(False,) * padding)
    spans = [Span(len(part) + padding, after) for part, after, padding in parts]
    rows, scales = _stacked([image for part, *_ in parts for image in part.images], features)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([mask]),
        torch.tensor([labels]),
        rows,
        tuple(names),
        tuple(spans),
        scales,
    )


def _stacked(images: Sequence[ImageRef], features: Loads) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The features [I, P, Dv] of ``images``, and the scales that those of int8 have."""
    if not images:
        return None, None
    columns = zip(*(features.stored(image) for image in images), strict=True)
    rows, *scales = (torch.from_numpy(np.stack(column)) for column in columns)
    return rows, scales[0] if scales else None
