"""VQA and TextVQA: short answers, each held against those of ten people (arXiv 1505.00468, 1904.08920)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import Field

from llavactl.components.tasks.image_questions import asked, beyond, picture, prompt_of, refuse_others
from llavactl.components.tasks.vqa_words import normal, one_line, text_vqa
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.files.records import Record, read_document, unique
from llavactl.images.references import ImageRoot

PEOPLE = 10
SHORTLY = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 adds to such questions."""


class VqaOptions(Options):
    """Options of the task ``vqa``."""

    questions: RecipePath = Field(description="VQA's questions: question_id, image_id, question")
    annotations: RecipePath = Field(description="VQA's annotations: question_id, answers, answer_type")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False
    image: str = Field("COCO_val2014_{:012d}.jpg", description="a picture's file, its image_id in the braces")


class TextVqaOptions(Options):
    """Options of the task ``textvqa``."""

    questions: RecipePath = Field(description="TextVQA_0.5.1_val.json: question_id, image_id, question, answers")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False


@dataclass(frozen=True)
class VqaQuestion:
    """A question with what ten people said."""

    question: Question
    words: str
    people: tuple[str, ...]


class Vqa:
    """The task ``vqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("official",)

    def __init__(self, options: VqaOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        return (item.question for item in self._items)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """``accuracy``, and that of each type of answer, in percent."""
        return _scores(self._items, answers, vqa_grade)

    @cached_property
    def _items(self) -> list[VqaQuestion]:
        notes = unique(_records(self.options.annotations, "annotations"), "question_id", what="annotation")
        questions = unique(_records(self.options.questions, "questions"), "question_id")
        if missing := [name for name in questions if name not in notes]:
            raise DataError(
                f"{self.options.annotations}: no answers to {len(missing)} of {len(questions)} questions, the first is "
                f"{missing[0]!r}",
                hint="are these the annotations of these questions?",
            )
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        return [
            _item(name, record, notes[name], root, self._file(record), str(notes[name].get("answer_type") or ""))
            for name, record in questions.items()
        ]

    def _file(self, record: Record) -> str:
        try:
            return self.options.image.format(int(record.name("image_id")))
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(f"{record.where}: {self.options.image!r} makes no file of its image_id: {error}") from error


class TextVqa:
    """The task ``textvqa``; see ``llavactl.core.protocols.Task``."""

    protocols = ("official",)

    def __init__(self, options: TextVqaOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        return (item.question for item in self._items)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """``accuracy`` in percent."""
        return _scores(self._items, answers, text_vqa_grade)

    def id_of(self, answer: Answer) -> str:
        """LLaVA's answers have the picture for ``question_id``; the question is in their prompt."""
        prompt = prompt_of(answer)
        if answer.id in self._own or not isinstance(prompt, str):
            return answer.id
        lines = re.split(r"\n|^ocr tokens: .*question: | short answer:", prompt.lower())
        known = (self._by_words[key] for line in lines if (key := (answer.id, line)) in self._by_words)
        return next(known, beyond(answer, prompt))

    @cached_property
    def _own(self) -> set[str]:
        return {each.question.id for each in self._items}

    @cached_property
    def _by_words(self) -> Mapping[tuple[str, str], str]:
        """Question ids by the picture and the question."""
        return {
            (record.name("image_id"), record.text("question").lower()): record.name("question_id")
            for record in _records(self.options.questions, "data")
        }

    @cached_property
    def _items(self) -> list[VqaQuestion]:
        root = ImageRoot(str(self.options.images or self.options.questions.parent), self.options.follow_links)
        return [
            _item(name, record, record, root, f"{record.name('image_id')}.jpg", "")
            for name, record in unique(_records(self.options.questions, "data"), "question_id").items()
        ]


def vqa_grade(answer: str, people: Sequence[str]) -> float:
    """The official grade, 0 to 1. Where all ten people say the same, it is compared as it stands."""
    answer, said = one_line(answer), [one_line(each) for each in people]
    if len(set(said)) > 1:
        answer, said = normal(answer), [normal(each) for each in said]
    return soft(sum(each == answer for each in said), len(said))


def text_vqa_grade(answer: str, people: Sequence[str]) -> float:
    """TextVQA's official grade, 0 to 1."""
    return soft([text_vqa(each) for each in people].count(text_vqa(answer)), len(people))


def soft(agree: int, people: int) -> float:
    """min(1, agreeing / 3), averaged over leaving out each of the ``people`` in turn."""
    left_out_agrees, left_out_differs = min(1.0, (agree - 1) / 3), min(1.0, agree / 3)
    return (agree * left_out_agrees + (people - agree) * left_out_differs) / people


def _scores(
    items: Sequence[VqaQuestion], answers: Mapping[str, Answer], grade: Callable[[str, Sequence[str]], float]
) -> Scores:
    here = {each.question.id: each for each in items if each.question.id in answers}
    refuse_others({name: each.words for name, each in here.items()}, answers)
    grades = {name: grade(answers[name].text, each.people) for name, each in here.items()}
    groups: dict[str, list[float]] = {}
    for name, each in here.items():
        if each.question.category:
            groups.setdefault(each.question.category, []).append(grades[name])
    scores: dict[str, Json] = {"accuracy": 100 * fmean(grades.values())}
    failed = sum(not answers[name].text.strip() for name in grades)
    return Scores(scores | {name: 100 * fmean(each) for name, each in sorted(groups.items())}, failed, grades=grades)


def _records(path: Path, key: str) -> list[Record]:
    """The list under ``key`` of a file, or the file's own."""
    document: Any = read_document(path)
    listed = document.get(key) if isinstance(document, dict) else document
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise DataError(f"{path}: there is no list {key!r} of objects")
    return [Record(f"{path} {key} {at}", each) for at, each in enumerate(listed)]


def _item(name: str, record: Record, notes: Record, root: ImageRoot, file: str, kind: str) -> VqaQuestion:
    people = notes.get("answers")
    said = (
        [each.get("answer") if isinstance(each, dict) else each for each in people] if isinstance(people, list) else []
    )
    texts = tuple(each for each in said if isinstance(each, str))
    if len(texts) != PEOPLE or len(said) != PEOPLE:
        raise DataError(f"{notes.where}: `answers` are not those of {PEOPLE} people")
    image = picture(Record(record.where, {"image": file}), root)
    words = f"{record.text('question')}\n{SHORTLY}"
    question = Question(name, asked(image, words), max(texts, key=texts.count), kind)
    return VqaQuestion(question, record.text("question"), texts)
