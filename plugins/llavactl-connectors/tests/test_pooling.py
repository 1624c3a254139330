"""The connectors whose tokens belong to cells, compared with plain loops and with other implementations."""

import pytest
import torch
from llavactl_connectors import components
from llavactl_connectors.honeybee import Bottleneck, CAbstractor
from torch import nn
from torch.nn import functional
from transformers import RegNetConfig
from transformers.models.regnet.modeling_regnet import RegNetYLayer

from llavactl import FeatureShape, RecipeError

WIDTH = 20


def windows(features: torch.Tensor, grid: tuple[int, int], factor: int) -> list[list[torch.Tensor]]:
    """The patches of each cell, both row by row, by plain indexing."""
    h, w = grid
    return [
        [features[:, (row * factor + y) * w + column * factor + x] for y in range(factor) for x in range(factor)]
        for row in range(h // factor)
        for column in range(w // factor)
    ]


class LayerNorm2d(nn.Module):
    """Normalizes each position over its channels, by definition."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        centered = maps - maps.mean(1, keepdim=True)
        normalized = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return normalized * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def parts(module: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [each for each in module.modules() if isinstance(each, kind)]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_average_pooling_is_the_mean_of_each_window(factor: int):
    shape = FeatureShape((6, 12), 8)
    connector = components.AveragePooling(components.AveragePoolingOptions(factor=factor, layers=1))
    module, features = connector.build(shape, WIDTH), torch.randn(2, 72, 8)
    (linear,) = parts(module, nn.Linear)
    expected = [linear(sum(window) / factor**2) for window in windows(features, shape.grid, factor)]
    torch.testing.assert_close(module(features), torch.stack(expected, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_pixel_shuffle_concatenates_each_window(factor: int):
    shape = FeatureShape((6, 12), 8)
    module = components.PixelShuffle(components.PixelShuffleOptions(factor=factor)).build(shape, WIDTH)
    features = torch.randn(2, 72, 8)
    first, last = parts(module, nn.Linear)
    (norm,) = parts(module, nn.LayerNorm)
    expected = [
        last(functional.gelu(first(norm(torch.cat(window, -1))))) for window in windows(features, shape.grid, factor)
    ]
    torch.testing.assert_close(module(features), torch.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_ldp_v2_is_an_mlp_pooling_and_a_residual_depthwise_convolution():
    shape = FeatureShape((4, 6), 8)
    module = components.LdpV2(components.LdpV2Options()).build(shape, WIDTH)
    features = torch.randn(2, 24, 8)
    first, last = parts(module, nn.Linear)
    (convolution,) = parts(module, nn.Conv2d)
    projected = last(functional.gelu(first(features)))
    cells = torch.stack([sum(window) / 4 for window in windows(projected, shape.grid, 2)], 1).view(2, 2, 3, WIDTH)
    expected = cells + convolution.bias
    for row in range(2):
        for column in range(3):
            for y in (-1, 0, 1):
                for x in (-1, 0, 1):
                    if 0 <= row + y < 2 and 0 <= column + x < 3:
                        weight = convolution.weight[:, 0, y + 1, x + 1]
                        expected[:, row, column] += weight * cells[:, row + y, column + x]
    torch.testing.assert_close(module(features), expected.flatten(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "out"), [(24, 24), (16, 24), (18, 24)])
def test_the_blocks_of_c_abstractor_are_those_of_regnet(width: int, out: int):
    """With a group per channel, SiLU and layer normalization, as Honeybee has them."""
    other = RegNetYLayer(RegNetConfig(groups_width=1, hidden_act="silu"), width, out)
    for layer in other.modules():
        if hasattr(layer, "normalization"):
            layer.normalization = LayerNorm2d(out)
        if hasattr(layer, "attention"):
            layer.attention[1] = nn.SiLU()
    weights = [*other.layer.parameters(), *other.shortcut.parameters()]
    block = Bottleneck(width, out)
    assert [weight.shape for weight in block.parameters()] == [weight.shape for weight in weights]
    with torch.no_grad():
        for weight, source in zip(block.parameters(), weights, strict=True):
            weight.copy_(source.normal_(std=0.5))
    maps = torch.randn(2, width, 4, 6)
    torch.testing.assert_close(block(maps), other(maps), rtol=1e-4, atol=1e-5)


def test_c_abstractor_pools_between_its_blocks():
    module = CAbstractor((4, 6), (3, 3), 8, 12, 2, WIDTH)
    features = torch.randn(2, 24, 8)
    maps = (features.view(2, 4, 6, 8) + module.positions).permute(0, 3, 1, 2)
    blocks = parts(module, Bottleneck)
    assert len(blocks) == 4
    maps = functional.adaptive_avg_pool2d(blocks[1](blocks[0](maps)), (3, 3))
    tokens = blocks[3](blocks[2](maps)).flatten(2).transpose(1, 2)
    first, last = module.projection[0], module.projection[2]
    torch.testing.assert_close(module(features), last(functional.silu(first(tokens))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("connector", "grid", "hint"),
    [
        (components.AveragePooling(components.AveragePoolingOptions(factor=2)), (5, 4), "1"),
        (components.PixelShuffle(components.PixelShuffleOptions(factor=4)), (6, 12), "1, 2, 3, 6"),
        (components.LdpV2(components.LdpV2Options(factor=5)), (24, 24), "1, 2, 3, 4, 6, 8, 12, 24"),
        (components.CAbstractor(components.CAbstractorOptions(tokens=36)), (5, 8), "25"),
    ],
)
def test_an_unsuitable_grid_is_refused(connector, grid: tuple[int, int], hint: str):
    shape = FeatureShape(grid, 8)
    for method in (connector.tokens, connector.grid, lambda shape: connector.build(shape, WIDTH)):
        with pytest.raises(RecipeError, match=f"{grid[0]}x{grid[1]}") as error:
            method(shape)
        assert hint in error.value.hint


def test_the_tokens_of_c_abstractor_are_a_square():
    with pytest.raises(ValueError, match="square"):
        components.CAbstractorOptions(tokens=100 + 1)
