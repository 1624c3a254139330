"""Creates the run of a stage: its trainable parameters, optimizer and packing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.training import stages
from llavactl.training.loop import Observer, Run
from llavactl.training.optimizer import Optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llavactl.core.schema import FeatureShape
    from llavactl.data.split import DataSplit
    from llavactl.model.llava import LlavaModel
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import TrainingStage


def create_run(
    recipe: Recipe,
    chosen: TrainingStage,
    model: LlavaModel,
    shape: FeatureShape,
    data: DataSplit,
    digest: str,
    accelerator: Accelerator,
    *,
    resume: bool,
) -> Run:
    """The run of a stage. Freezes and unfreezes the parameters of ``model`` and moves it to its device."""
    settings, folder = chosen.settings, recipe.run_dir / f"stage{chosen.number}"
    padding_reason = stages.padding_reason(model, settings, accelerator.device.type)
    rates = stages.configure_trainable(model, settings, recipe.seed)
    model.to(accelerator.device)
    optimizer = Optimizer(
        model,
        rates,
        settings.weight_decay,
        settings.adam_beta2,
        stages.muon_matrices(model, settings),
        stages.UntrainedState(model),
    )
    return Run(
        model=model,
        optimizer=optimizer,
        settings=settings,
        data=data.train,
        validation=data.validation,
        shape=shape,
        folder=folder,
        seed=recipe.seed,
        digest=digest,
        resume=resume,
        padding_reason=padding_reason,
        accelerator=accelerator,
        notify=_hook_caller(chosen.number, folder),
    )


def _hook_caller(stage: int, folder: Path) -> Observer:
    """Calls the plugins' hooks with ``stage`` and, at the start, ``folder``."""

    def notify(hook: str, facts: Mapping[str, Any]) -> None:
        extra = {"folder": folder} if hook == "train_started" else {}
        plugins.notify(hook, stage=stage, **extra, **facts)

    return notify
