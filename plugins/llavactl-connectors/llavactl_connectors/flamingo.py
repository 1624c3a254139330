"""The perceiver resampler of Flamingo, with the sizes and activations of OpenFlamingo."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    """Latents [I, Q, D] attend to features [I, P, D] and to themselves; both are normalized first, without biases."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.feature_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key_value = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.output = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.latent_norm(latents)
        keys, values = self.key_value(torch.cat([self.feature_norm(features), latents], 1)).chunk(2, dim=-1)
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.query(latents), keys, values)
        )
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        updated: torch.Tensor = self.output(attended)
        return updated


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


class PerceiverResampler(nn.Module):
    """Features [I, P, Dv] to embeddings [I, tokens, Dl] (arXiv 2204.14198, section 2.1).

    The latents have width Dv. Flamingo passes them to cross-attention layers; here, a linear layer projects them to Dl.
    Flamingo's time embeddings of video frames are left out: there is one frame.
    """

    def __init__(self, width: int, tokens: int, layers: int, heads: int, head_width: int, out: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(tokens, width))
        self.attention = nn.ModuleList(Attention(width, heads, head_width) for _ in range(layers))
        self.feed_forward = nn.ModuleList(_feed_forward(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        latents = self.latents.expand(len(features), -1, -1)
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            latents = latents + attention(features, latents)
            latents = latents + feed_forward(latents)
        embeddings: torch.Tensor = self.projection(self.norm(latents))
        return embeddings
