"""Figures of outputs that correspond to other positions than the model's."""

from __future__ import annotations

import math

import pytest
import torch

from llavactl.evaluation.verification.compare import _combined, _embeddings, _logits, _unprepared
from llavactl.evaluation.verification.result import Figure

EXPECTED = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
DISPLACED = torch.cat([EXPECTED[:, 1:], -EXPECTED[:, :1]], dim=1)


def test_embeddings_are_compared_with_the_stated_tokens() -> None:
    assert _embeddings(DISPLACED, EXPECTED, [1, 2, 3, None])["embedding_cosine"].value == 1
    assert (_embeddings(DISPLACED, EXPECTED)["embedding_cosine"].value or 0) < 0.9
    assert (_embeddings(DISPLACED, EXPECTED, [1, 2, 3, 0])["embedding_cosine"].value or 0) < 0.9


@pytest.mark.parametrize("tokens", [[], [0, 1, 2], [1, 2, 3, 4], [-1, 0, 1, 2], [None] * 4])
def test_other_indexes_are_not_comparable(tokens: list[int | None]) -> None:
    assert all(figure.value is None for figure in _embeddings(DISPLACED, EXPECTED, tokens).values())


def test_logits_at_some_positions() -> None:
    expected = EXPECTED[0]
    exported = expected.clone()
    exported[1] = -10
    text = [0, 2, 3]
    assert _logits(exported, expected, text, text_only=True)["logits"].value == 0
    assert (_logits(exported, expected, text)["logits"].value or 0) > 1
    for text_only in (False, True):
        assert _logits(exported[text], expected, text, text_only=text_only)["logits"].value == 0
        assert _logits(exported[-1:], expected, text, text_only=text_only)["logits"].value == 0
        assert (_logits(exported[1:], expected, text, text_only=text_only)["logits"].value or 0) > 1
        assert _logits(exported[:2], expected, text, text_only=text_only)["logits"].value is None


def test_unchanged_images_are_compared_by_the_mean_of_the_worst_image() -> None:
    exported = DISPLACED.clone()
    exported[1, 0] = -exported[1, 0]
    assert _unprepared(exported, EXPECTED, [1, 2, 3, None])["unprepared_cosine"].value == pytest.approx(1 / 3)
    assert _unprepared(exported[:1], EXPECTED)["unprepared_cosine"].value is None
    assert _unprepared(None, EXPECTED) == {}


@pytest.mark.parametrize("values", [[0.0, math.nan], [math.nan, 0.0], [0.0, math.inf]])
@pytest.mark.parametrize("name", ["logits", "embedding_cosine"])
def test_a_figure_that_is_not_finite_is_not_comparable(name: str, values: list[float]) -> None:
    assert _combined(name, [Figure(value) for value in values]).value is None
