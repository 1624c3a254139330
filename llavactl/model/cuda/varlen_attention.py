"""Attention over a packed sequence with torch's variable-length kernel, for CUDA devices in half precision.

Training uses it on a device after ``cuda.self_check`` has compared it with block attention there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any, cast

import torch

from llavactl.core.schema import Span


@dataclass(frozen=True)
class VarlenLayout:
    """The spans of a packed sequence as sequences of queries and keys for the kernel.

    The keys of span i are those at ``key_indices[key_bounds[i] : key_bounds[i + 1]]``: its prefix, then its own.
    ``key_indices`` is None if no span has a prefix: the keys are then in order. Bounds are int32.
    """

    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    key_indices: torch.Tensor | None
    max_queries: int
    max_keys: int


def varlen_layout(spans: Sequence[Span], device: torch.device) -> VarlenLayout:
    """The layout of ``spans``, with its tensors on ``device``."""
    query_lengths = [span.length for span in spans]
    ends = list(accumulate(query_lengths))
    prefixes = [() if span.after is None else (span.after,) for span in spans]
    key_parts = [(*prefix, index) for index, prefix in enumerate(prefixes)]
    key_lengths = [sum(query_lengths[part] for part in parts) for parts in key_parts]
    key_indices = None
    if any(prefixes):
        ranges = [torch.arange(ends[part] - query_lengths[part], ends[part]) for parts in key_parts for part in parts]
        key_indices = torch.cat(ranges).to(device)
    return VarlenLayout(
        _bounds(query_lengths).to(device),
        _bounds(key_lengths).to(device),
        key_indices,
        max(query_lengths),
        max(key_lengths),
    )


def _bounds(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: VarlenLayout, scaling: float
) -> torch.Tensor:
    """query [H, T, D], key and value [Hk, T, D] to [T, H, D]. Hk may be less than H (grouped queries)."""
    from torch.nn.attention import varlen

    groups = len(query) // len(key)
    options: dict[str, Any] = {}
    if groups > 1:
        if _groups_queries(varlen.varlen_attn):
            options = {"enable_gqa": True}
        else:
            key, value = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value))
    output = varlen.varlen_attn(
        query.transpose(0, 1).contiguous(),
        _gathered(key, layout.key_indices),
        _gathered(value, layout.key_indices),
        layout.query_bounds,
        layout.key_bounds,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    return cast(torch.Tensor, output)


@cache
def _groups_queries(kernel: Callable[..., Any]) -> bool:
    """Whether ``kernel`` supports grouped queries: torch 2.12 and newer."""
    return "enable_gqa" in signature(kernel).parameters


def _gathered(tensor: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """[Hk, T, D] to [K, Hk, D], its rows at ``indices`` [K], all T without them."""
    rows = tensor.transpose(0, 1)
    return rows.contiguous() if indices is None else rows[indices]
