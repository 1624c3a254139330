"""The arguments for the CUDA kernel, checked on a CPU: a plain implementation of the kernel takes its place.

tests/gpu/test_packed.py runs the kernel itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from llavactl.core.schema import Span
from llavactl.model.cpu import block_attention
from llavactl.model.cuda import varlen_attention

SPANS = (Span(70), Span(9, 0), Span(1, 0), Span(33, 0), Span(128), Span(5))


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


@pytest.mark.parametrize("kernel", [kernel_without_groups, kernel_with_groups])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_varlen_attention_equals_block_attention(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, heads: int, kv_heads: int
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    length = sum(span.length for span in SPANS)
    query, key, value = (torch.randn(n, length, 16, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    expected = block_attention.attention(query, key, value, block_attention.BlockLayout(SPANS), 0.25)
    output = varlen_attention.attention(query, key, value, SPANS, 0.25)
    assert torch.allclose(output, expected, atol=1e-12)
