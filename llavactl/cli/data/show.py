"""``llavactl data show``: print training samples token by token."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option, load, recipe_options, stage_option
from llavactl.core.control_characters import visible

if TYPE_CHECKING:
    from llavactl.data.token_info import TokenInfo
    from llavactl.verbs.show import ShownSample, ShowReport


@click.command(
    "show",
    cls=Command,
    examples=[
        "llavactl data show --stage 1",
        "llavactl data show --sample 3 --count 2 --ids",
        "llavactl data show --count 20 --html samples.html",
    ],
)
@recipe_options
@stage_option("Show samples of this stage.  [default: the last stage with data]")
@click.option("--sample", metavar="ID|N", help="First sample: its id or its index, from 0.  [default: 0]")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="N", default=1, show_default=True, help="Number of samples."
)
@click.option(
    "--epoch",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    show_default=True,
    help="Epoch, for a random image order.",
)
@click.option("--ids", is_flag=True, help="Print one line per token: position, id, * for a target token, text.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a self-contained HTML page to this file."
)
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    stage: int | None,
    sample: str | None,
    count: int,
    epoch: int,
    ids: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print training samples token by token.

    Target tokens are between « and »; dots separate tokens, and the tokens of an image are shown as one. Only the
    tokenizer and the models' configurations are read, neither weights nor features.
    """
    recipe = load(source, overrides)  # before imports that take seconds
    from llavactl.verbs.show import show

    report = show(recipe, stage, sample=sample, count=count, epoch=epoch, html=html)
    if as_json:
        output.document(report)
    elif html is not None:
        output.lines([f"page: {report.html}"])
    else:
        lines = [line for each in report.shown for line in (*_head(report, each), *_body(each, ids), "")]
        output.lines(lines[:-1], styled=True)


def _head(report: ShowReport, sample: ShownSample) -> Iterator[str]:
    where = f", {visible(sample.where)}" if sample.where else ""
    yield f"sample {sample.index} of {report.samples}, id {visible(sample.id)}{where}"
    yield (
        f"stage {report.stage}, template {report.template}, image order {report.image_order}, epoch {report.epoch}: "
        f"{sample.tokens} tokens, {sample.target_tokens} target tokens"
    )
    if sample.truncated_tokens:
        yield (
            f"max_length {report.max_length} truncates {sample.truncated_tokens} tokens, of which "
            f"{sample.truncated_target_tokens} are target tokens; they follow the line"
        )
    for image in sample.images:
        if image.problem:
            yield click.style(visible(f"image {image.name} can't be read: {image.problem}"), fg="yellow")
    if sample.left_out:
        yield click.style(visible(f"left out of training: {sample.left_out}"), fg="yellow")
    yield ""


def _body(sample: ShownSample, ids: bool) -> Iterator[str]:
    for truncated, pieces in itertools.groupby(sample.pieces, key=lambda piece: piece.truncated):
        if truncated:
            yield "--- truncated ---"
        if ids:
            yield from map(_row, pieces)
        else:
            yield "·".join(
                _run(target, list(run)) for target, run in itertools.groupby(pieces, lambda piece: piece.target)
            )


def _run(target: bool, pieces: list[TokenInfo]) -> str:
    text = "·".join(_text(piece) for piece in pieces)
    return click.style(f"«{text}»", fg="green", bold=True) if target else text


def _text(piece: TokenInfo) -> str:
    if piece.image:
        return f"<image x {piece.tokens}>"
    return visible(piece.text).replace("\n", "\\n\n")


def _row(piece: TokenInfo) -> str:
    if piece.image:
        return f"{piece.position:6}          <image x {piece.tokens}> {visible(piece.image)}"
    mark = "*" if piece.target else " "
    row = f"{piece.position:6}  {piece.id:6}  {mark}  {visible(json.dumps(piece.text, ensure_ascii=False))}"
    return click.style(row, fg="green") if piece.target else row
