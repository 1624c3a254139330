"""Loading of language models with quantized linear layers: 4 bits (QLoRA, arXiv 2305.14314) or 8 (arXiv 2208.07339)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn


def loading_arguments(dtype: torch.dtype, device: str, bits: Literal[4, 8] = 4) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for weights in nf4 or int8 on ``device`` that compute in ``dtype``.

    Each weight is quantized on ``device`` as it is read: neither the device nor the host ever holds all of them in full
    precision. In nf4, the scales of blocks of 64 weights are quantized as well.
    """
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def not_finite(weight: torch.Tensor) -> bool:
    """Whether ``weight`` has values that are not finite; its scales show it if it is quantized."""
    state = getattr(weight, "quant_state", None)
    values = getattr(weight, "SCB", None) if state is None else state.offset
    return not bool((weight if values is None else values).isfinite().all())


def keep_training_layout(model: nn.Module) -> None:
    """Keeps evaluation on a CPU from converting weights to a layout for inference, which has no backward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
