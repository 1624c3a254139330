"""Saves the trained model, and tests before step 1 that everything can be saved."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavactl import __version__
from llavactl.core.errors import StoreError
from llavactl.core.model_description import component_plugins
from llavactl.model import folder as model_folder
from llavactl.recipe.stages import STAGES
from llavactl.training import checkpoints
from llavactl.training.collective import on_main
from llavactl.training.initial_model import initial_language
from llavactl.training.sharding import gathered, language_state

if TYPE_CHECKING:
    from llavactl.features import FeatureReader
    from llavactl.model.build import ModelBundle
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber
    from llavactl.training.run import Run


def model_description(
    recipe: Recipe, stage: StageNumber, features: FeatureReader, digest: str, init_folder: Path | None
) -> dict[str, Any]:
    """The contents of ``llavactl.json`` for the model of ``stage``."""
    training_stage = recipe.stage(stage)
    settings = training_stage.settings
    components = {
        "vision": training_stage.vision,
        "connector": recipe.connector.spec(),
        "language": initial_language(recipe, stage, init_folder),
        "template": training_stage.template,
    }
    return {
        **components,
        "plugins": component_plugins(components),
        "stage": stage,
        "method": settings.method.removeprefix("q"),
        "quantised": "nf4" if settings.method == "qlora" else None,
        "features": {"dtype": recipe.features.dtype, "compute": recipe.features.compute},
        "fingerprint": dict(features.fingerprint.fields),
        "image_order": settings.image_order,
        "precision": settings.precision,
        "digest": digest,
        "restore_best": settings.restore_best,
        # Not from its metadata: llavactl may run from a checkout that isn't installed.
        "versions": {"llavactl": __version__, **{name: metadata.version(name) for name in ("torch", "transformers")}},
        "shape": asdict(features.shape),
    }


def save_model(run: Run, folder: Path, bundle: ModelBundle, description: Mapping[str, Any]) -> None:
    """Writes the model folder, with the connector in full precision; all processes must call this together.

    Raises:
        StoreError: it can't be written.
    """
    # By identity, not by name: a shared parameter has two names and one master.
    masters = {id(run.optimizer.parameters[name]): master for name, master in run.optimizer.masters.items()}
    state = bundle.model.connector.state_dict(keep_vars=True)
    connector = {name: gathered(masters.get(id(weight), weight).detach()).cpu() for name, weight in state.items()}
    precision = getattr(torch, description["precision"])
    with language_state(bundle.model, precision, run.folder) as language:
        on_main(lambda: model_folder.save(folder, bundle, connector, description, language))


def trial_save(run: Run, bundle: ModelBundle, description: Mapping[str, Any]) -> None:
    """Saves a checkpoint and the model once before step 1 and removes both; all processes must call this together.

    If something can't be saved, the stage fails immediately and not after hours of training.

    Raises:
        StoreError: something can't be written, or there is not enough disk space for all checkpoints.
    """
    trial = run.folder / ".dry-run"
    try:
        on_main(lambda: _check_disk_space(run, description["stage"]))
        checkpoints.save(trial, checkpoints.CheckpointState(0, run.digest), run.optimizer.state(), 1)
        save_model(run, trial / "model", bundle, description)
    finally:
        if run.accelerator.is_main_process:
            checkpoints.remove(trial)


def _check_disk_space(run: Run, stage: StageNumber) -> None:
    """Raises StoreError if the checkpoints don't fit on the disk."""
    run.folder.mkdir(parents=True, exist_ok=True)
    checkpoint_bytes = 3 * sum(4 * master.numel() for master in run.optimizer.masters.values())
    # The newest ``keep_last``, the best one, and the one being written; existing ones will be replaced.
    required = checkpoint_bytes * (run.settings.keep_last + 2)
    if run.preview is not None and run.settings.method == "full":  # the last preview, and the one being written
        required += 2 * sum(weight.numel() * weight.element_size() for weight in run.model.parameters())
    existing = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
    if required > (free := shutil.disk_usage(run.folder).free + existing):
        raise StoreError(
            f"{run.folder}: checkpoints need {required / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free",
            hint=f"free disk space, or set `-o {STAGES[stage]}.keep_last=1` or another `run_dir`",
        )
