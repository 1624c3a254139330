"""The cross entropy of a causal language model, with logits only where a target is predicted, computed in chunks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from llavactl.core.schema import IGNORE, Batch
from llavactl.model.packed import PackedLayout

CHUNK = 2048
"""Positions whose logits are in memory at once: 0.8 GB for a vocabulary of 49,152, in float32 with their gradient."""


def predictions(batch: Batch, layout: PackedLayout | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices [N] of the outputs that predict targets, into the flattened positions of ``batch``; the targets [N].

    ``layout`` is that of a packed batch. Conversations with a shared prefix have their first targets at the same index.
    """
    is_target = batch.labels != IGNORE
    if layout is not None:
        (indices,) = is_target[0].nonzero(as_tuple=True)
        return layout.predictors[indices], batch.labels[0, indices]
    is_target[:, 0] = False
    (indices,) = is_target.flatten().nonzero(as_tuple=True)
    return indices - 1, batch.labels.flatten()[indices]


def chunked_cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropy of ``head(hidden)`` [N, V] and ``targets`` [N], a float32 scalar.

    With more than one chunk, the backward pass computes the logits again.
    """
    if len(targets) <= CHUNK:
        return cross_entropy(head(hidden), targets)
    sums = [
        checkpoint(lambda hidden, targets: cross_entropy(head(hidden), targets), *chunk, use_reentrant=False)
        for chunk in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.stack(sums).sum()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropy of logits [N, V] and targets [N], in float32."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
