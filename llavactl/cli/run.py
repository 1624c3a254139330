"""``llavactl run``: run all steps of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llavactl.cli import output, verified
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load, recipe_options
from llavactl.core.program import command_line

if TYPE_CHECKING:
    from llavactl.evaluation.results import EvalReport
    from llavactl.verbs.run import RunReport

Row = tuple[str, str]
"""A label and a text."""


@click.command(
    cls=Command,
    resumes=True,
    examples=[
        "llavactl run",
        "llavactl run -r demo",
        "llavactl run -r recipe.yaml -o stage2.max_steps=100",
    ],
)
@recipe_options
@json_option
def command(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run all steps of a recipe.

    The steps are generate, extract, stage 1, stage 2, eval and export. Finished steps are skipped; an interrupted step
    resumes.
    """
    recipe = load(source, overrides)  # before the import of torch, which takes seconds
    from llavactl.verbs.run import run

    report = run(recipe)
    if as_json:
        output.document(report)
        return
    output.line(f"{report.name} in {report.run_dir}")
    output.labeled(_steps(report))
    verified.tables(report.export)
    if report.example is not None and report.model is not None:
        output.line()
        output.labeled(_answer(report.example))
        output.line()
        output.line(_chat_command(report.model, report.example["file"]))


def _steps(report: RunReport) -> list[Row]:
    """One row per step, and the scores."""
    rows = []
    if generated := report.generate:
        kinds = ", ".join(f"{count} {kind}" for kind, count in generated.kinds.items())
        rows.append(("generate", f"{generated.samples} samples ({kinds}), {generated.refused} refused"))
    if features := report.extract:
        counts = f"{features.unique} images, {features.encoded} encoded now, {features.skipped} skipped"
        rows.append(("extract", f"{counts}, {features.seconds:.0f} s"))
    for stage in filter(None, (report.stage1, report.stage2)):
        losses = (("loss", stage.loss), ("validation loss", stage.val_loss))
        shown = "".join(f", {name} {value:.4f}" for name, value in losses if value is not None)
        duration = "finished before" if stage.finished_before else f"{stage.seconds:.0f} s"
        rows.append((f"stage {stage.stage}", f"{stage.steps} steps{shown}, {duration}"))
    for task in report.eval:
        rows += _scores(task)
    for exported in report.export:
        rows.append(("export", f"{exported.format} in {exported.to}; {verified.verdict(exported)}"))
    return [*rows, ("report", report.report)]


def _scores(task: EvalReport) -> list[Row]:
    """The scores of a task with their confidence intervals and baselines, one row per score or group of scores."""
    scores = {name: value for name, value in task.scores.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in task.scores.items() if isinstance(value, dict)}
    groups |= {name: {key: values[key] for key in scores if key in values} for name, values in task.baselines.items()}
    baselines = {name: group for name, group in groups.items() if group.keys() <= scores.keys()}
    title = f"{task.task}, {task.n} questions, protocol {task.protocol}, {task.failed} answers not parsed"
    rows = [("eval", title)]
    for name, value in scores.items():
        interval = task.interval.get(name)
        bounds = f" [{_number(interval[0])}, {_number(interval[1])}]" if interval else ""
        others = "".join(f"   {other} {_number(group[name])}" for other, group in baselines.items() if name in group)
        rows.append(("", f"  {name:<12} {_number(value):>6}{bounds}{others}"))
    for name, group in groups.items():
        if name not in baselines:
            rows.append(("", f"  {name:<12} " + "  ".join(f"{key} {_number(value)}" for key, value in group.items())))
    return rows


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _answer(example: Any) -> list[Row]:
    return [
        ("question", example["question"]),
        ("answer", f"{example['answer']} (reference: {example['reference']})"),
    ]


def _chat_command(model: str, image: str) -> str:
    """The command that chats with ``model`` about ``image``."""
    return command_line("chat", "--model", model, *(["--image", image] if image else []))
