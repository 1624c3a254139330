"""Drawn scenes of colored shapes: questions whose answers can only be seen, captions and boxes for each.

With them a small model shows in minutes whether it sees: what is asked can't be told from the words, and
the test split is about pairs of a color and a shape that training never showed.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from pydantic import Field

from llavactl.components.sources.scenes.captions import captions, description
from llavactl.components.sources.scenes.draw import SceneImage
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import CATEGORIES, MOST, Category, Half, ask
from llavactl.components.sources.scenes.things import CANVAS, COLORS, SHAPES, Split, held_out
from llavactl.core.registry import Options
from llavactl.core.schema import Sample, Turn

INSTRUCTIONS = (
    "Describe the image briefly.",
    "Say in one sentence what the picture shows.",
    "What can be seen here?",
    "Give a short caption for this image.",
)


class ScenesOptions(Options):
    """Options of the source ``scenes``."""

    split: Split = Field("train", description="test shows pairs of color and shape that train never does")
    scenes: int = Field(ge=1, description="how many; a larger number begins with the same scenes")
    seed: int = Field(0, description="other scenes for another seed")
    content: Literal["captions", "descriptions", "questions"] = Field(
        "questions", description="what a scene is told or asked: a short caption, all things in their order, questions"
    )
    questions: int = Field(MOST, ge=1, le=MOST, description="questions a scene, with content: questions")
    about: tuple[Category | Half, ...] = Field(
        CATEGORIES, min_length=1, description="what these are about; a scene that has no such question is left out"
    )
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the pictures in pixels")


def scenes(options: ScenesOptions) -> Iterator[Sample]:
    """One record a scene: a caption of it, or questions and answers about it."""
    for index in range(options.scenes):
        staged = stage(options.split, options.seed, index)
        said = captions(staged)
        image = picture(staged, options.size)
        boxes = tuple(thing.box() for thing in staged.scene.things)
        extra = {"absent": _absent(staged)}
        if options.content == "questions":
            turns = _questions(staged, image, options)
            if not turns:
                continue
        else:
            turns = _caption(staged, image, (description(staged),) if options.content == "descriptions" else said)
        yield Sample(staged.id, turns, where=f"scene {staged.id}", captions=said, boxes=boxes, extra=extra)


def _absent(staged: Staged) -> tuple[str, ...]:
    """What a teacher may say is not there: never a pair that training must not mention."""
    there = {thing.pair for thing in staged.scene.things}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    unseen = staged.split == "train"
    return tuple(" ".join(pair) for pair in pairs if pair not in there and not (unseen and held_out(*pair)))


def picture(staged: Staged, size: int) -> SceneImage:
    """The picture of a scene; nothing is drawn before it is read."""
    return SceneImage(f"scenes/{staged.id}.png", staged.scene, size)


def _caption(staged: Staged, image: SceneImage, said: tuple[str, ...]) -> tuple[Turn, ...]:
    rng = Random(f"llavactl scenes/instruction/{staged.key}")
    asked = Turn("user", (image, "\n" + rng.choice(INSTRUCTIONS)))
    return asked, Turn("assistant", (rng.choice(said),))


def _questions(staged: Staged, image: SceneImage, options: ScenesOptions) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for asked in ask(staged, options.questions, options.about):
        turns.append(Turn("user", (asked.text,) if turns else (image, "\n" + asked.text)))
        turns.append(Turn("assistant", (asked.answer,)))
    return tuple(turns)
