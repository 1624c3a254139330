"""The random shapes of a scene and their positions, such that all answers to a question are equally likely.

All colors, shapes and positions are treated alike, and the numbers of shapes come from PLANS; the tests of the answers'
distribution check any change. Every second pair of scenes is a minimal pair, equal except for one exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from random import Random
from typing import Literal

from llavactl.components.sources.scenes.things import (
    CANVAS,
    COLORS,
    SHAPES,
    DrawnShape,
    Rgb,
    Scene,
    Split,
    exchange_colors,
    exchange_places,
    held_out,
)

Pair = tuple[str, str]

PLANS = ((2, 1), (2, 1), (2, 2), (2, 2), (3, 1), (4, 1), (3, 2), (4, 2), (3, 3), (3, 3), (4, 3), (4, 3))
"""(shapes in the scene, shapes of the counted color or shape): each number is uniform over its three values."""

SMALLEST = 24
GAP = 9
"""Minimum distance of the circles around two shapes: even small adjacent ones are CLEAR along an axis."""

MARGIN = 5
LARGEST = {2: 42, 3: 40, 4: 36}
"""Maximum radius by the number of shapes, small enough to find free positions quickly."""


@dataclass(frozen=True)
class Contrast:
    """The difference of the two scenes of a minimal pair: ``one`` and ``other``, as in the first scene."""

    id: str
    kind: Literal["binding", "arrangement"]
    one: DrawnShape
    other: DrawnShape


@dataclass(frozen=True)
class Staged:
    """A scene with the data of its questions; ``key`` seeds all other random choices for it."""

    id: str
    key: str
    split: Split
    scene: Scene
    counted: str
    contrast: Contrast | None = None


def stage(split: Split, seed: int, index: int) -> Staged:
    """The scene with index ``index`` of a split; independent of other calls."""
    couple, second = divmod(index, 2)
    # Scenes 2 and 3, 6 and 7, … are minimal pairs; the others are independent.
    contrasted = couple % 2 == 1
    drawn = index - second if contrasted else index
    rng = Random(f"llavactl scenes/{split}/{seed}/{drawn}")
    pairs, counted = _cast(rng, split)
    scene = Scene(_place(rng, pairs), _background(rng), rng.getrandbits(32))
    staged = Staged(f"{split}-{index:05d}", f"{split}/{seed}/{index}", split, scene, counted)
    if not contrasted:
        return staged
    twins, contrast = _twins(rng, scene, split, f"{split}/{seed}/{drawn}")
    return replace(staged, scene=twins[second], contrast=contrast)


def allowed(pairs: Sequence[Pair], split: Split) -> bool:
    """Whether a scene may have these pairs: all different, and in training none held out.

    A test scene has held-out and other pairs. If all were held out, the available questions would reveal answers.
    """
    if len(set(pairs)) < len(pairs):
        return False
    held = sum(held_out(*pair) for pair in pairs)
    return held == 0 if split == "train" else 0 < held < len(pairs)


def _cast(rng: Random, split: Split) -> tuple[list[Pair], str]:
    """The pairs of a scene, and the color or shape whose count its plan determines."""
    things, same = rng.choice(PLANS)
    by_color = rng.random() < 0.5
    counted = rng.choice(list(COLORS) if by_color else SHAPES)
    everything = [(color, shape) for color in COLORS for shape in SHAPES]
    inside = [pair for pair in everything if counted in pair]
    outside = [pair for pair in everything if counted not in pair]
    while True:
        pairs = rng.sample(inside, same) + rng.sample(outside, things - same)
        if allowed(pairs, split):
            return pairs, counted


def _place(rng: Random, pairs: Sequence[Pair]) -> tuple[DrawnShape, ...]:
    """The pairs as shapes that don't overlap."""
    things: list[DrawnShape] = []
    tries = 0
    while len(things) < len(pairs):
        tries += 1
        if tries % 50 == 0:
            things.clear()
        color, shape = pairs[len(things)]
        radius = rng.randint(SMALLEST, LARGEST[len(pairs)])
        low, high = radius + MARGIN, CANVAS - radius - MARGIN
        x, y, angle = rng.randint(low, high), rng.randint(low, high), rng.randint(-9, 9)
        thing = DrawnShape(color, shape, x, y, radius, angle, _shade(rng, COLORS[color]))
        if all(_apart(thing, other) for other in things):
            things.append(thing)
    return tuple(things)


def _apart(one: DrawnShape, other: DrawnShape) -> bool:
    return (one.x - other.x) ** 2 + (one.y - other.y) ** 2 >= (one.radius + other.radius + GAP) ** 2


def _shade(rng: Random, rgb: Rgb) -> Rgb:
    """The color with small random changes, so that a name isn't a single value."""
    red, green, blue = (min(255, max(0, value + rng.randint(-9, 9))) for value in rgb)
    return red, green, blue


def _background(rng: Random) -> Rgb:
    return rng.randint(222, 248), rng.randint(222, 248), rng.randint(222, 248)


def _twins(rng: Random, scene: Scene, split: Split, name: str) -> tuple[tuple[Scene, Scene], Contrast]:
    """Two scenes that differ in the colors of two shapes (binding) or in their positions (arrangement).

    Both have the same number of shapes of each color and kind, so counts are equal.
    """
    couples = list(combinations(range(len(scene.things)), 2))
    bindings = [places for places in couples if _rebinds(scene, places, split)]
    if bindings:
        # A third of the scenes allow a binding; any scene allows an arrangement.
        places = rng.choice(bindings)
        first, exchange = scene, exchange_colors
    else:
        places = rng.choice(couples)
        first, exchange = _equally_large(scene, places), exchange_places
    one, other = (first.things[place] for place in places)
    contrast = Contrast(name, "binding" if bindings else "arrangement", one, other)
    return (first, _exchanged(first, places, exchange)), contrast


def _rebinds(scene: Scene, places: tuple[int, int], split: Split) -> bool:
    """Whether exchanging two colors gives other pairs, and the split allows them.

    Two equal shapes would only exchange positions, and two equal colors nothing.
    """
    one, other = (scene.things[place] for place in places)
    pairs = [thing.pair for thing in _exchanged(scene, places, exchange_colors).things]
    return one.color != other.color and one.shape != other.shape and allowed(pairs, split)


def _exchanged(
    scene: Scene, places: tuple[int, int], exchange: Callable[[DrawnShape, DrawnShape], tuple[DrawnShape, DrawnShape]]
) -> Scene:
    things = list(scene.things)
    things[places[0]], things[places[1]] = exchange(things[places[0]], things[places[1]])
    return replace(scene, things=tuple(things))


def _equally_large(scene: Scene, places: tuple[int, int]) -> Scene:
    """The scene with the larger of the two shapes shrunk, so that each fits at the other's position."""
    radius = min(scene.things[place].radius for place in places)
    things = (replace(thing, radius=radius) if i in places else thing for i, thing in enumerate(scene.things))
    return replace(scene, things=tuple(things))
