"""Refuses models that ``LlavaForConditionalGeneration`` can't represent; see also ``languages.linear_head``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.components.languages.linear_head import head_fault, logits_fault
from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

HINT = "use `--format llava -t strict=false`, which supports any language model; llavactl itself needs no export"


def refuse_nonlinear_logits(language: PreTrainedModel) -> None:
    """Raises ModelError unless the logits of ``language`` are a bias-free linear map of its base model's output."""
    _refuse(language, logits_fault(language))


def refuse_nonlinear_head(language: PreTrainedModel) -> None:
    """Raises ModelError unless ``language`` is a base model with a bias-free linear head; no weights are needed."""
    _refuse(language, head_fault(language))


def _refuse(language: PreTrainedModel, reason: str) -> None:
    if reason:
        raise ModelError(
            f"format hf can't represent language model {type(language).__name__}: {reason}, "
            "but LlavaForConditionalGeneration is a base model with a linear head without bias",
            hint=HINT,
        )


def refuse_other_shapes(part: str, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelError unless the ``tensors`` of ``part`` have the names and shapes of ``expected``."""
    shapes, expected_shapes = (
        {name: "x".join(map(str, weight.shape)) for name, weight in weights.items()} for weights in (tensors, expected)
    )
    names = shapes.keys() | expected_shapes.keys()
    if differing := sorted(name for name in names if shapes.get(name) != expected_shapes.get(name)):
        name = differing[0]
        raise ModelError(
            f"format hf can't represent this {part}: {name} is {shapes.get(name, 'missing')}, "
            f"expected {expected_shapes.get(name, 'no such tensor')}",
            hint=HINT,
        )
