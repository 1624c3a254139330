"""The module of the connector ``cell-words``."""

from __future__ import annotations

import torch
from torch import nn


class CellPooling(nn.Module):
    """Features [I, h*w, Dv] of a ``grid`` (h, w) to embeddings [I, h/c * w/c * words, Dl], where c is ``cell``.

    Each patch is normalized to mean 0 and variance 1 and projected to ``hidden`` channels with a GELU. Each of the
    ``words`` tokens of a cell is a weighted mean of its patches, with weights from a softmax over learned scores,
    followed by its own linear layer.
    All cells share these weights.
    """

    def __init__(self, grid: tuple[int, int], cell: int, words: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.grid, self.cell, self.words = grid, cell, words
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.patches = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.scores = nn.Linear(hidden, words)
        self.embeddings = nn.ModuleList(nn.Linear(hidden, out) for _ in range(words))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (h, w), c, (i, _, d) = self.grid, self.cell, features.shape
        cells = features.view(i, h // c, c, w // c, c, d).permute(0, 1, 3, 2, 4, 5).reshape(i, -1, c * c, d)
        patches = self.patches(self.norm(cells))
        weights = self.scores(patches).softmax(2)
        pooled = torch.einsum("icpn,icph->nich", weights, patches)
        words = [embedding(each) for embedding, each in zip(self.embeddings, pooled, strict=True)]
        return torch.stack(words, 2).flatten(1, 2)
