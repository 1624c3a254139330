"""Pages of evaluated cases, in HTML and Markdown: the worst answers and a random sample, with their images."""

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
"""Cases per group."""


def write_cases(
    folder: Path,
    report: Mapping[str, Any],
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    scored: Scores,
) -> Path:
    """Writes ``folder/TASK.html`` and ``folder/TASK.md`` of an evaluated task; returns the path of the HTML page.

    ``report`` is the task's ``--json`` document. The selection is deterministic.
    """
    name = str(report["task"])
    grades = scored.by_question
    groups = [("Worst answers", _worst(questions, grades)), ("Random answers", _random(questions))]
    rows = [(title, [_row(folder / name, case, answers, grades) for case in group]) for title, group in groups]
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
    """The questions with the lowest grades below 1; ties are shuffled, or all would be about the first images."""
    wrong = [question for question in questions if grades.get(question.id, 1.0) < 1]
    random.Random(0).shuffle(wrong)
    return sorted(wrong, key=lambda question: grades[question.id])[:SHOWN]


def _random(questions: Sequence[Question]) -> list[Question]:
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
                lines += [f"Image: {_plain(row['image'])}", ""]
            parts = ("Question", "question"), ("Answer", "answer"), ("Reference", "reference")
            lines += [line for label, key in parts if row[key] for line in (f"{label}:", "", _indented(row[key]), "")]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    rows = [("", *table.columns), *((row.name, *row.cells) for row in table.rows)]
    head, *rest = ["| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *rest]


def _plain(text: str) -> str:
    """Untrusted text in one line, with HTML escaped."""
    return html.escape(" ".join(text.split()), quote=False)


def _indented(text: str) -> str:
    """``text`` as a Markdown code block, in which no character is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines())
