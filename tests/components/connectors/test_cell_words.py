"""The connector ``cell-words``: its tokens depend on the patches of their cell only."""

from __future__ import annotations

import pytest
import torch

from llavactl.core.errors import RecipeError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape
from llavactl.testing import check_connector

SHAPE = FeatureShape((4, 6), 8)
SPEC = {"name": "cell-words", "cell": 2, "words": 3, "hidden": 16}


def test_it_passes_the_conformance_checks() -> None:
    assert check_connector(registry().create("connectors", SPEC)) == []


def test_the_tokens_of_a_cell_are_consecutive() -> None:
    factory = registry().create("connectors", SPEC)
    assert factory.grid(SHAPE) == (2, 3)
    assert factory.tokens(SHAPE) == 18
    module = factory.build(SHAPE, 5)
    features = torch.randn(1, 24, 8)
    before = module(features)
    assert before.shape == (1, 18, 5)
    changed = features.clone()
    changed[:, 1 * 6 + 4] += torch.randn(8)  # row 1, column 4: the third cell of the first row
    differs = (module(changed) != before).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [6, 7, 8]


def test_the_scale_of_the_features_has_no_influence() -> None:
    module = registry().create("connectors", SPEC).build(SHAPE, 5)
    features = torch.randn(2, 24, 8)
    assert torch.allclose(module(features), module(10 * features + 3), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "why"), [(FeatureShape((4, 5), 8), "patch grid 4x5"), (FeatureShape((4, 6), 8, prefix=1), "patches only")]
)
def test_unsuitable_features_are_refused(shape: FeatureShape, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        registry().create("connectors", SPEC).build(shape, 5)
