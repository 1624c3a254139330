"""Minimal pairs of synthetic scenes: two images that differ in one respect, with one question and different answers.

A pair counts if both answers are correct, which is impossible for a model that ignores the image. Kinds of pairs:

- *relation*: two objects have swapped positions
- *binding*: two objects have swapped colors
- *count*, *absence*: one object is removed; the question is how many there are, or whether it is there
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

from llavactl.components.sources.scenes import scene_image
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import MAX_QUESTIONS, PLURALS, ask
from llavactl.components.sources.scenes.things import CANVAS, Split
from llavactl.components.tasks.image_questions import user_turn
from llavactl.components.tasks.scenes import parse_answer
from llavactl.core.protocols import Json, Scores
from llavactl.core.registry import Options
from llavactl.core.schema import Answer, Question
from llavactl.core.words import article

Kind = Literal["relation", "binding", "count", "absence"]
KINDS: tuple[Kind, ...] = ("relation", "binding", "count", "absence")


class SpatialOptions(Options):
    """Options of the task ``spatial``."""

    pairs: int = Field(100, ge=1, description="pairs of each kind")
    seed: int = Field(0, description="seed of the scenes")
    split: Split = Field(
        "test", description="test: unseen combinations; train (with an unused seed): trained combinations"
    )
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the images in pixels")


@dataclass(frozen=True)
class Half:
    """One of the two scenes of a pair, with the question's id and text, and the answer for this scene."""

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
            turns = user_turn(scene_image(half.staged, self.options.size), half.text)
            yield Question(half.id, turns, half.answer, half.kind)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:  # noqa: ARG002 - the only protocol
        """In percent: ``pairs`` with both answers correct, and ``accuracy`` of single answers; over all and per kind.

        ``n``: number of complete pairs. Pairs with an unanswered question (``--limit``) are left out of ``pairs``.
        """
        halves = [half for half in self._halves if half.id in answers]
        predictions = {half.id: parse_answer(answers[half.id].text, half.answer) for half in halves}
        right = {half.id: predictions[half.id] == half.answer for half in halves}
        scores = {**_shares(halves, right)}
        for kind in KINDS:
            if halves_of_kind := [half for half in halves if half.kind == kind]:
                scores[kind] = _shares(halves_of_kind, right)
        return Scores(scores, sum(prediction is None for prediction in predictions.values()), right)

    @cached_property
    def _halves(self) -> list[Half]:
        options = self.options
        generators = {"relation": _swapped, "binding": _swapped, "count": _removed, "absence": _removed}
        return [half for kind in KINDS for half in generators[kind](kind, options.pairs, options.split, options.seed)]


def _shares(halves: list[Half], right: Mapping[str, bool]) -> dict[str, Json]:
    pairs: dict[str, list[bool]] = {}
    for half in halves:
        pairs.setdefault(half.pair, []).append(right[half.id])
    complete = [all(pair) for pair in pairs.values() if len(pair) == 2]
    accuracy = 100 * fmean(right[half.id] for half in halves)
    return {"pairs": 100 * fmean(complete) if complete else None, "accuracy": accuracy, "n": len(complete)}


def _swapped(kind: Kind, pairs: int, split: Split, seed: int) -> Iterator[Half]:
    """Minimal pairs among the scenes: every other two scenes are one."""
    contrast_kind = "arrangement" if kind == "relation" else "binding"
    number = 0
    for pair_index in count(1, 2):
        halves = [stage(split, seed, 2 * pair_index + second) for second in (0, 1)]
        contrast = halves[0].contrast
        if contrast is None or contrast.kind != contrast_kind:
            continue
        for name, staged in zip("ab", halves, strict=True):
            question = next(question for question in ask(staged, MAX_QUESTIONS) if question.pair)
            yield Half(f"{kind}-{number}{name}", f"{kind}-{number}", kind, staged, question.text, question.answer)
        number += 1
        if number == pairs:
            return


def _removed(kind: Kind, pairs: int, split: Split, seed: int) -> Iterator[Half]:
    """Scenes with and without one of their objects; the two kinds use different scenes."""
    number = 0
    # Scenes 0 and 1, 4 and 5, … are not minimal pairs; each kind uses one of two.
    for index in count(0 if kind == "count" else 1, 4):
        complete = stage(split, seed, index)
        rng = Random(f"llavactl spatial/{kind}/{complete.key}")
        things = complete.scene.things
        candidates = [thing for thing in things if kind == "absence" or complete.counted in thing.pair]
        # At least one object to count must remain, and at least two objects in the scene.
        if len(things) < 3 or (kind == "count" and len(candidates) < 2):
            continue
        removed = rng.choice(candidates)
        scene = replace(complete.scene, things=tuple(thing for thing in things if thing != removed))
        if kind == "count":
            plural = PLURALS.get(complete.counted, f"{complete.counted} objects")
            text, answers = f"How many {plural} are there?", (str(len(candidates)), str(len(candidates) - 1))
        else:
            text, answers = f"Is there {article(removed.name)}?", ("yes", "no")
        halves = (complete, replace(complete, id=f"{complete.id}-less", scene=scene))
        order = rng.sample((0, 1), 2)  # the order within a pair must not reveal the answer
        for name, half in zip("ab", order, strict=True):
            yield Half(f"{kind}-{number}{name}", f"{kind}-{number}", kind, halves[half], text, answers[half])
        number += 1
        if number == pairs:
            return
