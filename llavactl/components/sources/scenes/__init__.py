"""The source ``scenes``: drawn scenes of colored shapes with captions, boxes and questions about the image.

They show within minutes whether a small model uses the image: answers can't be guessed from the questions, and the test
split has pairs of color and shape that training never shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal

from pydantic import Field

from llavactl.components.sources.scenes.captions import captions, description
from llavactl.components.sources.scenes.draw import SceneImage
from llavactl.components.sources.scenes.layout import Staged, stage
from llavactl.components.sources.scenes.questions import CATEGORIES, MAX_QUESTIONS, Category, Half, ask
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

    split: Split = Field("train", description="test has pairs of color and shape that train never shows")
    scenes: int = Field(ge=1, description="number of scenes; more scenes begin with the same ones")
    seed: int = Field(0, description="seed of the scenes")
    content: Literal["captions", "descriptions", "questions"] = Field(
        "questions", description="a short caption, a description of all shapes in order, or questions"
    )
    questions: int = Field(
        MAX_QUESTIONS, ge=1, le=MAX_QUESTIONS, description="questions per scene, with content: questions"
    )
    about: tuple[Category | Half, ...] = Field(
        CATEGORIES,
        min_length=1,
        description="categories of these questions; other scenes are skipped",
    )
    size: int = Field(CANVAS, ge=64, le=2048, description="width and height of the images in pixels")


def scenes(options: ScenesOptions) -> Iterator[Sample]:
    """One sample per scene: a caption, a description, or questions and answers."""
    for index in range(options.scenes):
        staged = stage(options.split, options.seed, index)
        texts = captions(staged)
        image = scene_image(staged, options.size)
        boxes = tuple(thing.box() for thing in staged.scene.things)
        extra = {"absent": _absent(staged)}
        if options.content == "questions":
            turns = _questions(staged, image, options)
            if not turns:
                continue
        else:
            turns = _caption(staged, image, (description(staged),) if options.content == "descriptions" else texts)
        yield Sample(staged.id, turns, where=f"scene {staged.id}", captions=texts, boxes=boxes, extra=extra)


def _absent(staged: Staged) -> tuple[str, ...]:
    """The absent pairs that a teacher may mention; in training none that is held out."""
    present = {thing.pair for thing in staged.scene.things}
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    training = staged.split == "train"
    return tuple(" ".join(pair) for pair in pairs if pair not in present and not (training and held_out(*pair)))


def scene_image(staged: Staged, size: int) -> SceneImage:
    """The image of a scene, which is drawn when it is read."""
    return SceneImage(f"scenes/{staged.id}.png", staged.scene, size)


def _caption(staged: Staged, image: SceneImage, texts: tuple[str, ...]) -> tuple[Turn, ...]:
    rng = Random(f"llavactl scenes/instruction/{staged.key}")
    question = Turn("user", (image, "\n" + rng.choice(INSTRUCTIONS)))
    return question, Turn("assistant", (rng.choice(texts),))


def _questions(staged: Staged, image: SceneImage, options: ScenesOptions) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for question in ask(staged, options.questions, options.about):
        turns.append(Turn("user", (question.text,) if turns else (image, "\n" + question.text)))
        turns.append(Turn("assistant", (question.answer,)))
    return tuple(turns)
