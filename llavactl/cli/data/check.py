"""``llavactl data check``: a look at every record and image before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load_outline, load_outline_if_given, recipe_options
from llavactl.core.errors import DataError

if TYPE_CHECKING:
    from llavactl.curation.scan import Decode
    from llavactl.recipe.stages import StageNumber
    from llavactl.verbs.check import CheckReport


SHOWN = 3


@click.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_options
@click.option(
    "--images", metavar="PLACE", help="Where FILE's images are: a folder, archives or a URL. Without it none is opened."
)
@click.option(
    "--follow-links", is_flag=True, help="Follow symbolic links that point outside the folder of FILE's images."
)
@click.option(
    "--decode",
    type=click.Choice(["no", "header", "full"]),
    default="header",
    show_default=True,
    help="How images are tried: not at all, by their header and end, or decoded whole.",
)
@click.option(
    "--stage", type=click.Choice(["1", "2"]), help="Of one stage alone; FILE trains it.  [default: both; FILE: 2]"
)
@click.option("--fix", type=click.Path(path_type=Path), metavar="OUT", help="Write FILE, repaired, to OUT.")
@json_option
def command(
    file: Path | None,
    source: str | None,
    overrides: tuple[str, ...],
    images: str | None,
    follow_links: bool,
    decode: Decode,
    stage: str | None,
    fix: Path | None,
    as_json: bool,
) -> None:
    """Find every problem of the recipe's records, or of FILE, before training does. Exit 1 if one would hurt it.

    FILE has LLaVA's records, as JSON or JSONL. With -r its lengths are counted in tokens, too. OUT is JSON or JSONL by
    its suffix; OUT's .fixes.jsonl says what was done to each record.
    """
    from llavactl.curation.problems import KINDS, NOT_IN_RECORDS
    from llavactl.verbs.check import check

    recipe = load_outline_if_given(source, overrides) if file is not None else load_outline(source, overrides)
    report = check(
        recipe,
        file,
        images,
        follow_links=follow_links,
        stage=cast("StageNumber | None", stage and int(stage)),
        decode=decode,
        fix=fix,
    )
    if as_json:
        output.document(report)
    else:
        _print(report)
    if beside := [KINDS[each.problem].what for each in report.problems if each.problem in NOT_IN_RECORDS]:
        raise DataError(f"{report.hurts} problems would hurt training", hint="; ".join(beside))
    if not report.ok and report.mended is None:
        raise DataError(
            f"{report.hurts} problems would hurt training",
            hint="`llavactl data check FILE --fix OUT` mends or drops such records",
        )


def _print(report: CheckReport) -> None:
    output.line(
        f"{report.records:,} records, {report.images:,} images (decode: {report.decode}), {report.seconds:.1f} s"
    )
    output.line(f"tokens: {report.lengths}")
    if report.problems:
        rows = [(each.problem, each.effect, f"{each.count:,}", each.what) for each in report.problems]
        output.table([("problem", "effect", "count", ""), *rows])
        for each in report.problems:
            for place in each.places[:SHOWN]:
                output.line(f"{each.problem}: {place}")
            if each.count > SHOWN:
                output.line(f"{each.problem}: and {each.count - SHOWN:,} more; --json has up to a thousand")
    if (repaired := report.mended) is not None:
        counts = f"{repaired.written:,} records written, {repaired.changed:,} changed, {repaired.dropped:,} dropped"
        output.line(f"{repaired.out}: {counts}; reasons in {repaired.log}")
