"""The CUDA kernel for packed sequences agrees with block-wise attention; required for ``packing: auto``."""

from __future__ import annotations

import pytest
import torch

from llavactl.core.schema import Span
from llavactl.model.cpu import block_attention
from llavactl.model.cuda import varlen_attention

SPANS = (Span(70), Span(9, 0), Span(1, 0), Span(33, 0), Span(128), Span(5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_varlen_kernel_agrees_with_block_attention(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    length = sum(span.length for span in SPANS)
    shapes = [(heads, length, 64), (kv_heads, length, 64), (kv_heads, length, 64)]
    reference = [torch.randn(shape, device="cuda", dtype=torch.float64).to(dtype).double() for shape in shapes]
    inputs = [tensor.to(dtype) for tensor in reference]
    weights = torch.randn(length, heads, 64, device="cuda", dtype=torch.float64)
    for tensor in (*reference, *inputs):
        tensor.requires_grad_()
    expected = block_attention.attention(*reference, block_attention.BlockLayout(SPANS), 0.125)
    output = varlen_attention.attention(*inputs, SPANS, 0.125)
    (expected * weights).sum().backward()
    (output.double() * weights).sum().backward()
    assert (output.double() - expected).norm() < 1e-2 * expected.norm()
    for tensor, exact in zip(inputs, reference, strict=True):
        assert (tensor.grad.double() - exact.grad).norm() < 2e-2 * exact.grad.norm()
