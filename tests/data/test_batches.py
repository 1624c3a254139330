"""Rows of many samples: what each sees, where they end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef
from llavactl.data.batches import pack
from llavactl.data.packing import PAD_MULTIPLE, padding_for
from llavactl.model.inputs import token_count


class Drawn(NamedTuple):
    name: str

    def read(self) -> bytes:
        return self.name.encode()


class Features:
    """Two patches of three numbers for any image."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        del image
        return (np.ones((2, 3), np.float16),)


@pytest.mark.parametrize("length", [1, PAD_MULTIPLE - 1, PAD_MULTIPLE, PAD_MULTIPLE + 1])
def test_a_conversation_ends_in_padding(length: int) -> None:
    item = Encoded((5,) * length, (IGNORE,) + (5,) * (length - 1), ())
    batch = pack([(0, [item, item])], Features())
    width = length + padding_for(length)
    assert width % PAD_MULTIPLE == 0
    assert width - length < PAD_MULTIPLE
    assert batch.spans == ((width, None),) * 2
    assert batch.ids.shape == batch.mask.shape == batch.labels.shape == (1, 2 * width)
    assert batch.mask.view(2, width).tolist() == [[at < length for at in range(width)]] * 2
    assert (batch.labels.view(2, width)[:, length:] == IGNORE).all()
    assert token_count(batch) == 2 * length


def test_those_behind_one_image_end_in_padding_together() -> None:
    image = Drawn("a.png")
    first = (1, IMAGE_TOKEN, IMAGE_TOKEN)
    items = [Encoded((*first, *rest), (IGNORE,) * 3 + rest, (image,)) for rest in ((7, 8), (9,))]
    batch = pack([(3, items), (0, items[:1])], Features())
    assert batch.spans == ((3, None), (2, 0), (PAD_MULTIPLE - 2, 0), (PAD_MULTIPLE, None))
    assert batch.labels[0, 3:6].tolist() == [7, 8, 9]
    assert batch.mask[0].nonzero()[:, 0].tolist() == [*range(6), *range(3 + PAD_MULTIPLE, 3 + PAD_MULTIPLE + 5)]


def test_tokens_of_what_is_shared_count_for_each() -> None:
    image = Drawn("a.png")
    first = (1, IMAGE_TOKEN, IMAGE_TOKEN)
    items = [Encoded((*first, *rest), (IGNORE,) * 3 + rest, (image,)) for rest in ((7, 8), (9,))]
    batch = pack([(3, items)], Features())
    assert token_count(batch) == 5 + 4
    assert int(batch.mask.sum()) == 3 + 2 + 1
    assert batch.features is not None
    assert batch.features.shape == (1, 2, 3)
