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


@pytest.mark.parametrize(("fold", "prefix"), [(1, 0), (1, 1), (2, 0)])
def test_columns_tell_left_from_right(fold: int, prefix: int) -> None:
    shape = FeatureShape((4, 6), 8, prefix)
    options = {"name": "mlp2x-gelu", "fold": fold}
    torch.manual_seed(0)
    plain = registry().create("connectors", options).build(shape, 6)
    torch.manual_seed(0)
    placed = registry().create("connectors", {**options, "columns": 0.5}).build(shape, 6)
    assert [value.shape for value in placed.state_dict().values()] == [v.shape for v in plain.state_dict().values()]
    features = torch.randn(3, prefix + 24, 8)
    tokens = plain(features)
    added = placed(features) - tokens
    assert not added[:, :prefix].any(), "what is no patch has no column"
    # In units of the token's size: the same in a column, in even steps along a row, half the size in the mean.
    size = tokens.square().mean(-1, keepdim=True).sqrt()
    grid = (added / size)[:, prefix:].view(3, 4 // fold, 6 // fold, 6)
    torch.testing.assert_close(grid, grid[:, :1].expand_as(grid))
    steps = grid.diff(dim=2)
    torch.testing.assert_close(steps, steps[:, :, :1].expand_as(steps))
    assert steps.abs().min() > 0.1
    torch.testing.assert_close(grid.square().mean().sqrt(), torch.tensor(0.5))


def test_a_single_column_adds_nothing() -> None:
    connector = registry().create("connectors", {"name": "linear", "columns": 0.5}).build(FeatureShape((4, 1), 8), 6)
    assert connector(torch.randn(1, 4, 8)).isfinite().all()


def test_a_fold_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(RecipeError, match="4x6"):
        registry().create("connectors", {"name": "linear", "fold": 4}).build(SHAPE, 5)
