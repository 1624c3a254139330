"""Captions of a scene, each with randomly chosen wording."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from random import Random

from llavactl.components.sources.scenes.layout import Staged
from llavactl.components.sources.scenes.questions import PLURALS, WHERE
from llavactl.components.sources.scenes.things import DrawnShape, clear_axes, side
from llavactl.core.words import article

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

LISTS = (
    "{listed}.",
    "{number} shapes: {listed}.",
    "There are {number} shapes: {listed}.",
    "The picture shows {listed}.",
    "{listed} on a light background.",
)
IN_ORDER = 18
"""Minimum distance of neighbors along an axis for a caption that lists shapes in order."""


def captions(staged: Staged) -> tuple[str, ...]:
    """Three captions: a list of the shapes, the relative position of two, and their counts or order."""
    rng = Random(f"llavactl scenes/captions/{staged.key}")
    things = rng.sample(staged.scene.things, len(staged.scene.things))
    texts = (_listed(things, rng), _related(things, rng), _counted(things, rng) or _ordered(things, rng))
    return tuple(text[0].upper() + text[1:] for text in texts)


def description(staged: Staged) -> str:
    """All shapes from left to right and from top to bottom, in random order of the two."""
    things = staged.scene.things
    across = _named(sorted(things, key=lambda thing: thing.x))
    down = _named(sorted(things, key=lambda thing: thing.y))
    ways = [f"From left to right: {across}.", f"From top to bottom: {down}."]
    return " ".join(Random(f"llavactl scenes/description/{staged.key}").sample(ways, 2))


def enumerated(names: Sequence[str]) -> str:
    """The names, joined by commas and "and"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _named(things: Sequence[DrawnShape]) -> str:
    return enumerated([article(thing.name) for thing in things])


def _listed(things: Sequence[DrawnShape], rng: Random) -> str:
    return rng.choice(LISTS).format(number=NUMBERS[len(things)], listed=_named(things))


def _related(things: Sequence[DrawnShape], rng: Random) -> str:
    """The position of one shape relative to another, and the other shapes."""
    one, other, axis = rng.choice([(*both, axis) for both in combinations(things, 2) for axis in clear_axes(*both)])
    where = WHERE[side(one, other, axis)]
    rest = [thing for thing in things if thing not in (one, other)]
    if rng.random() < 0.5:
        also = f" There {'is' if len(rest) == 1 else 'are'} also {_named(rest)}." if rest else ""
        return f"the {one.name} is {where} the {other.name}.{also}"
    beside = f", with {_named(rest)}" if rest else ""
    return f"{article(one.name)} {where} {article(other.name)}{beside}."


def _counted(things: Sequence[DrawnShape], rng: Random) -> str | None:
    """The count of each shape or color; None if all counts are 1."""
    ways = []
    for by_color in (False, True):
        numbers = Counter(thing.color if by_color else thing.shape for thing in things)
        if max(numbers.values()) > 1:
            ways.append(enumerated([_several(kind, number, by_color) for kind, number in numbers.items()]))
    if not ways:
        return None
    return rng.choice(("{}: {}.", "the image has {}: {}.")).format(rng.choice(ways), _named(things))


def _several(kind: str, number: int, by_color: bool) -> str:
    if by_color:
        return f"{NUMBERS[number]} {kind} {'shape' if number == 1 else 'shapes'}"
    return f"{NUMBERS[number]} {kind if number == 1 else PLURALS[kind]}"


def _ordered(things: Sequence[DrawnShape], rng: Random) -> str:
    """The shapes from left to right or from top to bottom if the order is clear, otherwise a list."""
    across = sorted(things, key=lambda thing: thing.x)
    down = sorted(things, key=lambda thing: thing.y)
    ways = []
    if all(right.x - left.x >= IN_ORDER for left, right in pairwise(across)):
        ways.append(f"from left to right: {_named(across)}.")
    if all(lower.y - upper.y >= IN_ORDER for upper, lower in pairwise(down)):
        ways.append(f"from top to bottom: {_named(down)}.")
    return rng.choice(ways) if ways else _listed(things, rng)
