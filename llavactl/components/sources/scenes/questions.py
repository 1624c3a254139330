"""Questions about a scene whose text doesn't reveal the answer.

Given only the text, every answer that a split allows is equally likely: the question, and a yes or no, are drawn before
the scene is considered, and the shape asked about is drawn with equal treatment of all colors, shapes and positions.
``chance_accuracy`` is thus the accuracy of a model that reads only the texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from random import Random
from typing import Literal, get_args

from llavactl.components.sources.scenes.layout import Contrast, Staged
from llavactl.components.sources.scenes.things import (
    AXES,
    COLORS,
    SHAPES,
    DrawnShape,
    Scene,
    Split,
    clear_axes,
    held_out,
    side,
)
from llavactl.core.words import article

Category = Literal["color", "shape", "count", "presence", "relation", "pair"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""Categories of questions; ``pair`` is the question about both scenes of a minimal pair."""

Half = Literal["left-right", "above-below"]
HALVES: dict[str, Half] = {"x": "left-right", "y": "above-below"}
"""``relation`` by its axis; models learn the two at very different rates."""

MAX_QUESTIONS = 6
"""Questions that every scene allows."""

REVEALED = {"presence": 1, "relation": 2, "pair": 2}
"""How much a question's text reveals about the scene."""

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
PRESENCE = ("Is there {}?", "Does the image show {}?")
WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class SceneQuestion:
    """A question and its answer; ``pair`` names the minimal pair that it distinguishes."""

    category: str
    text: str
    answer: str
    pair: str = ""


def chance_accuracy(category: str, split: Split) -> float:
    """The accuracy in percent without the image, given the frequency of each answer."""
    if category in ("color", "shape"):
        # A color occurs with all shapes except the held-out one, unless that is tested.
        return 100 / (len(SHAPES) - 1 if split == "train" else len(SHAPES))
    return 100 / 3 if category == "count" else 50.0


def ask(staged: Staged, limit: int, about: Collection[str] = CATEGORIES) -> list[SceneQuestion]:
    """Up to ``limit`` questions about a scene: one per category of ``about``, then more yes/no questions.

    ``about`` may contain one of HALVES instead of ``relation``.
    """
    axes = [axis for axis, half in HALVES.items() if {"relation", half} & set(about)]
    rng = Random(f"llavactl scenes/questions/{staged.key}")
    questions = [_pair(staged.contrast, staged.scene)] if staged.contrast and "pair" in about else []
    generators = {
        "color": _color(staged, rng),
        "shape": _shape(staged, rng),
        "count": _count(staged, rng),
        "presence": _presence(staged, rng),
        "relation": _relation(staged, rng, axes),
    }
    categories = {*about, *(["relation"] if axes else [])}
    supply = {category: generator for category, generator in generators.items() if category in categories}
    # The categories are drawn independently of the scene. Only presence and relation may replace a category without a
    # question for this scene, since their answers are uniform for any scene.
    drawn = rng.sample(list(supply), len(supply))[: limit - len(questions)]
    questions += [question for category in drawn for question in islice(supply[category], 1)]
    for category in rng.sample(["presence", "relation"], 2) * MAX_QUESTIONS:
        if len(questions) < limit and category in supply:
            questions += islice(supply[category], 1)
    rng.shuffle(questions)
    # Any question may come first, as it would alone. Questions that name shapes come late, since their texts could
    # reveal answers of later questions.
    return questions[:1] + sorted(questions[1:], key=lambda question: REVEALED.get(question.category, 0))


def _color(staged: Staged, rng: Random) -> Iterator[SceneQuestion]:
    shapes = [thing.shape for thing in staged.scene.things]
    for thing in _subject([t for t in staged.scene.things if shapes.count(t.shape) == 1], staged.split, rng):
        text = rng.choice(("What color is the {}?", "Which color does the {} have?")).format(thing.shape)
        yield SceneQuestion("color", text, thing.color)


def _shape(staged: Staged, rng: Random) -> Iterator[SceneQuestion]:
    colors = [thing.color for thing in staged.scene.things]
    for thing in _subject([t for t in staged.scene.things if colors.count(t.color) == 1], staged.split, rng):
        text = rng.choice(("What shape is the {} object?", "Which shape does the {} object have?"))
        yield SceneQuestion("shape", text.format(thing.color), thing.shape)


def _subject(things: Sequence[DrawnShape], split: Split, rng: Random) -> list[DrawnShape]:
    """The shape to ask about, if any.

    In the test split, a held-out pair is asked about as often as each other pair. Scenes without both kinds would bias
    this, so they get no such question.
    """
    if split == "train":
        return [rng.choice(things)] if things else []
    held = [thing for thing in things if thing.held_out]
    ordinary = [thing for thing in things if not thing.held_out]
    if not held or not ordinary:
        return []
    return [rng.choice(held if rng.randrange(len(SHAPES)) == 0 else ordinary)]


def _count(staged: Staged, rng: Random) -> Iterator[SceneQuestion]:
    things = staged.scene.things
    if rng.random() < 0.5:
        text = rng.choice(("How many shapes are there?", "How many objects are in the image?"))
        yield SceneQuestion("count", text, str(len(things)))
        return
    counted = staged.counted
    what = PLURALS.get(counted, f"{counted} objects")
    text = rng.choice(("How many {} are there?", "How many {} are in the image?")).format(what)
    yield SceneQuestion("count", text, str(sum(counted in thing.pair for thing in things)))


def _presence(staged: Staged, rng: Random) -> Iterator[SceneQuestion]:
    """Questions for the presence of a pair, a shape and a color, one each."""
    forms = ["shape", "color"]
    rng.shuffle(forms)
    if staged.contrast is None or staged.contrast.kind != "binding":
        # A binding already asks for a pair. Excluding only that pair would make "no" likelier for the others.
        forms.insert(rng.choice((0, 0, 1, 2)), "pair")
    for form in forms:
        yes = rng.random() < 0.5
        what = _pair_to_find(staged, rng, yes) if form == "pair" else _kind_to_find(staged.scene, rng, form, yes)
        text = rng.choice(PRESENCE).format(article(what))
        yield SceneQuestion("presence", text, "yes" if yes else "no")


def _kind_to_find(scene: Scene, rng: Random, form: str, present: bool) -> str:
    """A shape ("circle") or color ("red object") that is present or absent."""
    names = {thing.shape if form == "shape" else thing.color for thing in scene.things}
    name = rng.choice([name for name in (SHAPES if form == "shape" else COLORS) if (name in names) == present])
    return name if form == "shape" else f"{name} object"


def _pair_to_find(staged: Staged, rng: Random, present: bool) -> str:
    """A present or absent pair; for most absent ones, color and shape are both present, in different shapes.

    In the test split, half of the pairs are held out, for both answers.
    """
    held = staged.split == "test" and rng.random() < 0.5
    things = staged.scene.things
    if present:
        return rng.choice([thing.name for thing in things if thing.held_out == held])
    colors, shapes = {thing.color for thing in things}, {thing.shape for thing in things}
    pairs = {thing.pair for thing in things}
    by_similarity: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for color in COLORS:
        for shape in SHAPES:
            if (color, shape) not in pairs and held_out(color, shape) == held:
                by_similarity[(color in colors) + (shape in shapes)].append(f"{color} {shape}")
    order = (2, 1, 0) if rng.random() < 0.6 else (1, 2, 0)
    return rng.choice(next(by_similarity[similarity] for similarity in order if by_similarity[similarity]))


def _relation(staged: Staged, rng: Random, axes: Collection[str]) -> Iterator[SceneQuestion]:
    """The relative positions of each two shapes along each of ``axes``, one question each."""
    contrast = staged.contrast
    known = {contrast.one.name, contrast.other.name} if contrast and contrast.kind == "arrangement" else set()
    facts = [
        (*both, axis) for both in combinations(staged.scene.things, 2) for axis in clear_axes(*both) if axis in axes
    ]
    rng.shuffle(facts)
    for one, other, axis in facts:
        if {one.name, other.name} == known:
            continue
        first, second = rng.sample((one, other), 2)
        yield SceneQuestion("relation", *_compared(first, second, axis, rng))


def _compared(one: DrawnShape, other: DrawnShape, axis: str, rng: Random) -> tuple[str, str]:
    """A question about the position of ``one``, drawn independently of the scene, and its answer."""
    actual = side(one, other, axis)
    first, second = rng.sample(AXES[axis], 2)
    if rng.random() < 0.5:
        return f"Is the {one.name} {WHERE[first]} the {other.name}?", "yes" if actual == first else "no"
    options = f"to the {first} or to the {second} of" if axis == "x" else f"{first} or {second}"
    return f"Is the {one.name} {options} the {other.name}?", actual


def _pair(contrast: Contrast, scene: Scene) -> SceneQuestion:
    """The question of a minimal pair: the same text for both scenes, with opposite answers."""
    rng = Random(f"llavactl scenes/pair/{contrast.id}")
    one, other = rng.sample((contrast.one, contrast.other), 2)
    things = {thing.name: thing for thing in scene.things}
    if contrast.kind == "binding":
        name = f"{one.color} {rng.choice((one, other)).shape}"
        text = rng.choice(PRESENCE).format(article(name))
        return SceneQuestion("pair", text, "yes" if name in things else "no", contrast.id)
    axis = rng.choice(clear_axes(one, other))
    return SceneQuestion("pair", *_compared(things[one.name], things[other.name], axis, rng), contrast.id)
