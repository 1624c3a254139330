"""``llavactl sweep``: run and compare variants of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, recipe_options

if TYPE_CHECKING:
    from llavactl.verbs.sweep.report import SweepReport

SHOWN_COMPARISONS = 10


@click.command(
    cls=Command,
    examples=[
        "llavactl sweep --axis vision.layer=-1,-2 --seeds 3",
        "llavactl sweep --axis connector.name=linear,mlp2x-gelu --dry-run",
        "llavactl sweep --axis 'connector=[{name: linear, norm: true}, mlp2x-gelu]'",
    ],
)
@recipe_options
@click.option(
    "--axis",
    "axes",
    multiple=True,
    metavar="KEY=A,B,C",
    help="Compare these values (YAML) of one recipe key; repeat for every combination with another key. For `vision`, "
    "`connector` and `language`, a value may be the name of a component.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run each variant N times, with the seeds `seed`, `seed + 1`, ….  [default: 1]",
)
@click.option("--dry-run", is_flag=True, help="Check all variants and list the steps that they share; run nothing.")
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    axes: tuple[str, ...],
    seeds: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run and compare variants of a recipe.

    Features are extracted once per vision encoder, and equal stages are trained once. Finished runs are skipped; an
    interrupted one resumes. --axis and --seeds replace those of the section `sweep` of the recipe.
    """
    from llavactl.recipe.axes import load_sweep

    recipes = load_sweep(source, overrides, axes, seeds)  # before the import of torch, which takes seconds
    from llavactl.core.errors import LlavactlError
    from llavactl.verbs.sweep import sweep

    report = sweep(recipes, dry_run=dry_run)
    output.document(report) if as_json else _print(report)
    if report.failed:
        runs = sum(len(variant.runs) for variant in report.variants)
        hint = "see `error` of each" if as_json else "the same command tries them again and skips the finished ones"
        if dry_run:
            hint = "change the recipe or the axes; nothing was run"
        raise LlavactlError(f"{report.failed} of {runs} runs {'would fail' if dry_run else 'failed'}", hint=hint)


def _print(report: SweepReport) -> None:
    """Prints the variants, the clearest differences, and the failed runs."""
    from dataclasses import asdict

    from llavactl.core.quantities import duration
    from llavactl.recipe.stages import step_title
    from llavactl.report.sweep_page import comparison_table, variant_table

    document = asdict(report)
    if report.dry_run:
        _print_plan(report)
    else:
        columns, rows = variant_table(document)
        output.table(rows, columns, titles_in_pipes=True)
        for task in report.main_scores:
            if table := comparison_table(document, task, limit=SHOWN_COMPARISONS):
                output.line()
                rows = [(row.name, *row.cells) for row in table.rows]
                output.table(rows, (f"{task}: paired tests", *table.columns), titles_in_pipes=True)
    failed = [run for variant in report.variants for run in variant.runs if run.state == "failed"]
    output.line()
    output.labeled(
        [
            *(("failed", f"{run.run_dir}: {run.error}") for run in failed),
            ("steps", ", ".join(f"{step_title(step)} ({count})" for step, count in report.computed.items()) or "none"),
            *([] if report.dry_run else [("time", duration(report.seconds["computed"])), ("report", report.report)]),
        ]
    )


def _print_plan(report: SweepReport) -> None:
    """Prints the runs, numbered, with the steps that each takes from an earlier one."""
    runs = [(variant.name, run) for variant in report.variants for run in variant.runs]
    numbers = {Path(run.run_dir).name: number for number, (_, run) in enumerate(runs, 1)}
    rows = [
        (str(numbers[Path(run.run_dir).name]), name, str(run.seed), _shared(run.shared, numbers)) for name, run in runs
    ]
    output.table(rows, ("run", "variant", "seed", "shared steps"), titles_in_pipes=True)


def _shared(steps: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    from llavactl.recipe.stages import step_title

    return ", ".join(f"{step_title(step)} of run {numbers[owner]}" for step, owner in steps.items()) or "none"
