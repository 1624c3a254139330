"""MME: two yes-or-no questions a picture, one right and one wrong (Fu et al. 2023, arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from pydantic import Field

from llavactl.components.tasks.image_questions import asked, beyond, prompt_of, refuse_others
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
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


class MmeOptions(Options):
    """Options of the task ``mme``."""

    questions: RecipePath = Field(description="folder of CATEGORY.txt: picture, question and Yes or No, tabs between")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of CATEGORY/picture; null: that of the questions"
    )
    follow_links: FollowLinks = False


@dataclass(frozen=True)
class MmeQuestion:
    """One of the two questions about a picture."""

    id: str
    category: str
    image: str
    text: str
    gold: str


class Mme:
    """The task ``mme``; see ``llavactl.core.protocols.Task``. A question's id is ``CATEGORY/picture/1`` or ``/2``."""

    protocols = ("official",)

    def __init__(self, options: MmeOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        place = ImageRoot(str(self.options.images or self.options.questions), self.options.follow_links)
        for each in self._items:
            image = image_in(place, f"{each.category}/{each.image}")
            yield Question(each.id, asked(image, each.text), each.gold, each.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """A category's points: percent of right answers plus percent of pictures with both right, so up to 200.

        ``perception`` and ``cognition`` are sums of their categories' points, as published.
        """
        refuse_others({each.id: _words(each.text) for each in self._items}, answers)
        said = {each.id: says(answers[each.id].text) for each in self._items if each.id in answers}
        right = {each.id: said[each.id] == each.gold for each in self._items if each.id in said}
        points: dict[str, float] = {}
        for category in dict.fromkeys(each.category for each in self._items):
            pictures: dict[str, list[bool]] = {}
            for each in self._items:
                if each.category == category and each.id in right:
                    pictures.setdefault(each.image, []).append(right[each.id])
            if whole := [both for both in pictures.values() if len(both) == 2]:
                share = sum(map(sum, whole)) / (2 * len(whole))
                points[category] = 100 * share + 100 * sum(map(all, whole)) / len(whole)
        sums: dict[str, Json] = {
            name: sum(points[each] for each in group if each in points)
            for name, group in GROUPS.items()
            if any(each in points for each in group)
        }
        return Scores({**sums, **points}, sum(each is None for each in said.values()), right)

    def id_of(self, answer: Answer) -> str:
        """LLaVA's answers have ``CATEGORY/picture`` or ``CATEGORY/images/picture`` for ``question_id``, and its files
        of results another suffix: the question is in their prompt.
        """
        prompt = prompt_of(answer)
        if answer.id in self._own or not isinstance(prompt, str):
            return answer.id
        category, _, picture = answer.id.partition("/")
        words = _words(prompt)
        return self._by_words.get((category, PurePosixPath(picture).stem, words), beyond(answer, words))

    @cached_property
    def _own(self) -> set[str]:
        return {each.id for each in self._items}

    @cached_property
    def _by_words(self) -> Mapping[tuple[str, str, str], str]:
        return {(each.category, PurePosixPath(each.image).stem, _words(each.text)): each.id for each in self._items}

    @cached_property
    def _items(self) -> list[MmeQuestion]:
        files = sorted(self.options.questions.glob("*.txt"))
        if not files:
            raise DataError(f"{self.options.questions}: there is no CATEGORY.txt in this folder")
        return [item for file in files for item in _read(file)]


def _words(text: str) -> str:
    """A question without the ways to answer it, which LLaVA's prompts have and MME's files have otherwise."""
    for way in ("Answer the question using a single word or phrase.", "Please answer yes or no."):
        text = text.replace(way, "")
    return " ".join(text.split())


def says(text: str) -> str | None:
    """``yes`` or ``no``, where one of them is in the first four signs (``calculation.py``), else None."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def _read(file: Path) -> Iterator[MmeQuestion]:
    asked_of: Counter[str] = Counter()
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        gold = cells[2].strip().lower() if len(cells) >= 3 else ""
        if gold not in ("yes", "no"):
            raise DataError(f"{file}:{number}: not picture, question and Yes or No with tabs between")
        asked_of[cells[0]] += 1
        yield MmeQuestion(f"{file.stem}/{cells[0]}/{asked_of[cells[0]]}", file.stem, cells[0], cells[1], gold)
    if odd := [image for image, count in asked_of.items() if count != 2]:
        raise DataError(f"{file}: {odd[0]} has {asked_of[odd[0]]} questions, not two", hint="is the file cut?")
