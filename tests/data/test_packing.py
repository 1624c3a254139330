"""Planned sequences contain every sample once, respect the limits, and are equally many for each process."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef
from llavactl.data.batches import pack
from llavactl.data.packing import PAD_MULTIPLE, MicroBatchLimits, plan_sequences, prefix_groups, sample_length
from llavactl.images.image_file import ImageFile

Q = 4
REAL = Path(__file__).parents[3] / "shared/data/llava/llava_instruct_100.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")


class ConstantFeatures:
    """Features [2, 3] of ones for any image."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        del image
        return (np.ones((2, 3), np.float16),)


def encoded(length: int, image: int | None, target_at: int = 0) -> Encoded:
    """BOS, an image or none, and ``length`` tokens, which are targets from ``target_at``."""
    prefix = (1,) if image is None else (1, *(IMAGE_TOKEN,) * Q)
    ids = (*prefix, *range(10, 10 + length))
    labels = tuple(IGNORE if at < len(prefix) + target_at else token for at, token in enumerate(ids))
    return Encoded(ids, labels, () if image is None else (ImageFile("/photos", f"{image}.jpg"),))


item_lists = st.lists(st.builds(encoded, st.integers(1, 60), st.one_of(st.none(), st.integers(0, 3))), max_size=24)
limits_strategy = st.builds(MicroBatchLimits, st.integers(1, 9), st.one_of(st.none(), st.integers(5, 200)))


@given(item_lists, limits_strategy, st.integers(1, 4))
def test_sequences_contain_every_sample_once_within_the_limits(
    items: list[Encoded], limits: MicroBatchLimits, processes: int
) -> None:
    sequences = plan_sequences(items, Q, limits, processes)
    indices = [index for sequence in sequences for group in sequence for index in group.samples]
    assert sorted(indices) == list(range(len(items)))
    assert len(sequences) % processes == 0
    for sequence in sequences:
        tokens = sum(group.tokens for group in sequence)
        groups = [(group.prefix_length, [items[index] for index in group.samples]) for group in sequence]
        batch = pack(groups, ConstantFeatures())
        assert tokens == (batch.ids.shape[1] if sequence else 0)
        samples = sum(len(group.samples) for group in sequence)
        assert limits.allow(samples, tokens) or samples == 1


@given(item_lists, limits_strategy)
def test_a_prefix_group_shares_tokens_and_image_and_no_target(items: list[Encoded], limits: MicroBatchLimits) -> None:
    for group in prefix_groups([sample_length(item, Q) for item in items], limits):
        first = items[group.samples[0]]
        for index in group.samples:
            assert items[index].ids[: group.prefix_length] == first.ids[: group.prefix_length]
            assert items[index].images[:1] == first.images[:1]
            assert all(label == IGNORE for label in items[index].labels[: group.prefix_length])
        assert (group.prefix_length > 0) == (len(group.samples) > 1)


def test_only_samples_with_the_same_image_share_a_prefix() -> None:
    items = [encoded(5, 0), encoded(6, 1), encoded(7, 0), encoded(5, None), encoded(5, None)]
    groups = prefix_groups([sample_length(item, Q) for item in items], MicroBatchLimits(8))
    assert [(group.samples, group.prefix_length, group.tokens) for group in groups] == [
        ((0, 2), 5, 21), ((1,), 0, 16), ((3,), 0, 16), ((4,), 0, 16),
    ]  # fmt: skip


def test_a_prefix_with_a_target_is_not_shared() -> None:
    ids, labels = (1, 10, *(IMAGE_TOKEN,) * Q, 11), (IGNORE, 10, *(IGNORE,) * Q, 11)
    item = Encoded(ids, labels, (ImageFile("/photos", "0.jpg"),))
    assert [group.prefix_length for group in prefix_groups([sample_length(item, Q)] * 2, MicroBatchLimits(8))] == [0, 0]


def test_sequences_have_similar_lengths() -> None:
    items = [encoded(length * PAD_MULTIPLE - 1, None) for length in (50, 40, 30, 20, 20, 10, 9, 1)]
    sequences = plan_sequences(items, Q, MicroBatchLimits(4), 2)
    lengths = [sum(group.tokens for group in sequence) for sequence in sequences]
    assert len(lengths) == 2
    assert abs(lengths[0] - lengths[1]) <= 10 * PAD_MULTIPLE


def skewed_lengths() -> list[int]:
    """100 lengths with the skew of LLaVA-Instruct: a median of about 120 words and a few of more than 300."""
    rng = random.Random(0)
    return [max(5, round(rng.lognormvariate(4.8, 0.6))) for _ in range(100)]


def real_lengths() -> list[int]:
    records = json.loads(REAL.read_text())
    return [sum(len(turn["value"].split()) for turn in record["conversations"]) for record in records]


@pytest.mark.parametrize(
    "lengths",
    [
        skewed_lengths,
        pytest.param(real_lengths, marks=needs_real),
    ],
)
def test_lengths_are_balanced_between_processes(lengths: Callable[[], list[int]]) -> None:
    """A process with fewer tokens than another would wait."""
    items = [encoded(length, number) for number, length in enumerate(lengths())]
    sequences = plan_sequences(items, Q, MicroBatchLimits(16), 8)
    tokens = [sum(group.tokens for group in sequence) for sequence in sequences]
    assert len(sequences) == 8
    assert sum(max(tokens) - each for each in tokens) / (len(tokens) * max(tokens)) < 0.03
