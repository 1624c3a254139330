"""Asks about drawn scenes and counts right answers, by category and by minimal pair.

Every question is asked alone, so no earlier turn gives it away, and its text gives nothing away either:
the scores stand beside the chance level of one who never sees the picture.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import fmean

from pydantic import Field

from llavactl.components.sources.scenes import picture
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import CATEGORIES, MOST, PLURALS, SceneQuestion, ask, chance
from llavactl.components.sources.scenes.things import AXES, CANVAS, COLORS, Split
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question, Turn

PAIRS_CHANCE = 25.0
"""Both questions of a pair right by a toss for each; who answers by the text alone never gets both."""


class ScenesTaskOptions(Options):
    """Options of the task ``scenes``."""

    scenes: int = Field(200, ge=1, description="how many scenes are asked about")
    seed: int = Field(0, description="other scenes for another seed")
    split: Split = Field("test", description="train, with an unused seed: new scenes of pairs known from training")
    questions: int = Field(MOST, ge=1, le=MOST, description="questions a scene")
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the pictures in pixels")


class ScenesTask:
    """The task ``scenes``; see ``llavactl.core.protocols.Task``."""

    protocols = ("exact",)

    def __init__(self, options: ScenesTaskOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        for question, staged, asked in self._asked():
            turn = Turn("user", (picture(staged, self.options.size), "\n" + asked.text))
            yield Question(question, (turn,), asked.answer, asked.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """Percentages of right answers: ``accuracy``, each category, and ``pairs`` where both are right.

        ``chance`` holds what each would be without seeing. An answer that says nothing definite counts as
        wrong, and as ``failed``. A category that nothing was asked of is left out.
        """
        outcome: dict[str, bool] = {}
        right: dict[str, list[bool]] = defaultdict(list)
        pairs: dict[str, list[bool]] = defaultdict(list)
        unparsed = 0
        for question, _, asked in self._asked():
            if question not in answers:
                continue
            said = read_answer(answers[question].text, asked.answer)
            unparsed += said is None
            outcome[question] = said == asked.answer
            right[asked.category].append(said == asked.answer)
            if asked.pair:
                pairs[asked.pair].append(said == asked.answer)
        shares: dict[str, Json] = {name: 100 * fmean(right[name]) for name in CATEGORIES if name in right}
        chances: dict[str, Json] = {name: chance(name, self.options.split) for name in shares}
        # An odd number of scenes may end on the first half of a pair.
        if whole := [all(both) for both in pairs.values() if len(both) == 2]:
            shares["pairs"], chances["pairs"] = 100 * fmean(whole), PAIRS_CHANCE
        everything = [one for category in right.values() for one in category]
        blind = fmean(chance(category, self.options.split) for category, of in right.items() for _ in of)
        scores = {"accuracy": 100 * fmean(everything), **shares, "chance": {"accuracy": blind, **chances}}
        return Scores(scores, unparsed, outcome)

    def _asked(self) -> Iterator[tuple[str, Staged, SceneQuestion]]:
        """All that is asked, with the question's id and its scene."""
        for index in range(self.options.scenes):
            staged = stage(self.options.split, self.options.seed, index)
            for number, asked in enumerate(ask(staged, self.options.questions)):
                yield f"{staged.id}/{number}", staged, asked


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS: Mapping[str, Mapping[str, str]] = {
    "color": {color: color for color in COLORS},
    "shape": {shape: shape for shape in PLURALS} | {many: one for one, many in PLURALS.items()} | {"plus": "cross"},
    "x": {word: word for word in AXES["x"]},
    "y": {word: word for word in AXES["y"]},
    "count": {word: str(number) for number, word in enumerate(NUMBERS)} | {"no": "0", "none": "0"},
    "yes or no": dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), "yes")
    | dict.fromkeys(("no", "nope", "not", "none", "nothing", "neither", "false", "incorrect"), "no"),
}
"""By kind of answer: the words that give one, and which one."""

LITTLE = {"a", "an", "the", "to", "on"}
DENIED_BY = {"not", "nor", "than"}
UNSURE = re.compile(
    r"\b(not (sure|certain|clear|possible|able)|no (idea|way)|unsure|unclear|unable|can ?not|ca not|do not know)\b"
)
IS_SO = re.compile(r"(it|there|this|that) (is|does)|they are")


def read_answer(text: str, reference: str) -> str | None:
    """What ``text`` answers, in the form of ``reference``; None when it says nothing or several things.

    The first line with a candidate of the reference's kind (a color for "red", a number for "2") decides,
    and it has to hold exactly one: "The circle is red." is red, "Red or blue." is nothing.
    """
    kind = next(kind for kind, words in WORDS.items() if reference in words.values())
    for line in re.sub(r"n['’]t\b", " not", text.lower()).splitlines():
        words = re.findall(r"[a-z]+|[0-9]+", line)
        found = _yes_or_no(words) if kind == "yes or no" else _candidates(words, kind)
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _candidates(words: list[str], kind: str) -> set[str]:
    """The answers of a kind that a line holds, but for those it denies: "left, not right" is left."""
    meanings = WORDS[kind]
    told = [word for word in words if word not in LITTLE]
    said = [word for before, word in pairwise(["", *told]) if before not in DENIED_BY]
    numbers = {word.lstrip("0") or "0" for word in said if word.isdigit()} if kind == "count" else set()
    return numbers | {meanings[word] for word in said if word in meanings}


def _yes_or_no(words: list[str]) -> set[str]:
    """The answers in a line: "yes" or "no" where it opens with one, else all that it holds.

    A sentence without either is read only where it can't be mistaken ("It is."): to "Is it on the left?",
    "It is on the right" means no.
    """
    meanings, line = WORDS["yes or no"], " ".join(words)
    opening, *rest = [meanings.get(word) for word in words if word not in ("or", "and")] or [None]
    if UNSURE.match(line) or {opening, *rest[:1]} == {"yes", "no"}:
        return {"yes", "no"}
    if opening:
        return {opening}
    if UNSURE.search(line):
        return {"yes", "no"}
    return {"yes"} if IS_SO.fullmatch(line) else _candidates(words, "yes or no")
