"""Prepares a batch for the model: feature values, device, token count."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llavactl.core.schema import Batch


def image_features(batch: Batch) -> torch.Tensor | None:
    """The features [I, P, Dv] of ``batch``, on their device.

    int8 features are dequantized: integer x scale of its token x scale of its channel, in float32 in this order, then
    rounded to float16. The result is bitwise equal on every device.
    """
    if batch.features is None or batch.scales is None:
        return batch.features
    tokens, channels = batch.scales.split(list(batch.features.shape[1:]), dim=1)
    return (batch.features * tokens[:, :, None] * channels[:, None]).half()


def token_count(batch: Batch) -> int:
    """The number of tokens of all conversations of ``batch``; a shared prefix counts once for each conversation."""
    prefixes = [span.after for span in batch.spans if span.after is not None]
    repeated = sum(batch.spans[index].length for index in prefixes) - sum(
        batch.spans[index].length for index in set(prefixes)
    )
    return int(batch.mask.sum()) + repeated


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """``batch`` on ``device``."""
    features, scales = (
        None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (batch.features, batch.scales)
    )
    ids, mask, labels = batch.ids.to(device), batch.mask.to(device), batch.labels.to(device)
    return replace(batch, ids=ids, mask=mask, labels=labels, features=features, scales=scales)
