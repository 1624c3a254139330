"""Attention over a packed sequence with torch's variable-length kernel, for CUDA devices in half precision.

It has not been run on a device yet (tests/gpu), so only ``packing: always`` selects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, cast

import torch

from llavactl.core.schema import Span


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span], scaling: float
) -> torch.Tensor:
    """query [H, T, D], key and value [Hk, T, D] to [T, H, D].

    The keys and values of each span follow a copy of those of its prefix. Hk may be less than H (grouped queries).
    """
    from torch.nn.attention import varlen

    ends = list(accumulate(span.length for span in spans))
    key_indices: list[int] = []
    key_bounds = [0]
    for index, span in enumerate(spans):
        for part in [index] if span.after is None else [span.after, index]:
            key_indices.extend(range(ends[part] - spans[part].length, ends[part]))
        key_bounds.append(len(key_indices))
    groups = len(query) // len(key)
    options: dict[str, Any] = {}
    if groups > 1:
        if "enable_gqa" in signature(varlen.varlen_attn).parameters:  # torch 2.12 and newer
            options = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    gathered = torch.tensor(key_indices, device=query.device)
    output = varlen.varlen_attn(
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1)[gathered],
        value.transpose(0, 1)[gathered],
        torch.tensor([0, *ends], dtype=torch.int32, device=query.device),
        torch.tensor(key_bounds, dtype=torch.int32, device=query.device),
        max(span.length for span in spans),
        max(stop - start for start, stop in pairwise(key_bounds)),
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    return cast(torch.Tensor, output)
