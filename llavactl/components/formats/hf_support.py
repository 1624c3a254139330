"""Refuses language models that ``LlavaForConditionalGeneration`` can't represent: see ``languages.linear_head``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavactl.components.languages.linear_head import head_fault, logits_fault
from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

HINT = "`--format llava -t strict=false` keeps the whole language model; llavactl's own commands need no export"


def refuse_unless_linear(language: PreTrainedModel) -> None:
    """Raises ModelError unless the logits of ``language`` are a bias-free linear map of its base model's output."""
    _refuse(language, logits_fault(language))


def refuse_unless_linear_head(language: PreTrainedModel) -> None:
    """Raises ModelError unless ``language`` is a base model with a bias-free linear head; no weights are needed."""
    _refuse(language, head_fault(language))


def _refuse(language: PreTrainedModel, why: str) -> None:
    if why:
        raise ModelError(
            f"layout hf can't represent this language model ({type(language).__name__}): {why}, "
            "but LlavaForConditionalGeneration is a base model with a linear head without bias",
            hint=HINT,
        )


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
