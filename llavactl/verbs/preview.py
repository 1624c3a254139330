"""Previews during training (``preview_every``): answers about held-out images, and a model to chat with.

Each question is asked about its image and about another one: a model that ignores images gives the same answer twice.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.paths import json_text, write_atomic
from llavactl.core.program import command_line
from llavactl.core.registry import registry
from llavactl.core.schema import Question, Turn
from llavactl.evaluation.periodic import FixedFeatures
from llavactl.features import LiveFeatures
from llavactl.features.checked_encoder import load_encoder
from llavactl.model.folder import preview_folder
from llavactl.model.generate import Sampling
from llavactl.report.examples import example
from llavactl.report.optional import optional_output
from llavactl.report.page import report_page, write_report
from llavactl.training.collective import on_main
from llavactl.training.sample_answers import answers_file, shown_samples
from llavactl.training.sharding import root_gathered

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.core.schema import ImageRef, Sample
    from llavactl.data.split import DataSplit
    from llavactl.features import FeatureReader
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import TrainingStage
    from llavactl.training.run import Run

log = logging.getLogger(__name__)

QUESTIONS = 6
MAX_NEW_TOKENS = 24
SHOWN_CHARACTERS = 60
"""Of an answer in the log line."""

FOLDER = "preview"


@dataclass(frozen=True)
class ContrastedQuestion:
    """A question about an image, and another image for the same question, with its reference answer if known."""

    question: Question
    other: ImageRef
    other_reference: str = ""

    def conversations(self) -> tuple[tuple[Turn, ...], tuple[Turn, ...]]:
        """The question about its own image, and about the other one."""
        turns = self.question.turns
        return turns, tuple(
            replace(turn, content=tuple(part if isinstance(part, str) else self.other for part in turn.content))
            for turn in turns
        )


@dataclass
class AnswerPreview:
    """Shows the answers of ``assistant``, the model in training; see ``training.run.Preview``.

    ``save(run, folder)`` writes the model as it is.
    """

    assistant: Assistant
    questions: Sequence[ContrastedQuestion]
    save: Callable[[Run, Path], None]
    run_dir: Path

    def __post_init__(self) -> None:
        self._number = count()
        self._announced = False

    def show(self, run: Run, step: int) -> None:
        """Logs one answer, adds all to the report page and saves the model; all processes call this together."""
        with root_gathered(self.assistant.model):
            answers = self._answers() if run.accelerator.is_main_process or run.placement.sharded else []
        folder = preview_folder(run.folder)
        self.save(run, folder)
        on_main(lambda: self._publish(run, step, answers, folder))

    def _answers(self) -> list[tuple[str, str]]:
        """For each question the answers about its own image and about the other one."""
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
        pairs = (self.assistant.answer(each.conversations(), sampling) for each in self.questions)
        return [(own, other) for own, other in pairs]

    def _publish(self, run: Run, step: int, answers: Sequence[tuple[str, str]], folder: Path) -> None:
        file = answers_file(run.folder, step, FOLDER)
        rows = [self._row(file.parent, *each) for each in zip(self.questions, answers, strict=True)]
        with optional_output(file):
            write_atomic(file, json_text(rows, indent=2))
        with optional_output(report_page(self.run_dir)):
            write_report(self.run_dir)
        if rows:
            row = rows[next(self._number) % len(rows)]
            log.info("%s after step %d: %s", run.folder.name, step, _line(row))
        if not self._announced:
            self._announced = True
            image = ["--image", rows[0]["file"]] if rows and rows[0]["file"] else []
            log.info(
                "%s: chat with the newest weights while training continues: %s",
                run.folder.name,
                command_line("chat", "--model", str(folder), *image),
            )

    def _row(self, folder: Path, asked: ContrastedQuestion, answers: tuple[str, str]) -> dict[str, str]:
        own, other = answers
        row = example(folder, asked.question.turns, asked.question.reference, own)
        return {**row, "blind": other, "other_image": asked.other.name, "other_reference": asked.other_reference}


def preview(
    recipe: Recipe,
    stage: TrainingStage,
    features: FeatureReader,
    assistant: Callable[[FixedFeatures], Assistant],
    data: DataSplit,
    save: Callable[[Run, Path], None],
    device: str,
) -> AnswerPreview | None:
    """The preview of ``stage``, with its images encoded on ``device``; None unless ``preview_every`` is set.

    Its questions are those of the recipe's first task with images, else the validation samples, else training samples.

    Raises:
        LlavactlError: a task or an image can't be read.
    """
    if stage.settings.preview_every is None:
        return None
    questions = contrasted(_task_questions(recipe), QUESTIONS)
    stored: FeatureReader | LiveFeatures = features
    if not questions:
        questions = contrasted(map(_as_question, shown_samples(data, 4 * QUESTIONS)), QUESTIONS)
    elif not isinstance(features, LiveFeatures):
        encoder = load_encoder(registry().create("vision", stage.vision), device, recipe.features.compute)
        stored = LiveFeatures(encoder, features.fingerprint, device)
    images = {image for each in questions for turns in each.conversations() for turn in turns for image in turn.images}
    arrays = {image: stored.arrays(image) for image in sorted(images, key=lambda image: image.name)}
    return AnswerPreview(assistant(FixedFeatures(arrays)), questions, save, recipe.run_dir)


def remove_preview(run_folder: Path) -> None:
    """Removes the model of the previews of a stage that is finished: it has a newer one."""
    shutil.rmtree(preview_folder(run_folder), ignore_errors=True)


def contrasted(questions: Iterable[Question], limit: int) -> list[ContrastedQuestion]:
    """Up to ``limit`` of ``questions`` about one image, each with the image of another question.

    Preferred are, for each category, two questions with the same text and different reference answers: then the answer
    about the other image can be checked as well.
    """
    usable = [each for each in questions if sum(len(turn.images) for turn in each.turns) == 1]
    by_text: dict[tuple[str, ...], list[Question]] = defaultdict(list)
    for question in usable:
        by_text[tuple(turn.text for turn in question.turns)].append(question)
    paired: dict[str, ContrastedQuestion] = {}
    for first, *others in by_text.values():
        different = next((each for each in others if each.reference != first.reference), None)
        if different is not None and _image(different) != _image(first):
            paired.setdefault(first.category, ContrastedQuestion(first, _image(different), different.reference))
    chosen = list(paired.values())
    for question, other in zip(usable, usable[1:] + usable[:1], strict=True):
        if question.category not in paired and _image(question) != _image(other):
            chosen.append(ContrastedQuestion(question, _image(other)))
    return chosen[:limit]


def _image(question: Question) -> ImageRef:
    (image,) = (image for turn in question.turns for image in turn.images)
    return image


def _task_questions(recipe: Recipe) -> list[Question]:
    """The questions of the recipe's first task that has questions about an image."""
    for spec in recipe.eval.tasks:
        task: Any = registry().create("tasks", spec.spec())
        if contrasted(questions := list(task.questions()), 1):
            return questions
    return []


def _as_question(sample: Sample) -> Question:
    """The first question of ``sample``; its turns end before the first answer."""
    first_answer = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
    return Question(sample.id, sample.turns[:first_answer], sample.turns[first_answer].text)


def _line(row: dict[str, str]) -> str:
    """A question with the answers about both images on one line."""
    known = f" (reference: {_short(row['other_reference'])})" if row["other_reference"] else ""
    return (
        f'"{_short(row["question"])}" {Path(row["image"]).name}: "{_short(row["answer"])}" (reference: '
        f'{_short(row["reference"])}); {Path(row["other_image"]).name}: "{_short(row["blind"])}"{known}'
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"
