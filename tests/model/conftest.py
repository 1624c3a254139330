"""Stand-ins for torch's variable-length attention kernel, which has no CPU implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional


def kernel_without_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """``varlen_attn`` of torch 2.11 for [T, H, D]: each sequence is causal, aligned at its last query and key."""
    assert window_size == (-1, 0)
    assert key.shape[1] == query.shape[1], "grouped queries need torch 2.12"
    assert int(query_bounds.diff().max()) == max_queries
    assert int(key_bounds.diff().max()) == max_keys
    outputs = []
    for number in range(len(query_bounds) - 1):
        q = query[query_bounds[number] : query_bounds[number + 1]].transpose(0, 1)
        k, v = (x[key_bounds[number] : key_bounds[number + 1]].transpose(0, 1) for x in (key, value))
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        attended = functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=visible, scale=scale)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def kernel_with_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *bounds: Any, enable_gqa: bool = False, **options: Any
) -> torch.Tensor:
    """``varlen_attn`` of torch 2.12."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return kernel_without_groups(query, key, value, *bounds, **options)


@pytest.fixture(params=[kernel_without_groups, kernel_with_groups], ids=["torch 2.11", "torch 2.12"])
def varlen_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel of a version of torch; packed attention calls it on the CPU, in every dtype."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)
    monkeypatch.setattr("llavactl.model.packed.uses_varlen_kernel", lambda query: query.dtype != torch.float64)
    return request.param
