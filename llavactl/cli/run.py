"""``llavactl run``: a recipe's whole pipeline."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options

if TYPE_CHECKING:
    from llavactl.evaluation.results import EvalReport
    from llavactl.verbs.run import RunReport


@click.command()
@recipe_options
@json_option
def command(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Generate, extract, stage 1, stage 2, eval, export: finished steps are skipped, an interrupted one resumes."""
    from llavactl.verbs.run import run

    report = run(load(source, overrides))
    if as_json:
        output.document(report)
    else:
        output.lines(_summary(report))


def _summary(report: RunReport) -> list[str]:
    """What a person wants to know: each step, the scores, one question to try again."""
    lines = [f"{report.name} in {report.run_dir}"]
    if report.generate is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.generate.kinds.items())
        lines.append(f"generate {report.generate.samples} samples ({kinds}), {report.generate.refused} refused")
    if report.extract is not None:
        done, took = report.extract, f"{report.extract.seconds:.0f} s"
        lines.append(f"extract  {done.unique} images, {done.encoded} encoded now, {done.skipped} skipped, {took}")
    for stage in filter(None, (report.stage1, report.stage2)):
        held = "" if stage.val_loss is None else f", validation {stage.val_loss:.4f}"
        took = "finished before" if stage.finished_before else f"{stage.seconds:.0f} s"
        lines.append(f"stage {stage.stage}  {stage.steps} steps, loss {stage.loss:.4f}{held}, {took}")
    for task in report.eval:
        lines += _scores(task)
    for made in report.export:
        seen = "" if made.verified is None else f", verified: logits differ by at most {made.verified.logits:.2g}"
        lines.append(f"export   {made.format} in {made.to}{seen}")
    lines.append(f"report   {report.report}")
    if report.example is not None and report.model is not None:
        shown = report.example
        lines += [
            "",
            f"asked    {shown['question']}",
            f"answered {shown['answer']} (right is: {shown['reference']})",
            "",
        ]
        words = [*_called(), "chat", "--model", report.model, *(["--image", shown["file"]] if shown["file"] else [])]
        lines.append(shlex.join(words))
    return lines


def _called() -> list[str]:
    """What llavactl is called by here; ``make demo`` leaves a shell in which it isn't found by its name."""
    if shutil.which("llavactl"):
        return ["llavactl"]
    python = Path(sys.executable)
    return [str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python), "-m", "llavactl"]


def _scores(task: EvalReport) -> list[str]:
    """One line a score, with its interval and what stands beside it under the same name (chance, say)."""
    plain = {name: value for name, value in task.scores.items() if not isinstance(value, dict)}
    groups = {name: value for name, value in task.scores.items() if isinstance(value, dict)}
    groups |= {name: {key: each[key] for key in plain if key in each} for name, each in task.baselines.items()}
    beside = {name: group for name, group in groups.items() if group.keys() <= plain.keys()}
    lines = [f"eval     {task.task}, {task.n} questions, protocol {task.protocol}, {task.failed} not understood"]
    for name, value in plain.items():
        low_high = (
            f" [{_number(task.interval[name][0])}, {_number(task.interval[name][1])}]" if name in task.interval else ""
        )
        also = low_high + "".join(
            f"   {other} {_number(group[name])}" for other, group in beside.items() if name in group
        )
        lines.append(f"           {name:<12} {_number(value):>6}{also}")
    for name, group in groups.items():
        if name not in beside:
            lines.append(f"           {name:<12} " + "  ".join(f"{key} {_number(each)}" for key, each in group.items()))
    return lines


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)
