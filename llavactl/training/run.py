"""The run of a stage: its model, optimizer, data and settings, and how the recipe determines them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llavactl.core import plugins
from llavactl.core.errors import RecipeError
from llavactl.model.build import connector_grid
from llavactl.model.cuda import liger
from llavactl.model.cuda.self_check import packed_attention_fault
from llavactl.model.inputs import token_count
from llavactl.model.packed import packing_blocker
from llavactl.training.learning_rate import LearningRate, learning_rate_schedule
from llavactl.training.optimizer import Optimizer
from llavactl.training.sharding import shard
from llavactl.training.trainable import UntrainedState, configure_trainable
from llavactl.training.update_rules import assign_update_rules

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llavactl.core.schema import Batch, FeatureShape
    from llavactl.data.sample_set import SampleSet
    from llavactl.data.split import DataSplit
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, TrainingStage
    from llavactl.training.placement import Placement

log = logging.getLogger(__name__)

Observer = Callable[[str, Mapping[str, Any]], None]
"""A function that is called with the name of a hook and its arguments."""


class Evaluation(Protocol):
    """Evaluates the model during training; all processes call each function together."""

    def answers(self, run: Run, stopped: Callable[[], bool]) -> Any:
        """The model's answers; None once ``stopped`` returns True: a signal was received.

        If the model is sharded, an error is raised in the process where it occurs; the others may wait for it.
        """

    def scores(self, run: Run, step: int, answers: Any) -> Mapping[str, float]:
        """The scores of ``answers``, the result of ``answers`` after ``step`` (from 1), by name.

        An error in one process is raised in all of them.
        """


class Preview(Protocol):
    """Shows what the model in training answers; all processes call each function together."""

    def answers(self, run: Run) -> Any:
        """The model's answers to a few questions; errors are raised as by ``Evaluation.answers``."""

    def publish(self, run: Run, step: int, answers: Any) -> None:
        """Shows ``answers``, the result of ``answers`` after ``step``, and saves the model.

        An error in one process is raised in all of them.
        """


@dataclass
class TokenCounts:
    """Counts for the batches of this process.

    ``positions`` are computed; ``padding`` of them are padding. ``tokens`` counts all tokens of all conversations, so a
    shared prefix counts once for each.
    """

    positions: int = 0
    padding: int = 0
    tokens: int = 0

    def add(self, batch: Batch) -> None:
        self.positions += batch.mask.numel()
        self.padding += batch.mask.numel() - int(batch.mask.sum())
        self.tokens += token_count(batch)


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs to train a stage.

    ``schedule``: the learning rate in each step. ``shape`` is the shape of the vision features, ``token_grid`` the grid
    of the connector's tokens for box alignment. ``digest`` identifies settings and data: only checkpoints with the same
    digest are resumed. ``padding_reason``: why samples are padded; "" if they are packed. ``liger_fault``: why the
    kernels of liger-kernel are not used; "" if they are. ``hook_arguments`` are those that every hook gets.
    """

    model: LlavaModel
    optimizer: Optimizer
    schedule: LearningRate
    settings: AnyStage
    data: SampleSet
    validation: SampleSet
    shape: FeatureShape
    token_grid: tuple[int, int] | None
    folder: Path
    seed: int
    digest: str
    placement: Placement
    resume: bool
    padding_reason: str
    liger_fault: str
    accelerator: Accelerator
    notify: Observer
    hook_arguments: Mapping[str, Any]
    evaluation: Evaluation | None = None
    preview: Preview | None = None
    token_counts: TokenCounts = field(default_factory=TokenCounts)


def create_run(
    recipe: Recipe,
    stage: TrainingStage,
    model: LlavaModel,
    shape: FeatureShape,
    data: DataSplit,
    digest: str,
    accelerator: Accelerator,
    placement: Placement,
    *,
    resume: bool,
) -> Run:
    """The run of a stage. Freezes and unfreezes the parameters of ``model``, shards it, and moves it to its device."""
    settings, folder = stage.settings, recipe.run_dir / f"stage{stage.number}"
    padding_reason = _padding_reason(model, settings, accelerator)
    liger_fault = _liger_fault(model, settings, accelerator.device)
    rates = configure_trainable(model, settings, recipe.seed)
    assignments, on_host = assign_update_rules(model, settings), placement.optimizer_state == "host"
    if placement.sharded:
        shard(model, accelerator.device, offload=on_host)
    else:
        model.to(accelerator.device)
    optimizer = Optimizer(
        model,
        rates,
        assignments,
        settings.weight_decay,
        settings.adam_beta2,
        UntrainedState(model, settings.train_connector),
        on_host=on_host and not placement.sharded,  # FSDP2 keeps its shares there already
    )
    hook_arguments = {"stage": stage.number, "recipe": recipe.model_dump(mode="json")}
    return Run(
        model=model,
        optimizer=optimizer,
        schedule=learning_rate_schedule(settings),
        settings=settings,
        data=data.train,
        validation=data.validation,
        shape=shape,
        token_grid=connector_grid(recipe.connector.spec(), shape) if settings.box_alignment_steps else None,
        folder=folder,
        seed=recipe.seed,
        digest=digest,
        placement=placement,
        resume=resume,
        padding_reason=padding_reason,
        liger_fault=liger_fault,
        accelerator=accelerator,
        notify=lambda hook, arguments: plugins.notify(hook, **hook_arguments, **arguments),
        hook_arguments=hook_arguments,
    )


def _padding_reason(model: LlavaModel, settings: AnyStage, accelerator: Accelerator) -> str:
    """Why training pads samples instead of packing them, the same on all processes; "" if it packs them.

    Raises:
        RecipeError: ``packing: always``, but packing is not exact for this language model or on a device of the run.
    """
    if settings.packing == "never":
        reason = "disabled by `packing: never`"
    else:
        reason = packing_blocker(model.language) or _device_fault(model, settings, accelerator)
        if reason and settings.packing == "always":
            raise RecipeError(f"packing: always, but {reason}", hint="`packing: auto` trains with padding instead")
    if settings.shuffle == "images" and (reason or settings.image_order == "random"):
        cause = f"no sequence packing ({reason})" if reason else "half of the questions precede their image"
        log.warning("shuffle: images has little effect: %s", cause)
    return reason


def _device_fault(model: LlavaModel, settings: AnyStage, accelerator: Accelerator) -> str:
    """Why packed attention can't be used on the devices of this run; "" if it can.

    Processes whose devices differ must still agree: each of them packs, or none.
    """
    from accelerate.utils import gather_object

    device = accelerator.device
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        untested = f"packing is untested on {device.type}; `packing: always` enables it"
        return "" if settings.packing == "always" else untested
    fault = packed_attention_fault(model.language, getattr(torch, settings.precision), device)
    faults = gather_object([fault]) if accelerator.num_processes > 1 else [fault]
    fault = next(filter(None, faults), "")
    if fault and settings.packing == "auto":
        log.warning("samples are padded, not packed: %s", fault)
    return fault


def _liger_fault(model: LlavaModel, settings: AnyStage, device: torch.device) -> str:
    """Why liger's kernels are not used; "" if they are. Logs a warning if they are installed, but don't work."""
    if blocker := liger.blocker(model.language, device):
        return blocker
    fault = liger.fault(model.language, getattr(torch, settings.precision), device)
    if fault:
        log.warning("%s", fault)
    return fault
