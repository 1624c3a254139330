"""Connectors: how many tokens come out, in which order, and on what scale patches go in."""

from __future__ import annotations

import pytest
import torch

from llavactl.core.errors import RecipeError
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape

SHAPE = FeatureShape((4, 6), 8)


@pytest.mark.parametrize("name", ["linear", "mlp2x-gelu"])
@pytest.mark.parametrize("fold", [1, 2])
def test_tokens_are_counted_and_ordered(name: str, fold: int) -> None:
    maker = registry().create("connectors", {"name": name, "fold": fold})
    connector = maker.build(SHAPE, 5)
    features = torch.randn(3, 24, 8)
    made = connector(features)
    assert made.shape == (3, maker.tokens(SHAPE), 5)
    # The last patch belongs to the last token alone.
    features[:, -1] += 1
    changed = (connector(features) != made).any(-1)
    assert changed[:, -1].all()
    assert not changed[:, :-1].any()


@pytest.mark.parametrize("fold", [1, 2])
def test_norm_makes_the_scale_of_features_irrelevant(fold: int) -> None:
    maker = registry().create("connectors", {"name": "mlp2x-gelu", "fold": fold, "norm": True})
    connector = maker.build(SHAPE, 5)
    features = torch.randn(2, 24, 8)
    torch.testing.assert_close(connector(features * 30 + 4), connector(features), rtol=1e-3, atol=1e-3)
    assert not any("norm" in name for name in connector.state_dict()), "it has no weights of its own"


@pytest.mark.parametrize("fold", [1, 2])
def test_place_adds_one_vector_for_the_row_and_one_for_the_column(fold: int) -> None:
    torch.manual_seed(0)
    connector = registry().create("connectors", {"name": "linear", "fold": fold, "place": True}).build(SHAPE, 5)
    made = connector(torch.ones(2, 24, 8)).view(2, 4 // fold, 6 // fold, 5)
    assert torch.equal(made[0], made[1]), "a place is the same in every image"
    from_place = made[0] - made[0, 0, 0]
    torch.testing.assert_close(from_place, from_place[:, :1] + from_place[:1])
    flat = from_place.flatten(0, 1)
    assert (flat[:, None] - flat[None]).norm(dim=-1).fill_diagonal_(1).min() > 1e-2, "no two places are alike"
    connector(torch.ones(1, 24, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in connector.parameters()), "all of it is learned"


def test_a_class_token_has_no_place() -> None:
    shape = FeatureShape((4, 6), 8, prefix=1)
    with pytest.raises(RecipeError, match="class token"):
        registry().create("connectors", {"name": "linear", "place": True}).build(shape, 5)


def test_a_fold_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(RecipeError, match="4x6"):
        registry().create("connectors", {"name": "linear", "fold": 4}).build(SHAPE, 5)
