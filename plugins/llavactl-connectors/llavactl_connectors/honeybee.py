"""C-Abstractor, the convolutional connector of Honeybee.

Normalization is over the channels of each position, and squeeze-and-excitation pools over one image: no layer depends
on other images of the batch, also in training mode.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from llavactl_connectors.pooling import patches


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of maps [I, C, h, w]."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _convolution(width: int, out: int, size: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(width, out, size, padding=size // 2, groups=groups, bias=False), ChannelNorm(out)]


class SqueezeExcitation(nn.Module):
    """Scales each channel of maps [I, C, h, w] by a gate between 0 and 1, computed from the mean over h and w."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(width, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, width, 1), nn.Sigmoid())

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = maps * self.gate(maps.mean((2, 3), keepdim=True))
        return gated


class Bottleneck(nn.Module):
    """The block of RegNetY (arXiv 2003.13678) with a group per channel, SiLU and layer normalization.

    Maps [I, width, h, w] to [I, out, h, w].
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(width, out),
            nn.SiLU(),
            *_convolution(out, out, 3, groups=out),
            nn.SiLU(),
            SqueezeExcitation(out, max(1, round(width / 4))),
            *_convolution(out, out),
        )
        self.shortcut = nn.Identity() if width == out else nn.Sequential(*_convolution(width, out))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return functional.silu(self.layers(maps) + self.shortcut(maps))


class CAbstractor(nn.Module):
    """Features [I, P, Dv] to embeddings [I, Q, Dl], where Q are the ``cells`` (h, w) row by row (arXiv 2312.06742).

    Learned position embeddings are added to the patches; then ``depth`` blocks, adaptive average pooling to ``cells``,
    ``depth`` blocks and an MLP. If the cells don't divide the patch grid, they overlap, as in the original.
    """

    def __init__(
        self, grid: tuple[int, int], cells: tuple[int, int], width: int, hidden: int, depth: int, out: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(torch.zeros(*grid, width))
        first = [Bottleneck(width if index == 0 else hidden, hidden) for index in range(depth)]
        second = [Bottleneck(hidden, hidden) for _ in range(depth)]
        self.blocks = nn.Sequential(*first, nn.AdaptiveAvgPool2d(cells), *second)
        self.projection = nn.Sequential(nn.Linear(hidden, out), nn.SiLU(), nn.Linear(out, out))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.apply(_initialize)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        maps = (patches(features, self.grid) + self.positions).permute(0, 3, 1, 2)
        embeddings: torch.Tensor = self.projection(self.blocks(maps).flatten(2).transpose(1, 2))
        return embeddings


def _initialize(module: nn.Module) -> None:
    """Honeybee's initialization of convolutions and linear layers."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
