"""``llavactl data check``: validate every record and image before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import boundary, output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options, stage_option
from llavactl.core.errors import DataError
from llavactl.core.quantities import quantity

if TYPE_CHECKING:
    from llavactl.curation.scan import Decode
    from llavactl.verbs.check import CheckReport


SHOWN_LOCATIONS = 3


@click.command(
    "check",
    cls=Command,
    examples=[
        "llavactl data check",
        "llavactl data check records.json --images photos --decode full",
        "llavactl data check records.json --images photos --fix repaired.jsonl",
    ],
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option(
    "--images",
    metavar="LOCATION",
    help="Where FILE's images are: a folder, archives or a URL. Without it, images are not opened.",
)
@click.option(
    "--follow-links", is_flag=True, help="Follow symbolic links that point outside the folder of FILE's images."
)
@click.option(
    "--decode",
    type=click.Choice(["no", "header", "full"]),
    default="header",
    show_default=True,
    help="How to check images: not at all, their header and end, or by decoding them.",
)
@stage_option("Check one stage only; FILE is its data.  [default: both; FILE: 2]")
@click.option(
    "--fix", type=click.Path(path_type=Path), metavar="OUT", help="Write the records of FILE, repaired, to OUT."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    images: str | None,
    follow_links: bool,
    decode: Decode,
    stage: int | None,
    fix: Path | None,
    as_json: bool,
) -> None:
    """Validate the records of the recipe, or of FILE, before training. Exit 1 if a problem affects training.

    FILE holds LLaVA records, as JSON or JSONL. With -r, lengths are counted in tokens, too. OUT is JSON or JSONL by its
    suffix; OUT's .fixes.jsonl lists the changes to each record. With -r and one source, --fix writes that source's
    records.
    """
    from llavactl.curation.problems import KINDS, NOT_IN_RECORDS
    from llavactl.verbs.check import check, in_code

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    report = check(
        recipe,
        file,
        images,
        follow_links=follow_links,
        stage=stage,
        decode=decode,
        fix=fix,
    )
    if as_json:
        output.document(report)
    else:
        _print(report)
    errors = "1 problem affects training" if report.errors == 1 else f"{report.errors:,} problems affect training"
    if outside := [KINDS[each.problem].description for each in report.problems if each.problem in NOT_IN_RECORDS]:
        raise DataError(errors, hint="; ".join(outside))
    if report.ok or report.repaired is not None:
        return
    each = ", one source at a time" if len(report.repairs) > 1 else ""
    hint = f"to repair or drop these records{each}: {in_code(report.repairs)}" if report.repairs else ""
    if not report.trains:
        where = "in `problems`" if as_json else "above"
        raise DataError(errors, hint=hint or f"correct the files at the locations listed {where}")
    boundary.message("warning:", f"training works, {_despite(report)}", "bold yellow")
    if hint:
        boundary.message("hint:", hint, "bold yellow")
    ctx.exit(1)


def _despite(report: CheckReport) -> str:
    """What the problems of ``report`` change in training."""
    harmful = sum(each.count for each in report.problems if each.effect == "harms")
    effects = [
        f"but {quantity(report.left_out, 'sample')} will be left out" if report.left_out else "",
        f"but {quantity(harmful, 'problem')} will teach the model something wrong" if harmful else "",
    ]
    return ", ".join(filter(None, effects))


def _print(report: CheckReport) -> None:
    output.line(
        f"{report.records:,} records, {report.images:,} images (decode: {report.decode}), {report.seconds:.1f} s"
    )
    output.line(f"tokens: {report.token_counting}")
    if report.problems:
        rows = [(each.problem, each.effect, f"{each.count:,}", each.description) for each in report.problems]
        output.table(rows, ("problem", "effect", "count", "description"), titles_in_pipes=True)
        for each in report.problems:
            for location in each.locations[:SHOWN_LOCATIONS]:
                output.line(f"{each.problem}: {location}")
            if each.count > SHOWN_LOCATIONS:
                output.line(f"{each.problem}: and {each.count - SHOWN_LOCATIONS:,} more; --json lists up to a thousand")
    if (repaired := report.repaired) is not None:
        counts = f"{repaired.written:,} records written, {repaired.changed:,} changed, {repaired.dropped:,} dropped"
        output.line(f"{repaired.out}: {counts}; changes listed in {repaired.log}")
