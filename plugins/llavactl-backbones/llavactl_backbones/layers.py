"""Layer indexes and frozen weights, for all backbones of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavactl import ModelError

if TYPE_CHECKING:
    from torch import nn


def checked_layers(layers: Sequence[int], depth: int, *, first: int) -> tuple[int, ...]:
    """``layers`` as indexes from ``first`` to ``depth``; negative ones count from the end, -1 is ``depth``.

    Raises:
        ModelError: a layer doesn't exist, or ``layers`` is empty.
    """
    positive = tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)
    if not positive or not all(first <= layer <= depth for layer in positive):
        raise ModelError(f"vision.layer {', '.join(map(str, layers))}: the model has layers {first} to {depth}")
    return positive


def load_frozen(model: nn.Module, name: str, device: str, dtype: str) -> nn.Module:
    """``model`` on ``device`` in ``dtype``, in evaluation mode and without gradients.

    Raises:
        ModelError: a weight is not finite in ``dtype``.
    """
    import torch

    model = model.to(device=torch.device(device), dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    if not all(torch.isfinite(weight).all() for weight in model.parameters()):
        raise ModelError(f"vision model {name} has weights that are not finite in {dtype}")
    return model
