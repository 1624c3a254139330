"""Rows: everything is in exactly one, none is over its limits, and every process has as many."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef
from llavactl.data.batches import pack
from llavactl.data.packing import PAD_MULTIPLE, MicroBatchLimits, plan_sequences, prefix_groups
from llavactl.images.image_file import ImageFile

Q = 4
REAL = Path(__file__).parents[3] / "shared/data/llava/llava_instruct_100.json"


class Features:
    """Two patches of three numbers for any image."""

    def stored(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        del image
        return (np.ones((2, 3), np.float16),)


def item(length: int, image: int | None, target_at: int = 0) -> Encoded:
    """``length`` tokens behind BOS and an image, if any."""
    opening = (1,) if image is None else (1, *(IMAGE_TOKEN,) * Q)
    ids = (*opening, *range(10, 10 + length))
    labels = tuple(IGNORE if at < len(opening) + target_at else token for at, token in enumerate(ids))
    return Encoded(ids, labels, () if image is None else (ImageFile("/photos", f"{image}.jpg"),))


items = st.lists(st.builds(item, st.integers(1, 60), st.one_of(st.none(), st.integers(0, 3))), max_size=24)
limits = st.builds(MicroBatchLimits, st.integers(1, 9), st.one_of(st.none(), st.integers(5, 200)))


@given(items, limits, st.integers(1, 4))
def test_rows_hold_everything_once_and_keep_their_limits(
    found: list[Encoded], most: MicroBatchLimits, processes: int
) -> None:
    planned = plan_sequences(found, Q, most, processes)
    members = [number for row in planned for family in row for number in family.samples]
    assert sorted(members) == list(range(len(found)))
    assert len(planned) % processes == 0
    for row in planned:
        tokens = sum(family.tokens for family in row)
        batch = pack(
            [(family.prefix_length, [found[number] for number in family.samples]) for family in row], Features()
        )
        assert tokens == (batch.ids.shape[1] if row else 0)
        samples = sum(len(family.samples) for family in row)
        assert most.allow(samples, tokens) or samples == 1


@given(items, limits)
def test_a_family_begins_alike_and_without_a_target(found: list[Encoded], most: MicroBatchLimits) -> None:
    for family in prefix_groups(found, Q, most):
        first = found[family.samples[0]]
        for number in family.samples:
            assert found[number].ids[: family.prefix_length] == first.ids[: family.prefix_length]
            assert found[number].images[:1] == first.images[:1]
            assert all(label == IGNORE for label in found[number].labels[: family.prefix_length])
        assert (family.prefix_length > 0) == (len(family.samples) > 1)


def test_one_picture_is_shared_and_another_is_not() -> None:
    found = [item(5, 0), item(6, 1), item(7, 0), item(5, None), item(5, None)]
    assert [(f.samples, f.prefix_length, f.tokens) for f in prefix_groups(found, Q, MicroBatchLimits(8))] == [
        ((0, 2), 5, 21), ((1,), 0, 16), ((3,), 0, 16), ((4,), 0, 16),
    ]  # fmt: skip


def test_a_target_before_the_end_of_the_image_is_nobody_elses() -> None:
    late = Encoded((1, 10, *(IMAGE_TOKEN,) * Q, 11), (IGNORE, 10, *(IGNORE,) * Q, 11), (ImageFile("/photos", "0.jpg"),))
    assert [family.prefix_length for family in prefix_groups([late, late], Q, MicroBatchLimits(8))] == [0, 0]


def test_rows_are_of_much_the_same_length() -> None:
    found = [item(length * PAD_MULTIPLE - 1, None) for length in (50, 40, 30, 20, 20, 10, 9, 1)]
    lengths = [sum(family.tokens for family in row) for row in plan_sequences(found, Q, MicroBatchLimits(4), 2)]
    assert len(lengths) == 2
    assert abs(lengths[0] - lengths[1]) <= 10 * PAD_MULTIPLE


@pytest.mark.skipif(not REAL.is_file(), reason="real LLaVA-Instruct records are not there")
def test_real_lengths_leave_processes_alike() -> None:
    """What could be lost is waiting: a process with fewer tokens than another."""
    words = [
        sum(len(turn["value"].split()) for turn in record["conversations"]) for record in json.loads(REAL.read_text())
    ]
    found = [item(length, number) for number, length in enumerate(words)]
    planned = plan_sequences(found, Q, MicroBatchLimits(16), 8)
    tokens = [sum(family.tokens for family in row) for row in planned]
    assert len(planned) == 8
    assert sum(max(tokens) - each for each in tokens) / (len(tokens) * max(tokens)) < 0.03
