"""``llavactl extract``: extract vision features into the feature store."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_vision, max_skipped_option, recipe_options
from llavactl.core.quantities import BYTE, duration, quantity

if TYPE_CHECKING:
    from llavactl.verbs.extract import ExtractReport


@click.command(
    cls=Command,
    resumes=True,
    examples=[
        "llavactl extract --dry-run",
        "llavactl extract -r llava-v1.5-7b -o features.dtype=int8",
        "torchrun --nproc-per-node 8 -m llavactl extract",
    ],
)
@recipe_options
@click.option("--dry-run", is_flag=True, help="Estimate images, bytes, free disk space and time; write nothing.")
@max_skipped_option
@click.option(
    "--part",
    metavar="I/N",
    help="Extract part I (from 0) of N only.  [default: set by torchrun, accelerate and srun]",
)
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    dry_run: bool,
    max_skipped: int | None,
    part: str | None,
    as_json: bool,
) -> None:
    """Extract vision features into the feature store.

    Every image of the recipe is encoded once. Images that can't be read are skipped and listed with a reason.
    """
    index_and_count = _index_and_count(part) if part else None
    recipe = load_vision(source, overrides)  # before the import of torch, which takes seconds
    from llavactl.features.parts import Part
    from llavactl.verbs.extract import extract

    share = Part(*index_and_count) if index_and_count else None
    report = extract(recipe, dry_run=dry_run, max_skipped=max_skipped, part=share)
    output.document(report) if as_json else output.labeled(_rows(report))


def _rows(report: ExtractReport) -> list[tuple[str, str]]:
    """``report`` as lines of label and text."""
    contents = f", {report.unique:,} distinct" if report.unique != report.images else ""
    rows = [("images", f"{report.images:,}{contents}"), ("stored before", f"{report.stored_before:,}")]
    if report.parts > 1:
        rows.insert(0, ("part", f"{report.part} of {report.parts}"))
    speed = f", {report.images_per_s:,.1f} images/s" if report.images_per_s else ""
    size, free = quantity(report.bytes, BYTE), quantity(report.free_bytes, BYTE)
    skipped = f"{report.skipped:,}, listed with reasons in {report.skipped_file}" if report.skipped else "none"
    if report.dry_run:
        unreadable = f"{report.skipped:,}" if report.skipped else "none so far; images to encode are not decoded"
        rows += [("to encode", f"{report.to_encode:,}"), ("unreadable", unreadable), ("disk", f"{size} of {free} free")]
        rows.append(("time", f"{duration(report.estimated_seconds or 0.0)} on {report.device}{speed}"))
    else:
        rows += [("encoded", f"{report.encoded:,}{speed}"), ("skipped", skipped), ("disk", f"{size} written")]
        rows.append(("time", f"{duration(report.seconds)} on {report.device}"))
    for store in report.stores:
        stages = "stage " + " and ".join(map(str, store.stages))
        image = f", image: {store.image}" if store.image else ""
        rows.append(("store", f"{store.path} ({stages}{image})"))
    return rows


def _index_and_count(part: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", part, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise click.UsageError(f"--part: expected I/N with I from 0 to N-1, such as 0/4, got {part!r}")
    return int(match[1]), int(match[2])
