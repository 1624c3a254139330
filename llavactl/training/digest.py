"""The digest of a training stage: a hash of everything that determines its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.hashes import hash_json
from llavactl.core.identity import component_identity
from llavactl.model import folder as model_folder
from llavactl.recipe.stages import STAGES
from llavactl.training import control

if TYPE_CHECKING:
    from llavactl.data.split import DataSplit
    from llavactl.features import Fingerprint
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, StageNumber

_EXCLUDED_SETTINGS = {
    "micro_batch_size",
    "micro_batch_tokens",
    "packing",
    "gradient_checkpointing",
    "checkpoint_every",
    "keep_last",
    "restore_best",
    "evaluate_every",
    "preview_every",
    "init",
}
"""Settings that affect speed, memory or checkpoints, not the result; the hash of the initial model covers ``init``."""


def stage_digest(
    recipe: Recipe, stage: StageNumber, fingerprint: Fingerprint, data: DataSplit, init_folder: Path | None
) -> str:
    """A hash of the settings, components, data, features and initial model of ``stage``.

    Files count by content, not by name. Settings that don't affect the result, such as ``micro_batch_size``, are left
    out, so a run resumes after they are changed.
    """
    training_stage = recipe.stage(stage)
    settings = training_stage.settings
    return hash_json(
        {
            "stage": _settings(settings),
            "connector": component_identity("connectors", recipe.connector.spec()),
            "language": component_identity("languages", recipe.language.spec()),
            "template": component_identity("templates", training_stage.template),
            "fingerprint": fingerprint.id,
            "data": data.digest,
            "boxes": [sample.boxes for sample in data.train.samples] if settings.box_alignment_steps else None,
            "seed": recipe.seed,
            "start": model_folder.identity(init_folder) if init_folder else None,
            **_extensions(settings),
            **_controlling_plugins(recipe),
            **_arithmetic(settings),
        }
    )


def newer_defaults(settings: AnyStage) -> set[str]:
    """Settings that earlier versions didn't have, with values that behave as they did: their runs are still valid."""
    values: dict[str, Any] = {"train_connector": True, "schedule": None}
    if settings.method == "connector":  # stage 1 had AdamW only
        values["optimizer"] = "adamw"
    return {key for key, value in values.items() if getattr(settings, key) == value}


def _extensions(settings: AnyStage) -> dict[str, Any]:
    """The identities of the optimizer and the schedule, unless they are the built-in ones without options."""
    specs = {"optimizers": settings.optimizer_spec(), "schedules": settings.schedule_spec()}
    return {
        kind: component_identity(kind, spec)
        for kind, spec in specs.items()
        if spec is not None and (kind, spec) not in (("optimizers", "adamw"), ("optimizers", "muon"))
    }


def _controlling_plugins(recipe: Recipe) -> dict[str, Any]:
    """The versions and options of the plugins that may end a stage early; {} without any."""
    names = [name for name, _ in plugins.implementations(control.HOOK)]
    versions = {name: [plugins.version_of(name), recipe.plugins.get(name, {})] for name in names}
    return {"control": versions} if versions else {}


def stage_inputs(recipe: Recipe, stage: StageNumber) -> str:
    """A hash of the keys of ``recipe`` that determine ``stage``; recipes with equal hashes train it once.

    Reads no files, so recipes that name equal files differently have different hashes and still equal digests.
    """
    training_stage = recipe.stage(stage)
    init = training_stage.settings.init
    number = next((number for number, section in STAGES.items() if section == init), None)
    return hash_json(
        {
            "stage": _settings(training_stage.settings),
            "restore_best": training_stage.settings.restore_best,
            "connector": recipe.connector.spec(),
            "language": recipe.language.spec(),
            "template": training_stage.template,
            "vision": training_stage.vision,
            "features": [recipe.features.dtype, recipe.features.compute],
            "data": [source.model_dump(mode="json") for source in training_stage.sources],
            "seed": recipe.seed,
            **_controlling_plugins(recipe),
            "start": init if number is None else stage_inputs(recipe, number),
        }
    )


def _settings(settings: AnyStage) -> dict[str, Any]:
    """The settings that affect the result."""
    return settings.model_dump(mode="json", exclude=_EXCLUDED_SETTINGS | newer_defaults(settings))


def _arithmetic(settings: AnyStage) -> dict[str, str]:
    """Changes to the arithmetic of a method in a newer version of llavactl, whose results therefore differ."""
    # Before, embeddings, norms, head and adapters were float32 with any precision.
    return {"qlora": "all in precision"} if settings.method == "qlora" and settings.precision != "float32" else {}
