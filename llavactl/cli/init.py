"""``llavactl init``: write a recipe for given data."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llavactl.cli import boundary, output
from llavactl.cli.help import Command
from llavactl.cli.options import component_options, device_options, json_option, key_values
from llavactl.cli.prompts import ask

if TYPE_CHECKING:
    from llavactl.verbs.init import InitReport

log = logging.getLogger(__name__)


@click.command(
    cls=Command,
    examples=[
        "llavactl init",
        "llavactl init --data photos/",
        "llavactl init --data captions.json --data instruct.json --images coco/",
        "llavactl init --data photos/ --device-memory 24GB --devices 8",
    ],
)
@click.option(
    "--data",
    multiple=True,
    metavar="PATH|SOURCE",
    help="Train on this: a file of LLaVA records, a folder of images with captions, or a source (repeatable).",
)
@click.option("--images", metavar="PATH", help="Root of the image paths in the records.  [default: recognized]")
@click.option("--vision", metavar="MODEL", help="Vision encoder: a folder, a hub id or a registered name.")
@click.option("--language", metavar="MODEL", help="Language model: a folder, a hub id or a registered name.")
@click.option(
    "--method",
    type=click.Choice(["full", "lora", "qlora"]),
    help="Method of stage 2.  [default: the first of these that fits the device]",
)
@device_options()
@click.option("--name", metavar="NAME", help="Name of the recipe and its run.  [default: from the data]")
@component_options("source")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="Write to FILE, or to recipe.yaml in a folder.  [default: ./recipe.yaml]",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--json-schema", is_flag=True, help="Also write recipe.schema.json, with which editors complete keys.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: use the defaults of all options that are not given.")
@click.option("--dry-run", is_flag=True, help="Print the recipe; write nothing.")
@json_option
def command(
    data: tuple[str, ...],
    images: str | None,
    vision: str | None,
    language: str | None,
    method: str | None,
    device_memory: int | None,
    devices: int | None,
    name: str | None,
    options: tuple[str, ...],
    to: Path | None,
    force: bool,
    json_schema: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a recipe for your data, models and memory.

    The data are recognized, models are read from their folders, and the method (full fine-tuning, LoRA or QLoRA) is the
    first whose predicted memory fits. Comments in the recipe say why each value was chosen. On a terminal, options
    that are not given are asked for, unless --yes is passed.
    """
    from llavactl.curation.recognize import MissingAnswerError
    from llavactl.verbs.init import init

    asking = not yes and not as_json and sys.stdin.isatty()
    if not data and not asking:
        raise click.UsageError("nothing to train on: pass --data PATH|SOURCE, and --images PATH if necessary")
    if options and len(data) > 1:
        raise click.UsageError("-t is for one --data only")
    answers: dict[str, Any] = {"data": data, "images": images, "vision": vision, "language": language}
    answers |= {"options": key_values(options), "device_memory": device_memory, "devices": devices}
    if asking:
        _ask(answers)
    try:
        report = init(**answers, method=method, name=name, to=to, force=force, json_schema=json_schema, dry_run=dry_run)
    except MissingAnswerError as error:
        raise click.UsageError(f"{error.message}: pass --{error.option} ({error.hint})") from error
    for warning in report.warnings:
        log.warning("%s", warning)
    if as_json:
        output.document(report)
    elif dry_run:
        output.text(report.text)
    else:
        _print(report)


def _print(report: InitReport) -> None:
    """What was recognized and chosen, and how to continue."""
    rows = [("recipe", report.recipe), *((("schema", report.schema),) if report.schema else ())]
    for each in report.data:
        count = f"{each.samples:,}" if each.exact else f"about {each.samples:,}"
        rows.append(("data", f"{count} {each.content}, read by {each.source['name']}"))
    rows.append(("vision", report.vision.get("model") or report.vision["name"]))
    rows.append(("language", f"{report.language.get('model') or report.language['name']}, template {report.template}"))
    device = f"{report.device['count']} × {report.device['memory_bytes'] / 1e9:.1f} GB ({report.device['kind']})"
    rows += [("method", report.method), ("devices", device)]
    for stage, peak in report.peak_bytes.items():
        known = "predicted peak unknown" if peak is None else _peak(peak, report.assumes[stage])
        rows.append((stage, f"{known}: doesn't fit" if report.stage_fits[stage] is False else known))
    output.labeled(rows)
    output.line()
    output.lines(["Next:", *(f"  {each}" for each in report.next)])


def _peak(size: int, assumed: Mapping[str, int] | None) -> str:
    from llavactl.training.prediction.assumption import LongestMicroBatch

    return f"predicted peak {size / 1e9:.1f} GB" + (f", with {LongestMicroBatch(**assumed)}" if assumed else "")


def _ask(answers: dict[str, Any]) -> None:
    """Asks for the options that are not in ``answers``; an answer that can't be used is asked for again."""
    from llavactl.core.quantities import gigabytes
    from llavactl.curation.recognize import MissingAnswerError, recognize
    from llavactl.training.prediction.target import target_device
    from llavactl.verbs.init.models import default_models, language_choice, vision_choice

    def recognized(data: str, images: str | None) -> str:
        """``data`` if it is usable, at least with other ``images``."""
        with contextlib.suppress(MissingAnswerError):
            recognize(data, images, answers["options"])
        return data

    def complete(images: str) -> str:
        for each in answers["data"]:
            recognize(each, images, answers["options"])
        return images

    if not answers["data"]:
        label = "Data: a file of records, a folder of images with captions, or a source"
        answers["data"] = (ask(label, lambda text: recognized(text, answers["images"])),)
    try:
        for each in answers["data"]:
            recognize(each, answers["images"], answers["options"])
    except MissingAnswerError as error:
        boundary.message("llavactl:", error.message, "yellow")
        answers["images"] = ask("Images: the folder or archive that their paths are relative to", complete)
    if answers["device_memory"] is None:
        target = target_device(None, None)
        shown = f"{'GPU' if target.cuda else 'CPU'} of this machine, {gigabytes(target.memory_bytes)}"
        answers["device_memory"] = ask(f"Memory of the GPU, such as 24GB; empty for the {shown}", _size, default="")
    defaults = default_models(cuda=answers["device_memory"] is not None or target_device(None, None).cuda)
    for key, label, choice, default in (
        ("vision", "Vision encoder: a folder, id or name", vision_choice, defaults[0]),
        ("language", "Language model: a folder, id or name", language_choice, defaults[1]),
    ):
        if answers[key] is None:
            answers[key] = ask(label, _usable(choice), default=default)


def _size(text: str) -> int | None:
    from llavactl.cli.options import parse_bytes

    return parse_bytes(text) if text else None


def _usable(choice: Callable[[str], object]) -> Callable[[str], str]:
    def check(text: str) -> str:
        choice(text)
        return text

    return check
