"""Folding neighbouring patches into one token before a projection (pixel unshuffle, as InternVL does)."""

from __future__ import annotations

import torch
from torch import nn


class Fold(nn.Module):
    """Features [I, h*w, Dv] to [I, h/f * w/f, f*f*Dv], then ``projection``."""

    def __init__(self, grid: tuple[int, int], fold: int, projection: nn.Module) -> None:
        super().__init__()
        self.grid, self.fold, self.projection = grid, fold, projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (h, w), f, (i, _, d) = self.grid, self.fold, features.shape
        blocks = features.view(i, h // f, f, w // f, f, d).permute(0, 1, 3, 2, 4, 5)
        folded: torch.Tensor = self.projection(blocks.reshape(i, (h // f) * (w // f), f * f * d))
        return folded
