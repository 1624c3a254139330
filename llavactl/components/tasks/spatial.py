"""Minimal pairs of drawn scenes: two pictures that differ in one thing, asked in the same words, with other answers.

Who answers by the words alone says the same twice and has no pair right; a pair counts when both answers are right.
*relation*: two things have changed places; *binding*: two things have changed colors; *count* and *absence*: one thing
is gone, and it is asked how many there are, or whether it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from random import Random
from statistics import fmean
from typing import Literal

from pydantic import Field

from llavactl.components.sources.scenes import picture
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import MOST, PLURALS, article, ask
from llavactl.components.sources.scenes.things import CANVAS, Split
from llavactl.components.tasks.image_questions import asked
from llavactl.components.tasks.scenes import read_answer
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question

Kind = Literal["relation", "binding", "count", "absence"]
KINDS: tuple[Kind, ...] = ("relation", "binding", "count", "absence")


class SpatialOptions(Options):
    """Options of the task ``spatial``."""

    pairs: int = Field(100, ge=1, description="how many of each kind")
    seed: int = Field(0, description="other scenes for another seed")
    split: Split = Field("test", description="train, with an unused seed: things known from training")
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the pictures in pixels")


@dataclass(frozen=True)
class Half:
    """One of the two scenes of a pair, with the question's id, its words and its answer here."""

    id: str
    pair: str
    kind: Kind
    staged: Staged
    text: str
    answer: str


class Spatial:
    """The task ``spatial``; see ``llavactl.core.protocols.Task``."""

    protocols = ("exact",)

    def __init__(self, options: SpatialOptions) -> None:
        self.options = options

    def questions(self) -> Iterator[Question]:
        for half in self._halves:
            turns = asked(picture(half.staged, self.options.size), half.text)
            yield Question(half.id, turns, half.answer, half.kind)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - there is one
        """Percentages: ``pairs`` with both right, ``accuracy`` of single answers, and both of each kind.

        A pair of which one question was not asked (``--limit``) is left out of ``pairs``.
        """
        here = [half for half in self._halves if half.id in answers]
        said = {half.id: read_answer(answers[half.id].text, half.answer) for half in here}
        right = {half.id: said[half.id] == half.answer for half in here}
        scores = {**_shares(here, right)}
        for kind in KINDS:
            if some := [half for half in here if half.kind == kind]:
                scores[kind] = _shares(some, right)
        return Scores(scores, sum(each is None for each in said.values()), right)

    @cached_property
    def _halves(self) -> list[Half]:
        given = self.options
        makers = {"relation": _exchanged, "binding": _exchanged, "count": _removed, "absence": _removed}
        return [half for kind in KINDS for half in makers[kind](kind, given.pairs, given.split, given.seed)]


def _shares(halves: list[Half], right: Mapping[str, bool]) -> dict[str, Json]:
    pairs: dict[str, list[bool]] = {}
    for half in halves:
        pairs.setdefault(half.pair, []).append(right[half.id])
    whole = [all(both) for both in pairs.values() if len(both) == 2]
    accuracy = 100 * fmean(right[half.id] for half in halves)
    return {"pairs": 100 * fmean(whole) if whole else None, "accuracy": accuracy, "n": len(whole)}


def _exchanged(kind: Kind, pairs: int, split: Split, seed: int) -> Iterator[Half]:
    """Pairs that the scenes have themselves: every other two of them are such."""
    wanted = "arrangement" if kind == "relation" else "binding"
    found = 0
    for couple in count(1, 2):
        halves = [stage(split, seed, 2 * couple + second) for second in (0, 1)]
        contrast = halves[0].contrast
        if contrast is None or contrast.kind != wanted:
            continue
        for name, staged in zip("ab", halves, strict=True):
            question = next(each for each in ask(staged, MOST) if each.pair)
            yield Half(f"{kind}-{found}{name}", f"{kind}-{found}", kind, staged, question.text, question.answer)
        found += 1
        if found == pairs:
            return


def _removed(kind: Kind, pairs: int, split: Split, seed: int) -> Iterator[Half]:
    """A scene, and the same one with a thing less. Of the two kinds each has scenes of its own."""
    found = 0
    # Scenes 0 and 1, 4 and 5, … are single ones; one of each two for either kind.
    for index in count(0 if kind == "count" else 1, 4):
        whole = stage(split, seed, index)
        rng = Random(f"llavactl spatial/{kind}/{whole.key}")
        things = whole.scene.things
        gone = [each for each in things if kind == "absence" or whole.counted in each.pair]
        # Of one thing alone nothing would be left to count, and of two little to look at.
        if len(things) < 3 or (kind == "count" and len(gone) < 2):
            continue
        thing = rng.choice(gone)
        left = replace(whole.scene, things=tuple(each for each in things if each != thing))
        if kind == "count":
            what = PLURALS.get(whole.counted, f"{whole.counted} objects")
            text, answers = f"How many {what} are there?", (str(len(gone)), str(len(gone) - 1))
        else:
            text, answers = f"Is there {article(thing.name)}?", ("yes", "no")
        halves = (whole, replace(whole, id=f"{whole.id}-less", scene=left))
        order = rng.sample((0, 1), 2)  # who goes by an order of answers learns nothing
        for name, place in zip("ab", order, strict=True):
            yield Half(f"{kind}-{found}{name}", f"{kind}-{found}", kind, halves[place], text, answers[place])
        found += 1
        if found == pairs:
            return
