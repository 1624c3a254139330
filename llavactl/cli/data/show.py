"""``llavactl data show``: training samples token by token."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from llavactl.cli import output
from llavactl.cli.options import json_option, load, recipe_options

if TYPE_CHECKING:
    from llavactl.data.token_info import TokenInfo
    from llavactl.verbs.show import ShownSample, ShowReport

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal would obey: others wrote the data."""


@click.command("show")
@recipe_options
@click.option("--stage", type=click.Choice(["1", "2"]), help="Whose samples.  [default: the last stage with data]")
@click.option("--sample", metavar="ID|N", help="The first one: its id, else its number from 0.  [default: 0]")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="How many samples.")
@click.option(
    "--epoch", type=click.IntRange(min=1), default=1, show_default=True, help="A random image order changes with it."
)
@click.option("--ids", is_flag=True, help="One line a token: its place, id, whether it is trained (*), and text.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page that needs nothing else to this file."
)
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    stage: Literal["1", "2"] | None,
    sample: str | None,
    count: int,
    epoch: int,
    ids: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print training samples token by token.

    What is trained stands between « and »; dots part tokens, and an image is one piece. Only the tokenizer and the
    models' configurations are read, no weights and no features.
    """
    from llavactl.verbs.show import show

    number: Literal[1, 2] | None = None if stage is None else 1 if stage == "1" else 2
    report = show(load(source, overrides), number, sample=sample, count=count, epoch=epoch, html=html)
    if as_json:
        output.document(report)
    elif html is not None:
        output.lines([f"page: {report.html}"])
    else:
        output.lines([line for each in report.shown for line in (*_head(report, each), *_body(each, ids), "")][:-1])


def _head(report: ShowReport, sample: ShownSample) -> Iterator[str]:
    where = f", {_harmless(sample.where)}" if sample.where else ""
    yield f"sample {sample.number} of {report.samples}, id {_harmless(sample.id)}{where}"
    yield (
        f"stage {report.stage}, template {report.template}, image order {report.image_order}, epoch {report.epoch}: "
        f"{sample.tokens} tokens, {sample.trained} trained"
    )
    if sample.cut:
        yield (
            f"max_length {report.max_length} cuts {sample.cut} tokens, {sample.cut_trained} of them trained; "
            "they stand behind the line"
        )
    for image in sample.images:
        if image.problem:
            yield click.style(_harmless(f"image {image.name} can't be read: {image.problem}"), fg="yellow")
    if sample.left_out:
        yield click.style(_harmless(f"left out of training: {sample.left_out}"), fg="yellow")
    yield ""


def _body(sample: ShownSample, ids: bool) -> Iterator[str]:
    for cut, found in itertools.groupby(sample.pieces, key=lambda piece: piece.cut):
        if cut:
            yield "--- cut ---"
        if ids:
            yield from map(_row, found)
        else:
            yield "·".join(_run(trained, list(run)) for trained, run in itertools.groupby(found, lambda p: p.trained))


def _run(trained: bool, pieces: list[TokenInfo]) -> str:
    text = "·".join(_text(piece) for piece in pieces)
    return click.style(f"«{text}»", fg="green", bold=True) if trained else text


def _text(piece: TokenInfo) -> str:
    if piece.image:
        return f"<image x {piece.tokens}>"
    return _harmless(piece.text).replace("\n", "\\n\n")


def _row(piece: TokenInfo) -> str:
    if piece.image:
        return f"{piece.position:6}          <image x {piece.tokens}> {_harmless(piece.image)}"
    mark = "*" if piece.trained else " "
    row = f"{piece.position:6}  {piece.id:6}  {mark}  {_harmless(json.dumps(piece.text, ensure_ascii=False))}"
    return click.style(row, fg="green") if piece.trained else row


def _harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
