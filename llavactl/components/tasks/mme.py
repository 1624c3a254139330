"""MME: two yes/no questions per image, one with each answer (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import Field

from llavactl.components.tasks.image_questions import (
    check_prompts,
    stored_prompt,
    unmatched_id,
    user_turn,
)
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.files.json_parse import TRUNCATED_HINT
from llavactl.files.text import read_text
from llavactl.images.references import ImageRoot, image_in

GROUPS = {
    "perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
INSTRUCTIONS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")
"""Appended to the questions: the first by LLaVA, the second in MME's files."""


class MmeOptions(Options):
    """Options of the task ``mme``."""

    questions: RecipePath = Field(
        description="folder of CATEGORY.txt: image, question and Yes or No, separated by tabs"
    )
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of CATEGORY/image; null: the folder of the questions"
    )
    follow_links: FollowLinks = False


@dataclass(frozen=True)
class MmeQuestion:
    """One of the two questions about an image."""

    id: str
    category: str
    image: str
    text: str
    reference: str


class Mme:
    """The task ``mme``; see ``llavactl.core.protocols.Task``. A question's id is ``CATEGORY/image/1`` or ``/2``."""

    protocols = ("official",)

    def __init__(self, options: MmeOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        root = ImageRoot(str(self.options.images or self.options.questions), self.options.follow_links)
        for item in self._items:
            image = image_in(root, f"{item.category}/{item.image}")
            yield Question(item.id, user_turn(image, item.text), item.reference, item.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """Points per category: accuracy plus the share of images with both answers correct, both in percent.

        ``perception`` and ``cognition`` are the sums over their categories, as published.
        """
        check_prompts({item.id: _without_instructions(item.text) for item in self._items}, answers)
        items = [item for item in self._items if item.id in answers]
        predictions = {item.id: parse_yes_no(answers[item.id].text) for item in items}
        right = {item.id: predictions[item.id] == item.reference for item in items}
        points: dict[str, float] = {}
        for category in dict.fromkeys(item.category for item in self._items):
            by_image: dict[str, list[bool]] = {}
            for item in items:
                if item.category == category:
                    by_image.setdefault(item.image, []).append(right[item.id])
            if pairs := [pair for pair in by_image.values() if len(pair) == 2]:
                accuracy = sum(map(sum, pairs)) / (2 * len(pairs))
                points[category] = 100 * accuracy + 100 * sum(map(all, pairs)) / len(pairs)
        sums: dict[str, Json] = {
            name: sum(points[category] for category in group if category in points)
            for name, group in GROUPS.items()
            if any(category in points for category in group)
        }
        return Scores({**sums, **points}, sum(prediction is None for prediction in predictions.values()), right)

    def id_of(self, answer: Answer) -> str:
        """Finds the question by its text in the stored prompt.

        In LLaVA's answers, ``question_id`` is ``CATEGORY/image`` or ``CATEGORY/images/image``, and in its result files
        the image has another suffix.
        """
        prompt = stored_prompt(answer)
        if answer.id in self._ids or not isinstance(prompt, str):
            return answer.id
        category, _, image = answer.id.partition("/")
        text = _without_instructions(prompt)
        return self._ids_by_text.get((category, PurePosixPath(image).stem, text), unmatched_id(answer, text))

    @cached_property
    def _ids(self) -> set[str]:
        return {item.id for item in self._items}

    @cached_property
    def _ids_by_text(self) -> Mapping[tuple[str, str, str], str]:
        """Question ids by category, image without its suffix, and text."""
        return {
            (item.category, PurePosixPath(item.image).stem, _without_instructions(item.text)): item.id
            for item in self._items
        }

    @cached_property
    def _items(self) -> list[MmeQuestion]:
        files = sorted(self.options.questions.glob("*.txt"))
        if not files:
            raise DataError(f"{self.options.questions}: expected a folder of CATEGORY.txt files")
        return [item for file in files for item in _read(file)]


def _without_instructions(text: str) -> str:
    for instruction in INSTRUCTIONS:
        text = text.replace(instruction, "")
    return " ".join(text.split())


def parse_yes_no(text: str) -> str | None:
    """``yes`` or ``no`` if the first four characters contain it (as MME's ``calculation.py``), else None."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _read(file: Path) -> Iterator[MmeQuestion]:
    questions_per_image: Counter[str] = Counter()
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        reference = cells[2].strip().lower() if len(cells) >= 3 else ""
        if reference not in ("yes", "no"):
            raise DataError(f"{file}:{number}: expected image, question and Yes or No, separated by tabs")
        questions_per_image[cells[0]] += 1
        question_id = f"{file.stem}/{cells[0]}/{questions_per_image[cells[0]]}"
        yield MmeQuestion(question_id, file.stem, cells[0], cells[1], reference)
    if incomplete := [image for image, count in questions_per_image.items() if count != 2]:
        raise DataError(
            f"{file}: {incomplete[0]} has {questions_per_image[incomplete[0]]} questions, expected 2",
            hint=TRUNCATED_HINT,
        )
