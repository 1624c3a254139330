"""Rows of many samples: what each sees, where they end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef
from llavactl.data.batches import MULTIPLE, pack


class Drawn(NamedTuple):
    name: str

    def read(self) -> bytes:
        return self.name.encode()


class Features:
    """Two patches of three numbers for any image."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        del image
        return (np.ones((2, 3), np.float16),)


@pytest.mark.parametrize("length", [1, MULTIPLE - 1, MULTIPLE, MULTIPLE + 1])
def test_a_row_ends_in_padding_that_is_its_own_span(length: int) -> None:
    item = Encoded((5,) * length, (IGNORE,) + (5,) * (length - 1), ())
    batch = pack([(0, [item])], Features())
    assert batch.ids.shape[1] % MULTIPLE == 0
    assert batch.ids.shape[1] - length < MULTIPLE
    assert sum(span.length for span in batch.spans) == batch.ids.shape[1]
    assert all(span.length for span in batch.spans)
    assert batch.spans[0] == (length, None)
    assert batch.mask[0].tolist() == [at < length for at in range(batch.ids.shape[1])]
    assert (batch.labels[0, length:] == IGNORE).all()
    assert batch.tokens == length


def test_tokens_of_what_is_shared_count_for_each() -> None:
    image = Drawn("a.png")
    first = (1, IMAGE_TOKEN, IMAGE_TOKEN)
    items = [Encoded((*first, *rest), (IGNORE,) * 3 + rest, (image,)) for rest in ((7, 8), (9,))]
    batch = pack([(3, items)], Features())
    assert batch.tokens == 5 + 4
    assert int(batch.mask.sum()) == 3 + 2 + 1
    assert batch.features is not None
    assert batch.features.shape == (1, 2, 3)
