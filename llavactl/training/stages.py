"""What each stage trains, how fast, and in which rows: the two stages as data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from llavactl.core.errors import RecipeError
from llavactl.model.packed import packing_blocker
from llavactl.model.quantised import quantise

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.stages import AnyStage, Stage2

log = logging.getLogger(__name__)


def trained(model: LlavaModel, stage: AnyStage, seed: int) -> dict[str, float]:
    """Freezes and unfreezes ``model`` for ``stage``; returns the learning rate of each trained parameter by name.

    Stage 1 trains the connector alone; stage 2 the connector and the language model: whole, some
    of its weights (``only``), or through LoRA on all of its linear layers but the head (LLaVA's choice),
    with ``qlora`` on four bits a weight.
    """
    method = stage.method
    model.requires_grad_(False)
    for name, parameter in model.connector.named_parameters():
        parameter.requires_grad_(name not in model.frozen)
    if method == "full":
        model.language.requires_grad_(True)
        train_only(model.language, stage.trainable_modules)
    elif method in ("lora", "qlora"):
        if method == "qlora":
            quantise(model.language)
        torch.manual_seed(seed)
        _add_lora(model, stage)  # type: ignore[arg-type]
    if stage.gradient_checkpointing:
        # transformers 6 keeps the first name alone, 5.17 knows the second alone.
        enable = getattr(model.language, "activation_checkpointing_enable", None)
        (enable or model.language.gradient_checkpointing_enable)({"use_reentrant": False})
    connector = stage.connector_learning_rate or stage.learning_rate
    rates = {
        name: connector if name.startswith("connector.") else stage.learning_rate
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not rates:
        raise RecipeError(
            "the connector has no trainable parameters, so there is nothing to train in this stage",
            hint="`llavactl train --stage 2 -o stage2.init=scratch` trains the language model with it",
        )
    return rates


class Untrained:
    """The connector's state that no optimizer updates: its buffers and the parameters that its component froze.

    Buffers such as BatchNorm statistics change during training and are part of the result. They are looked up on
    each call, because a module may replace them.
    """

    def __init__(self, model: LlavaModel) -> None:
        self.connector, self.frozen = model.connector, model.frozen

    def state(self) -> dict[str, torch.Tensor]:
        """By name in the connector's state dict."""
        # By identity, not by name: a shared parameter has two.
        trainable = {id(each) for name, each in self.connector.named_parameters() if name not in self.frozen}
        state = self.connector.state_dict(keep_vars=True)
        return {name: each.detach() for name, each in state.items() if id(each) not in trainable}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what ``state`` gave, or a part of it."""
        self.connector.load_state_dict(state, strict=False)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The part that may change in training."""
        return {name: each for name, each in self.state().items() if name not in self.frozen}


def matrices(model: LlavaModel, stage: AnyStage) -> list[str]:
    """What Muon updates, by name: the language model's trained matrices between its embeddings and its head.

    Raises:
        RecipeError: ``optimizer: muon``, and none is trained.
    """
    if stage.optimizer != "muon":
        return []
    language = model.language
    parts = (language.get_input_embeddings(), language.get_output_embeddings())
    ends = [part.weight for part in parts if part is not None]
    found = [
        f"language.{name}"
        for name, parameter in language.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and not any(parameter is end for end in ends)
    ]
    if not found:
        raise RecipeError(
            "stage2.optimizer: muon, but none of the language model's matrices is trained",
            hint="`stage2.trainable_modules` selects only embeddings or head: use `stage2.optimizer: adamw`",
        )
    return found


def unpacked(model: LlavaModel, stage: AnyStage, device: str) -> str:
    """Why every sample of ``stage`` has a row of its own on ``device``; "" where rows hold many.

    Raises:
        RecipeError: ``packing: always``, and this language model can't be given such rows.
    """
    why = packing_blocker(model.language)
    if why and stage.packing == "always":
        raise RecipeError(f"packing: always, but {why}", hint="`packing: auto` trains such a model on padded rows")
    if stage.packing == "never":
        why = "the recipe says so"
    elif stage.packing == "auto" and device != "cpu":
        why = why or f"untested on {device}; `packing: always` takes it"
    if stage.shuffle == "images" and (why or stage.image_order == "random"):
        cause = f"rows are not packed ({why})" if why else "half of the questions come before their image"
        log.warning("shuffle: images is of little use: %s", cause)
    return why


def train_only(language: nn.Module, parts: Sequence[str]) -> None:
    """Freezes the weights of ``language`` whose names have none of ``parts``, if there are any.

    Raises:
        RecipeError: no weight has one of ``parts`` in its name.
    """
    names = [name for name, _ in language.named_parameters()]
    if unknown := [part for part in parts if not any(part in name for name in names)]:
        raise RecipeError(
            f"stage2.trainable_modules: the language model has no weight with {unknown[0]!r} in its name",
            hint=f"its names are like {names[0]}, {names[len(names) // 2]}",
        )
    for name, parameter in language.named_parameters():
        parameter.requires_grad_(not parts or any(part in name for part in parts))


def _add_lora(model: LlavaModel, stage: Stage2) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=stage.lora.r,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model.language = get_peft_model(model.language, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(f"stage2.method lora: {error}", hint="`stage2.method: full` needs no adapters") from error
