"""Whether ``LlavaForConditionalGeneration`` computes the same logits as a causal language model's own class.

It wraps the base model and adds a linear head without bias. Anything else that the causal language model's class
computes (a bias, scaled or capped logits) can't be represented, and transformers drops it silently. This is detected by
running the model once, not by a list of architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

POSITIONS = 8
TOLERANCE = 1e-2
"""Relative to the largest value; two forward passes with the same weights in bfloat16 differ by less."""


def logits_fault(language: PreTrainedModel) -> str:
    """Why the logits of ``language`` aren't a bias-free linear map of its base model's output; "" if they are."""
    return head_fault(language) or _computation_fault(language, language.base_model, language.get_output_embeddings())


def head_fault(language: PreTrainedModel) -> str:
    """Why ``language`` isn't a base model with a bias-free linear head; "" if it is. It needs no weights."""
    from torch import nn

    base, head = language.base_model, language.get_output_embeddings()
    if base is language or not isinstance(head, nn.Linear):
        return "it is not a base model with a linear head"
    return "its head has a bias" if head.bias is not None else ""


def _computation_fault(language: PreTrainedModel, base: nn.Module, head: nn.Module) -> str:
    """What ``language`` computes in addition to ``base`` and ``head``; "" if nothing.

    The head's output must equal the logits of the same forward pass exactly, because a soft cap hardly changes small
    logits. The head's input is compared with a separate forward pass of ``base``.
    """
    import torch

    captured: list[torch.Tensor] = []

    def capture(_module: nn.Module, args: Any, output: torch.Tensor) -> None:
        captured.extend((args[0].clone(), output.clone()))

    width = language.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(1, POSITIONS, width, generator=torch.Generator().manual_seed(0))
    embeds = embeds.to(language.device, language.dtype)
    hook = head.register_forward_hook(capture)
    try:
        with torch.no_grad():
            logits = language.eval()(inputs_embeds=embeds, use_cache=False).logits
            hidden = base(inputs_embeds=embeds, use_cache=False)[0]
    finally:
        hook.remove()
    head_input, head_output = captured
    if head_input.shape != hidden.shape or not (head_input - hidden).abs().max() <= TOLERANCE * hidden.abs().max():
        return "it scales or changes the input of its base model or its head"
    return (
        "" if torch.equal(head_output.float(), logits.float()) else "it scales, caps or changes the logits of its head"
    )
