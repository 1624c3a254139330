"""Random pages: a tree of HTML elements in one of five layouts. Nothing is drawn here.

A page has at most 8 rows of 50 pixels (see ``layout``). Texts are drawn independently of the structure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal

from llavactl_sketches.words import WORDS, Language, Words

Split = Literal["train", "test"]

ROWS = 8
TEST_SHARE = 5
"""One of this many structures is in the test split."""

VOID_TAGS = frozenset({"img", "input"})


@dataclass(frozen=True)
class Element:
    """An HTML element with text or children."""

    tag: str
    text: str = ""
    children: tuple[Element, ...] = ()

    def html(self, *, texts: bool = True) -> str:
        """The element as HTML without whitespace; ``</li>`` is omitted, as HTML allows."""
        inner = "".join(child.html(texts=texts) for child in self.children) or (self.text if texts else "")
        return f"<{self.tag}>{inner}" + ("" if self.tag in VOID_TAGS or self.tag == "li" else f"</{self.tag}>")


@dataclass(frozen=True)
class Page:
    """A page: the elements of its body, and the name of their ``layout``."""

    id: str
    layout: str
    body: tuple[Element, ...]

    @property
    def html(self) -> str:
        """The body as HTML, one line per element."""
        return "\n".join(element.html() for element in self.body)

    @property
    def structure(self) -> str:
        """The body as HTML without texts."""
        return "".join(element.html(texts=False) for element in self.body)


def split_of(structure: str) -> Split:
    """The split of pages with this structure, for every seed: no structure is in both splits."""
    return "test" if hashlib.sha256(structure.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def draw_page(split: Split, seed: int, index: int, language: Language) -> Page:
    """The page with index ``index`` of a split; independent of other calls."""
    for attempt in count():
        rng = Random(f"llavactl sketches/{split}/{seed}/{index}/{attempt}")
        layout = list(LAYOUTS)[index % len(LAYOUTS)]
        body = tuple(LAYOUTS[layout](_Author(rng, WORDS[language])))
        page = Page(f"{split}-{index:05d}", layout, body)
        if split_of(page.structure) == split:
            return page
    raise AssertionError("count() is endless")


@dataclass(frozen=True)
class _Author:
    """Writes random elements."""

    rng: Random
    words: Words

    def head(self, *, heading: bool | None = None) -> list[Element]:
        """An optional navigation bar and a heading."""
        nav = [self.nav()] if self.rng.random() < 0.5 else []
        with_heading = self.rng.random() < 0.5 if heading is None else heading
        return [*nav, *([self.heading("h1")] if with_heading else [])]

    def nav(self) -> Element:
        return Element("nav", " ".join(self.rng.sample(self.words.menu, self.rng.choice((2, 3)))))

    def heading(self, tag: str) -> Element:
        return Element(tag, self.rng.choice(self.words.heading))

    def button(self) -> Element:
        return Element("button", self.rng.choice(self.words.action))

    def items(self, number: int) -> Element:
        return Element("ul", children=tuple(Element("li", text) for text in self.rng.sample(self.words.item, number)))

    def stack(self, rows: int) -> Iterator[Element]:
        """Blocks that fill ``rows`` rows; neighbors have different tags."""
        previous = ""
        while rows:
            sizes = {"p": 1, "button": 1, "input": 1, "img": 2, "ul": self.rng.choice((2, 3))}
            tag = self.rng.choice([tag for tag, size in sizes.items() if size <= rows and tag != previous])
            yield self.block(tag, sizes[tag])
            rows -= sizes[tag]
            previous = tag

    def block(self, tag: str, rows: int) -> Element:
        if tag == "ul":
            return self.items(rows)
        return self.button() if tag == "button" else Element(tag)


def _column(author: _Author) -> Iterable[Element]:
    head = author.head(heading=True)
    return [*head, *author.stack(author.rng.randint(2, ROWS - len(head) - 1))]


def _columns(author: _Author) -> Iterable[Element]:
    rows = author.rng.randint(2, 4)
    columns = (Element("div", children=tuple(author.stack(rows))) for _ in range(2))
    return [*author.head(), Element("section", children=tuple(columns))]


def _sidebar(author: _Author) -> Iterable[Element]:
    aside = Element("aside", children=(author.items(author.rng.randint(2, 4)),))
    rows = author.rng.randint(2, 5)
    content = Element("div", children=(author.heading("h2"), *author.stack(rows)))
    sides = [aside, content] if author.rng.random() < 0.7 else [content, aside]
    return [*author.head(heading=False), Element("section", children=tuple(sides))]


def _cards(author: _Author) -> Iterable[Element]:
    """Two or three cards of the same structure."""
    rng = author.rng
    parts = [tag for tag in ("img", "p", "button") if rng.random() < 0.6] or ["img"]
    cards = [Element("article", children=_card(author, parts)) for _ in range(rng.choice((2, 3)))]
    foot = [[], [Element("p")], [author.button()]][rng.randrange(3)]
    return [*author.head(), Element("section", children=tuple(cards)), *foot]


def _card(author: _Author, parts: list[str]) -> tuple[Element, ...]:
    image, rest = parts[:1] == ["img"], [tag for tag in parts if tag != "img"]
    first = [Element("img")] if image else []
    return (*first, author.heading("h2"), *(author.block(tag, 1) for tag in rest))


def _form(author: _Author) -> Iterable[Element]:
    rng = author.rng
    labels = rng.sample(author.words.label, rng.randint(1, 4))
    fields = [part for text in labels for part in (Element("label", text), Element("input"))]
    intro = [Element("p")] if rng.random() < 0.5 else []
    foot = [Element("p")] if len(labels) < 4 and rng.random() < 0.3 else []
    return [*author.head(), *intro, Element("form", children=(*fields, author.button())), *foot]


LAYOUTS: dict[str, Callable[[_Author], Iterable[Element]]] = {
    "column": _column,
    "columns": _columns,
    "sidebar": _sidebar,
    "cards": _cards,
    "form": _form,
}
"""The layouts by name: one column, two columns, a sidebar, cards side by side, a form."""
