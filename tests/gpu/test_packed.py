"""The CUDA kernel for packed rows gives what products of matrices a block do. ``packing: auto`` waits for this."""

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
@pytest.mark.parametrize(("heads", "of_keys"), [(4, 4), (8, 2)])
def test_one_kernel_is_block_by_block(dtype: torch.dtype, heads: int, of_keys: int) -> None:
    torch.manual_seed(0)
    length = sum(span.length for span in SPANS)
    shapes = [(heads, length, 64), (of_keys, length, 64), (of_keys, length, 64)]
    exact = [torch.randn(shape, device="cuda", dtype=torch.float64).to(dtype).double() for shape in shapes]
    rough = [tensor.to(dtype) for tensor in exact]
    weights = torch.randn(length, heads, 64, device="cuda", dtype=torch.float64)
    for tensor in (*exact, *rough):
        tensor.requires_grad_()
    expected = block_attention.attention(*exact, block_attention.BlockLayout(SPANS), 0.125)
    found = varlen_attention.attention(*rough, SPANS, 0.125)
    (expected * weights).sum().backward()
    (found.double() * weights).sum().backward()
    assert (found.double() - expected).norm() < 1e-2 * expected.norm()
    for ours, theirs in zip(rough, exact, strict=True):
        assert (ours.grad.double() - theirs.grad).norm() < 2e-2 * theirs.grad.norm()
