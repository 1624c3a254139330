"""Connectors: number and order of output tokens, normalization of input patches."""

from __future__ import annotations

import pytest
import torch

from llavactl.core.errors import RecipeError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape

SHAPE = FeatureShape((4, 6), 8)


@pytest.mark.parametrize("name", ["linear", "mlp2x-gelu"])
@pytest.mark.parametrize("factor", [1, 2])
def test_number_and_order_of_tokens(name: str, factor: int) -> None:
    factory = registry().create("connectors", {"name": name, "pixel_shuffle": factor})
    connector = factory.build(SHAPE, 5)
    features = torch.randn(3, 24, 8)
    embeddings = connector(features)
    assert embeddings.shape == (3, factory.tokens(SHAPE), 5)
    # Changing the last patch changes only the last token.
    features[:, -1] += 1
    changed = (connector(features) != embeddings).any(-1)
    assert changed[:, -1].all()
    assert not changed[:, :-1].any()


@pytest.mark.parametrize("factor", [1, 2])
def test_norm_removes_the_scale_of_features(factor: int) -> None:
    factory = registry().create("connectors", {"name": "mlp2x-gelu", "pixel_shuffle": factor, "norm": True})
    connector = factory.build(SHAPE, 5)
    features = torch.randn(2, 24, 8)
    torch.testing.assert_close(connector(features * 30 + 4), connector(features), rtol=1e-3, atol=1e-3)
    assert not any("norm" in name for name in connector.state_dict()), "the normalization must have no weights"


def test_factor_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(RecipeError, match="4x6"):
        registry().create("connectors", {"name": "linear", "pixel_shuffle": 4}).build(SHAPE, 5)
