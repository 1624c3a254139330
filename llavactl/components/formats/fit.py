"""Whether ``LlavaForConditionalGeneration`` computes what a causal language model computes.

It holds the model below the head and puts a linear head without bias of its own on top. Whatever else the causal
language model's class does (a bias, scaled or capped logits) has no place there, and transformers drops it silently.
This is found by running the model once, not by a list of architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from transformers import PreTrainedModel

HINT = "`--format llava` keeps the whole language model; llavactl's own commands need no export"
POSITIONS = 8
NEAR = 1e-2
"""Of the largest: what two passes of the same weights in bfloat16 may differ by."""


def refuse_unless_linear(language: PreTrainedModel) -> None:
    """Raises ModelError unless the logits of ``language`` are a bias-free linear map of its base model's output."""
    from torch import nn

    base, head = language.base_model, language.get_output_embeddings()
    if base is language or not isinstance(head, nn.Linear):
        raise _no_place(language, "it is not a base model with a linear head")
    if head.bias is not None:
        raise _no_place(language, "its head has a bias")
    if why := _beside(language, base, head):
        raise _no_place(language, why)


def refuse_other_weights(what: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelError unless ``theirs``, made from the configuration, has a place for ``ours`` and for no more."""
    wanted, found = ({name: tuple(weight.shape) for name, weight in each.items()} for each in (ours, theirs))
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        sizes = (
            "x".join(map(str, shapes[differing[0]])) if differing[0] in shapes else "no such weight"
            for shapes in (wanted, found)
        )
        raise ModelError(
            f"layout hf can't hold this {what}: {differing[0]} is {' here and '.join(sizes)} in the layout", hint=HINT
        )


def _beside(language: PreTrainedModel, base: nn.Module, head: nn.Module) -> str:
    """What ``language`` does beside running ``base`` and then ``head``: '' when nothing.

    What the head returns is compared with the logits of the same pass, to the bit: a soft cap is nearly the
    identity on small logits. What it is given is compared with a pass of ``base`` alone.
    """
    import torch

    seen: list[torch.Tensor] = []

    def projected(_module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.extend((args[0].clone(), output.clone()))

    width = language.get_input_embeddings().weight.shape[1]
    embeds = torch.randn(1, POSITIONS, width, generator=torch.Generator().manual_seed(0)).to(language.dtype)
    hook = head.register_forward_hook(projected)
    try:
        with torch.no_grad():
            logits = language.eval()(inputs_embeds=embeds, use_cache=False).logits
            hidden = base(inputs_embeds=embeds, use_cache=False)[0]
    finally:
        hook.remove()
    given, made = seen
    if given.shape != hidden.shape or not (given - hidden).abs().max() <= NEAR * hidden.abs().max():
        return "it scales or changes what goes into its base model or its head"
    return "" if torch.equal(made.float(), logits.float()) else "it scales, caps or changes the logits of its head"


def _no_place(language: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"layout hf can't hold this language model ({type(language).__name__}): {why}, "
        "and LlavaForConditionalGeneration has a linear head without bias, and nothing else, on top of a base model",
        hint=HINT,
    )
