"""The cross entropy of a causal language model, its logits made at trained positions alone and never all at once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llavactl.core.schema import IGNORE, Batch
from llavactl.model.packed import predictors

CHUNK = 2048
"""Positions whose logits are in memory together: 0.8 GB with 49,152 tokens, in float32 and with their gradient."""


def predictions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets [N] of ``batch`` and the places [N], in its rows laid end to end, whose outputs predict them.

    Two conversations that go on from one span have their first targets at one place.
    """
    trained = batch.labels != IGNORE
    if batch.spans:
        (places,) = trained[0].nonzero(as_tuple=True)
        return predictors(batch.spans, batch.ids.device)[places], batch.labels[0, places]
    trained[:, 0] = False
    (places,) = trained.flatten().nonzero(as_tuple=True)
    return places - 1, batch.labels.flatten()[places]


def summed(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropy of ``head(hidden)`` [N, V] against ``targets`` [N], a float32 scalar.

    Beyond one chunk logits are made anew for the backward pass: that takes the head's forward twice.
    """
    if len(targets) <= CHUNK:
        return cross_entropy(head(hidden), targets)
    parts = [
        checkpoint(lambda hidden, targets: cross_entropy(head(hidden), targets), *part, use_reentrant=False)
        for part in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over [N, V] in float32."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
