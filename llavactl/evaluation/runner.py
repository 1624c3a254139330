"""Runs a model on the questions of a task, in batches, and stores each answer as soon as it is generated."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core import progress
from llavactl.core.errors import DataError
from llavactl.core.paths import exclusive_lock, json_text, write_atomic
from llavactl.core.schema import Answer, Question
from llavactl.evaluation.answers import read_answers
from llavactl.evaluation.processes import SINGLE_PROCESS, Processes
from llavactl.features.keys import error_reason
from llavactl.images.decode import ImageError, inspect
from llavactl.images.image_file import ImageFile
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef
    from llavactl.evaluation.models import EvaluatedModel
    from llavactl.recipe.sections import Eval


def answer_questions(
    model: EvaluatedModel,
    questions: Sequence[Question],
    limit: int | None,
    settings: Eval,
    file: Path,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Answer]:
    """The answers to the first ``limit`` questions; those already in ``file`` (JSONL) are not generated again.

    ``questions`` are all questions of the task: the shuffled-image baseline must not depend on ``limit``. Each process
    writes its answers to a part file, which is merged into ``file`` at the end, or by the next run after a kill.

    Raises:
        DataError: an image can't be read, a prompt exceeds the model's context, or another process is writing ``file``.
    """
    busy = DataError(f"another process is writing {file}", hint="wait until it has finished")
    with exclusive_lock(file.with_name(f".{file.name}.lock"), busy) if processes.is_main else nullcontext():
        answers = _merge_parts(file, processes)
        pending = [question for question in questions[:limit] if question.id not in answers]
        if not pending:
            return answers
        _check_images(pending)
        total = len(questions[:limit])
        loaded = model.load(questions, pending)
        sampling = Sampling(max_new_tokens=settings.max_new_tokens)
        file.parent.mkdir(parents=True, exist_ok=True)
        own_batches = list(question_batches(pending, settings.batch_size))[processes.rank :: processes.count]
        with (
            (file if processes.count == 1 else _part_file(file, processes.rank)).open("a", encoding="utf-8") as output,
            progress.bar(total, f"eval {model.name}".strip(), "question", total - len(pending), memory=True) as bar,
        ):
            for batch in own_batches:
                texts = loaded.answer([question.turns for question in batch], sampling)
                for question, text in zip(batch, texts, strict=True):
                    answers[question.id] = Answer(question.id, text)
                    output.write(_json_line(answers[question.id]))
                output.flush()
                bar.advance(len(batch))
        return answers if processes.count == 1 else _merge_parts(file, processes)


def copy_answers(file: Path, folders: Iterable[Path]) -> Path | None:
    """Copies the answers of another run to ``file``, unless it exists; returns the file that was copied, if any.

    It is in the first of ``folders`` that has one of this name, which contains a digest of the model and the questions.
    """
    others = [] if file.exists() else [folder / file.name for folder in folders]
    found = next((other for other in others if other.is_file()), None)
    if found is not None:
        write_atomic(file, found.read_bytes())
    return found


def _merge_parts(file: Path, processes: Processes) -> dict[str, Answer]:
    """Merges the part files of all processes, of this run or an interrupted one, into ``file``; returns its answers.

    Lines that a kill left incomplete are dropped.
    """
    processes.barrier()
    if processes.is_main:
        parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.*.part"))
        answers: dict[str, Answer] = {}
        for source in (file, *parts):
            if source.is_file():
                answers |= read_answers(source, truncated=True)
        if answers:
            write_atomic(file, "".join(_json_line(answer) for answer in answers.values()))
        for part in parts:
            part.unlink()
    processes.barrier()
    return read_answers(file) if file.is_file() else {}


def _part_file(file: Path, rank: int) -> Path:
    return file.with_name(f"{file.name}.{rank}.part")


def _json_line(answer: Answer) -> str:
    return json_text({"id": answer.id, "text": answer.text}) + "\n"


def _check_images(questions: Sequence[Question]) -> None:
    """Raises DataError if an image can't be read: a score over the other questions would not be comparable."""
    images = dict.fromkeys(image for question in questions for turn in question.turns for image in turn.images)
    unreadable: list[str] = []
    for image in images:
        try:
            if isinstance(image, ImageFile):
                inspect(image, whole=False)
            else:  # inspecting it would read it completely
                image.stamp()
        except OSError as error:
            unreadable.append(f"{_path(image)}: {error_reason(error)}")
        except ImageError as error:
            unreadable.append(f"{_path(image)}: {error.reason}")
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(images)} images can't be read, the first is {unreadable[0]}",
            hint="if the task has the option `images`, set the folder: -t images=FOLDER",
        )


def _path(image: ImageRef) -> str:
    return str(image.file) if isinstance(image, ImageFile) else image.name


def question_batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Batches of questions: first groups that share an image, which is encoded once per batch; then the others."""
    by_image: dict[object, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[tuple(image for turn in question.turns for image in turn.images)].append(question)
    groups = list(by_image.values())
    single = [question for group in groups if len(group) == 1 for question in group]
    for group in (*(group for group in groups if len(group) > 1), single):
        for start in range(0, len(group), size):
            yield group[start : start + size]
