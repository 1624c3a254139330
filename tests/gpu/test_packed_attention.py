"""Packed attention on the device agrees with references: block attention in float64, and padded samples on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llavactl.core.schema import Batch, FeatureShape
from llavactl.model.build import build
from llavactl.model.cuda.self_check import packed_attention_fault
from llavactl.model.inputs import to_device
from llavactl.model.llava import LlavaModel
from llavactl.model.packed import packed_attention

HEADS = [(32, 32, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64), (16, 8, 256)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
def test_the_check_before_training_finds_no_fault(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int
) -> None:
    scale = 1 if device.type == "cuda" else 8  # a CPU takes seconds for heads of 128
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width // scale)
    assert packed_attention_fault(SimpleNamespace(config=config), dtype, device) == ""  # type: ignore[arg-type]


def loss_and_gradients(model: LlavaModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(to_device(batch, model.device))
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_loss_and_gradients_of_a_packed_batch(
    toy: Path,
    device: torch.device,
    shape: FeatureShape,
    padded_batch: Batch,
    packed_batch: Batch,
    dtype: str,
    tolerance: float,
    checkpointing: bool,
) -> None:
    """With a shared prefix; the reference is padded, in float32 on the CPU."""
    language = {"name": "hf", "model": str(toy / "language")}
    reference, model = (
        build({"name": "mlp2x-gelu"}, language, shape, dtype=name).model.train() for name in ("float32", dtype)
    )
    model.to(device)
    expected_loss, expected = loss_and_gradients(reference, padded_batch)
    if checkpointing:
        enable = getattr(model.language, "activation_checkpointing_enable", None)
        (enable or model.language.gradient_checkpointing_enable)({"use_reentrant": False})
    with packed_attention(model.language):
        loss, gradients = loss_and_gradients(model, packed_batch)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name
