"""``llavactl train``: train one stage of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import device_options, json_option, load, max_skipped_option, recipe_options, stage_option

if TYPE_CHECKING:
    from llavactl.verbs.plan import TrainPlan


@click.command(
    cls=Command,
    resumes=True,
    examples=[
        "llavactl train --stage 1",
        "llavactl train --stage 2 -o stage2.learning_rate=1e-5 --resume never",
        "llavactl train --stage 2 --dry-run --device-memory 24GB --devices 8",
        "torchrun --nproc-per-node 8 -m llavactl train --stage 2",
    ],
)
@recipe_options
@stage_option("Train this stage. 1: connector; 2: connector and language model.", required=True)
@click.option(
    "--resume",
    type=click.Choice(["auto", "never"]),
    default="auto",
    show_default=True,
    help="Resume from the last checkpoint (auto), or start over (never).",
)
@max_skipped_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Predict memory, steps and time from the configuration and the data, without weights or GPU; train nothing. "
    "Exit with 1 if the stage doesn't fit.",
)
@device_options("With --dry-run: ")
@click.option(
    "--tokens-per-second",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="With --dry-run: compute the time from this throughput of all devices.  [default: that of an earlier run]",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    source: str | None,
    overrides: tuple[str, ...],
    stage: int,
    resume: str,
    max_skipped: int | None,
    dry_run: bool,
    device_memory: int | None,
    devices: int | None,
    tokens_per_second: float | None,
    as_json: bool,
) -> None:
    """Train one stage of a recipe.

    Features are read from the feature store, or computed during training with `-o features.mode=live`.
    """
    if dry_run:
        recipe = load(source, overrides)
        from llavactl.verbs.plan import plan_training

        plan = plan_training(
            recipe,
            stage,
            device_memory=device_memory,
            devices=devices,
            tokens_per_s=tokens_per_second,
        )
        output.document(plan) if as_json else _print(plan)
        if not plan.fits:
            raise plan.error
        return
    if given := [name for name in ("device_memory", "devices", "tokens_per_second") if ctx.params[name] is not None]:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --dry-run")
    recipe = load(source, overrides)  # before the import of torch, which takes seconds
    from llavactl.verbs.train import train

    mode = cast(Literal["auto", "never"], resume)
    output.report(train(recipe, stage, mode, max_skipped=max_skipped), as_json)


def _print(plan: TrainPlan) -> None:
    """Prints ``plan`` as lines of label and text."""
    from llavactl.core.quantities import duration, gigabytes

    def count(number: int | None) -> str:
        return "unknown" if number is None else f"{number:,}"

    where, device, parameters = plan.placement, plan.device, plan.parameters
    parts = {
        kind: ", ".join(f"{name.replace('_', ' ')} {gigabytes(size)}" for name, size in sizes.items() if size >= 5e4)
        for kind, sizes in plan.peak_parts.items()
    }
    per_device, per_process = (" per device", " per process") if device["count"] > 1 else ("", "")
    limit = where["micro_batch_tokens"]
    placement = [
        "sharded" if where["sharded"] else "replicated",
        f"optimizer state: {where['optimizer_state']}",
        f"activation checkpointing: {'on' if where['gradient_checkpointing'] else 'off'}",
        "micro-batches: " + ("no limit of tokens" if limit is None else f"at most {limit:,} tokens"),
        "packed" if where["packed"] else "padded",
    ]
    rows = [
        ("fits", "yes" if plan.fits else "NO"),
        ("devices", f"{device['count']} × {gigabytes(device['memory_bytes'])} ({device['kind']})"),
        ("placement", ", ".join(placement)),
        ("parameters", f"{parameters['trainable']:,} trainable, {parameters['frozen']:,} frozen"),
        ("device peak", f"{gigabytes(plan.peak_bytes['device'])}{per_device}: {parts['device']}"),
        ("host peak", f"{gigabytes(plan.peak_bytes['host'])}{per_process}: {parts['host']}"),
        ("assumes", plan.assumption),
        ("checkpoint", gigabytes(plan.checkpoint_bytes)),
        ("steps", count(plan.steps)),
        ("tokens", count(plan.tokens)),
    ]
    if plan.padding is not None and plan.prefix_sharing is not None:
        rows += [("padding", f"{plan.padding:.1%}"), ("prefix sharing", f"{plan.prefix_sharing:.1%}")]
    if plan.time is not None:
        rows.append(("time", f"{duration(plan.time['seconds'])} ({plan.time['source']})"))
    output.labeled([*rows, *(("note", note) for note in plan.notes)])
