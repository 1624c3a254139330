"""A language model's linear layers in four bits, for adapters to be trained upon (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from llavactl.core.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def four_bits() -> Any:
    """The module of bitsandbytes.

    Raises:
        RecipeError: it isn't there, or doesn't work on this machine.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise RecipeError(
            f"stage2.method: qlora needs bitsandbytes, which can't be imported ({error})",
            hint="`pip install 'llavactl[qlora]'`, or `-o stage2.method=lora`, which takes more memory",
        ) from error
    return bitsandbytes


def quantise(language: PreTrainedModel) -> None:
    """Every linear layer of ``language`` but its head to nf4, in place; the rest to float32, as peft prepares it.

    The layers go on computing in the precision they had. Scales of blocks of 64 weights are quantised again.

    Raises:
        RecipeError: bitsandbytes isn't there, or doesn't work on this machine.
    """
    from peft import prepare_model_for_kbit_training

    make = four_bits().nn
    head = language.get_output_embeddings()
    found = [(name, part) for name, part in language.named_modules() if type(part) is nn.Linear and part is not head]
    for name, part in found:
        bits = make.Linear4bit(
            part.in_features,
            part.out_features,
            bias=part.bias is not None,
            compute_dtype=part.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        bits.weight = make.Params4bit(part.weight.data, requires_grad=False, quant_type="nf4", module=bits)
        bits.bias = part.bias
        # Or a validation would lay out its weights for inference, and the step after it have no gradient.
        bits.support_avx512bf16_for_cpu = False
        language.set_submodule(name, bits.to(part.weight.device))
    language.is_loaded_in_4bit = True  # what peft goes by
    prepare_model_for_kbit_training(language, use_gradient_checkpointing=False)
