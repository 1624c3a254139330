"""What a stage of training reports, and whether a finished one is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.hashes import hash_folder
from llavactl.training.metrics import read as read_metrics

if TYPE_CHECKING:
    from llavactl.data.training_set import Split
    from llavactl.training.loop import Run, Trained


@dataclass(frozen=True)
class TrainReport:
    """What a stage did. ``finished_before``: nothing had to be done; ``first_step`` > 0: it was resumed.

    ``rows``: packed, or why they are padded. ``padding``: its share of the positions computed. ``shared``: the share
    of the tokens that were not computed, as another conversation of the row begins with them too. ``model_step``: the
    step whose weights the model has, the best checkpoint's with ``restore_best``; ``val_loss``: their validation loss.
    ``model_sha256``: a hash of all files of the model.
    """

    stage: int
    model: str
    steps: int
    first_step: int
    samples: int
    validation_samples: int
    left_out: int
    trainable_parameters: int
    loss: float
    val_loss: float | None
    tokens: int
    seconds: float
    tokens_per_s: float
    rows: str
    padding: float
    shared: float
    digest: str
    restore_best: bool
    model_step: int
    model_sha256: str
    finished_before: bool = False


def finished(folder: Path, digest: str, restore_best: bool) -> TrainReport | None:
    """The report of the finished run in ``folder``, if its digest and ``restore_best`` are these and its model whole.

    Raises:
        OSError: the report or the model exists but can't be read.
    """
    model = folder / "model"
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        same = (report["digest"], report["restore_best"]) == (digest, restore_best)
        if not same or hash_folder(model) != report["model_sha256"]:
            return None
    except (FileNotFoundError, ValueError, KeyError):
        return None
    known = {field.name for field in fields(TrainReport)}
    kept = {key: value for key, value in report.items() if key in known}
    return TrainReport(**{**kept, "model": str(model), "finished_before": True})


def report_of(run: Run, data: Split, trained: Trained, seconds: float, description: Mapping[str, Any]) -> TrainReport:
    lines = read_metrics(run.folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    validations = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    tokens = sum(line["tokens"] for line in steps if line["step"] > trained.first)
    work = run.work
    return TrainReport(
        stage=description["stage"],
        model=str(run.folder / "model"),
        steps=steps[-1]["step"],
        first_step=trained.first,
        samples=len(data.train),
        validation_samples=len(data.validation),
        left_out=len(data.left_out),
        trainable_parameters=sum(master.numel() for master in run.optimizer.masters.values()),
        loss=steps[-1]["loss"],
        val_loss=validations.get(trained.step),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_s=round(tokens / seconds, 1) if seconds else 0.0,
        rows=f"padded: {run.unpacked}" if run.unpacked else "packed",
        padding=round(work.padding / max(work.positions, 1), 4),
        shared=round(1 - (work.positions - work.padding) / max(work.tokens, 1), 4),
        digest=run.digest,
        restore_best=run.stage.restore_best,
        model_step=trained.step,
        model_sha256=hash_folder(run.folder / "model") if run.accelerator.is_main_process else "",
    )
