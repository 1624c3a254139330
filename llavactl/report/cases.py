"""What a model got wrong, beside the pictures: a page and a Markdown file of the worst answers and of some of all."""

from __future__ import annotations

import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.paths import write_atomic
from llavactl.report.examples import example
from llavactl.report.figures import Table
from llavactl.report.page import about, sample_answer, tables
from llavactl.report.templates import template

if TYPE_CHECKING:
    from llavactl.core.protocols import Scores
    from llavactl.core.schema import Answer, Question

SHOWN = 24
"""Cases of each group."""


def write_cases(
    folder: Path,
    report: Mapping[str, Any],
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    scored: Scores,
) -> Path:
    """Writes ``folder/TASK.html`` and ``folder/TASK.md`` of a scored task; returns the page's path.

    ``report`` is the task's ``--json`` document. The same answers give the same cases.
    """
    name = str(report["task"])
    grades = scored.grades or {each: float(right) for each, right in scored.right.items()}
    groups = [("The worst answers", _worst(questions, grades)), ("Some of all answers", _some(questions))]
    rows = [(title, [_row(folder / name, each, answers, grades) for each in group]) for title, group in groups]
    page = template("cases.html").render(
        name=name,
        about=about(report),
        tables=tables(report),
        groups=[(title, [sample_answer(row) for row in group]) for title, group in rows],
    )
    write_atomic(folder / f"{name}.md", _markdown(folder, report, rows))
    write_atomic(folder / f"{name}.html", page)
    return folder / f"{name}.html"


def _worst(questions: Sequence[Question], grades: Mapping[str, float]) -> list[Question]:
    """Those of the lowest grades below 1; among equals chance decides, or all would be about the first pictures."""
    wrong = [each for each in questions if grades.get(each.id, 1.0) < 1]
    random.Random(0).shuffle(wrong)
    return sorted(wrong, key=lambda each: grades[each.id])[:SHOWN]


def _some(questions: Sequence[Question]) -> list[Question]:
    return random.Random(1).sample(list(questions), min(SHOWN, len(questions)))


def _row(
    folder: Path, question: Question, answers: Mapping[str, Answer], grades: Mapping[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = dict(example(folder, question.turns, question.reference, answers[question.id].text))
    return row | {"id": question.id} | ({"right": grades[question.id] >= 1} if question.id in grades else {})


def _markdown(
    folder: Path, report: Mapping[str, Any], groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> str:
    lines = [f"# {_plain(str(report['task']))}", "", _plain(about(report)), ""]
    for table in tables(report):
        lines += [*_table(table), ""]
    for title, rows in groups:
        if rows:
            lines += [f"## {title}", ""]
        for row in rows:
            lines += [f"### {_plain(row['id'])}", ""]
            if row["file"]:
                lines += [f"![](<{Path(row['file']).relative_to(folder).as_posix()}>)", ""]
            elif row["image"]:
                lines += [f"Picture: {_plain(row['image'])}", ""]
            told = ("Question", "question"), ("Answer", "answer"), ("In the data", "reference")
            lines += [line for label, key in told if row[key] for line in (f"{label}:", "", _quote(row[key]), "")]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    rows = [("", *table.columns), *((row.name, *row.cells) for row in table.rows)]
    head, *rest = ["| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *rest]


def _plain(text: str) -> str:
    """Text that others wrote, without a line end and without markup of HTML."""
    return html.escape(" ".join(text.split()), quote=False)


def _quote(text: str) -> str:
    """A block of text as it is: whatever marks it holds are its own, and none is Markdown's."""
    return "\n".join(f"    {line}" for line in text.splitlines())
