"""The task ``sketch-to-html``: HTML for hand-drawn wireframes, compared with the HTML of their pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from statistics import fmean

from pydantic import Field

from llavactl import Answer, Json, Question, RecipeError, Scores, Turn
from llavactl_sketches.answers import KINDS, Found, html_in
from llavactl_sketches.browser import Browser, find_browser
from llavactl_sketches.dom import compare_sequences, read_dom
from llavactl_sketches.drawing import SketchImage
from llavactl_sketches.layout import FRAMES, place
from llavactl_sketches.matching import Grade, compare_boxes
from llavactl_sketches.pages import LAYOUTS, Page
from llavactl_sketches.source import SketchOptions

NAMES = {
    "rendered": ("layout", "text", "exact", "valid"),
    "dom": ("structure", "structure_text", "structure_exact", "structure_valid"),
}
"""The names of each protocol's scores; protocols share none, as their scores aren't comparable."""

EXACT = 0.99
"""The layout of an exact answer; positions in a browser are rounded."""


class SketchToHtmlOptions(SketchOptions):
    """Options of the task ``sketch-to-html``."""

    count: int = Field(100, ge=1, description="number of sketches of the test split")
    browser: str = Field(
        "auto", min_length=1, description="Chromium program to compare pages in; `auto`: the first one found; `none`"
    )
    timeout_s: float = Field(30, gt=0, le=600, description="time limit of each start of the browser, in seconds")


class SketchToHtml:
    """The task ``sketch-to-html``; see ``llavactl.Task``.

    The protocols are ``rendered``, if there is a browser, and ``dom``. Their scores have different names.
    """

    def __init__(self, options: SketchToHtmlOptions) -> None:
        self.options = options
        self.browser = _browser(options)
        self.protocols: tuple[str, ...] = ("rendered", "dom") if self.browser else ("dom",)

    def questions(self) -> Iterator[Question]:
        for page, image in self._sketches():
            turn = Turn("user", (image, "\n" + self.options.prompt))
            yield Question(page.id, (turn,), f"```html\n{page.html}\n```", page.layout)

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:
        """Scores in percent, over all sketches and for each layout of the page.

        1. The elements: their boxes in the browser (``rendered``), or their sequence in the document (``dom``).
        2. The texts of matched elements.
        3. The share of answers with all elements in their places.
        4. The share of answers with any element. Others have 0 everywhere; without HTML they count as ``failed``.
        """
        elements, texts, exact, valid = NAMES[protocol]
        pages = [page for page, _ in self._sketches() if page.id in answers]
        bodies = {page.id: html_in(answers[page.id].text) for page in pages}
        graded = self._rendered(pages, bodies) if protocol == "rendered" else _compared(pages, bodies)
        right = {name: grade is not None and grade.layout >= EXACT for name, grade in graded.items()}
        scores: dict[str, Json] = _means(list(graded.values()), elements, texts)
        scores[exact] = 100 * fmean(right.values())
        scores[valid] = 100 * fmean(grade is not None for grade in graded.values())
        for layout in LAYOUTS:
            if grades_of_layout := [graded[page.id] for page in pages if page.layout == layout]:
                scores[layout] = _means(grades_of_layout, elements, texts)
        failed = sum(body is None for body in bodies.values())
        grades = {name: grade.layout if grade else 0.0 for name, grade in graded.items()}
        return Scores(scores, failed, right=right, about={exact: list(right)}, grades=grades)

    def _sketches(self) -> Iterator[tuple[Page, SketchImage]]:
        return (self.options.sketch("test", index) for index in range(self.options.count))

    def _rendered(self, pages: list[Page], bodies: Mapping[str, str | None]) -> dict[str, Grade | None]:
        """Grades by page id, from boxes in the browser; None if the answer has no visible element."""
        assert self.browser is not None, "the protocol is available with a browser only"
        shown = {name: body for name, body in bodies.items() if body is not None}
        measured = dict(zip(shown, self.browser.measure(list(shown.values())), strict=True))
        graded: dict[str, Grade | None] = {}
        for page in pages:
            boxes = measured.get(page.id)
            graded[page.id] = (
                compare_boxes(_reference(page), boxes.found, boxes.count) if boxes and boxes.count else None
            )
        return graded


def _compared(pages: list[Page], bodies: Mapping[str, str | None]) -> dict[str, Grade | None]:
    """Grades by page id, from elements in document order; None if the answer has no element."""
    graded: dict[str, Grade | None] = {}
    for page in pages:
        found = read_dom(bodies[page.id] or "")
        is_valid = any(item.kind in KINDS.values() for item in found)
        graded[page.id] = compare_sequences(read_dom(page.html), found) if is_valid else None
    return graded


def _reference(page: Page) -> list[Found]:
    """The compared elements of a page with their boxes."""
    return [Found(KINDS[item.tag], item.text, item.box) for item in place(page.body) if item.tag not in FRAMES]


def _means(grades: list[Grade | None], elements: str, texts: str) -> dict[str, Json]:
    """The mean scores in percent and the number of pages; pages without text have no score for texts."""
    layouts = [grade.layout if grade else 0.0 for grade in grades]
    scored = [text for text in (grade.text if grade else 0.0 for grade in grades) if text is not None]
    return {elements: 100 * fmean(layouts), texts: 100 * fmean(scored) if scored else None, "n": len(grades)}


def _browser(options: SketchToHtmlOptions) -> Browser | None:
    """The browser that ``options.browser`` selects; None for a comparison without one.

    Raises:
        RecipeError: the program isn't installed.
    """
    if options.browser == "none":
        return None
    program = find_browser() if options.browser == "auto" else shutil.which(options.browser)
    if program is None and options.browser != "auto":
        raise RecipeError(
            f"browser: no program {options.browser!r}", hint="name a Chromium, or `auto` or `none` (compares the DOM)"
        )
    return Browser(program, options.timeout_s) if program else None
