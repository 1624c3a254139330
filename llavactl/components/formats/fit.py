"""Whether ``LlavaForConditionalGeneration`` computes the same as a causal language model's own class.

It wraps the base model (without head) and adds its own linear head without bias. Anything else that the causal model's
class does (a bias, scaled or capped logits) can't be represented, and transformers drops it silently. This is detected
by running the model once, not by a list of architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from transformers import PreTrainedModel

HINT = "`--format llava -t strict=false` keeps the whole language model; llavactl's own commands need no export"
POSITIONS = 8
NEAR = 1e-2
"""Tolerance for two passes of the same weights in bfloat16, relative to the largest value."""


def refuse_unless_linear(language: PreTrainedModel) -> None:
    """Raises ModelError unless the logits of ``language`` are a bias-free linear map of its base model's output."""
    base, head = refuse_other_heads(language)
    if why := _other_computation(language, base, head):
        raise _unsupported(language, why)


def refuse_other_heads(language: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The base model and the head of ``language``, which may be on the meta device.

    Raises:
        ModelError: it is not a base model with a linear head without bias.
    """
    from torch import nn

    base, head = language.base_model, language.get_output_embeddings()
    if base is language or not isinstance(head, nn.Linear):
        raise _unsupported(language, "it is not a base model with a linear head")
    if head.bias is not None:
        raise _unsupported(language, "its head has a bias")
    return base, head


def refuse_other_weights(what: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelError unless ``ours`` and ``theirs``, created from the configuration, have equal names and shapes."""
    wanted, found = ({name: tuple(weight.shape) for name, weight in each.items()} for each in (ours, theirs))
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        sizes = (
            "x".join(map(str, shapes[differing[0]])) if differing[0] in shapes else "missing"
            for shapes in (wanted, found)
        )
        raise ModelError(
            f"layout hf can't represent this {what}: {differing[0]} is {' here and '.join(sizes)} in the layout",
            hint=HINT,
        )


def _other_computation(language: PreTrainedModel, base: nn.Module, head: nn.Module) -> str:
    """What ``language`` computes besides ``base`` and ``head``; "" if nothing.

    The head's output is compared with the logits of the same pass bit for bit, as a soft cap is nearly the identity on
    small logits. The head's input is compared with a pass of ``base`` alone.
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
        return "it scales or changes the input of its base model or its head"
    return "" if torch.equal(made.float(), logits.float()) else "it scales, caps or changes the logits of its head"


def _unsupported(language: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"layout hf can't represent this language model ({type(language).__name__}): {why}, "
        "but LlavaForConditionalGeneration is a base model with a linear head without bias",
        hint=HINT,
    )
