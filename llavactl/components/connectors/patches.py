"""What stands around a projection: patches folded into one token as in InternVL, patches normalised, tokens placed."""

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


class Normed(nn.Module):
    """Features [I, P, Dv], each patch brought to mean 0 and variance 1 over its Dv channels, then ``projection``."""

    def __init__(self, width: int, projection: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.projection = projection

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(self.norm(features))
        return projected


class Columns(nn.Module):
    """``projection``, then each token's column added to it: ``share`` times as large as the token (root mean square).

    A language model reads an image's tokens as one line, row after row. Which of two things is higher it can tell from
    their order in that line; which is further left, only from what the tokens themselves say. What is added grows
    evenly from left to right, along one direction of the embedding space (its signs alternate).
    """

    columns: torch.Tensor

    def __init__(self, grid: tuple[int, int], prefix: int, width: int, share: float, projection: nn.Module) -> None:
        """``grid`` (h, w) of tokens [h*w, ``width``] behind ``prefix`` others, which have no column."""
        super().__init__()
        self.projection = projection
        self.share = share
        h, w = grid
        places = torch.arange(w) - (w - 1) / 2
        ramp = places / places.square().mean().sqrt() if w > 1 else places
        signs = 1.0 - 2 * (torch.arange(width) % 2)
        columns = torch.cat([torch.zeros(prefix, width), (ramp[:, None] * signs).repeat(h, 1)])
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.projection(features)
        size = tokens.detach().float().square().mean(-1, keepdim=True).sqrt()
        placed: torch.Tensor = tokens + (self.share * size * self.columns).to(tokens.dtype)
        return placed
