"""Packed sequences: spans, padding, labels and token counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef
from llavactl.data.batches import pack
from llavactl.data.packing import PAD_MULTIPLE, padding_for
from llavactl.model.inputs import token_count


class NamedImage(NamedTuple):
    name: str

    def read(self) -> bytes:
        return self.name.encode()


class ConstantFeatures:
    """Features [2, 3] of ones for any image."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        del image
        return (np.ones((2, 3), np.float16),)


PREFIX = (1, IMAGE_TOKEN, IMAGE_TOKEN)


def with_shared_prefix() -> list[Encoded]:
    """Two conversations about the same image, with two tokens and one token after it."""
    image = NamedImage("a.png")
    return [Encoded((*PREFIX, *rest), (IGNORE,) * 3 + rest, (image,)) for rest in ((7, 8), (9,))]


@pytest.mark.parametrize("length", [1, PAD_MULTIPLE - 1, PAD_MULTIPLE, PAD_MULTIPLE + 1])
def test_each_conversation_is_padded_to_the_multiple(length: int) -> None:
    item = Encoded((5,) * length, (IGNORE,) + (5,) * (length - 1), ())
    batch = pack([(0, [item, item])], ConstantFeatures())
    width = length + padding_for(length)
    assert width % PAD_MULTIPLE == 0
    assert width - length < PAD_MULTIPLE
    assert batch.spans == ((width, None),) * 2
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape == (1, 2 * width)
    assert batch.mask.view(2, width).tolist() == [[position < length for position in range(width)]] * 2
    assert (batch.labels.view(2, width)[:, length:] == IGNORE).all()
    assert token_count(batch) == 2 * length


def test_conversations_with_a_shared_prefix_are_padded_together() -> None:
    items = with_shared_prefix()
    batch = pack([(3, items), (0, items[:1])], ConstantFeatures())
    assert batch.spans == ((3, None), (2, 0), (PAD_MULTIPLE - 2, 0), (PAD_MULTIPLE, None))
    assert batch.labels[0, 3:6].tolist() == [7, 8, 9]
    assert batch.mask[0].nonzero()[:, 0].tolist() == [*range(6), *range(3 + PAD_MULTIPLE, 3 + PAD_MULTIPLE + 5)]


def test_a_shared_prefix_is_packed_once_and_counted_for_each_conversation() -> None:
    batch = pack([(3, with_shared_prefix())], ConstantFeatures())
    assert token_count(batch) == 5 + 4
    assert int(batch.mask.sum()) == 3 + 2 + 1
    assert batch.features is not None
    assert batch.features.shape == (1, 2, 3)
