"""Quantizes a language model's linear layers to 4 bits for training adapters (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from llavactl.core.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def import_bitsandbytes() -> Any:
    """The bitsandbytes module.

    Raises:
        RecipeError: it isn't installed, or doesn't work on this machine.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise RecipeError(
            f"stage2.method: qlora needs bitsandbytes, which can't be imported ({error})",
            hint="`pip install 'llavactl[qlora]'`, or `-o stage2.method=lora`, which needs more memory",
        ) from error
    return bitsandbytes


def quantize(language: PreTrainedModel) -> None:
    """Quantizes all linear layers of ``language`` except its head to nf4, in place; the rest becomes float32.

    The layers still compute in their original precision. Scales of blocks of 64 weights are quantized as well. Other
    weights are prepared by peft.

    Raises:
        RecipeError: bitsandbytes isn't installed, or doesn't work on this machine.
    """
    from peft import prepare_model_for_kbit_training

    layers = import_bitsandbytes().nn
    head = language.get_output_embeddings()
    linear = [(name, part) for name, part in language.named_modules() if type(part) is nn.Linear and part is not head]
    for name, part in linear:
        replacement = layers.Linear4bit(
            part.in_features,
            part.out_features,
            bias=part.bias is not None,
            compute_dtype=part.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        replacement.weight = layers.Params4bit(
            part.weight.data, requires_grad=False, quant_type="nf4", module=replacement
        )
        replacement.bias = part.bias
        # Otherwise validation would convert the weights to a layout for inference that has no backward pass.
        replacement.support_avx512bf16_for_cpu = False
        language.set_submodule(name, replacement.to(part.weight.device))
    language.is_loaded_in_4bit = True  # peft checks this attribute
    prepare_model_for_kbit_training(language, use_gradient_checkpointing=False)
