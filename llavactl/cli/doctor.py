"""``llavactl doctor``: check the installation and the machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from llavactl.cli import output
from llavactl.cli.help import Command
from llavactl.cli.options import json_option
from llavactl.core.plugins import BUILTIN

if TYPE_CHECKING:
    from llavactl.verbs.doctor import DoctorReport, TrainingMemory

_VERSIONS = ("torch", "transformers", "accelerate", "peft")
"""The packages whose versions explain most problems."""

_TITLES = {"connector": "stage 1", "full": "full", "lora": "LoRA", "qlora": "QLoRA"}
_MARKS = {"sharding": "S", "optimizer_state": "H", "gradient_checkpointing": "C"}
_MARKS_TEXT = "C: activation checkpointing, H: optimizer state in host memory, S: sharded"
_WIDTH = 79
_LABEL = 9
_SHOWN = 4

Row = tuple[str, str]
"""A label and a text."""


@click.command(
    cls=Command,
    examples=[
        "llavactl doctor",
        "llavactl doctor --json",
    ],
)
@click.option("--all", "everything", is_flag=True, help="Also list all packages and checks.")
@json_option
def command(everything: bool, as_json: bool) -> None:
    """Check packages, devices, disk space, network and plugins.

    Also prints which sizes of models can be trained here and how, with the predicted peak of memory.
    """
    from llavactl.verbs.doctor import doctor

    report = doctor()
    if as_json:
        output.document(report)
        return
    output.labeled(list(_machine(report)))
    if report.training:
        output.line()
        output.paragraph(f"Predicted peak in GB on {report.training_device}; –: does not fit")
        titles, *models = _models(report.training)
        output.table(models, titles, titles_in_pipes=True)
        output.paragraph(_assumption(report.training))
        if any(each.settings for each in report.training):
            output.paragraph(_MARKS_TEXT)
    if notes := list(_notes(report)):
        output.line()
        output.labeled(notes)
    if everything:
        output.line()
        output.table(list(report.packages.items()))
        rows = [("yes" if finding.works else "NO", finding.what, finding.why) for finding in report.findings]
        output.table(rows, styles={"yes": "green", "NO": "bold red"})


def _machine(report: DoctorReport) -> Iterator[Row]:
    """Versions, devices, disks and plugins, one line each."""
    rows = [("llavactl", f"{report.llavactl}, Python {report.python}, {report.platform}")]
    versions = (f"{name} {report.packages[name]}" for name in _VERSIONS if name in report.packages)
    rows.append(("packages", ", ".join(versions)))
    rows += (("device", device) for device in _first(_devices(report), "devices"))
    rows += (("disk", f"{disk.free_gb:.0f} GB free for {disk.what} in {disk.folder}") for disk in report.disks)
    names = [each.name for each in report.plugins if not each.error and each.name != BUILTIN]
    rows.append(("plugins", ", ".join(_first(names, "plugins")) or "none"))
    yield from ((label, _shortened(text)) for label, text in rows)


def _devices(report: DoctorReport) -> list[str]:
    """The devices; equal ones in one line."""
    names = [re.sub(r"^cuda:\d+ ", "GPU ", device.name) for device in report.devices]
    lines = [
        f"{name}: {device.memory_gb:.0f} GB, {' '.join(device.dtypes)}"
        for name, device in zip(names, report.devices, strict=True)
    ]
    return [f"{count} × {line}" if count > 1 else line for line, count in Counter(lines).items()]


def _models(training: Sequence[TrainingMemory]) -> Iterator[tuple[str, ...]]:
    """A heading, and a row per model: the predicted peak of each method, with marks for settings that cost time.

    The columns are the methods on one device, and those that need less on each of several.
    """
    cells = {(each.method, each.devices, each.model): _cell(each) for each in training}
    models = list(dict.fromkeys(each.model for each in training))
    columns = [
        (method, devices)
        for method, devices in dict.fromkeys((each.method, each.devices) for each in training)
        if devices == 1 or any(cells[method, devices, model] != cells[method, 1, model] for model in models)
    ]
    titles = [_TITLES[method] + (f" on {devices}" if devices > 1 else "") for method, devices in columns]
    yield ("language model", *titles)
    for model in models:
        yield (model, *(cells[*column, model] for column in columns))


def _assumption(training: Sequence[TrainingMemory]) -> str:
    """The longest micro-batches of both stages that the peaks are predicted for."""
    known = [each for each in training if each.assumes]
    first, second = (
        max(each.assumes["samples"] for each in known if each.assumes and (each.method == "connector") == is_first)
        for is_first in (True, False)
    )
    tokens = max(each.assumes["tokens"] for each in known if each.assumes)
    return f"for micro-batches of at most {first} (stage 1) or {second} samples of {tokens:,} tokens"


def _cell(each: TrainingMemory) -> str:
    if each.peak_bytes is None:
        return ""  # not possible on these devices, or not predicted
    if not each.fits:
        return "–"
    return " ".join([f"{each.peak_bytes / 1e9:.1f}", *(_MARKS[name] for name in each.settings)])


def _notes(report: DoctorReport) -> Iterator[Row]:
    """What doesn't work, and the packages that can be installed."""
    problems = [f"{each.what}: {each.why}" for each in report.problems]
    yield from (("PROBLEM", problem) for problem in _first(problems, "problems"))
    if missing := [each for each in report.features if not each.installed]:
        yield ("missing", "; ".join(each.what for each in missing))
        yield ("", "pip install " + " ".join(each.install.removeprefix("pip install ") for each in missing))


def _shortened(text: str) -> str:
    """``text`` in one line of a terminal; of a path, the end is kept."""
    width = _WIDTH - _LABEL
    if len(text) <= width:
        return text
    before, slash, path = text.partition(" /")
    keep = width - len(before) - 3
    return f"{before} …{(slash + path)[-keep:]}" if slash and keep > 0 else f"{text[: width - 1]}…"


def _first(lines: Sequence[str], what: str) -> list[str]:
    """At most four of ``lines``, and the number of the others: the screen has room for no more."""
    if len(lines) <= _SHOWN:
        return list(lines)
    return [*lines[: _SHOWN - 1], f"and {len(lines) - _SHOWN + 1} more {what} (--all, --json)"]
