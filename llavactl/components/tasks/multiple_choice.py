"""Multiple-choice questions with lettered options, optionally with MMBench's CircularEval (Liu et al. 2023).

CircularEval (arXiv 2307.06281) asks every question once per option, with the options rotated by one each time, and
counts it as correct if all answers are: a model that always answers A, or guesses, rarely succeeds. MMBench's own
tables already contain the rotations of question 7 as 7, 1000007, 2000007, …; these are grouped as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from string import ascii_uppercase

from pydantic import Field

from llavactl.components.tasks.image_questions import IMAGES_HELP, check_prompts, image_of, user_turn
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, ImageRef, Question
from llavactl.files.records import Record, read_records, read_table, unique
from llavactl.images.references import ImageRoot

LETTERS = ascii_uppercase[:8]
ROTATION_STEP = 1_000_000
"""MMBench adds this to a question's index for each rotation."""
_LETTER = r"\(?([A-Z])(?:[).:,\n]|$)"
ANSWER_WITH_LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's instruction for such questions."""


class MultipleChoiceOptions(Options):
    """Options of the task ``multiple-choice``."""

    questions: RecipePath = Field(
        description="MMBench's .tsv, or JSON: index, question, A, B, …, answer; hint, category, image: path or base64"
    )
    images: RecipePlace | None = Field(None, description=IMAGES_HELP)
    follow_links: FollowLinks = False
    circular: bool = Field(
        False, description="CircularEval: a question counts if all rotations of its options are answered correctly"
    )


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question; ``hint`` precedes it, and ``right`` is the index of the correct option."""

    name: str
    hint: str
    text: str
    options: tuple[str, ...]
    right: int
    category: str
    image: ImageRef | None

    def rotated(self, by: int) -> ChoiceQuestion:
        """The same question with its options rotated by ``by``: ``A B C`` → ``B C A`` for 1."""
        options = self.options[by:] + self.options[:by]
        right = (self.right - by) % len(options)
        return replace(self, name=f"{self.name}+{by}" if by else self.name, options=options, right=right)


class MultipleChoice:
    """The task ``multiple-choice``; see ``llavactl.core.protocols.Task``. The id ``7+2`` is question 7 rotated by 2."""

    protocols = ("letter",)

    def __init__(self, options: MultipleChoiceOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        for item in self._items:
            options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, item.options, strict=False))
            text = f"{item.hint}{item.text}\n{options}\n{ANSWER_WITH_LETTER}"
            yield Question(item.name, user_turn(item.image, text), LETTERS[item.right], item.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """``accuracy`` and each category in percent; with ``circular`` a question needs all rotations correct.

        ``once``: accuracy of the questions without rotation. Questions with unanswered rotations (``--limit``) are
        left out of both.
        """
        check_prompts({item.name: item.text for item in self._items}, answers)
        items = [item for item in self._items if item.name in answers]
        predictions = {item.name: parse_letter(answers[item.name].text, item.options) for item in items}
        right = {item.name: predictions[item.name] == item.right for item in items}
        rotations = {name: [item.name for item in group] for name, group in self._groups.items()}
        all_right = {
            name: all(right[rotation] for rotation in names)
            for name, names in rotations.items()
            if right.keys() >= set(names)
        }
        categories: dict[str, list[str]] = {}
        for name in all_right:
            if category := self._groups[name][0].category:
                categories.setdefault(category, []).append(name)
        scores: dict[str, Json] = {"accuracy": _percent(list(all_right.values()))}
        if self.options.circular:
            scores["once"] = _percent([right[name] for name in all_right])
        by_category = {
            category: _percent([all_right[name] for name in names]) for category, names in sorted(categories.items())
        }
        failed = sum(prediction is None for prediction in predictions.values())
        return Scores(scores | by_category, failed, all_right, {"accuracy": list(all_right), **categories})

    def id_of(self, answer: Answer) -> str:
        """LLaVA's answers store the rotation in ``round_id``."""
        rotation = answer.extra.get("round_id")
        return f"{answer.id}+{rotation}" if isinstance(rotation, int) and rotation > 0 else answer.id

    @cached_property
    def _items(self) -> list[ChoiceQuestion]:
        return [rotation for group in self._groups.values() for rotation in group]

    @cached_property
    def _groups(self) -> Mapping[str, list[ChoiceQuestion]]:
        """By question: the question only, or all of its rotations."""
        if not self.options.circular:
            return {item.name: [item] for item in self._file_items}
        groups = _rotations_in_file(self._file_items)
        if len(groups) == len(self._file_items):
            return {item.name: [item.rotated(by) for by in range(len(item.options))] for item in self._file_items}
        # Not always one rotation per option: MMBench has questions with four options and three rotations.
        return groups

    @cached_property
    def _file_items(self) -> list[ChoiceQuestion]:
        file = self.options.questions
        records = (
            read_table(file, "question", "answer", delimiter="\t") if file.suffix == ".tsv" else read_records(file)
        )
        root = ImageRoot(str(self.options.images or file.parent), self.options.follow_links)
        return [_item(name, record, root) for name, record in unique(records, "index", "question_id", "id").items()]


def _rotations_in_file(items: Sequence[ChoiceQuestion]) -> Mapping[str, list[ChoiceQuestion]]:
    """The items by question, where their indices mark them as rotations of one question."""
    names = {item.name for item in items}
    groups: dict[str, list[ChoiceQuestion]] = {}
    for item in items:
        index = int(item.name) if item.name.isascii() and item.name.isdecimal() else 0
        question = str(index % ROTATION_STEP)
        groups.setdefault(question if index >= ROTATION_STEP and question in names else item.name, []).append(item)
    return groups


def parse_letter(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that ``text`` chooses; None if there is none, or several.

    Accepted: a letter alone, at the beginning (``B.``, ``(B)``, ``B:``) or after "answer is"; or the exact text of one
    option.
    """
    answer = text.strip()
    first = re.match(rf"{_LETTER}", answer)
    letters = {first[1]} if first else set(re.findall(rf"\b[Aa]nswer(?: is)?:? {_LETTER}", answer))
    if letters:
        index = ascii_uppercase.index(letters.pop()) if len(letters) == 1 else len(options)
        return index if index < len(options) else None
    normalized = answer.rstrip(".").casefold()
    matches = [index for index, option in enumerate(options) if option.strip().rstrip(".").casefold() == normalized]
    return matches[0] if len(matches) == 1 else None


def _item(name: str, record: Record, root: ImageRoot) -> ChoiceQuestion:
    # Tables have "nan" or nothing in the columns beyond a question's options.
    cells = [str(record.get(letter) or "") for letter in LETTERS]
    count = next((index for index, cell in enumerate(cells) if cell in ("", "nan")), len(LETTERS))
    answer = record.text("answer").strip()
    if count < 2 or len(answer) != 1 or answer not in LETTERS[:count]:
        raise DataError(
            f"{record.where}: `answer` is {answer!r:.40}, expected the letter of one of at least 2 options; "
            f"the question has {count}"
        )
    hint = str(record.get("hint") or "")
    return ChoiceQuestion(
        name,
        "" if hint in ("", "nan") else f"{hint}\n",
        record.text("question"),
        tuple(cells[:count]),
        LETTERS.index(answer),
        str(record.get("category") or ""),
        image_of(record, root) if record.get("image") else None,
    )


def _percent(right: Sequence[bool]) -> float | None:
    return 100 * fmean(right) if right else None
