"""Models and computations on tensors without values: shapes, dtypes and storage sizes are those of real ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_tensors() -> Iterator[None]:
    """In this context new floating-point tensors have no values; integer tensors have.

    A forward pass depends on the values of token ids, labels and masks, for example to find target positions, but never
    on those of activations. So training code runs unchanged. Computing with fake tensors takes about a tenth of a
    millisecond per operation, for any size.
    """
    from torch._subclasses import fake_tensor

    level = fake_tensor.log.level
    fake_tensor.log.setLevel(logging.CRITICAL)  # an operation that can't be faked raises; torch logs its traceback too
    try:
        with _RealIntegers(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)):
            yield
    finally:
        fake_tensor.log.setLevel(level)


class _RealIntegers(TorchDispatchMode):
    """Operations on tensors with values are computed; all others, and new floating-point tensors, are faked."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor

        kwargs = kwargs or {}
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        if inputs and not any(isinstance(value, FakeTensor) for value in inputs):
            return func(*args, **kwargs)
        with self.fake:
            grouped = func is torch.ops.aten._grouped_mm.default
            output = _grouped_product(*args, **kwargs) if grouped else func(*args, **kwargs)
        if not inputs and isinstance(output, torch.Tensor) and not output.is_floating_point():
            return func(*args, **kwargs)
        return output


def _grouped_product(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor | None = None, *_args: Any, **_kwargs: Any
) -> torch.Tensor:
    """The matrix products of a mixture of experts: rows of a [M, K] with b [G, K, N], or G products [M, K] [K, N].

    torch fakes its operation in bfloat16 only, but computes it in every dtype.
    """
    groups = [] if a.ndim != b.ndim else [len(a)] if offsets is None else [len(offsets)]
    return a.new_empty([*groups, a.shape[-2], b.shape[-1]])


def as_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces parameters and buffers of ``module``, on any device, by fake ones on the CPU, in place.

    Parameters get ``dtype``, unless they are integers. A parameter with several names remains one parameter. Call it
    within ``fake_tensors``.
    """
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if id(tensor) not in copies:
            empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return copies[id(tensor)]

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                kept = weight.dtype if not weight.is_floating_point() else dtype
                part._parameters[name] = copy(weight, kept)  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = copy(buffer, buffer.dtype)
