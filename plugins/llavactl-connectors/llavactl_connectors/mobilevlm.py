"""LDPv2, the "lightweight downsample projector" of MobileVLM V2."""

from __future__ import annotations

import torch
from torch import nn

from llavactl_connectors.pooling import blocks, patches, projection


class LdpV2(nn.Module):
    """Features [I, P, Dv] to embeddings [I, h/f * w/f, Dl] (arXiv 2402.03766, section 3.3).

    An MLP on each patch, the mean of each block of ``factor`` x ``factor``, and a depthwise 3x3 convolution with a
    residual connection, which encodes positions. There is no normalization.
    """

    def __init__(self, grid: tuple[int, int], factor: int, width: int, out: int) -> None:
        super().__init__()
        self.grid, self.factor = grid, factor
        self.projection = projection(width, out)
        self.position = nn.Conv2d(out, out, 3, padding=1, groups=out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (h, w), f = self.grid, self.factor
        pooled = blocks(self.projection(patches(features, self.grid)), f).mean(2)
        maps = pooled.transpose(1, 2).reshape(len(features), -1, h // f, w // f)
        embeddings: torch.Tensor = (maps + self.position(maps)).flatten(2).transpose(1, 2)
        return embeddings
