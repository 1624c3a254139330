"""One runner for every task: ask in batches, keep each answer as it comes, score."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.errors import DataError
from llavactl.core.paths import write_atomic
from llavactl.core.registry import suggest
from llavactl.core.schema import Answer, Question
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    from llavactl.core.protocols import Scores, Task
    from llavactl.evaluation.views import View


def ask(
    view: View, questions: Sequence[Question], batch_size: int, max_new_tokens: int, file: Path
) -> dict[str, Answer]:
    """Asks every question that has no answer in ``file`` (JSONL) yet; each answer goes there as it comes."""
    answers = read_answers(file, cut=True) if file.is_file() else {}
    wanted = [question for question in questions if question.id not in answers]
    if not wanted:
        return answers
    assistant = view.open(questions)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    # What a kill cut short is left behind: the file holds the answers we know, then the new ones.
    write_atomic(file, "".join(_line(answer) for answer in answers.values()))
    with (
        file.open("a", encoding="utf-8") as out,
        progress.bar(len(questions), f"eval {view.name}".strip(), "question", len(answers)) as bar,
    ):
        for asked in _batches(wanted, batch_size):
            texts = assistant.answer([question.turns for question in asked], sampling)
            for question, text in zip(asked, texts, strict=True):
                answers[question.id] = Answer(question.id, text)
                out.write(_line(answers[question.id]))
            out.flush()
            bar.show(len(asked))
    return answers


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions about the same picture together, as they read it once; the others as they come."""
    by_image: dict[object, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[tuple(image for turn in question.turns for image in turn.images)].append(question)
    groups = list(by_image.values())
    alone = [question for group in groups if len(group) == 1 for question in group]
    for group in (*(group for group in groups if len(group) > 1), alone):
        for at in range(0, len(group), size):
            yield group[at : at + size]


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"


def read_answers(file: Path, *, cut: bool = False) -> dict[str, Answer]:
    """Answers by question id, from a JSONL of ``{"id" or "question_id", "text"}``; with ``cut`` a last line may be.

    Raises:
        DataError: a line that isn't one, or a question answered twice.
    """
    answers: dict[str, Answer] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}", hint="answers are JSONL, a line an answer") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            answer = _answer(line, f"{file}:{number}")
        except DataError:
            if cut and number == len(lines):
                break
            raise
        if answer.id in answers:
            raise DataError(f"{file}:{number}: question {answer.id!r} is answered twice")
        answers[answer.id] = answer
    return answers


def _answer(line: str, where: str) -> Answer:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if isinstance(record, dict):
        name = record.get("id", record.get("question_id"))
        if name is not None and isinstance(record.get("text"), str):
            return Answer(str(name), record["text"])
    raise DataError(f'{where}: an answer is {{"id": …, "text": …}}')


def score(
    task: Task, questions: Iterable[Question], answers: Mapping[str, Answer], protocol: str | None
) -> tuple[str, Scores]:
    """(protocol, scores); answers beyond the questions are ignored.

    Raises:
        DataError: a question without an answer, or an unknown protocol.
    """
    chosen = protocol or task.protocols[0]
    if chosen not in task.protocols:
        raise DataError(f"no protocol {chosen!r} for this task", hint=suggest(chosen, task.protocols))
    ids = [question.id for question in questions]
    missing = [name for name in ids if name not in answers]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(ids)} questions have no answer, the first is {missing[0]!r}",
            hint="are these the answers to this task's questions?",
        )
    return chosen, task.score({name: answers[name] for name in ids}, chosen)
