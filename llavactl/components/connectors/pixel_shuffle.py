"""Modules applied before a projection: pixel shuffle of neighboring patches (as in InternVL) and normalization."""

from __future__ import annotations

import torch
from torch import nn


class PixelShuffle(nn.Module):
    """Features [I, h*w, Dv] to [I, h/f * w/f, f*f*Dv] with ``factor`` f, then ``projection``."""

    def __init__(self, grid: tuple[int, int], factor: int, projection: nn.Module) -> None:
        super().__init__()
        self.grid, self.factor, self.projection = grid, factor, projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (h, w), f, (i, _, d) = self.grid, self.factor, features.shape
        blocks = features.view(i, h // f, f, w // f, f, d).permute(0, 1, 3, 2, 4, 5)
        projected: torch.Tensor = self.projection(blocks.reshape(i, (h // f) * (w // f), f * f * d))
        return projected


class NormalizedPatches(nn.Module):
    """Features [I, P, Dv], each patch normalized to mean 0 and variance 1 over its Dv channels, then ``projection``."""

    def __init__(self, width: int, projection: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.projection = projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(self.norm(features))
        return projected
