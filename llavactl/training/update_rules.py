"""Which update rule (``components.optimizers``) updates which trainable weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import UpdateRule, Weight
from llavactl.core.registry import component_name, registry

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.stages import AnyStage

DEFAULT = "adamw"
"""The optimizer of the weights that the stage's optimizer doesn't select."""


@dataclass(frozen=True)
class AssignedWeights:
    """The weights that ``rule`` updates, by name."""

    rule: UpdateRule
    names: tuple[str, ...]


def optimizer_of(settings: AnyStage) -> UpdateRule:
    """The stage's optimizer."""
    return registry().create("optimizers", settings.optimizer_spec())


def probe_groups() -> list[dict[str, Any]]:
    """Parameter groups of one small weight, to build an optimizer without a model."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(2, 2))
    return [{"params": [weight], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999)}]


def assign_update_rules(model: LlavaModel, settings: AnyStage) -> Sequence[AssignedWeights]:
    """The update rules of all trainable weights of ``model``: the stage's optimizer, and AdamW for the others.

    Raises:
        RecipeError: the stage's optimizer selects no trainable weight.
    """
    rule, weights = optimizer_of(settings), list(trainable_weights(model))
    selected = [weight.name for weight in weights if rule.selects(weight)]
    if weights and not selected:
        name = component_name(settings.optimizer_spec())
        raise RecipeError(
            f"optimizer: {name} updates none of the {len(weights)} trainable weights of this stage",
            hint=f"`optimizer: {DEFAULT}`, or other trainable weights",
        )
    assignments = [AssignedWeights(rule, tuple(selected))]
    if others := [weight.name for weight in weights if weight.name not in set(selected)]:
        assignments.insert(0, AssignedWeights(registry().create("optimizers", DEFAULT), tuple(others)))
    return assignments


def moments_by_weight(model: LlavaModel, settings: AnyStage) -> dict[str, Sequence[str]]:
    """The keys of the optimizer's state of each trainable weight of ``model``, by its name."""
    return {name: each.rule.moments for each in assign_update_rules(model, settings) for name in each.names}


def trainable_weights(model: LlavaModel) -> Iterator[Weight]:
    """The trainable weights of ``model``, each once: a tied head is part of the embeddings."""
    embeddings = model.language.get_input_embeddings()
    head = model.language.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "connector" if name.startswith("connector.") else "language"
        if embeddings is not None and parameter is embeddings.weight:
            part = "embeddings"
        elif head is not None and any(parameter is weight for weight in head.parameters()):
            part = "head"
        yield Weight(name, tuple(parameter.shape), part)  # type: ignore[arg-type]
