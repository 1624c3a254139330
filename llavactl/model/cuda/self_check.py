"""Compares packed attention on a CUDA device with a reference on that device, before a run uses it.

Kernels depend on GPU, driver and the version of torch, so tests on another machine prove nothing about this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llavactl.core.library_errors import out_of_memory, reason
from llavactl.core.schema import Span
from llavactl.model.cpu import block_attention
from llavactl.model.packed import PackedLayout, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPANS = (Span(150), Span(9, 0), Span(1, 0), Span(33, 0), Span(260), Span(5), Span(1))
"""Spans longer and shorter than the tiles of kernels, with a shared prefix."""

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest relative errors. Rounding causes a quarter of them; a wrong mask, scale or head errors of about 1."""


def packed_attention_fault(language: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str:
    """Why packed attention with the heads of ``language`` can't be used on ``device`` in ``dtype``; "" if it can.

    Outputs and gradients of a random sequence are compared with block attention in float64, span by span.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    try:
        error = _largest_error(language, dtype, device)
    except Exception as exception:
        if out_of_memory(exception):
            raise
        return f"packed attention fails on {device_name(device)}: {reason(exception)}"
    if error <= TOLERANCES[dtype]:
        return ""
    return f"packed attention is wrong on {device_name(device)} in {dtype}: relative error {error:.1e}"


def _largest_error(language: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of output and gradients: RMS over a span, relative to the RMS over all of them; may be NaN."""
    config = language.config
    heads, width = config.num_attention_heads, _head_width(config)
    generator = torch.Generator().manual_seed(0)
    length = sum(span.length for span in SPANS)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(heads, length, width, generator=generator).to(device, dtype)

    inputs = [random(heads), *(random(config.num_key_value_heads) for _ in range(2))]
    gradient = random(heads)
    scaling = width**-0.5
    layout = PackedLayout(SPANS, device)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output, _ = attend(torch.nn.Module(), q[None], k[None], v[None], None, scaling, packed_layout=layout)
        return output[0].transpose(0, 1)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_attention.attention(q, k, v, layout.blocks, scaling).transpose(0, 1)

    actual = output_and_gradients(packed, inputs, gradient)
    expected = output_and_gradients(reference, [x.double() for x in inputs], gradient.double())
    errors = [_error(one.double(), other) for one, other in zip(actual, expected, strict=True)]
    return float(torch.cat(errors).max())


def output_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], gradient: torch.Tensor
) -> list[torch.Tensor]:
    """``function(*inputs)``, and the gradients of ``inputs`` for the ``gradient`` of this output."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def _error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The RMS error of each span, relative to the RMS of ``expected`` [heads, T, D]."""
    errors = (actual - expected).split([span.length for span in SPANS], dim=1)
    return torch.stack([error.square().mean().sqrt() for error in errors]) / expected.square().mean().sqrt()


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def device_name(device: torch.device) -> str:
    """The name of the device for messages."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
