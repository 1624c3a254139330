"""VQA and TextVQA: short answers, compared with those of ten people (arXiv 1505.00468, 1904.08920)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from llavactl.components.tasks.image_questions import (
    IMAGES_HELP,
    check_prompts,
    image_of,
    stored_prompt,
    unmatched_id,
    user_turn,
)
from llavactl.components.tasks.vqa_normalization import normalize_textvqa, normalize_vqa, one_line
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_document, unique
from llavactl.images.references import ImageRoot

HUMAN_ANSWERS = 10
SHORT_ANSWER = "Answer the question using a single word or phrase."
"""LLaVA-1.5's instruction for such questions."""


class VqaOptions(Options):
    """Options of the task ``vqa``."""

    questions: RecipePath = Field(description="VQA's questions (JSON): question_id, image_id, question")
    annotations: RecipePath = Field(description="VQA's annotations (JSON): question_id, answers, answer_type")
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False
    image: str = Field("COCO_val2014_{:012d}.jpg", description="file name of an image; {} stands for its image_id")


class TextVqaOptions(Options):
    """Options of the task ``textvqa``."""

    questions: RecipePath = Field(description="TextVQA_0.5.1_val.json: question_id, image_id, question, answers")
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False


@dataclass(frozen=True)
class VqaQuestion:
    """A question, its text without the instruction, and the answers of ten people."""

    question: Question
    text: str
    human_answers: tuple[str, ...]


class Vqa:
    """The task ``vqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("official",)

    def __init__(self, options: VqaOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        return (item.question for item in self._items)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """``accuracy`` over all questions and for each answer type, in percent."""
        return _scores(self._items, answers, vqa_grade)

    @cached_property
    def _items(self) -> list[VqaQuestion]:
        annotations = unique(_records(self.options.annotations, "annotations"), "question_id", what="annotation")
        questions = unique(_records(self.options.questions, "questions"), "question_id")
        if missing := [question_id for question_id in questions if question_id not in annotations]:
            raise DataError(
                f"{self.options.annotations}: {len(missing)} of {len(questions)} questions have no annotation, the "
                f"first is {missing[0]!r}",
                hint="check that these are the annotations of this question file",
            )
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        return [
            _item(
                question_id,
                record,
                annotations[question_id],
                root,
                self._file(record),
                _answer_type(annotations[question_id]),
            )
            for question_id, record in questions.items()
        ]

    def _file(self, record: Record) -> str:
        try:
            return self.options.image.format(int(record.name("image_id")))
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(
                f"{record.where}: the option image={self.options.image!r} is invalid for its image_id: {error}"
            ) from error


class TextVqa:
    """The task ``textvqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("official",)

    def __init__(self, options: TextVqaOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        return (item.question for item in self._items)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """``accuracy`` in percent."""
        return _scores(self._items, answers, textvqa_grade)

    def id_of(self, answer: Answer) -> str:
        """Finds the question by its text in the stored prompt: in LLaVA's answers, ``question_id`` is the image."""
        prompt = stored_prompt(answer)
        if answer.id in self._ids or not isinstance(prompt, str):
            return answer.id
        lines = re.split(r"\n|^ocr tokens: .*question: | short answer:", prompt.lower())
        matches = (self._ids_by_text[key] for line in lines if (key := (answer.id, line)) in self._ids_by_text)
        return next(matches, unmatched_id(answer, prompt))

    @cached_property
    def _ids(self) -> set[str]:
        return {item.question.id for item in self._items}

    @cached_property
    def _ids_by_text(self) -> Mapping[tuple[str, str], str]:
        """Question ids by image and text."""
        return {
            (record.name("image_id"), record.text("question").lower()): record.name("question_id")
            for record in _records(self.options.questions, "data")
        }

    @cached_property
    def _items(self) -> list[VqaQuestion]:
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        return [
            _item(question_id, record, record, root, f"{record.name('image_id')}.jpg", "")
            for question_id, record in unique(_records(self.options.questions, "data"), "question_id").items()
        ]


def vqa_grade(answer: str, human_answers: Sequence[str]) -> float:
    """VQA's official grade, 0 to 1. Answers are not normalized if all people gave the same answer."""
    answer, references = one_line(answer), [one_line(reference) for reference in human_answers]
    if len(set(references)) > 1:
        answer, references = normalize_vqa(answer), [normalize_vqa(reference) for reference in references]
    return soft_accuracy(references.count(answer), len(references))


def textvqa_grade(answer: str, human_answers: Sequence[str]) -> float:
    """TextVQA's official grade, 0 to 1."""
    references = [normalize_textvqa(reference) for reference in human_answers]
    return soft_accuracy(references.count(normalize_textvqa(answer)), len(references))


def soft_accuracy(agreeing: int, people: int) -> float:
    """min(1, agreeing / 3), averaged over all subsets that leave out one of the ``people``."""
    left_out_agrees, left_out_differs = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * left_out_agrees + (people - agreeing) * left_out_differs) / people


def _scores(
    items: Sequence[VqaQuestion], answers: Mapping[str, Answer], grade: Callable[[str, Sequence[str]], float]
) -> Scores:
    answered = {item.question.id: item for item in items if item.question.id in answers}
    check_prompts({question_id: item.text for question_id, item in answered.items()}, answers)
    grades = {
        question_id: grade(answers[question_id].text, item.human_answers) for question_id, item in answered.items()
    }
    by_category: dict[str, list[float]] = {}
    for question_id, item in answered.items():
        if item.question.category:
            by_category.setdefault(item.question.category, []).append(grades[question_id])
    scores: dict[str, Json] = {"accuracy": 100 * fmean(grades.values())}
    scores |= {category: 100 * fmean(values) for category, values in sorted(by_category.items())}
    failed = sum(not answers[question_id].text.strip() for question_id in grades)
    return Scores(scores, failed, grades=grades)


def _records(path: Path, key: str) -> list[Record]:
    """The objects in the list under ``key``, or in a file that is itself a list."""
    document: Any = read_document(path)
    items = document.get(key) if isinstance(document, dict) else document
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{path}: expected a list of objects in {key!r}")
    return [Record(f"{path} {key} {index}", item) for index, item in enumerate(items)]


def _answer_type(annotation: Record) -> str:
    return str(annotation.get("answer_type") or "")


def _item(
    question_id: str, record: Record, annotation: Record, root: ImageRoot, file: str, category: str
) -> VqaQuestion:
    """A question whose reference is the most frequent human answer."""
    listed = annotation.get("answers")
    values = (
        [item.get("answer") if isinstance(item, dict) else item for item in listed] if isinstance(listed, list) else []
    )
    human_answers = tuple(value for value in values if isinstance(value, str))
    if len(human_answers) != HUMAN_ANSWERS or len(values) != HUMAN_ANSWERS:
        raise DataError(f"{annotation.where}: `answers`: expected {HUMAN_ANSWERS} strings, got {listed!r:.60}")
    image = image_of(Record(record.where, {"image": file}), root)
    turns = user_turn(image, f"{record.text('question')}\n{SHORT_ANSWER}")
    question = Question(question_id, turns, max(human_answers, key=human_answers.count), category)
    return VqaQuestion(question, record.text("question"), human_answers)
