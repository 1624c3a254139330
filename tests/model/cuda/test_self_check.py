"""The check of the packed kernel accepts a right kernel and finds wrong ones; a stand-in runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from llavactl.model.cuda.self_check import packed_attention_fault

CPU = torch.device("cpu")
GROUPED = SimpleNamespace(config=SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64))


def fault(dtype: torch.dtype = torch.bfloat16) -> str:
    return packed_attention_fault(GROUPED, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_right_kernel(varlen_kernel: Any, dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    assert fault(dtype) == ""
    assert torch.equal(torch.get_rng_state(), state)


def test_block_attention_where_no_kernel_is_used() -> None:
    assert fault(torch.float32) == fault(torch.bfloat16) == ""


def wrong_scale(kernel: Callable[..., torch.Tensor], *args: Any, scale: float, **options: Any) -> torch.Tensor:
    return kernel(*args, scale=1.1 * scale, **options)


def first_keys_of_another_sequence(
    kernel: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, queries: Any, keys: Any, *args: Any, **options: Any
) -> torch.Tensor:
    return kernel(q, k.roll(1, 0), v, queries, keys, *args, **options)


def wrong_last_sequence(kernel: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    output = kernel(*args, **options)
    return torch.cat([output[:-1], output[-1:] * 1.5])


def no_gradient_of_values(
    kernel: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, *args: Any, **options: Any
) -> Any:
    return kernel(q, k, v.detach() + 0 * v, *args, **options)


def not_a_number(kernel: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
    return kernel(*args, **options) * float("nan")


@pytest.mark.parametrize(
    "wrong",
    [wrong_scale, first_keys_of_another_sequence, wrong_last_sequence, no_gradient_of_values, not_a_number],
    ids=lambda function: function.__name__,
)
def test_a_wrong_kernel(varlen_kernel: Any, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]) -> None:
    kernel = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **options: wrong(kernel, *args, **options))
    assert "relative error" in fault()


@pytest.mark.parametrize("error", [RuntimeError("FlashAttention only supports Ampere GPUs or newer."), TypeError("!")])
def test_a_kernel_that_does_not_run(varlen_kernel: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def kernel(*args: Any, **options: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    assert str(error) in fault()


def test_a_full_device_is_not_a_fault_of_the_kernel(varlen_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    with pytest.raises(torch.OutOfMemoryError):
        fault()
