"""The arguments for the CUDA kernel, checked on a CPU with a stand-in; tests/gpu runs the kernel itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llavactl.core.schema import Span
from llavactl.model.cpu import block_attention
from llavactl.model.cuda import varlen_attention
from llavactl.model.packed import PackedLayout

SHARED = (Span(70), Span(9, 0), Span(1, 0), Span(33, 0), Span(128), Span(5))
SEPARATE = (Span(70), Span(1), Span(33))


@pytest.mark.parametrize("spans", [SHARED, SEPARATE], ids=["shared prefix", "separate"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_varlen_attention_equals_block_attention(varlen_kernel: Any, heads: int, kv_heads: int, spans: Any) -> None:
    torch.manual_seed(0)
    length = sum(span.length for span in spans)
    query, key, value = (torch.randn(n, length, 16, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    layout = PackedLayout(spans, torch.device("cpu"))
    expected = block_attention.attention(query, key, value, layout.blocks, 0.25)
    output = varlen_attention.attention(query, key, value, layout.varlen, 0.25)
    assert torch.allclose(output, expected, atol=1e-12)


def test_without_shared_prefixes_no_key_is_copied() -> None:
    assert varlen_attention.varlen_layout(SEPARATE, torch.device("cpu")).key_indices is None
