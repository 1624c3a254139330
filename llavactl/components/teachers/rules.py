"""A teacher without a network: captions and boxes to conversations, descriptions and reasoning, by rules.

It answers in the form that a language model is asked for, so that all else is the same for both. What is
asked, and for a yes or no which of the two, is drawn before the picture is looked at: answers can't be told
from the question's words. It names nothing that the picture doesn't have, but what ``extra["absent"]`` lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, permutations
from random import Random
from typing import TypeVar

from pydantic import Field

from llavactl.core.errors import DataError
from llavactl.core.protocols import Request
from llavactl.core.registry import Options
from llavactl.core.schema import Box, Sample

COLORS = frozenset(
    ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "brown", "gray", "grey", "pink"]
)
CLEAR = 0.18
"""How far apart two centers are, as a share of the picture, before one is said to be left of the other."""

IN_ORDER = 0.03
"""How far apart neighbours are, as a share of the picture, before things are told in their order."""

QA = tuple[str, str]
T = TypeVar("T")


class RulesOptions(Options):
    """``questions``: at most so many in one conversation."""

    questions: int = Field(6, ge=1)


class Rules:
    """The teacher ``rules``; the same request always has the same reply."""

    exact = True

    def __init__(self, options: RulesOptions) -> None:
        self.options = options

    def reply(self, request: Request) -> str:
        """Raises DataError for a picture without boxes: there is nothing to reason from."""
        if not request.sample.boxes:
            raise DataError(f"{request.sample.where or request.id}: no boxes", hint="the teacher `rules` needs boxes")
        rng = Random(f"{request.seed}/{request.kind}/{request.id}")
        things = [NamedBox(box) for box in request.sample.boxes if not box.crowd]
        if request.kind == "detail":
            return _description(things, rng)
        pairs = [_reasoning(things, rng)]
        if request.kind == "conversation":
            pairs = _conversation(request.sample, things, rng, self.options.questions)
        return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


class NamedBox:
    """A box in words: ``name`` ("red circle"), its ``color`` where it has one, its ``kind``, its center (x, y)."""

    def __init__(self, box: Box) -> None:
        first, _, rest = box.category.partition(" ")
        self.name = box.category
        self.color, self.kind = (first, rest) if rest and first in COLORS else ("", box.category)
        left, top, right, bottom = box.xyxy
        self.x, self.y, self.area = (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)


def _conversation(sample: Sample, things: Sequence[NamedBox], rng: Random, limit: int) -> list[QA]:
    """Questions of every sort by turns, none twice; behind the first, those whose text tells the most come last.

    What an earlier text has told needs no picture any more, and teaches nothing of it.
    """
    absent = [str(name) for name in sample.extra.get("absent", ())]
    looks, counts, presence = _looks(things, rng), _counts(things, rng), _presence(things, absent, rng)
    relations = _relations(things, rng)
    # Each with how much its text tells.
    sorts: list[tuple[int, Iterator[QA]]] = [(0, looks), (0, looks), (0, counts), (1, presence)]
    sorts += [(2, relations), (2, relations)]
    rng.shuffle(sorts)
    asked: dict[str, tuple[int, str]] = {}
    while sorts and len(asked) < limit:
        for sort in list(sorts):
            found = next(sort[1], None)
            if found is None:
                sorts.remove(sort)
            elif len(asked) < limit:
                asked.setdefault(found[0], (sort[0], found[1]))
    # Any of them opens the conversation: most questions of this world are asked alone.
    first, *rest = _shuffled(list(asked.items()), rng)
    pairs = [first, *sorted(rest, key=lambda each: each[1][0])]
    return [(question, answer) for question, (_, answer) in pairs]


def _looks(things: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    """The color of a thing, or its kind: one question about each, as each answer is told by the other's question."""
    for thing in _shuffled([thing for thing in things if thing.color], rng):
        color = rng.choice(("What color is the {}?", "Which color does the {} have?")).format(thing.kind)
        kind = rng.choice(("What shape is the {} object?", "Which shape does the {} object have?")).format(thing.color)
        ways = [(color, thing.color)] * _only(things, "kind", thing) + [(kind, thing.kind)] * _only(
            things, "color", thing
        )
        if ways:
            yield rng.choice(ways)


def _counts(things: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    """How many of all, of a kind, of a color, the largest groups mostly first.

    Most groups are of one: drawn alike, "1" would be the answer to most questions, and with the largest
    always first "2" would.
    """
    every = rng.choice(("How many shapes are there?", "How many objects are in the image?"))
    everything = (every if all(thing.color for thing in things) else "How many objects are there?", str(len(things)))
    groups = Counter([plural(thing.kind) for thing in things])
    groups.update(f"{thing.color} objects" for thing in things if thing.color)
    wordings = ("How many {} are there?", "How many {} are in the image?")
    largest = _shuffled(sorted(groups), rng)
    if rng.random() < 0.75:
        largest.sort(key=lambda name: -groups[name])
    asked = [(rng.choice(wordings).format(name), str(groups[name])) for name in largest]
    asked.insert(rng.randrange(2), everything)
    yield from asked


def _presence(things: Sequence[NamedBox], absent: Sequence[str], rng: Random) -> Iterator[QA]:
    names = {"name": absent, "kind": [NamedBox(_named(name)).kind for name in absent]}
    names["color"] = [f"{color} object" for name in absent if (color := NamedBox(_named(name)).color)]
    for form in _shuffled(["name", "kind", "color"], rng):
        here = {f"{thing.color} object" if form == "color" else str(getattr(thing, form)) for thing in things}
        here -= {" object"}
        there = sorted(set(names[form]) - here)
        yes = rng.random() < 0.5
        if not here or not there:
            continue
        name = rng.choice(sorted(here) if yes else there)
        wording = rng.choice(("Is there {}?", "Does the image show {}?"))
        yield wording.format(article(name)), "yes" if yes else "no"


def _relations(things: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    single = [thing for thing in things if _only(things, "name", thing)]
    for one, other in _shuffled(list(permutations(single, 2)), rng):
        sides = [side for side in (_across(one, other), _upright(one, other)) if side]
        if not sides:
            continue
        here = rng.choice(sides)
        words = ("left", "right") if here in ("left", "right") else ("above", "below")
        first, second = rng.sample(words, 2)
        if rng.random() < 0.5:
            yield f"Is the {one.name} {WHERE[first]} the {other.name}?", "yes" if here == first else "no"
        else:
            options = f"to the {first} or to the {second} of" if here in ("left", "right") else f"{first} or {second}"
            yield f"Is the {one.name} {options} the {other.name}?", here


WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def _across(one: NamedBox, other: NamedBox) -> str:
    return _side(one.x - other.x, one.y - other.y, ("left", "right"))


def _upright(one: NamedBox, other: NamedBox) -> str:
    return _side(one.y - other.y, one.x - other.x, ("above", "below"))


def _side(along: float, aside: float, words: tuple[str, str]) -> str:
    """The word for where something is along an axis; "" when that is not clear."""
    return "" if abs(along) < max(CLEAR, abs(aside) / 2) else words[along > 0]


def _description(things: Sequence[NamedBox], rng: Random) -> str:
    """How many things there are, which and where: in their order along both axes, else each with its place."""
    number = NUMBERS.get(len(things), str(len(things)))
    noun = "shape" if all(thing.color for thing in things) else "object"
    several = len(things) != 1
    said = [f"There {'are' if several else 'is'} {number} {noun}{'s' * several} in the picture."]
    orders = [*_order(things, "From left to right", "x"), *_order(things, "From top to bottom", "y")]
    said += _shuffled(orders, rng)
    if len(orders) < 2:
        said += [_sentence(f"{article(thing.name)} is {_place(thing)}.") for thing in _shuffled(things, rng)]
    one, other = max(things, key=lambda thing: thing.area), min(things, key=lambda thing: thing.area)
    if one.name != other.name and one.area > 1.3 * other.area:
        said.append(f"The {one.name} is larger than the {other.name}.")
    return " ".join(said)


def _order(things: Sequence[NamedBox], way: str, axis: str) -> list[str]:
    """The things in their order along an axis, where nobody would argue about it."""
    order = sorted(things, key=lambda thing: float(getattr(thing, axis)))
    clear = all(getattr(b, axis) - getattr(a, axis) >= IN_ORDER for a, b in pairwise(order))
    names = [article(thing.name) for thing in order]
    return [f"{way}: {', '.join(names[:-1])} and {names[-1]}."] if clear and len(order) > 1 else []


def _reasoning(things: Sequence[NamedBox], rng: Random) -> QA:
    """A question that takes two looks, and an answer that says both."""
    ways: list[Callable[[], QA | None]] = [
        lambda: _left_over(things, rng), lambda: _nearest_corner(things, rng), lambda: _largest(things)
    ]  # fmt: skip
    for way in _shuffled(ways, rng):
        if (found := way()) is not None:
            return found
    return "What is the one thing to be seen?", f"It is {article(things[0].name)}."


def _left_over(things: Sequence[NamedBox], rng: Random) -> QA | None:
    colors = sorted({thing.color for thing in things if thing.color})
    if not colors:
        return None
    color = rng.choice(colors)
    gone = sum(thing.color == color for thing in things)
    left = len(things) - gone
    return (
        f"If everything {color} were taken away, how many shapes would be left?",
        f"There are {len(things)} shapes and {gone} of them {'is' if gone == 1 else 'are'} {color}, "
        f"so {left} would be left.",
    )


def _nearest_corner(things: Sequence[NamedBox], rng: Random) -> QA | None:
    name, x, y = rng.choice((("top left", 0, 0), ("top right", 1, 0), ("bottom left", 0, 1), ("bottom right", 1, 1)))
    near = sorted(things, key=lambda thing: (thing.x - x) ** 2 + (thing.y - y) ** 2)
    if len(near) < 2:
        return None
    what = "shape" if all(thing.color for thing in things) else "object"
    return (
        f"Which {what} is nearest to the {name} corner, and where is it?",
        f"It is the {near[0].name}: it is {_place(near[0])}, while the {near[1].name} is {_place(near[1])}.",
    )


def _largest(things: Sequence[NamedBox]) -> QA | None:
    order = sorted(things, key=lambda thing: -thing.area)
    if len(order) < 2 or order[0].area < 1.25 * order[1].area:
        return None
    return (
        "Which one is the largest, and what comes next?",
        f"The {order[0].name} takes up the most room, and the {order[1].name} comes next.",
    )


def _place(thing: NamedBox) -> str:
    """``in the top left``, ``in the middle``, ``on the right`` …"""
    across = "left" if thing.x < 0.36 else "right" if thing.x > 0.64 else ""
    upright = "top" if thing.y < 0.36 else "bottom" if thing.y > 0.64 else ""
    if not across and not upright:
        return "in the middle"
    if across and upright:
        return f"in the {upright} {across}"
    return f"on the {across}" if across else f"at the {upright}"


NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def article(name: str) -> str:
    """``name`` with "a" or "an"."""
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """More than one of ``name``."""
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _named(name: str) -> Box:
    return Box(name, (0, 0, 1, 1))


def _only(things: Sequence[NamedBox], what: str, thing: NamedBox) -> bool:
    return sum(getattr(other, what) == getattr(thing, what) for other in things) == 1


def _shuffled(items: Sequence[T], rng: Random) -> list[T]:
    return rng.sample(items, len(items))
