"""The source ``sketches``: each sample is a drawn page and its HTML in a code block."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from llavactl import Box, Options, Sample, Turn
from llavactl_sketches.drawing import SketchImage
from llavactl_sketches.layout import FRAMES, PAGE, place
from llavactl_sketches.pages import Page, Split, draw_page
from llavactl_sketches.words import Language

PROMPT = (
    "Write the page of this hand-drawn wireframe as HTML. It is 400×400 pixels and has a stylesheet. Use nav, h1, h2, "
    "p, button, label, input, ul, li and img; around them section for columns (div, aside, or article for cards) and "
    "form. Wavy lines are an empty p. Answer with one code block."
)
"""The default prompt; it names the elements, which a model can't know otherwise."""

BOX_WORDS = {"h1": "heading", "h2": "heading", "p": "text", "img": "image", "li": "item"}
"""The word for an element in the names of boxes, if not its tag; box alignment uses the embeddings of words."""


class SketchOptions(Options):
    """Options of sketches, in training and in evaluation."""

    seed: int = Field(0, description="seed of the pages")
    language: Language = Field("en", description="language of the words on the pages: de, en, es, fr")
    size: int = Field(224, ge=112, le=2048, description="width and height of the images in pixels")
    prompt: str = Field(PROMPT, min_length=1, description="the question about each image")

    def sketch(self, split: Split, index: int) -> tuple[Page, SketchImage]:
        """The page with index ``index`` and its image, which is drawn when it is read."""
        page = draw_page(split, self.seed, index, self.language)
        return page, SketchImage(f"sketches/{page.id}.png", page, f"{split}/{self.seed}/{index}", self.size)


class SketchesOptions(SketchOptions):
    """Options of the source ``sketches``."""

    count: int = Field(ge=1, description="number of sketches; a larger count adds sketches and keeps the first ones")
    split: Split = Field("train", description="no page structure is in both splits, for any seed")


def sketches(options: SketchesOptions) -> Iterator[Sample]:
    """One sample per sketch, with its HTML in a code block; layouts alternate."""
    for index in range(options.count):
        page, image = options.sketch(options.split, index)
        turns = (Turn("user", (image, "\n" + options.prompt)), Turn("assistant", (f"```html\n{page.html}\n```",)))
        yield Sample(page.id, turns, where=f"sketch {page.id}", captions=(caption(page),), boxes=boxes(page))


def caption(page: Page) -> str:
    """The elements of a page in document order, in words."""
    return ", ".join(_name(item.tag, item.text) for item in place(page.body) if item.tag not in FRAMES) + "."


def boxes(page: Page) -> tuple[Box, ...]:
    """The boxes of a page's elements; the category is an element's text and kind ("Buy button")."""
    return tuple(
        Box(_name(item.tag, item.text), tuple(side / PAGE for side in item.box))  # type: ignore[arg-type] # four
        for item in place(page.body)
        if item.tag not in FRAMES
    )


def _name(tag: str, text: str) -> str:
    return f"{text} {BOX_WORDS.get(tag, tag)}".strip()
