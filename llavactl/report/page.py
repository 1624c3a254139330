"""report.html: a self-contained page about a run, without scripts or network.

It shows the results in the run folder so far. All text comes from untrusted data: the template escapes every value,
images must be data URIs, and the content security policy forbids the browser to load anything.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llavactl.core.paths import write_atomic
from llavactl.core.processes import is_main_process
from llavactl.files.eval_result import read_eval_result
from llavactl.model.folder import PREVIEW
from llavactl.report.figures import MISSING, Row, Table, duration, score_tables, show
from llavactl.report.inputs import read_document, read_objects, read_recipe
from llavactl.report.optional import optional_output
from llavactl.report.plots import DARK, LIGHT, PLOTS_MISSING, draw_loss, plots_available
from llavactl.report.templates import template
from llavactl.report.thumbnails import data_uri, safe_image

TIMES = "times.json"
"""A file of the run folder with the seconds of each step, written by ``llavactl run``."""

REFRESH_SECONDS = 20
"""The browser reloads the page of a run that this process continues."""

SHOWN_SKIPPED = 20
SHOWN_EVALUATIONS = 5
STAGES = (
    ("stage1", "Stage 1", "train the connector, language model frozen"),
    ("stage2", "Stage 2", "fine-tune connector and language model"),
)
TILES = (("steps", "steps"), ("samples", "samples"), ("loss", "final loss"), ("val_loss", "validation loss"))
PACKAGES = ("llavactl", "torch", "transformers")


_refreshed: ContextVar[bool] = ContextVar("refreshed", default=False)


@contextmanager
def refreshed(run_dir: Path) -> Iterator[None]:
    """In this context, browsers reload the page of ``run_dir``; at the end it is written without that."""
    token = _refreshed.set(True)
    try:
        yield
    finally:
        _refreshed.reset(token)
        if not _refreshed.get() and is_main_process() and report_page(run_dir).exists():
            with optional_output(report_page(run_dir)):
                write_report(run_dir)


@dataclass(frozen=True)
class WordMap:
    """Overlays (data URIs) of the image for one word of an answer; ``attention`` is "" if there is none."""

    word: str
    attention: str
    occlusion: str


@dataclass(frozen=True)
class SampleAnswer:
    """A question with its reference answer and the model's answer.

    ``right`` is the task's verdict, or else whether both answers have the same words. ``blind`` is the answer of the
    shuffled-image baseline, or about another image, whose reference answer is ``other_reference``.
    """

    image: str
    thumbnail: str
    question: str
    reference: str
    answer: str
    right: bool
    blind: str = ""
    other_reference: str = ""
    maps: tuple[WordMap, ...] = ()


@dataclass(frozen=True)
class StageView:
    """A training stage on the page.

    ``curves`` are the loss curves for light and dark backgrounds as data URIs, empty before the first step or without
    matplotlib. ``facts`` are all fields of the stage's report. ``evaluations`` are the scores by step during training,
    ``progress_answers`` and ``preview_answers`` the answers to the same questions by step, ``previews`` those of the
    newest preview.
    """

    title: str
    purpose: str
    curves: tuple[str, str]
    tiles: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    answers: tuple[SampleAnswer, ...]
    evaluations: tuple[Table, ...]
    progress_answers: tuple[Table, ...]
    preview_answers: tuple[Table, ...]
    preview_step: str
    previews: tuple[SampleAnswer, ...]
    held_out: bool
    finished: bool
    step: str


@dataclass(frozen=True)
class TaskView:
    """An evaluated task; ``cases`` is the relative URL of its page of cases, or ""."""

    name: str
    about: str
    tables: tuple[Table, ...]
    answers: tuple[SampleAnswer, ...]
    cases: str


def write_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` from the results in ``run_dir`` so far; returns its path."""
    text, recipe = read_recipe(run_dir)
    skipped = read_objects(run_dir / "skipped.jsonl")
    can_plot = plots_available()
    stages = [view for stage in STAGES if (view := _stage(run_dir, *stage, can_plot=can_plot))]
    page = template("page.html").render(
        name=show(recipe.get("name") or run_dir.absolute().name),
        refresh_seconds=REFRESH_SECONDS if _refreshed.get() else 0,
        components=_components(recipe),
        stages=stages,
        plots_missing="" if can_plot else PLOTS_MISSING,
        tasks=[_task(file) for file in sorted((run_dir / "eval").glob("*.json"))],
        skipped=[(show(row.get("image")), show(row.get("reason"))) for row in skipped[:SHOWN_SKIPPED]],
        skipped_count=len(skipped),
        times=_times(read_document(run_dir / TIMES)),
        try_next=[show(line) for line in _list(recipe.get("try_next"))],
        versions=_versions(),
        recipe=text,
    )
    path = report_page(run_dir)
    write_atomic(path, page)
    return path


def report_page(run_dir: Path) -> Path:
    """The file that ``write_report`` writes."""
    return run_dir / "report.html"


def _components(recipe: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """(kind, name, model) of vision encoder, connector and language model."""
    specs = [(kind, recipe.get(kind)) for kind in ("vision", "connector", "language")]
    return tuple(
        (kind, show(spec.get("name")), Path(str(spec.get("model") or "")).name)
        for kind, spec in specs
        if isinstance(spec, Mapping)
    )


def _stage(run_dir: Path, folder: str, title: str, purpose: str, *, can_plot: bool) -> StageView | None:
    """The stage in ``folder``; None before its first step or preview."""
    metrics = run_dir / folder / "metrics.jsonl"
    report = read_document(run_dir / folder / "report.json")
    lines = read_objects(metrics)
    preview_step, previews = _newest_preview(run_dir / folder / PREVIEW)
    if not report and not lines and not previews:
        return None
    seconds = [("time", duration(report["seconds"]))] if "seconds" in report else []
    speed = [("tokens per second", show(report["tokens_per_s"]))] if "tokens_per_s" in report else []
    speed += [("MFU", f"{report['mfu']:.1%}")] if isinstance(report.get("mfu"), float) else []
    curves = ("", "")
    if lines and can_plot:
        curves = (data_uri(draw_loss(metrics, LIGHT), "png"), data_uri(draw_loss(metrics, DARK), "png"))
    return StageView(
        title=title,
        purpose=purpose,
        curves=curves,
        tiles=(*((label, show(report[key])) for key, label in TILES if report.get(key) is not None), *seconds, *speed),
        facts=tuple(
            (key.replace("_", " "), show(value)) for key, value in report.items() if not isinstance(value, dict)
        ),
        answers=tuple(map(sample_answer, read_objects(run_dir / folder / "samples.json"))),
        evaluations=_evaluations(lines),
        progress_answers=_progress_answers(run_dir / folder / "samples"),
        preview_answers=_progress_answers(run_dir / folder / PREVIEW),
        preview_step=preview_step,
        previews=previews,
        held_out=bool(report.get("validation_samples")),
        finished=bool(report),
        step=show(max((line["step"] for line in lines if isinstance(line.get("step"), int)), default=0)),
    )


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> tuple[Table, ...]:
    """The scores of the evaluations in metrics.jsonl, one row per step."""
    scored = {line.get("step"): line["scores"] for line in lines if isinstance(line.get("scores"), dict)}
    names = tuple(dict.fromkeys(name for scores in scored.values() for name in scores))
    rows = [Row(f"step {show(step)}", tuple(show(each.get(name)) for name in names)) for step, each in scored.items()]
    return (Table(names, tuple(rows)),) if names else ()


def _progress_answers(folder: Path) -> tuple[Table, ...]:
    """The answers during training, one row per question and one column for each of the last evaluations."""
    files = sorted(folder.glob("step-*.json"))[-SHOWN_EVALUATIONS:]
    by_step = {f"step {_step(file)}": read_objects(file) for file in files}
    evaluations = {step: rows for step, rows in by_step.items() if rows}
    rows = [
        Row(show(samples[0].get("question")), tuple(show(row.get("answer")) for row in samples))
        for samples in zip(*evaluations.values(), strict=False)
    ]
    return (Table(tuple(evaluations), tuple(rows)),) if rows else ()


def _newest_preview(folder: Path) -> tuple[str, tuple[SampleAnswer, ...]]:
    """The step and the answers of the newest preview."""
    files = sorted(folder.glob("step-*.json"))
    return (_step(files[-1]), tuple(map(sample_answer, read_objects(files[-1])))) if files else ("", ())


def _step(file: Path) -> str:
    """The step in the name of a file with answers."""
    return file.stem.removeprefix("step-").lstrip("0") or "0"


def sample_answer(row: Mapping[str, Any]) -> SampleAnswer:
    """A row of ``report.examples`` for the page."""
    reference, answer = (show(row.get(key)).strip() for key in ("reference", "answer"))
    return SampleAnswer(
        image=show(row.get("image")),
        thumbnail=safe_image(row.get("thumbnail")),
        question=show(row.get("question")),
        reference=reference,
        answer=answer,
        right=bool(row["right"]) if "right" in row else _words(reference) == _words(answer) != MISSING,
        blind=show(row["blind"]) if "blind" in row else "",
        other_reference=show(row["other_reference"]) if row.get("other_reference") else "",
        maps=tuple(
            WordMap(show(each.get("word")), safe_image(each.get("attention")), safe_image(each.get("occlusion")))
            for each in _list(row.get("maps"))
            if isinstance(each, Mapping)
        ),
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
        cases=quote(cases.as_posix()) if (file.parents[1] / cases).is_file() else "",
    )


def about(report: Mapping[str, Any]) -> str:
    """A one-line summary of a task: number of questions, failed questions, protocol."""
    counts = ("n", "questions"), ("failed", "failed")
    facts = [f"{show(report[key])} {label}" for key, label in counts if report.get(key)]
    return " · ".join([*facts, f"protocol {show(report['protocol'])}"] if report.get("protocol") else facts)


def tables(report: Mapping[str, Any]) -> tuple[Table, ...]:
    """The scores of a task, with confidence intervals and baselines as columns."""
    return score_tables(_with_baselines(report))


def _with_baselines(report: Mapping[str, Any]) -> dict[str, Any]:
    """The scores, with confidence intervals and the same scores of baselines as groups."""
    scores, intervals, baselines = (_mapping(report.get(key)) for key in ("scores", "interval", "baselines"))
    scalars = {name: value for name, value in scores.items() if not isinstance(value, Mapping)}
    interval = {name: _range(value) for name, value in intervals.items() if name in scalars}
    columns = {
        baseline: {name: value for name, value in _mapping(values).items() if name in scalars}
        for baseline, values in baselines.items()
    }
    return {**scalars, "95 % interval": interval, **scores, **columns}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _range(interval: Any) -> str:
    match interval:
        case [int() | float() as low, int() | float() as high]:  # rounded: a bound near 0 is not 1e-15
            return f"{show(round(low, 1))} to {show(round(high, 1))}"
    return show(interval)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _times(seconds: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(step, time) in the order of the first run, then the total."""
    known = {step: time for step, time in seconds.items() if isinstance(time, int | float)}
    rows = [(show(step), duration(time)) for step, time in known.items()]
    return [*rows, ("total", duration(sum(known.values())))] if len(rows) > 1 else rows


def _versions() -> tuple[tuple[str, str], ...]:
    versions = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            versions.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(versions)
