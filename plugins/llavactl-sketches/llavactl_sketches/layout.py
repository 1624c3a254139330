"""The positions of a page's elements, and the stylesheet that gives them the same positions in a browser.

All sizes are fixed, so no position depends on a font: elements are 40 pixels high, images 90, with gaps of 10 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llavactl_sketches.pages import Element

PAGE = 400
"""Width and height of a page in CSS pixels."""

GAP, ROW, IMAGE = 10, 40, 90
LABEL, SIDEBAR, BUTTON, PADDING = 90, 100, 120, 6

FRAMES = frozenset({"article", "form"})

STYLESHEET = f"""
*{{box-sizing:border-box;margin:0;padding:0;border:0;font:20px/{ROW}px sans-serif}}
body{{width:{PAGE}px;padding:{GAP // 2}px {GAP}px}}
nav,h1,h2,h3,h4,p,button,input,textarea,select,label,li,img{{display:block;width:100%;height:{ROW}px;
margin-bottom:{GAP}px;overflow:hidden}}
nav,button,label,li,h1,h2,h3,h4{{white-space:pre}}
nav{{background:#dde;word-spacing:1em;padding-left:{GAP}px}}
h1,h2,h3,h4{{font-weight:bold;font-size:24px}}
p:empty{{background:repeating-linear-gradient(#fff 0 8px,#ccc 8px 10px)}}
button{{width:{BUTTON}px;max-width:100%;background:#ccd;border-radius:8px}}
input{{border:1px solid #888}}
ul{{list-style:none}}
li{{border-bottom:1px dotted #888}}
img{{height:{IMAGE}px;background:#ddd}}
section{{display:flex;gap:{GAP}px}}
section>*{{flex:1;min-width:0}}
section>aside{{flex:0 0 {SIDEBAR}px}}
article,form{{padding:0 {PADDING}px;background:#f4f4f8}}
form{{display:grid;grid-template-columns:{LABEL}px 1fr;column-gap:{GAP}px}}
form>*{{grid-column:1/-1}}
form>label{{grid-column:1}}
form>label+input{{grid-column:2}}
"""
"""The stylesheet of all pages, including answers."""


@dataclass(frozen=True)
class Placed:
    """An element with its box (left, top, right, bottom) in CSS pixels; ``text`` is what is drawn in it."""

    tag: str
    text: str
    box: tuple[float, float, float, float]


def place(body: Sequence[Element]) -> tuple[Placed, ...]:
    """The boxes of all leaf elements and of FRAMES, in document order."""
    return tuple(_stack(body, GAP, GAP / 2, PAGE - 2 * GAP)[0])


def _stack(elements: Sequence[Element], x: float, y: float, width: float) -> tuple[list[Placed], float]:
    """Elements stacked vertically, and the y of the next one."""
    placed: list[Placed] = []
    for element in elements:
        if element.tag == "section":
            sides = [_stack([each], left, y, size) for each, left, size in _columns(element.children, x, width)]
            placed += [item for items, _ in sides for item in items]
            y = max(bottom for _, bottom in sides)
        elif element.tag == "form":
            fields, bottom = _form(element.children, x + PADDING, y, width - 2 * PADDING)
            placed += [Placed("form", "", (x, y, x + width, bottom)), *fields]
            y = bottom
        elif element.children:
            padding = PADDING if element.tag in FRAMES else 0
            inner, bottom = _stack(element.children, x + padding, y, width - 2 * padding)
            placed += [Placed(element.tag, "", (x, y, x + width, bottom))] if element.tag in FRAMES else []
            placed += inner
            y = bottom
        else:
            placed.append(_leaf(element, x, y, width))
            y = placed[-1].box[3] + GAP
    return placed, y


def _leaf(element: Element, x: float, y: float, width: float) -> Placed:
    right = x + (min(BUTTON, width) if element.tag == "button" else width)
    return Placed(element.tag, element.text, (x, y, right, y + (IMAGE if element.tag == "img" else ROW)))


def _columns(children: Sequence[Element], x: float, width: float) -> Iterator[tuple[Element, float, float]]:
    """The children of a section side by side: element, left, width."""
    sidebars = sum(child.tag == "aside" for child in children)
    free = width - GAP * (len(children) - 1) - SIDEBAR * sidebars
    for child in children:
        size = SIDEBAR if child.tag == "aside" else free / (len(children) - sidebars)
        yield child, x, size
        x += size + GAP


def _form(children: Sequence[Element], x: float, y: float, width: float) -> tuple[list[Placed], float]:
    """Labels with their inputs to the right of them; other elements over the whole width."""
    placed: list[Placed] = []
    for child in children:
        if child.tag == "label":
            placed.append(_leaf(child, x, y, LABEL))
            continue
        after_label = bool(placed) and placed[-1].tag == "label"
        offset = LABEL + GAP if after_label else 0
        placed.append(_leaf(child, x + offset, y, width - offset))
        y = placed[-1].box[3] + GAP
    return placed, y
