"""One runner for every task: ask in batches, keep each answer as it comes, score."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core import progress
from llavactl.core.errors import DataError
from llavactl.core.paths import exclusive_lock, json_text, write_atomic
from llavactl.core.schema import Answer, Question
from llavactl.core.suggest import suggest
from llavactl.evaluation.answers import read_answers
from llavactl.evaluation.processes import ALONE, Processes
from llavactl.features.keys import error_reason
from llavactl.images.decode import ImageError, inspect
from llavactl.images.image_file import ImageFile
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    from llavactl.core.protocols import Scores, Task
    from llavactl.evaluation.views import View


def ask(
    view: View,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    file: Path,
    limit: int | None = None,
    among: Processes = ALONE,
) -> dict[str, Answer]:
    """Asks the first ``limit`` questions that have no answer in ``file`` (JSONL) yet; each goes there as it comes.

    All questions are given, so that a view is the same however many of them are asked. Several processes ask a share
    each, into a file of its own that becomes part of ``file`` at the end, or at the beginning of the next time.

    Raises:
        DataError: a picture can't be read, or somebody else asks into ``file``.
    """
    busy = DataError(f"another process is writing {file}", hint="wait until it has finished")
    with exclusive_lock(file.with_name(f".{file.name}.lock"), busy) if among.first else nullcontext():
        answers = _gathered(file, among)
        wanted = [question for question in questions[:limit] if question.id not in answers]
        if not wanted:
            return answers
        total = len(questions[:limit])
        _refuse_unreadable(wanted)
        assistant = view.open(questions)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        file.parent.mkdir(parents=True, exist_ok=True)
        share = list(_batches(wanted, batch_size))[among.rank :: among.count]
        with (
            (file if among.count == 1 else _part(file, among.rank)).open("a", encoding="utf-8") as out,
            progress.bar(total, f"eval {view.name}".strip(), "question", total - len(wanted)) as bar,
        ):
            for asked in share:
                texts = assistant.answer([question.turns for question in asked], sampling)
                for question, text in zip(asked, texts, strict=True):
                    answers[question.id] = Answer(question.id, text)
                    out.write(_line(answers[question.id]))
                out.flush()
                bar.advance(len(asked))
        return answers if among.count == 1 else _gathered(file, among)


def _gathered(file: Path, among: Processes) -> dict[str, Answer]:
    """All answers there are, in ``file`` and in what processes, of now or before, have left beside it.

    What a kill cut short is left behind: afterwards ``file`` holds whole answers alone, and nothing is beside it.
    """
    among.meet()
    if among.first:
        parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.*.part"))
        found: dict[str, Answer] = {}
        for each in (file, *parts):
            if each.is_file():
                found |= read_answers(each, cut=True)
        if found:
            write_atomic(file, "".join(_line(answer) for answer in found.values()))
        for each in parts:
            each.unlink()
    among.meet()
    return read_answers(file) if file.is_file() else {}


def _part(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.name}.{rank}.part")


def _refuse_unreadable(questions: Sequence[Question]) -> None:
    """Raises an error before any work if an image can't be read: a score without it would not be comparable."""
    images = dict.fromkeys(image for each in questions for turn in each.turns for image in turn.images)
    missing: list[str] = []
    for image in images:
        try:
            if isinstance(image, ImageFile):
                inspect(image, whole=False)
            else:  # the check would have to read it completely
                image.stamp()
        except OSError as error:
            missing.append(f"{image.name}: {error_reason(error)}")
        except ImageError as error:
            missing.append(f"{image.name}: {error.reason}")
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} pictures can't be read, the first is {missing[0]}",
            hint="-t images=FOLDER, where the task takes it, names their folder",
        )


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
    return json_text({"id": answer.id, "text": answer.text}) + "\n"


def score(
    task: Task, questions: Iterable[Question], answers: Mapping[str, Answer], protocol: str, file: Path | None = None
) -> Scores:
    """The scores of the answers to ``questions``, read from ``file``; those beyond them are ignored.

    Raises:
        DataError: a question without an answer, or no question at all.
    """
    return task.score(chosen(questions, answers, file), protocol)


def chosen(questions: Iterable[Question], answers: Mapping[str, Answer], file: Path | None = None) -> dict[str, Answer]:
    """The answers to ``questions``, in their order; what can't be scored is told as by ``score``."""
    ids = [question.id for question in questions]
    if not ids:
        raise DataError("this task has no questions", hint="is its file of questions empty?")
    missing = [name for name in ids if name not in answers]
    if missing:
        raise DataError(
            f"{f'{file}: ' if file else ''}{len(missing)} of {len(ids)} questions have no answer, the first is "
            f"{missing[0]!r}",
            hint="are these the answers to this task's questions? is the file cut?",
        )
    return {name: answers[name] for name in ids}


def choose(protocols: Sequence[str], wanted: str | None) -> str:
    """``wanted`` where it is one of ``protocols``, the first of them where nothing is.

    Raises:
        DataError: there is no such protocol.
    """
    if wanted is not None and wanted not in protocols:
        raise DataError(f"no protocol {wanted!r} for this task", hint=suggest(wanted, protocols))
    return wanted or protocols[0]
