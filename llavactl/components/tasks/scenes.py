"""Questions about synthetic scenes, scored by category and by minimal pair.

Neither earlier turns nor the text of a question reveal its answer. The scores are reported with the chance level of a
model that doesn't see the image.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import fmean

from pydantic import Field

from llavactl.components.sources.scenes import scene_image
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import (
    CATEGORIES,
    MAX_QUESTIONS,
    PLURALS,
    SceneQuestion,
    ask,
    chance_accuracy,
)
from llavactl.components.sources.scenes.things import AXES, CANVAS, COLORS, Split
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question, Turn

PAIRS_CHANCE = 25.0
"""Chance level of guessing both answers of a pair; a model that ignores the image never answers both correctly."""


class ScenesTaskOptions(Options):
    """Options of the task ``scenes``."""

    scenes: int = Field(200, ge=1, description="number of scenes")
    seed: int = Field(0, description="seed of the scenes")
    split: Split = Field(
        "test", description="test: unseen combinations; train (with an unused seed): new scenes of trained combinations"
    )
    questions: int = Field(MAX_QUESTIONS, ge=1, le=MAX_QUESTIONS, description="questions per scene")
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the images in pixels")


class ScenesTask:
    """The task ``scenes``; see ``llavactl.core.protocols.Task``."""

    protocols = ("exact",)

    def __init__(self, options: ScenesTaskOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        for question_id, staged, item in self._items():
            turn = Turn("user", (scene_image(staged, self.options.size), "\n" + item.text))
            yield Question(question_id, (turn,), item.answer, item.category)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """Accuracy in percent: over all questions, per category, and of ``pairs`` with both answers correct.

        ``chance``: the chance level of each score. An answer that can't be parsed is wrong, and counts as ``failed``.
        Categories without questions are left out.
        """
        right: dict[str, bool] = {}
        by_category: dict[str, list[bool]] = defaultdict(list)
        by_pair: dict[str, list[bool]] = defaultdict(list)
        failed = 0
        for question_id, _, item in self._items():
            if question_id not in answers:
                continue
            prediction = parse_answer(answers[question_id].text, item.answer)
            failed += prediction is None
            right[question_id] = prediction == item.answer
            by_category[item.category].append(right[question_id])
            if item.pair:
                by_pair[item.pair].append(right[question_id])
        shares: dict[str, Json] = {name: 100 * fmean(by_category[name]) for name in CATEGORIES if name in by_category}
        chances: dict[str, Json] = {name: chance_accuracy(name, self.options.split) for name in shares}
        # With an odd number of scenes, the last pair may be incomplete.
        if complete := [all(pair) for pair in by_pair.values() if len(pair) == 2]:
            shares["pairs"], chances["pairs"] = 100 * fmean(complete), PAIRS_CHANCE
        chance_of_all = fmean(
            chance_accuracy(name, self.options.split) for name, values in by_category.items() for _ in values
        )
        accuracy = 100 * fmean(value for values in by_category.values() for value in values)
        scores = {"accuracy": accuracy, **shares, "chance": {"accuracy": chance_of_all, **chances}}
        return Scores(scores, failed, right)

    def _items(self) -> Iterator[tuple[str, Staged, SceneQuestion]]:
        """All questions: id, scene, question."""
        for index in range(self.options.scenes):
            staged = stage(self.options.split, self.options.seed, index)
            for number, item in enumerate(ask(staged, self.options.questions)):
                yield f"{staged.id}/{number}", staged, item


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS: Mapping[str, Mapping[str, str]] = {
    "color": {color: color for color in COLORS},
    "shape": {shape: shape for shape in PLURALS}
    | {plural: singular for singular, plural in PLURALS.items()}
    | {"plus": "cross"},
    "x": {word: word for word in AXES["x"]},
    "y": {word: word for word in AXES["y"]},
    "count": {word: str(number) for number, word in enumerate(NUMBERS)} | {"no": "0", "none": "0"},
    "yes or no": dict.fromkeys(("yes", "yeah", "yep", "true", "correct"), "yes")
    | dict.fromkeys(("no", "nope", "not", "none", "nothing", "neither", "false", "incorrect"), "no"),
}
"""By kind of answer: the answer that each word expresses."""

IGNORED_WORDS = {"a", "an", "the", "to", "on"}
NEGATIONS = {"not", "nor", "than"}
UNSURE = re.compile(
    r"\b(not (sure|certain|clear|possible|able)|no (idea|way)|unsure|unclear|unable|can ?not|ca not|do not know)\b"
)
AFFIRMATION = re.compile(r"(it|there|this|that) (is|does)|they are")


def parse_answer(text: str, reference: str) -> str | None:
    """The answer in ``text``, in the form of ``reference``; None if there is no answer, or several.

    The first line with a candidate of the reference's kind (a color for "red", a number for "2") counts, and must
    contain exactly one: "The circle is red." is parsed as red, "Red or blue." as None.
    """
    kind = next(kind for kind, words in WORDS.items() if reference in words.values())
    for line in re.sub(r"n['’]t\b", " not", text.lower()).splitlines():
        words = re.findall(r"[a-z]+|[0-9]+", line)
        candidates = _yes_or_no(words) if kind == "yes or no" else _candidates(words, kind)
        if candidates:
            return candidates.pop() if len(candidates) == 1 else None
    return None


def _candidates(words: list[str], kind: str) -> set[str]:
    """The answers of a kind in a line, without negated ones: "left, not right" is left."""
    meanings = WORDS[kind]
    relevant = [word for word in words if word not in IGNORED_WORDS]
    asserted = [word for previous, word in pairwise(["", *relevant]) if previous not in NEGATIONS]
    numbers = {word.lstrip("0") or "0" for word in asserted if word.isdigit()} if kind == "count" else set()
    return numbers | {meanings[word] for word in asserted if word in meanings}


def _yes_or_no(words: list[str]) -> set[str]:
    """The answers in a line: "yes" or "no" if it starts with one, else all that it contains.

    A sentence without either counts only if it is unambiguous ("It is."): "It is on the right" may mean no, as an
    answer to "Is it on the left?".
    """
    meanings, line = WORDS["yes or no"], " ".join(words)
    opening, *rest = [meanings.get(word) for word in words if word not in ("or", "and")] or [None]
    if UNSURE.match(line) or {opening, *rest[:1]} == {"yes", "no"}:
        return {"yes", "no"}
    if opening:
        return {opening}
    if UNSURE.search(line):
        return {"yes", "no"}
    return {"yes"} if AFFIRMATION.fullmatch(line) else _candidates(words, "yes or no")
