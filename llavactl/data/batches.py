"""Builds batches for the model from encoded conversations and the features of their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import torch

from llavactl.core.schema import IGNORE, Batch, Encoded, Span
from llavactl.data.packing import padding_for

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef


class FeatureLookup(Protocol):
    """Returns the features of an image, cached or computed live."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        """The features [P, Dv] of ``image``, float16 or int8; for int8 also their scales [P + Dv]."""


def collate(
    items: Sequence[Encoded],
    features: FeatureLookup,
    *,
    side: Literal["left", "right"] = "right",
    names: Sequence[str] = (),
) -> Batch:
    """``items`` as one batch [B, T], padded at ``side``, with the features [I, P, Dv] of their images in order."""
    longest = max(map(len, items))
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), IGNORE)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, item in enumerate(items):
        columns = slice(longest - len(item), longest) if side == "left" else slice(0, len(item))
        ids[row, columns] = torch.tensor(item.ids)
        labels[row, columns] = torch.tensor(item.labels)
        mask[row, columns] = True
    images = [image for item in items for image in item.images]
    stacked, scales = _stacked_features(images, features)
    return Batch(ids, mask, labels, stacked, tuple(names), scales=scales)


class _PackedSpan(NamedTuple):
    """The tokens of one span of a packed sequence, the index of the span with its prefix, and its padding tokens."""

    tokens: Encoded
    prefix: int | None
    padding: int


def pack(
    groups: Sequence[tuple[int, Sequence[Encoded]]], features: FeatureLookup, *, names: Sequence[str] = ()
) -> Batch:
    """Packs conversations into one sequence [1, T]; none attends to another.

    ``groups`` are (prefix length, conversations). The conversations of a group start with the same tokens, which
    contain one image and no target and are in the sequence once. Padding is at the end of each conversation without a
    shared prefix, and at the end of each group with one; no other token attends to it.
    """
    parts: list[_PackedSpan] = []
    for prefix_length, items in groups:
        if not prefix_length:
            parts += [_PackedSpan(item, None, padding_for(len(item))) for item in items]
            continue
        first, prefix_index = items[0], len(parts)
        prefix = Encoded(first.ids[:prefix_length], first.labels[:prefix_length], first.images[:1])
        parts.append(_PackedSpan(prefix, None, 0))
        suffixes = [Encoded(item.ids[prefix_length:], item.labels[prefix_length:], item.images[1:]) for item in items]
        parts += [_PackedSpan(suffix, prefix_index, 0) for suffix in suffixes[:-1]]
        parts.append(_PackedSpan(suffixes[-1], prefix_index, padding_for(sum(map(len, suffixes)))))
    ids: list[int] = []
    labels: list[int] = []
    mask: list[bool] = []
    for part, span_prefix, padding in parts:
        # Nothing precedes the first token of a conversation, so no output predicts it.
        first_label = part.labels[:1] if span_prefix is not None else (IGNORE,) * len(part.labels[:1])
        ids += (*part.ids, *(0,) * padding)
        labels += (*first_label, *part.labels[1:], *(IGNORE,) * padding)
        mask += (*(True,) * len(part), *(False,) * padding)
    spans = [Span(len(part) + padding, span_prefix) for part, span_prefix, padding in parts]
    stacked, scales = _stacked_features([image for part, *_ in parts for image in part.images], features)
    return Batch(
        torch.tensor([ids]),
        torch.tensor([mask]),
        torch.tensor([labels]),
        stacked,
        tuple(names),
        tuple(spans),
        scales,
    )


def _stacked_features(
    images: Sequence[ImageRef], features: FeatureLookup
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The features [I, P, Dv] of ``images``, and the scales of int8 features."""
    if not images:
        return None, None
    columns = zip(*(features.arrays(image) for image in images), strict=True)
    stacked, *scales = (torch.from_numpy(np.stack(column)) for column in columns)
    return stacked, scales[0] if scales else None
