"""``llavactl export``: export a model to another format."""

from __future__ import annotations

from pathlib import Path

import click

from llavactl.cli import completion, output, verified
from llavactl.cli.help import Command
from llavactl.cli.options import (
    component_options,
    json_option,
    key_values,
    load_outline,
    load_outline_if_given,
    recipe_options,
)
from llavactl.core.quantities import BYTE, quantity


@click.command(
    cls=Command,
    examples=[
        "llavactl export --format hf --to exported",
        "llavactl export --model runs/mine/stage2/model --format llava --to exported",
    ],
)
@recipe_options
@click.option(
    "--format",
    "form",
    required=True,
    metavar="NAME",
    shell_complete=completion.names_of("formats"),
    help="Export to this format; `llavactl components formats` lists the formats.",
)
@click.option(
    "--to", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Write the export to this folder."
)
@click.option(
    "--model",
    metavar="DIR|ID",
    shell_complete=completion.file_names,
    help="Export this model instead of the recipe's; a recipe is then optional.",
)
@click.option(
    "--verify/--no-verify", default=None,
    help="Reload the export without llavactl and compare token ids, pixels, logits and answers.  "
    "[default: on for formats that can be reloaded]",
)  # fmt: skip
@click.option("--allow-different", is_flag=True, help="Keep an export that differs from the model, without an error.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="Verify with this image (repeatable).  [default: images of the recipe]",
)  # fmt: skip
@component_options("format")
@json_option
def command(
    source: str | None,
    overrides: tuple[str, ...],
    form: str,
    to: Path,
    model: str | None,
    verify: bool | None,
    allow_different: bool,
    images: tuple[Path, ...],
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Export a model to another format.

    The model is the recipe's last finished stage, or --model.
    """
    recipe = load_outline_if_given(source, overrides) if model is not None else load_outline(source, overrides)
    from llavactl.verbs.export import export

    spec = {"name": form, **key_values(options)}
    report = export(recipe, spec, to, model=model, check=verify, allow_different=allow_different, images=images)
    if as_json:
        output.document(report)
        return
    size = f"{quantity(len(report.files), 'file')}, {quantity(report.bytes, BYTE)}"
    finished = ", finished before" if report.finished_before else ""
    output.line(f"{report.format} in {report.to}: {size}{finished}")
    output.labeled([("model", report.model), ("verdict", verified.verdict(report))])
    verified.tables([report])
