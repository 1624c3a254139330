"""What is asked about a scene: short questions whose text gives nothing away.

Given the text alone, every answer that a split allows is equally likely. What is asked, and for a yes
or no which of the two, is decided by lot before the scene is looked at; which thing is asked about
treats all colors, shapes and places alike. ``chance`` is thus what a reader of the texts alone gets right.
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

Category = Literal["color", "shape", "count", "presence", "relation", "pair"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""What a question is about; ``pair`` is the one question that both scenes of a minimal pair are asked."""

Half = Literal["left-right", "above-below"]
HALVES: dict[str, Half] = {"x": "left-right", "y": "above-below"}
"""``relation`` by its axis: the two are learned very differently."""

MOST = 6
"""So many questions can be asked about every scene."""

TELLING = {"presence": 1, "relation": 2, "pair": 2}
"""How much a question's text tells about the scene."""

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
PRESENCE = ("Is there {}?", "Does the image show {}?")
WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class SceneQuestion:
    """A question and its answer; ``pair`` names the minimal pair that it tells apart."""

    category: str
    text: str
    answer: str
    pair: str = ""


def chance(category: str, split: Split) -> float:
    """The percentage of right answers of one who sees no picture, but knows how often each answer is right."""
    if category in ("color", "shape"):
        # A color goes with all shapes but the one held out, unless that one is tested.
        return 100 / (len(SHAPES) - 1 if split == "train" else len(SHAPES))
    return 100 / 3 if category == "count" else 50.0


def ask(staged: Staged, limit: int, about: Collection[str] = CATEGORIES) -> list[SceneQuestion]:
    """``limit`` questions about a scene, at most MOST: one of each category of ``about``, then more yes and no.

    ``about`` may have one of HALVES in place of ``relation``.
    """
    axes = [axis for axis, half in HALVES.items() if {"relation", half} & set(about)]
    rng = Random(f"llavactl scenes/questions/{staged.key}")
    asked = [_pair(staged.contrast, staged.scene)] if staged.contrast and "pair" in about else []
    every = {
        "color": _color(staged, rng),
        "shape": _shape(staged, rng),
        "count": _count(staged, rng),
        "presence": _presence(staged, rng),
        "relation": _relation(staged, rng, axes),
    }
    asked_for = {*about, *(["relation"] if axes else [])}
    supply = {category: questions for category, questions in every.items() if category in asked_for}
    # The categories are chosen blindly. Only presence and relation may stand in for one that this scene
    # has no question of: their answers are even in whatever scene they are asked.
    wanted = rng.sample(list(supply), len(supply))[: limit - len(asked)]
    asked += [question for category in wanted for question in islice(supply[category], 1)]
    for category in rng.sample(["presence", "relation"], 2) * MOST:
        if len(asked) < limit and category in supply:
            asked += islice(supply[category], 1)
    rng.shuffle(asked)
    # Any of them opens the conversation, as when it is asked alone; those that name things come late, or
    # much of what is asked after them could be read off their texts.
    return asked[:1] + sorted(asked[1:], key=lambda question: TELLING.get(question.category, 0))


def article(name: str) -> str:
    """``name`` with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


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
    """The thing to ask about, if any will do.

    When testing, a held-out pair is asked about as often as each other pair. Scenes that hadn't both to
    choose from would tip that, so they are not asked.
    """
    if split == "train":
        return [rng.choice(things)] if things else []
    unseen = [thing for thing in things if thing.held_out]
    ordinary = [thing for thing in things if not thing.held_out]
    if not unseen or not ordinary:
        return []
    return [rng.choice(unseen if rng.randrange(len(SHAPES)) == 0 else ordinary)]


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
    """Is there such a thing? Each form once: by pair, by shape, by color."""
    forms = ["shape", "color"]
    rng.shuffle(forms)
    if staged.contrast is None or staged.contrast.kind != "binding":
        # A binding asks for a pair already. Leaving out just that pair would make the others' "no" likelier.
        forms.insert(rng.choice((0, 0, 1, 2)), "pair")
    for form in forms:
        yes = rng.random() < 0.5
        what = _pair_to_find(staged, rng, yes) if form == "pair" else _kind_to_find(staged.scene, rng, form, yes)
        text = rng.choice(PRESENCE).format(article(what))
        yield SceneQuestion("presence", text, "yes" if yes else "no")


def _kind_to_find(scene: Scene, rng: Random, form: str, present: bool) -> str:
    """A shape ("circle") or color ("red object") that is in the scene, or is not."""
    seen = {thing.shape if form == "shape" else thing.color for thing in scene.things}
    name = rng.choice([name for name in (SHAPES if form == "shape" else COLORS) if (name in seen) == present])
    return name if form == "shape" else f"{name} object"


def _pair_to_find(staged: Staged, rng: Random, present: bool) -> str:
    """A color and shape that a thing has, or none has: then mostly one where both are there, apart.

    When testing, half of them are held out, whatever the answer.
    """
    unseen = staged.split == "test" and rng.random() < 0.5
    things = staged.scene.things
    if present:
        return rng.choice([thing.name for thing in things if thing.held_out == unseen])
    colors, shapes = {thing.color for thing in things}, {thing.shape for thing in things}
    there = {thing.pair for thing in things}
    by_likeness: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for color in COLORS:
        for shape in SHAPES:
            if (color, shape) not in there and held_out(color, shape) == unseen:
                by_likeness[(color in colors) + (shape in shapes)].append(f"{color} {shape}")
    order = (2, 1, 0) if rng.random() < 0.6 else (1, 2, 0)
    return rng.choice(next(by_likeness[likeness] for likeness in order if by_likeness[likeness]))


def _relation(staged: Staged, rng: Random, axes: Collection[str]) -> Iterator[SceneQuestion]:
    """Which of two things is where, each two and each of ``axes`` once."""
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
    """A question on where ``one`` is, and its answer; the question is made without looking."""
    here = side(one, other, axis)
    first, second = rng.sample(AXES[axis], 2)
    if rng.random() < 0.5:
        return f"Is the {one.name} {WHERE[first]} the {other.name}?", "yes" if here == first else "no"
    options = f"to the {first} or to the {second} of" if axis == "x" else f"{first} or {second}"
    return f"Is the {one.name} {options} the {other.name}?", here


def _pair(contrast: Contrast, scene: Scene) -> SceneQuestion:
    """The question of a minimal pair: the same text about both scenes, with opposite answers."""
    rng = Random(f"llavactl scenes/pair/{contrast.id}")
    one, other = rng.sample((contrast.one, contrast.other), 2)
    things = {thing.name: thing for thing in scene.things}
    if contrast.kind == "binding":
        name = f"{one.color} {rng.choice((one, other)).shape}"
        text = rng.choice(PRESENCE).format(article(name))
        return SceneQuestion("pair", text, "yes" if name in things else "no", contrast.id)
    axis = rng.choice(clear_axes(one, other))
    return SceneQuestion("pair", *_compared(things[one.name], things[other.name], axis, rng), contrast.id)
