"""The teacher ``rules``: conversations, descriptions and reasoning from boxes, by templates and without a model.

Replies have the same form as those of a language model. The question, and the answer of a yes/no question, are drawn
before the boxes are used, so that answers can't be guessed from the wording. Only objects of the image and those in
``extra["absent"]`` are mentioned.
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
from llavactl.core.words import article

COLORS = frozenset(
    ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "brown", "gray", "grey", "pink"]
)
MIN_DISTANCE = 0.18
"""Minimum distance of two centers, relative to the image size, for a question about their relation."""

MIN_GAP = 0.03
"""Minimum distance of neighbors, relative to the image size, for a description in order."""

QA = tuple[str, str]
T = TypeVar("T")


class RulesOptions(Options):
    """Options of the teacher ``rules``."""

    questions: int = Field(6, ge=1, description="maximum number of questions per conversation")


class Rules:
    """The teacher ``rules``; replies are deterministic."""

    exact = True

    def __init__(self, options: RulesOptions) -> None:
        self.options = options

    def reply(self, request: Request) -> str:
        """Raises DataError for an image without boxes."""
        if not request.sample.boxes:
            raise DataError(f"{request.sample.where or request.id}: no boxes", hint="the teacher `rules` needs boxes")
        rng = Random(f"{request.seed}/{request.kind}/{request.id}")
        objects = [NamedBox(box) for box in request.sample.boxes if not box.crowd]
        if request.kind == "detail":
            return _description(objects, rng)
        pairs = [_reasoning(objects, rng)]
        if request.kind == "conversation":
            pairs = _conversation(request.sample, objects, rng, self.options.questions)
        return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


class NamedBox:
    """A box with its ``name`` ("red circle"), ``color`` ("" if it has none), ``kind`` and center (x, y)."""

    def __init__(self, box: Box) -> None:
        first, _, rest = box.category.partition(" ")
        self.name = box.category
        self.color, self.kind = (first, rest) if rest and first in COLORS else ("", box.category)
        left, top, right, bottom = box.xyxy
        self.x, self.y, self.area = (left + right) / 2, (top + bottom) / 2, (right - left) * (bottom - top)


def _conversation(sample: Sample, objects: Sequence[NamedBox], rng: Random, limit: int) -> list[QA]:
    """Questions of all types in turn, without repetition.

    After the first, questions are ordered by how much their text reveals: an answer that follows from earlier text
    doesn't need the image.
    """
    absent = [str(name) for name in sample.extra.get("absent", ())]
    looks, counts, presence = _looks(objects, rng), _counts(objects, rng), _presence(objects, absent, rng)
    relations = _relations(objects, rng)
    # Each with the amount of information in its text.
    types: list[tuple[int, Iterator[QA]]] = [(0, looks), (0, looks), (0, counts), (1, presence)]
    types += [(2, relations), (2, relations)]
    rng.shuffle(types)
    selected: dict[str, tuple[int, str]] = {}
    while types and len(selected) < limit:
        for question_type in list(types):
            pair = next(question_type[1], None)
            if pair is None:
                types.remove(question_type)
            elif len(selected) < limit:
                selected.setdefault(pair[0], (question_type[0], pair[1]))
    # Any type may come first, as evaluation asks single questions.
    first, *rest = _shuffled(list(selected.items()), rng)
    pairs = [first, *sorted(rest, key=lambda item: item[1][0])]
    return [(question, answer) for question, (_, answer) in pairs]


def _looks(objects: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    """One question per object, about color or kind: each question reveals the answer to the other."""
    for box in _shuffled([box for box in objects if box.color], rng):
        color = rng.choice(("What color is the {}?", "Which color does the {} have?")).format(box.kind)
        kind = rng.choice(("What shape is the {} object?", "Which shape does the {} object have?")).format(box.color)
        options = [(color, box.color)] * _only(objects, "kind", box) + [(kind, box.kind)] * _only(objects, "color", box)
        if options:
            yield rng.choice(options)


def _counts(objects: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    """Questions about the number of all objects, of a kind, and of a color; in most cases, the largest groups first.

    Most groups have one object: in random order, "1" would answer most questions; with the largest group always first,
    "2" would.
    """
    question = rng.choice(("How many shapes are there?", "How many objects are in the image?"))
    everything = (question if all(box.color for box in objects) else "How many objects are there?", str(len(objects)))
    groups = Counter([plural(box.kind) for box in objects])
    groups.update(f"{box.color} objects" for box in objects if box.color)
    wordings = ("How many {} are there?", "How many {} are in the image?")
    largest = _shuffled(sorted(groups), rng)
    if rng.random() < 0.75:
        largest.sort(key=lambda name: -groups[name])
    pairs = [(rng.choice(wordings).format(name), str(groups[name])) for name in largest]
    pairs.insert(rng.randrange(2), everything)
    yield from pairs


def _presence(objects: Sequence[NamedBox], absent: Sequence[str], rng: Random) -> Iterator[QA]:
    names = {"name": absent, "kind": [NamedBox(_named(name)).kind for name in absent]}
    names["color"] = [f"{color} object" for name in absent if (color := NamedBox(_named(name)).color)]
    for form in _shuffled(["name", "kind", "color"], rng):
        present = {f"{box.color} object" if form == "color" else str(getattr(box, form)) for box in objects}
        present -= {" object"}
        missing = sorted(set(names[form]) - present)
        yes = rng.random() < 0.5
        if not present or not missing:
            continue
        name = rng.choice(sorted(present) if yes else missing)
        wording = rng.choice(("Is there {}?", "Does the image show {}?"))
        yield wording.format(article(name)), "yes" if yes else "no"


def _relations(objects: Sequence[NamedBox], rng: Random) -> Iterator[QA]:
    single = [box for box in objects if _only(objects, "name", box)]
    for one, other in _shuffled(list(permutations(single, 2)), rng):
        sides = [side for side in (_horizontal(one, other), _vertical(one, other)) if side]
        if not sides:
            continue
        side = rng.choice(sides)
        words = ("left", "right") if side in ("left", "right") else ("above", "below")
        first, second = rng.sample(words, 2)
        if rng.random() < 0.5:
            yield f"Is the {one.name} {WHERE[first]} the {other.name}?", "yes" if side == first else "no"
        else:
            options = f"to the {first} or to the {second} of" if side in ("left", "right") else f"{first} or {second}"
            yield f"Is the {one.name} {options} the {other.name}?", side


WHERE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def _horizontal(one: NamedBox, other: NamedBox) -> str:
    return _side(one.x - other.x, one.y - other.y, ("left", "right"))


def _vertical(one: NamedBox, other: NamedBox) -> str:
    return _side(one.y - other.y, one.x - other.x, ("above", "below"))


def _side(along: float, across: float, words: tuple[str, str]) -> str:
    """The word for the direction along an axis; "" if it is ambiguous."""
    return "" if abs(along) < max(MIN_DISTANCE, abs(across) / 2) else words[along > 0]


def _description(objects: Sequence[NamedBox], rng: Random) -> str:
    """The number of objects and their order along both axes, or else the position of each."""
    number = NUMBERS.get(len(objects), str(len(objects)))
    noun = "shape" if all(box.color for box in objects) else "object"
    several = len(objects) != 1
    sentences = [f"There {'are' if several else 'is'} {number} {noun}{'s' * several} in the picture."]
    orders = [*_order(objects, "From left to right", "x"), *_order(objects, "From top to bottom", "y")]
    sentences += _shuffled(orders, rng)
    if len(orders) < 2:
        sentences += [_sentence(f"{article(box.name)} is {_position(box)}.") for box in _shuffled(objects, rng)]
    one, other = max(objects, key=lambda box: box.area), min(objects, key=lambda box: box.area)
    if one.name != other.name and one.area > 1.3 * other.area:
        sentences.append(f"The {one.name} is larger than the {other.name}.")
    return " ".join(sentences)


def _order(objects: Sequence[NamedBox], direction: str, axis: str) -> list[str]:
    """The objects in their order along an axis, if it is unambiguous."""
    order = sorted(objects, key=lambda box: float(getattr(box, axis)))
    clear = all(getattr(b, axis) - getattr(a, axis) >= MIN_GAP for a, b in pairwise(order))
    names = [article(box.name) for box in order]
    return [f"{direction}: {', '.join(names[:-1])} and {names[-1]}."] if clear and len(order) > 1 else []


def _reasoning(objects: Sequence[NamedBox], rng: Random) -> QA:
    """A question that needs two facts about the image, and an answer with both."""
    templates: list[Callable[[], QA | None]] = [
        lambda: _left_over(objects, rng), lambda: _nearest_corner(objects, rng), lambda: _largest(objects)
    ]  # fmt: skip
    for template in _shuffled(templates, rng):
        if (pair := template()) is not None:
            return pair
    return "What is the one thing to be seen?", f"It is {article(objects[0].name)}."


def _left_over(objects: Sequence[NamedBox], rng: Random) -> QA | None:
    colors = sorted({box.color for box in objects if box.color})
    if not colors:
        return None
    color = rng.choice(colors)
    gone = sum(box.color == color for box in objects)
    left = len(objects) - gone
    return (
        f"If everything {color} were taken away, how many shapes would be left?",
        f"There are {len(objects)} shapes and {gone} of them {'is' if gone == 1 else 'are'} {color}, "
        f"so {left} would be left.",
    )


def _nearest_corner(objects: Sequence[NamedBox], rng: Random) -> QA | None:
    name, x, y = rng.choice((("top left", 0, 0), ("top right", 1, 0), ("bottom left", 0, 1), ("bottom right", 1, 1)))
    near = sorted(objects, key=lambda box: (box.x - x) ** 2 + (box.y - y) ** 2)
    if len(near) < 2:
        return None
    what = "shape" if all(box.color for box in objects) else "object"
    return (
        f"Which {what} is nearest to the {name} corner, and where is it?",
        f"It is the {near[0].name}: it is {_position(near[0])}, while the {near[1].name} is {_position(near[1])}.",
    )


def _largest(objects: Sequence[NamedBox]) -> QA | None:
    order = sorted(objects, key=lambda box: -box.area)
    if len(order) < 2 or order[0].area < 1.25 * order[1].area:
        return None
    return (
        "Which one is the largest, and what comes next?",
        f"The {order[0].name} takes up the most room, and the {order[1].name} comes next.",
    )


def _position(box: NamedBox) -> str:
    """``in the top left``, ``in the middle``, ``on the right`` …"""
    horizontal = "left" if box.x < 0.36 else "right" if box.x > 0.64 else ""
    vertical = "top" if box.y < 0.36 else "bottom" if box.y > 0.64 else ""
    if not horizontal and not vertical:
        return "in the middle"
    if horizontal and vertical:
        return f"in the {vertical} {horizontal}"
    return f"on the {horizontal}" if horizontal else f"at the {vertical}"


NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def plural(name: str) -> str:
    """The plural of ``name``."""
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _named(name: str) -> Box:
    return Box(name, (0, 0, 1, 1))


def _only(objects: Sequence[NamedBox], attribute: str, box: NamedBox) -> bool:
    return sum(getattr(other, attribute) == getattr(box, attribute) for other in objects) == 1


def _shuffled(items: Sequence[T], rng: Random) -> list[T]:
    return rng.sample(items, len(items))
