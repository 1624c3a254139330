"""Packed attention on a GPU agrees with block attention, which ``packing: auto`` requires."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llavactl.model.cuda.self_check import packed_attention_fault

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 32, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64), (16, 8, 256)]
)
def test_the_check_of_the_kernel_finds_no_fault(dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> None:
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width)
    assert packed_attention_fault(SimpleNamespace(config=config), dtype, torch.device("cuda")) == ""
