"""report.html: a run on one page that needs nothing else, neither a network nor a script.

Whatever the run folder holds so far is shown. All text comes from data that others wrote: the template escapes
every value, images are taken only whole and inline, and the page forbids its browser to load anything.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llavactl.core.paths import write_atomic
from llavactl.files.eval_result import read_eval_result
from llavactl.report.figures import MISSING, Table, duration, score_tables, show
from llavactl.report.inputs import read_document, read_objects, read_recipe
from llavactl.report.plots import DARK, LIGHT, draw_loss
from llavactl.report.templates import template
from llavactl.report.thumbnails import data_uri, safe_image

TIMES = "times.json"
"""In a run folder: the seconds of each step, written by ``llavactl run``."""

SHOWN_SKIPPED = 20
STAGES = (
    ("stage1", "Stage 1", "the connector learns to translate"),
    ("stage2", "Stage 2", "the model learns to answer"),
)
TILES = (("steps", "steps"), ("samples", "samples"), ("loss", "final loss"), ("val_loss", "validation loss"))
PACKAGES = ("llavactl", "torch", "transformers")


@dataclass(frozen=True)
class SampleAnswer:
    """A question, what the data says and what the model said; ``right``: as the task says, else the same words."""

    image: str
    picture: str
    question: str
    reference: str
    answer: str
    right: bool
    blind: str = ""


@dataclass(frozen=True)
class StageView:
    """One stage as the page shows it; ``report`` is empty until the stage is finished."""

    title: str
    purpose: str
    curves: tuple[str, str]
    tiles: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    answers: tuple[SampleAnswer, ...]
    held_out: bool
    finished: bool
    step: str


@dataclass(frozen=True)
class TaskView:
    """One scored task; ``more`` is the address of its page of cases, "" where there is none."""

    name: str
    about: str
    tables: tuple[Table, ...]
    answers: tuple[SampleAnswer, ...]
    more: str


def write_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` from what is in ``run_dir`` so far; returns its path."""
    text, recipe = read_recipe(run_dir)
    skipped = read_objects(run_dir / "skipped.jsonl")
    page = template("page.html").render(
        name=show(recipe.get("name") or run_dir.absolute().name),
        parts=_parts(recipe),
        stages=[view for each in STAGES if (view := _stage(run_dir, *each))],
        tasks=[_task(file) for file in sorted((run_dir / "eval").glob("*.json"))],
        skipped=[(show(each.get("image")), show(each.get("reason"))) for each in skipped[:SHOWN_SKIPPED]],
        skipped_count=len(skipped),
        times=_times(read_document(run_dir / TIMES)),
        try_next=[show(line) for line in _list(recipe.get("try_next"))],
        versions=_versions(),
        recipe=text,
    )
    path = run_dir / "report.html"
    write_atomic(path, page)
    return path


def _parts(recipe: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """(kind, component, its model) of what the assistant is made of."""
    specs = [(kind, recipe.get(kind)) for kind in ("vision", "connector", "language")]
    return tuple(
        (kind, show(spec.get("name")), Path(str(spec.get("model") or "")).name)
        for kind, spec in specs
        if isinstance(spec, Mapping)
    )


def _stage(run_dir: Path, folder: str, title: str, purpose: str) -> StageView | None:
    """The stage in ``folder``; None before its first step."""
    metrics = run_dir / folder / "metrics.jsonl"
    report = read_document(run_dir / folder / "report.json")
    lines = read_objects(metrics)
    if not report and not lines:
        return None
    seconds = [("time", duration(report["seconds"]))] if "seconds" in report else []
    speed = [("tokens a second", show(report["tokens_per_s"]))] if "tokens_per_s" in report else []
    light, dark = (data_uri(draw_loss(metrics, palette), "png") for palette in (LIGHT, DARK))
    return StageView(
        title=title,
        purpose=purpose,
        curves=(light, dark) if lines else ("", ""),
        tiles=(*((label, show(report[key])) for key, label in TILES if report.get(key) is not None), *seconds, *speed),
        facts=tuple(
            (key.replace("_", " "), show(value)) for key, value in report.items() if not isinstance(value, dict)
        ),
        answers=tuple(map(sample_answer, read_objects(run_dir / folder / "samples.json"))),
        held_out=bool(report.get("validation_samples")),
        finished=bool(report),
        step=show(max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=None)),
    )


def sample_answer(row: Mapping[str, Any]) -> SampleAnswer:
    """A row of ``report.examples`` as the page shows it."""
    reference, answer = (show(row.get(key)).strip() for key in ("reference", "answer"))
    return SampleAnswer(
        image=show(row.get("image")),
        picture=safe_image(row.get("thumbnail")),
        question=show(row.get("question")),
        reference=reference,
        answer=answer,
        right=bool(row["right"]) if "right" in row else _words(reference) == _words(answer) != MISSING,
        blind=show(row["blind"]) if "blind" in row else "",
    )


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _task(file: Path) -> TaskView:
    report = read_eval_result(file)
    cases = Path("eval", "cases", f"{file.stem}.html")
    return TaskView(
        name=show(report.get("task") or file.stem),
        about=about(report),
        tables=tables(report),
        answers=tuple(map(sample_answer, read_objects(file.parent / "examples" / file.name))),
        more=quote(cases.as_posix()) if (file.parents[1] / cases).is_file() else "",
    )


def about(report: Mapping[str, Any]) -> str:
    """A scored task in a line: questions, what failed, protocol."""
    counts = ("n", "questions"), ("failed", "failed")
    known = [f"{show(report[key])} {word}" for key, word in counts if report.get(key)]
    return " · ".join([*known, f"protocol {show(report['protocol'])}"] if report.get("protocol") else known)


def tables(report: Mapping[str, Any]) -> tuple[Table, ...]:
    """The scores of a task, beside them their intervals and the scores of others."""
    return score_tables(_with_those_beside(report))


def _with_those_beside(report: Mapping[str, Any]) -> dict[str, Any]:
    """The scores, and as groups beside them their intervals and the same scores of others."""
    scores, ranges, others = (_mapping(report.get(key)) for key in ("scores", "interval", "baselines"))
    plain = {name: each for name, each in scores.items() if not isinstance(each, Mapping)}
    interval = {name: _range(each) for name, each in ranges.items() if name in plain}
    theirs = {
        other: {name: each for name, each in _mapping(found).items() if name in plain}
        for other, found in others.items()
    }
    return {**plain, "95 %": interval, **scores, **theirs}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _range(each: Any) -> str:
    return f"{show(each[0])} to {show(each[1])}" if isinstance(each, list | tuple) and len(each) == 2 else show(each)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _times(seconds: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(step, time) in the order they were first done, then all of them together."""
    known = {step: each for step, each in seconds.items() if isinstance(each, int | float)}
    rows = [(show(step), duration(each)) for step, each in known.items()]
    return [*rows, ("together", duration(sum(known.values())))] if len(rows) > 1 else rows


def _versions() -> tuple[tuple[str, str], ...]:
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)
