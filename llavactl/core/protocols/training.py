"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.typed import Typed

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Weight(Typed):
    """A trainable weight of the model: its name, such as ``language.model.layers.0.mlp.up_proj.weight``, and shape.

    ``part`` is what it belongs to: the connector, the embeddings of the language model (with a tied head), its head, or
    ``language``, everything else of it, LoRA adapters included.
    """

    name: str
    shape: tuple[int, ...]
    part: Literal["connector", "embeddings", "head", "language"]


@runtime_checkable
class UpdateRule(Protocol):
    """An optimizer: how float32 master weights are updated from their gradients.

    llavactl keeps the master weights, accumulates and clips gradients, sets learning rates, and saves the state.
    """

    scope: Literal["element", "weight", "all"]
    """What the update of an element depends on besides its own gradient and state: nothing (AdamW), its whole weight
    (Muon), or all weights. Only ``element`` can be sharded; with ``weight``, the weights are divided among threads on a
    CPU."""

    moments: tuple[str, ...]
    """The keys of the optimizer's state, per weight, that have the shape of the weight. The only other key allowed is
    the scalar ``step``. Memory predictions count these tensors."""

    def selects(self, weight: Weight) -> bool:
        """Whether this rule updates ``weight``; AdamW updates the others."""

    def build(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        """A torch optimizer of parameter ``groups``.

        Each has the float32 ``params``, ``weight_decay``, and ``betas``, which are 0.9 and the stage's ``adam_beta2``.
        ``lr`` is set before each step. The optimizer must have the same groups with the same ``params``; other keys may
        be left out. Weights without a gradient in a step have the gradient 0.
        """


@runtime_checkable
class Schedule(Protocol):
    """A learning-rate schedule after the warm-up."""

    def fraction(self, step: int, steps: int) -> float:
        """The fraction of the peak learning rate at ``step`` (from 0) of ``steps``, both counted after the warm-up: a
        finite number of at least 0, of Python or numpy.

        It must depend on its arguments and options only: a resumed run calls it for the remaining steps.
        """
