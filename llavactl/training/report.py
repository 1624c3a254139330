"""The report of a training stage, and whether a stage was finished by an earlier run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.hashes import hash_folder
from llavactl.training.metrics import read as read_metrics
from llavactl.training.throughput import parameter_count

if TYPE_CHECKING:
    from llavactl.data.split import DataSplit
    from llavactl.training.loop import TrainingResult
    from llavactl.training.run import Run

REPORT = "report.json"

_FORMER_NAMES = {
    "first_step": "resumed_from",
    "left_out": "skipped_samples",
    "rows": "packing",
    "shared": "prefix_sharing",
}
"""Fields of reports written by earlier versions, and their names now."""


@dataclass(frozen=True)
class TrainReport:
    """The result of a training stage.

    ``resumed_from``: the step of the checkpoint that training resumed from, 0 for a new run. ``skipped_samples`` were
    not trained on; ``left_out.jsonl`` lists them. ``packing``: "packed", or "padded: " and the reason. ``padding``: the
    fraction of computed positions that are padding. ``prefix_sharing``: the fraction of tokens that were not computed
    because they belong to a prefix shared with another conversation. ``model_step``: the step whose weights the model
    has (with ``restore_best`` that of the best checkpoint); ``val_loss``: its validation loss. ``model_sha256``: a hash
    of all files of the model. ``restore_best`` is the setting. ``mfu``: the mean model FLOPs utilization of the steps
    trained by this command, None without a formula for the model; ``peak``: what it is relative to, per device.
    ``kernels`` of norms and MLPs: "liger", or "torch: " and the reason. ``parameters`` of the whole model, ``method``,
    ``device`` (its type) and ``processes``: what the throughput depends on. ``stopped_by``: the plugins that
    ended the stage early. ``finished_before``: the stage was finished already, and nothing was trained.
    """

    stage: int
    model: str
    steps: int
    resumed_from: int
    samples: int
    validation_samples: int
    skipped_samples: int
    trainable_parameters: int
    loss: float | None
    val_loss: float | None
    tokens: int
    seconds: float
    tokens_per_s: float
    packing: str
    padding: float
    prefix_sharing: float
    digest: str
    restore_best: bool | str
    model_step: int
    model_sha256: str
    mfu: float | None = None
    peak: str = ""
    kernels: str = ""
    parameters: int = 0
    method: str = ""
    device: str = ""
    processes: int = 0
    stopped_by: tuple[str, ...] = ()
    finished_before: bool = False


def finished_report(folder: Path, digest: str, restore_best: bool | str) -> TrainReport | None:
    """The report of the finished stage in ``folder``.

    None if digest or ``restore_best`` differ, or if a file of the model is missing or damaged.

    Raises:
        OSError: the report or the model exists but can't be read.
    """
    model = folder / "model"
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        matches = (report["digest"], report["restore_best"]) == (digest, restore_best)
        if not matches or hash_folder(model) != report["model_sha256"]:
            return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return TrainReport(**{**_known_fields(report), "model": str(model), "finished_before": True})


def _known_fields(report: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stored report that ``TrainReport`` has, with their names now."""
    renamed = {_FORMER_NAMES.get(key, key): value for key, value in report.items()}
    known = {field.name for field in fields(TrainReport)}
    return {key: value for key, value in renamed.items() if key in known}


def create_report(stage: int, run: Run, data: DataSplit, result: TrainingResult, seconds: float) -> TrainReport:
    """The report of a stage that was just trained and saved.

    The losses are None if metrics.jsonl was removed during training: the model is finished without it.
    """
    lines = read_metrics(run.folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    validation_losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    trained = [line for line in steps if line["step"] > result.resumed_from]
    tokens = sum(line["tokens"] for line in trained)
    counts = run.token_counts
    return TrainReport(
        stage=stage,
        model=str(run.folder / "model"),
        steps=result.steps,
        resumed_from=result.resumed_from,
        samples=len(data.train),
        validation_samples=len(data.validation),
        skipped_samples=len(data.skipped),
        trainable_parameters=sum(master.numel() for master in run.optimizer.masters.values()),
        loss=steps[-1]["loss"] if steps else None,
        val_loss=validation_losses.get(result.model_step),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_s=round(tokens / seconds, 1) if seconds else 0.0,
        packing=f"padded: {run.padding_reason}" if run.padding_reason else "packed",
        kernels=f"torch: {run.liger_fault}" if run.liger_fault else "liger",
        padding=round(counts.padding / max(counts.positions, 1), 4),
        prefix_sharing=round(1 - (counts.positions - counts.padding) / max(counts.tokens, 1), 4),
        digest=run.digest,
        restore_best=run.settings.restore_best,
        model_step=result.model_step,
        model_sha256=hash_folder(run.folder / "model"),
        mfu=_mean_mfu(trained),
        peak=str(result.peak),
        parameters=parameter_count(run.model),
        method=run.settings.method,
        device=run.accelerator.device.type,
        processes=run.accelerator.num_processes,
        stopped_by=result.stopped_by,
    )


def _mean_mfu(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """The MFU of the steps in ``lines`` for which it is known: earlier versions wrote none, or more than 1."""
    known = [line for line in lines if line.get("mfu", math.inf) <= 1]
    seconds = sum(line["seconds"] for line in known)
    return round(sum(line["mfu"] * line["seconds"] for line in known) / seconds, 4) if seconds else None
