"""The results of the runs of a sweep, read from their folders: scores, costs, grades of answers, shared steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.model_description import feature_shape, read_description
from llavactl.core.protocols import Judged
from llavactl.core.registry import registry
from llavactl.evaluation.answers import read_answers
from llavactl.evaluation.periodic import flat_scores
from llavactl.evaluation.scoring import select_answers
from llavactl.features.manifest import read_manifest
from llavactl.files.eval_result import read_eval_result
from llavactl.model.build import connector_tokens
from llavactl.recipe.stages import STAGES
from llavactl.report.inputs import read_document
from llavactl.report.page import TIMES
from llavactl.training.metrics import read as read_metrics

if TYPE_CHECKING:
    from llavactl.recipe.axes import Variant
    from llavactl.recipe.specs import TaskSpec
    from llavactl.training.report import TrainReport
    from llavactl.verbs.extract import ExtractReport
    from llavactl.verbs.run import RunReport

EXTRACTIONS = "extractions.json"
"""A file of the sweep's folder: the seconds of each extraction, by the fingerprints of its stores."""

Grades = Mapping[str, float]
"""The grade of each question, 0 to 1."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a variant: its scores, and what it takes to make its model without sharing anything.

    ``scores`` and 95 % ``intervals`` by task; ``trainable_parameters`` and ``tokens`` (of all training steps) by stage;
    ``seconds`` by step, None if unknown: features that were stored before the sweep. ``val_loss`` of the last stage.
    ``feature_bytes``: size of the features of this run's images. ``shared``: the steps that another run computed, with
    its name. ``error``: why it failed.
    """

    seed: int
    run_dir: str
    state: Literal["pending", "finished", "failed"]
    error: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    val_loss: float | None = None
    image_tokens: int | None = None
    trainable_parameters: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    feature_bytes: int | None = None
    shared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, the name of its extraction, and its grades by task."""

    run: SweepRun
    extraction: str
    grades: Mapping[str, Grades]


Outcome = FinishedRun | str
"""A finished run, or why it failed."""


def finished_run(
    variant: Variant,
    report: RunReport,
    extracted: Sequence[ExtractReport],
    sweep_folder: Path,
    grades: TaskGrades,
) -> FinishedRun:
    """The results of ``variant``, read from the ``report`` of its run and from its folder.

    ``extracted`` are the extractions of all processes, each of its part of the images; empty for live features.
    """
    run_dir = variant.recipe.run_dir
    stages = {STAGES[stage.stage]: stage for stage in (report.stage1, report.stage2) if stage is not None}
    extraction, extract_s = _extraction(extracted, sweep_folder)
    seconds = {"extract": extract_s} if extracted else {}
    seconds |= {section: _training_seconds(run_dir / section, stage) for section, stage in stages.items()}
    answered = {f"eval {each.task}": _answered_by(run_dir, each.task) for each in report.eval}
    seconds |= {step: read_document(owner / TIMES).get(step) for step, owner in answered.items()}
    owners = {section: _trained_by(run_dir / section) for section in stages} | answered
    run = SweepRun(
        seed=variant.seed,
        run_dir=str(run_dir),
        state="finished",
        scores={each.task: flat_scores(each.scores) for each in report.eval},
        intervals={
            each.task: {name: (low, high) for name, (low, high) in each.interval.items()} for each in report.eval
        },
        val_loss=next((stage.val_loss for stage in reversed(stages.values())), None),
        image_tokens=_image_tokens(report.model),
        trainable_parameters={section: stage.trainable_parameters for section, stage in stages.items()},
        tokens={section: _training_tokens(run_dir / section) for section in stages},
        seconds=seconds,
        feature_bytes=round(sum(map(_feature_bytes, extracted))) if extracted else None,
        shared={step: owner.name for step, owner in owners.items() if owner.name not in ("", run_dir.name)},
    )
    files = {each.task: Path(each.answers) for each in report.eval if each.answers}
    specs = {task.name: task for task in variant.recipe.eval.tasks}
    by_task = {each.task: grades(specs[each.task], each.protocol, files.get(each.task)) for each in report.eval}
    return FinishedRun(run, extraction, {task: each for task, each in by_task.items() if each})


def _training_seconds(folder: Path, stage: TrainReport) -> float:
    """The seconds of all steps: those of the last command, and those before the step that it resumed from."""
    lines = read_metrics(folder / "metrics.jsonl")
    before = (line.get("seconds", 0.0) for line in lines if "loss" in line and line["step"] <= stage.resumed_from)
    return round(stage.seconds + sum(before), 3)


def _training_tokens(folder: Path) -> int:
    return sum(line["tokens"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line)


def _trained_by(folder: Path) -> Path:
    """The folder of the run that trained the stage in ``folder``, which may be a link or a copy."""
    return Path(str(read_document(folder / "report.json").get("model"))).parent.parent


def _answered_by(run_dir: Path, task: str) -> Path:
    """The folder of the run that generated the answers to ``task``: ``run_dir``, or one that it copied them from."""
    seen = [run_dir]
    while source := read_eval_result(seen[-1] / "eval" / f"{task}.json").get("copied_from"):
        owner = Path(source).parents[2]  # RUN/eval/answers/FILE
        if owner in seen or not owner.is_dir():
            break
        seen.append(owner)
    return seen[-1]


def _image_tokens(model: str | None) -> int | None:
    if model is None:
        return None
    description = read_description(Path(model))
    return connector_tokens(description["connector"], feature_shape(description))


def _feature_bytes(report: ExtractReport) -> float:
    """The size of the features of the run's images; its stores may have other images as well."""
    total = 0.0
    for store in report.stores:
        manifest = read_manifest(Path(store.path))
        total += store.unique * manifest.bytes / manifest.images if manifest is not None and manifest.images else 0
    return total


def _extraction(extracted: Sequence[ExtractReport], sweep_folder: Path) -> tuple[str, float | None]:
    """The name of the extraction of the run's features, and its seconds if this sweep encoded all of them at once."""
    name = "+".join(sorted({store.fingerprint for report in extracted for store in report.stores}))
    if any(report.encoded for report in extracted) and not any(report.stored_before for report in extracted):
        return name, max(report.seconds for report in extracted)
    known: float | None = read_document(sweep_folder / EXTRACTIONS).get(name)
    return name, known


class TaskGrades:
    """Grades of stored answers; the questions of each task are read once."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Any, Any]] = {}

    def __call__(self, task: TaskSpec, protocol: str, file: Path | None) -> Grades:
        """The grade of each answer in ``file``; empty for judged answers, or if the task has no score per answer."""
        key = json.dumps(task.spec(), sort_keys=True, default=str)
        if key not in self._tasks:
            component = registry().create("tasks", task.spec())
            self._tasks[key] = component, list(component.questions())
        component, questions = self._tasks[key]
        if file is None or isinstance(component, Judged):
            return {}
        answers = select_answers(questions, read_answers(file, component), file)
        grades: Grades = component.score(answers, protocol).by_question
        return grades
