"""The trainable parameters of a stage: freezing, LoRA adapters, learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from llavactl.core.errors import RecipeError

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.stages import AnyStage, Stage2


def configure_trainable(model: LlavaModel, settings: AnyStage, seed: int) -> dict[str, float]:
    """Freezes and unfreezes the parameters of ``model``; returns the learning rate of each trainable one by name.

    Stage 1 trains the connector. Stage 2 trains the connector and the language model: all weights, some of them
    (``trainable_modules``), or LoRA adapters of all linear layers except the head, as in LLaVA. ``train_connector``
    selects weights of the connector.

    Raises:
        RecipeError: the model doesn't support a setting, or has nothing to train in this stage.
    """
    method = settings.method
    model.requires_grad_(False)
    for name in trained_connector_weights(model, settings.train_connector):
        model.connector.get_parameter(name).requires_grad_(True)
    if method == "full":
        model.language.requires_grad_(True)
        train_only(model.language, settings.trainable_modules)
    elif method in ("lora", "qlora"):
        torch.manual_seed(seed)
        _add_lora(model, settings)  # type: ignore[arg-type]
    if settings.gradient_checkpointing:
        if blocker := checkpointing_blocker(model.language):
            raise RecipeError(
                f"gradient_checkpointing: {blocker}",
                hint="`gradient_checkpointing: false`, with a smaller `micro_batch_tokens` if memory is short",
            )
        # transformers 6 has only the first name, 5.17 only the second.
        enable = getattr(model.language, "activation_checkpointing_enable", None)
        (enable or model.language.gradient_checkpointing_enable)({"use_reentrant": False})
    connector_rate = settings.connector_learning_rate or settings.learning_rate
    rates = {
        name: connector_rate if name.startswith("connector.") else settings.learning_rate
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not rates:
        raise RecipeError(
            "the connector has no trainable parameters, so there is nothing to train in this stage"
            if settings.train_connector
            else "train_connector: false, and nothing else is trainable in this stage",
            hint="`llavactl train --stage 2 -o stage2.init=scratch` trains the language model",
        )
    return rates


def checkpointing_blocker(language: nn.Module) -> str:
    """Why ``language`` can't be trained with activation checkpointing; "" if it can."""
    if getattr(language, "supports_gradient_checkpointing", True):  # a plugin's model may not name it
        return ""
    return f"transformers doesn't support it for {type(language).__name__}"


def trained_connector_weights(model: LlavaModel, selection: bool | Sequence[str]) -> list[str]:
    """The names of the connector's weights that a stage with ``train_connector: selection`` trains.

    Those that the connector's component froze are never among them.

    Raises:
        RecipeError: a string of ``selection`` is in no name.
    """
    names = [name for name, _ in model.connector.named_parameters() if name not in model.frozen]
    if isinstance(selection, bool):
        return names if selection else []
    if unknown := [part for part in selection if not any(part in name for name in names)]:
        raise RecipeError(
            f"train_connector: no weight of the connector has {unknown[0]!r} in its name",
            hint=f"names: {', '.join(names) or 'none is trainable'}",
        )
    return [name for name in names if any(part in name for part in selection)]


class UntrainedState:
    """The connector's state that the optimizer doesn't update: buffers, and parameters that the stage doesn't train.

    Buffers such as BatchNorm statistics change during training and are part of the result. They are looked up in each
    call, because a module may replace them.
    """

    def __init__(self, model: LlavaModel, selection: bool | Sequence[str] = True) -> None:
        """``selection``: the stage's ``train_connector``."""
        self.connector = model.connector
        trained = set(trained_connector_weights(model, selection))
        self.frozen = frozenset(name for name, _ in model.connector.named_parameters() if name not in trained)

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors by their names in the connector's state dict."""
        # By identity, not by name: a shared parameter has two names.
        trainable = {id(weight) for name, weight in self.connector.named_parameters() if name not in self.frozen}
        state = self.connector.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in trainable}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the result of ``state`` or of ``buffers``."""
        self.connector.load_state_dict(state, strict=False)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The buffers, which may change during training."""
        return {name: tensor for name, tensor in self.state().items() if name not in self.frozen}


def train_only(language: nn.Module, modules: Sequence[str]) -> None:
    """Freezes the weights of ``language`` whose names contain none of ``modules``; none if ``modules`` is empty.

    Raises:
        RecipeError: one of ``modules`` matches no weight.
    """
    names = [name for name, _ in language.named_parameters()]
    if unknown := [module for module in modules if not any(module in name for name in names)]:
        raise RecipeError(
            f"stage2.trainable_modules: no weight of the language model has {unknown[0]!r} in its name",
            hint=f"examples of names: {names[0]}, {names[len(names) // 2]}",
        )
    for name, parameter in language.named_parameters():
        parameter.requires_grad_(not modules or any(module in name for module in modules))


def _add_lora(model: LlavaModel, settings: Stage2) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model.language = get_peft_model(model.language, config, autocast_adapter_dtype=False)
    except ValueError as error:
        without_dropout = "`-o stage2.lora.dropout=0`, or " if "lora_dropout" in str(error) else ""
        raise RecipeError(
            f"stage2.method lora: {error}", hint=f"{without_dropout}`stage2.method: full`, which needs no adapters"
        ) from error
    dtype = model.language.get_input_embeddings().weight.dtype
    for parameter in model.language.parameters():
        if parameter.requires_grad:  # older versions of peft create the adapters of layers in 4 bits in float32
            parameter.data = parameter.data.to(dtype)
