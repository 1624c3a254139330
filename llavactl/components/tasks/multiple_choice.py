"""Multiple choice with lettered options, if wanted in a circle, as MMBench does (Liu et al. 2023, arXiv 2307.06281).

In a circle every question is asked once for each of its options, all options moved on by one each time: who always
says A, or guesses, seldom gets all of them right. MMBench's own tables hold these turns already, question 7 as
7, 1000007, 2000007, …; they are then asked and grouped as they stand there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from string import ascii_uppercase

from pydantic import Field

from llavactl.components.tasks.image_questions import asked, picture, refuse_others
from llavactl.core.errors import DataError
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, ImageRef, Question
from llavactl.files.records import Record, read_records, read_table, unique
from llavactl.images.references import ImageRoot

LETTERS = ascii_uppercase[:8]
TURN = 1_000_000
"""What MMBench adds to a question's number for each turn."""
_LETTER = r"\(?([A-Z])(?:[).:,\n]|$)"
DIRECTLY = "Answer with the option's letter from the given choices directly."


class MultipleChoiceOptions(Options):
    """Options of the task ``multiple-choice``."""

    questions: RecipePath = Field(
        description="MMBench's .tsv, or JSON: index, question, A, B, …, answer; hint, category, image: path or base64"
    )
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL of the pictures; null: that of the questions"
    )
    follow_links: FollowLinks = False
    circular: bool = Field(
        False, description="all turns of a question count as one: those in MMBench's table, else made of its options"
    )


@dataclass(frozen=True)
class ChoiceQuestion:
    """One question, which may have a text before it; ``right`` is an option's place from 0."""

    name: str
    hint: str
    text: str
    options: tuple[str, ...]
    right: int
    category: str
    image: ImageRef | None

    def turned(self, by: int) -> ChoiceQuestion:
        """The same question with its options moved on by ``by`` places: ``A B C`` → ``B C A`` by one."""
        options = self.options[by:] + self.options[:by]
        right = (self.right - by) % len(options)
        return replace(self, name=f"{self.name}+{by}" if by else self.name, options=options, right=right)


class MultipleChoice:
    """The task ``multiple-choice``; see ``llavactl.core.protocols.Task``. Question 7 turned by 2 is ``7+2``."""

    protocols = ("letter",)

    def __init__(self, options: MultipleChoiceOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        for item in self._asked:
            options = "\n".join(f"{letter}. {each}" for letter, each in zip(LETTERS, item.options, strict=False))
            words = f"{item.hint}{item.text}\n{options}\n{DIRECTLY}"
            yield Question(item.name, asked(item.image, words), LETTERS[item.right], item.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """``accuracy`` and each category in percent; in a circle a question counts when all of its turns are right.

        ``once`` is then the share of the questions as they stand in the file. A question with some of its turns
        unasked (``--limit``) is left out of both.
        """
        refuse_others({item.name: item.text for item in self._asked}, answers)
        chosen = {
            item.name: read_letter(answers[item.name].text, item.options)
            for item in self._asked
            if item.name in answers
        }
        right = {item.name: chosen[item.name] == item.right for item in self._asked if item.name in chosen}
        turns = {name: [each.name for each in group] for name, group in self._groups.items()}
        whole = {name: all(right[each] for each in ids) for name, ids in turns.items() if right.keys() >= set(ids)}
        about: dict[str, list[str]] = {}
        for name in whole:
            if category := self._groups[name][0].category:
                about.setdefault(category, []).append(name)
        scores: dict[str, Json] = {"accuracy": _percent(list(whole.values()))}
        if self.options.circular:
            scores["once"] = _percent([right[name] for name in whole])
        shares = {name: _percent([whole[each] for each in ids]) for name, ids in sorted(about.items())}
        failed = sum(each is None for each in chosen.values())
        return Scores(scores | shares, failed, whole, {"accuracy": list(whole), **about})

    def id_of(self, answer: Answer) -> str:
        """LLaVA's answers say in ``round_id`` which turn they are to."""
        turn = answer.extra.get("round_id")
        return f"{answer.id}+{turn}" if isinstance(turn, int) and turn > 0 else answer.id

    @cached_property
    def _asked(self) -> list[ChoiceQuestion]:
        return [turn for group in self._groups.values() for turn in group]

    @cached_property
    def _groups(self) -> Mapping[str, list[ChoiceQuestion]]:
        """What is asked of each question: itself alone, or all of its turns."""
        if not self.options.circular:
            return {item.name: [item] for item in self._items}
        own = _turns_in(self._items)
        if len(own) == len(self._items):
            return {item.name: [item.turned(by) for by in range(len(item.options))] for item in self._items}
        # Not always as many as there are options: MMBench has four options in three turns, too.
        return own

    @cached_property
    def _items(self) -> list[ChoiceQuestion]:
        file = self.options.questions
        records = (
            read_table(file, "question", "answer", delimiter="\t") if file.suffix == ".tsv" else read_records(file)
        )
        root = ImageRoot(str(self.options.images or file.parent), self.options.follow_links)
        return [_item(name, record, root) for name, record in unique(records, "index", "question_id", "id").items()]


def _turns_in(items: Sequence[ChoiceQuestion]) -> Mapping[str, list[ChoiceQuestion]]:
    """The items by their question, where their numbers say that they are turns of one."""
    names = {item.name for item in items}
    found: dict[str, list[ChoiceQuestion]] = {}
    for item in items:
        number = int(item.name) if item.name.isascii() and item.name.isdecimal() else 0
        first = str(number % TURN)
        found.setdefault(first if number >= TURN and first in names else item.name, []).append(item)
    return found


def read_letter(text: str, options: Sequence[str]) -> int | None:
    """The place of the option that ``text`` chooses, None where it chooses none or several.

    A letter alone, at the beginning (``B.``, ``(B)``, ``B:``) or after "answer is"; else an option word for word.
    """
    said = text.strip()
    first = re.match(rf"{_LETTER}", said)
    letters = {first[1]} if first else set(re.findall(rf"\b[Aa]nswer(?: is)?:? {_LETTER}", said))
    if letters:
        place = ascii_uppercase.index(letters.pop()) if len(letters) == 1 else len(options)
        return place if place < len(options) else None
    plain = said.rstrip(".").casefold()
    found = [at for at, option in enumerate(options) if option.strip().rstrip(".").casefold() == plain]
    return found[0] if len(found) == 1 else None


def _item(name: str, record: Record, root: ImageRoot) -> ChoiceQuestion:
    # A table has "nan" or nothing where a question has fewer options.
    given = [str(record.get(letter) or "") for letter in LETTERS]
    count = next((at for at, each in enumerate(given) if each in ("", "nan")), len(LETTERS))
    answer = record.text("answer").strip()
    if count < 2 or len(answer) != 1 or answer not in LETTERS[:count]:
        raise DataError(f"{record.where}: `answer` is {answer!r:.40}, the options are {count}: A, B, …")
    hint = str(record.get("hint") or "")
    return ChoiceQuestion(
        name,
        "" if hint in ("", "nan") else f"{hint}\n",
        record.text("question"),
        tuple(given[:count]),
        LETTERS.index(answer),
        str(record.get("category") or ""),
        picture(record, root) if record.get("image") else None,
    )


def _percent(right: Sequence[bool]) -> float | None:
    return 100 * fmean(right) if right else None
