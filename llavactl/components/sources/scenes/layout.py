"""Which things a scene has and where they are: drawn by lot so that no question has a favorite answer.

Every choice treats all colors, all shapes and all places alike, and the numbers of things come from
PLANS; that is what makes the answers even, so a change here is checked by the tests of chance.
Scenes come in twos: every other two are a minimal pair, equal but for one exchange.
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
"""(things in the scene, things of the counted color or shape): each number is even over its three values."""

SMALLEST = 24
GAP = 9
"""Between the circles around two things: so wide that even small ones side by side are CLEAR along an axis."""

MARGIN = 5
LARGEST = {2: 42, 3: 40, 4: 36}
"""Radii by the number of things, small enough that a free place is soon found."""


@dataclass(frozen=True)
class Contrast:
    """What the two scenes of a minimal pair differ in: ``one`` and ``other``, as the first scene has them."""

    id: str
    kind: Literal["binding", "arrangement"]
    one: DrawnShape
    other: DrawnShape


@dataclass(frozen=True)
class Staged:
    """A scene with what its questions need to know. ``key`` seeds whatever else is drawn by lot for it."""

    id: str
    key: str
    split: Split
    scene: Scene
    counted: str
    contrast: Contrast | None = None


def stage(split: Split, seed: int, index: int) -> Staged:
    """The scene number ``index`` of a split, whichever others were asked for before."""
    couple, second = divmod(index, 2)
    # Scenes 2 and 3, 6 and 7, … are minimal pairs; the others are drawn one by one.
    contrasted = couple % 2 == 1
    drawn = index - second if contrasted else index
    rng = Random(f"llavactl scenes/{split}/{seed}/{drawn}")
    pairs, counted = _cast(rng, split)
    scene = Scene(_place(rng, pairs), _background(rng), rng.getrandbits(32))
    here = Staged(f"{split}-{index:05d}", f"{split}/{seed}/{index}", split, scene, counted)
    if not contrasted:
        return here
    twins, contrast = _twins(rng, scene, split, f"{split}/{seed}/{drawn}")
    return replace(here, scene=twins[second], contrast=contrast)


def allowed(pairs: Sequence[Pair], split: Split) -> bool:
    """Whether a scene may have these pairs: all different, and none held out when training.

    A scene for testing has a held-out pair and an ordinary one too: were all of them held out, which
    questions can be asked would give answers away.
    """
    if len(set(pairs)) < len(pairs):
        return False
    unseen = sum(held_out(*pair) for pair in pairs)
    return unseen == 0 if split == "train" else 0 < unseen < len(pairs)


def _cast(rng: Random, split: Split) -> tuple[list[Pair], str]:
    """Colors and shapes of a scene, and the color or shape of which it has as many as its plan says."""
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
    """The pairs as things, apart from each other."""
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
    """The color a little off, so that no single value stands for a name."""
    red, green, blue = (min(255, max(0, value + rng.randint(-9, 9))) for value in rgb)
    return red, green, blue


def _background(rng: Random) -> Rgb:
    return rng.randint(222, 248), rng.randint(222, 248), rng.randint(222, 248)


def _twins(rng: Random, scene: Scene, split: Split, name: str) -> tuple[tuple[Scene, Scene], Contrast]:
    """Two scenes that differ in the colors of two things (binding) or in their places (arrangement).

    Both keep the numbers of things of each color and shape, so what is counted in one holds in the other.
    """
    couples = list(combinations(range(len(scene.things)), 2))
    bindings = [places for places in couples if _rebinds(scene, places, split)]
    if bindings:
        # A third of the scenes allow it; any scene allows an arrangement.
        places = rng.choice(bindings)
        first, exchange = scene, exchange_colors
    else:
        places = rng.choice(couples)
        first, exchange = _equally_large(scene, places), exchange_places
    one, other = (first.things[place] for place in places)
    contrast = Contrast(name, "binding" if bindings else "arrangement", one, other)
    return (first, _exchanged(first, places, exchange)), contrast


def _rebinds(scene: Scene, places: tuple[int, int], split: Split) -> bool:
    """Whether exchanging two colors makes other pairs, and ones that the split allows.

    Two things of one shape would only change places, and two of one color not even that.
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
    """The scene with the larger of the two shrunk, so that either fits where the other is."""
    radius = min(scene.things[place].radius for place in places)
    things = (replace(thing, radius=radius) if i in places else thing for i, thing in enumerate(scene.things))
    return replace(scene, things=tuple(things))
