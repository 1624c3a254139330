"""Average pooling and pixel shuffle: blocks of neighboring patches become one token each."""

from __future__ import annotations

import torch
from torch import nn


def patches(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The patches [I, h, w, Dv] of features [I, P, Dv], without the tokens before them, such as CLS."""
    (h, w), (i, p, d) = grid, features.shape
    return features[:, p - h * w :].reshape(i, h, w, d)


def blocks(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """Maps [I, h, w, D] as blocks of f x f, where f is ``factor``: [I, h/f * w/f, f*f, D], all row by row."""
    i, h, w, d = maps.shape
    split = maps.reshape(i, h // factor, factor, w // factor, factor, d)
    return split.transpose(2, 3).reshape(i, -1, factor * factor, d)


def projection(width: int, out: int, layers: int = 2) -> nn.Sequential:
    """One linear layer from ``width`` to ``out`` channels, or two with a GELU in between."""
    first = nn.Linear(width, out)
    return nn.Sequential(first) if layers == 1 else nn.Sequential(first, nn.GELU(), nn.Linear(out, out))


def normalized(width: int, module: nn.Module) -> nn.Sequential:
    """``module`` on features [I, P, ``width``] of mean 0 and variance 1 over the channels, without weights."""
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), module)


class AveragePooling(nn.Module):
    """The mean of each block of ``factor`` x ``factor`` patches, then ``projection``.

    Features [I, P, Dv] to embeddings [I, h/f * w/f, Dl]. DeCo (arXiv 2405.20985) pools before the projection, which is
    then computed for fewer tokens.
    """

    def __init__(self, grid: tuple[int, int], factor: int, projection: nn.Module) -> None:
        super().__init__()
        self.grid, self.factor, self.projection = grid, factor, projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled = blocks(patches(features, self.grid), self.factor).mean(2)
        embeddings: torch.Tensor = self.projection(pooled)
        return embeddings


class PixelShuffle(nn.Module):
    """The patches of each block of ``factor`` x ``factor``, concatenated and normalized, then an MLP.

    Features [I, P, Dv] to embeddings [I, h/f * w/f, Dl]: InternVL's ``mlp1`` (arXiv 2404.16821). The order of the
    channels is that of InternVL and of the option ``pixel_shuffle`` of ``mlp2x-gelu``, which has no normalization of
    the concatenated patches.
    """

    def __init__(self, grid: tuple[int, int], factor: int, width: int, out: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor
        self.norm = nn.LayerNorm(width * factor**2)
        self.projection = projection(width * factor**2, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        merged = blocks(patches(features, self.grid), self.factor).flatten(2)
        embeddings: torch.Tensor = self.projection(self.norm(merged))
        return embeddings
