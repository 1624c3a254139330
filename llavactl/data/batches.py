"""Encoded conversations and their features to the batch that the model sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch

from llavactl.core.schema import IGNORE, Batch, Encoded

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef


class Loads(Protocol):
    """Where features come from, cached or live: one image to [P, Dv]."""

    def load(self, image: ImageRef) -> np.ndarray: ...


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
    stacked = torch.from_numpy(np.stack([features.load(image) for image in images])) if images else None
    return Batch(ids, mask, labels, stacked, tuple(names))
