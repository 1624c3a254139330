"""Previews during training (``preview_every``): answers about images, and a model to chat with.

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
from typing import TYPE_CHECKING

from llavactl.core.locations import shown_path
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.plugin_faults import described
from llavactl.core.program import command_line
from llavactl.core.registry import registry
from llavactl.core.schema import Question, Turn
from llavactl.evaluation.periodic import FixedFeatures
from llavactl.model.folder import PREVIEW, preview_model
from llavactl.model.generate import Sampling
from llavactl.recipe.stages import STAGES
from llavactl.report.examples import example
from llavactl.report.optional import optional_output
from llavactl.report.page import report_page, write_report
from llavactl.training.collective import on_main, together
from llavactl.training.sample_answers import answers_file, shown_samples
from llavactl.training.sharding import root_gathered
from llavactl.verbs.evaluate_every import live_features

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.core.schema import ImageRef, Sample
    from llavactl.data.split import DataSplit
    from llavactl.features import FeatureReader
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber, TrainingStage
    from llavactl.training.run import Run

log = logging.getLogger(__name__)

QUESTIONS = 6
MAX_NEW_TOKENS = 24
SHOWN_CHARACTERS = 80
"""Of a question or an answer in the log line."""

Answers = Sequence[tuple[str, str]]
"""For each question, the answers about its own image and about the other one."""


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

    def answers(self, run: Run) -> Answers:
        """The main process answers; if the model is sharded, all processes answer together."""
        with root_gathered(self.assistant.model):
            return self._answers() if run.placement.sharded else on_main(self._answers)

    def _answers(self) -> Answers:
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
        pairs = (self.assistant.answer(each.conversations(), sampling) for each in self.questions)
        return [(own, other) for own, other in pairs]

    def publish(self, run: Run, step: int, answers: Answers) -> None:
        """Logs one of ``answers``, adds all to the report page, and saves the model."""
        self.save(run, preview_model(run.folder))
        on_main(lambda: self._publish(run, step, answers))

    def _publish(self, run: Run, step: int, answers: Answers) -> None:
        file = answers_file(run.folder, step, PREVIEW)
        rows = [self._row(file.parent, *each) for each in zip(self.questions, answers, strict=True)]
        with optional_output(file):
            write_atomic(file, json_text(rows, indent=2))
        with optional_output(report_page(self.run_dir)):
            write_report(self.run_dir)
        number = next(self._number)
        row = rows[number % len(rows)]
        log.info("%s after step %d: %s", run.folder.name, step, _line(row))
        if not number:
            image = ["--image", shown_path(Path(row["file"]))] if row["file"] else []
            command = command_line("chat", "--model", shown_path(preview_model(run.folder)), *image)
            log.info("%s: chat with the newest weights while it trains: %s", run.folder.name, command)

    def _row(self, folder: Path, asked: ContrastedQuestion, answers: tuple[str, str]) -> dict[str, str]:
        own, other = answers
        row = example(folder, asked.question.turns, asked.question.reference, own)
        return {**row, "blind": other, "other_image": asked.other.name, "other_reference": asked.other_reference}


def preview(
    recipe: Recipe,
    stage: TrainingStage,
    features: FeatureReader,
    data: DataSplit,
    device: str,
    assistant: Callable[[FixedFeatures], Assistant],
    save: Callable[[Run, Path], None],
) -> AnswerPreview | None:
    """The preview of ``stage``, with its images encoded on ``device``.

    Its questions are those of the recipe's first task with images, else the validation samples, else training samples.
    None unless ``preview_every`` is set, or, with a warning, if no question about two images can be read.
    """
    if stage.settings.preview_every is None:
        return None
    previews: list[AnswerPreview] = []

    def prepare() -> None:
        questions = contrasted(_task_questions(recipe), QUESTIONS)
        encoder = live_features(recipe, stage, features, device) if questions else features
        questions = questions or contrasted(map(_as_question, shown_samples(data, 4 * QUESTIONS)), QUESTIONS)
        turns = [turn for each in questions for conversation in each.conversations() for turn in conversation]
        images = dict.fromkeys(image for turn in turns for image in turn.images)
        fixed = FixedFeatures({image: encoder.arrays(image) for image in images})
        if not questions:
            log.warning("stage%d: no previews: there are no questions about two images", stage.number)
        else:
            previews.append(AnswerPreview(assistant(fixed), questions, save, recipe.run_dir))

    try:
        together(prepare)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - in all processes; plugins may raise anything
        log.warning("stage%d: no previews: %s", stage.number, described(error))
    return next(iter(previews), None)


def remove_previews(run_dir: Path, stage: StageNumber) -> None:
    """Removes the models of the previews of ``stage`` and later ones: they are older than the weights of ``stage``."""
    for number, folder in STAGES.items():
        if number >= stage:
            shutil.rmtree(preview_model(run_dir / folder), ignore_errors=True)


def contrasted(questions: Iterable[Question], limit: int) -> list[ContrastedQuestion]:
    """Up to ``limit`` of ``questions`` about one image, each with the image of another question.

    First, for each category, two questions with the same text and different reference answers: then the answer about
    the other image can be checked as well.
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
    asked = {each.question.id for each in chosen}
    for question, other in zip(usable, usable[1:] + usable[:1], strict=True):
        if question.id not in asked and _image(question) != _image(other):
            known = [turn.text for turn in question.turns] == [turn.text for turn in other.turns]
            chosen.append(ContrastedQuestion(question, _image(other), other.reference if known else ""))
    return chosen[:limit]


def _image(question: Question) -> ImageRef:
    (image,) = (image for turn in question.turns for image in turn.images)
    return image


def _task_questions(recipe: Recipe) -> list[Question]:
    """The questions of the recipe's first task that has questions about an image."""
    for spec in recipe.eval.tasks:
        questions = list(registry().create("tasks", spec.spec()).questions())
        if any(turn.images for question in questions for turn in question.turns):
            return questions
    return []


def _as_question(sample: Sample) -> Question:
    """The first question of ``sample``; its turns end before the first answer."""
    first_answer = next(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
    return Question(sample.id, sample.turns[:first_answer], sample.turns[first_answer].text)


def _line(row: dict[str, str]) -> str:
    """A question with the answers about both images on one line."""
    answers = (
        (row["image"], row["answer"], row["reference"]),
        (row["other_image"], row["blind"], row["other_reference"]),
    )
    shown = (
        f'{Path(image).name}: "{_short(answer)}"' + (f" (reference: {_short(reference)})" if reference else "")
        for image, answer, reference in answers
    )
    return f'"{_short(row["question"])}" {"; ".join(shown)}'


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}…"
