"""RMSNorm and SwiGLU of the optional package liger-kernel (Hsu et al. 2024, arXiv 2410.10989), for CUDA devices.

Each is one kernel that keeps only its inputs for the backward pass; transformers consists of separate operations and
keeps a float32 copy. A run uses them after they were compared with torch on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from llavactl.core.library_errors import out_of_memory, reason
from llavactl.model.cuda.self_check import TOLERANCES, device_name, output_and_gradients
from llavactl.model.packed import PACKABLE_MODEL_TYPES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

TOKENS = 300
"""The length of the check's random input."""


def blocker(language: PreTrainedModel, device: torch.device) -> str:
    """Why liger's kernels are not tried for ``language`` on ``device``; "" if they are."""
    if device.type != "cuda":
        return "liger-kernel needs a CUDA device"
    config = language.config
    if config.model_type not in PACKABLE_MODEL_TYPES or config.hidden_act != "silu":
        return f"liger-kernel is not used for model type {config.model_type}"
    try:
        import liger_kernel.ops  # noqa: F401
    except ModuleNotFoundError:
        return "liger-kernel is not installed"
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in many ways
        return f"liger-kernel can't be imported: {reason(error)}"
    return ""


def fault(language: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str:
    """Why liger's kernels with the sizes of ``language`` can't be used on ``device`` in ``dtype``; "" if they can.

    Outputs and gradients for random inputs are compared with torch in float64.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
    """
    config = language.config
    width, inner = config.hidden_size, config.intermediate_size
    epsilon = float(config.rms_norm_eps)
    try:
        errors = {
            "RMSNorm": _error(
                partial(rms_norm, epsilon=epsilon),
                lambda x, weight: x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight,
                [(TOKENS, width), (width,)],
                dtype,
                device,
            ),
            "SwiGLU": _error(
                swiglu, lambda gate, up: functional.silu(gate) * up, [(TOKENS, inner), (TOKENS, inner)], dtype, device
            ),
        }
    except Exception as exception:
        if out_of_memory(exception):
            raise
        return f"liger-kernel fails on {device_name(device)}: {reason(exception)}"
    wrong = [f"{name} (relative error {error:.1e})" for name, error in errors.items() if not error <= TOLERANCES[dtype]]
    return f"liger-kernel is wrong on {device_name(device)} in {dtype}: {', '.join(wrong)}" if wrong else ""


def _error(
    kernel: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The largest error of output and gradients, relative to the norm of each; may be NaN."""
    generator = torch.Generator().manual_seed(0)
    *inputs, gradient = (torch.randn(shape, generator=generator).to(device, dtype) for shape in (*shapes, shapes[0]))
    exact = output_and_gradients(reference, [x.double() for x in inputs], gradient.double())
    actual = output_and_gradients(kernel, inputs, gradient)
    errors = [(one.double() - other).norm() / other.norm() for one, other in zip(actual, exact, strict=True)]
    return float(torch.stack(errors).max())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., D], weight [D] to [..., D]; rounded as in transformers' Llama."""
    from liger_kernel.ops import LigerRMSNormFunction

    output: torch.Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)
    return output


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate and up [..., D] to silu(gate) * up. The backward pass overwrites both."""
    from liger_kernel.ops import LigerSiLUMulFunction

    output: torch.Tensor = LigerSiLUMulFunction.apply(gate, up)
    return output


@contextmanager
def liger_layers(language: PreTrainedModel) -> Iterator[None]:
    """In this context the RMSNorms and MLPs of a Llama-like ``language`` use liger's kernels.

    The context must enclose the backward pass as well: with gradient checkpointing it computes layers again.
    """
    replaced: list[nn.Module] = []
    for module in language.modules():
        name = type(module).__name__
        if forward := _rms_norm if name.endswith("RMSNorm") else _mlp if name.endswith("MLP") else None:
            module.forward = partial(forward, module)
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _rms_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = mlp.down_proj(swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return output
