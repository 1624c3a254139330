"""Images of pages as if drawn by hand: wobbly lines, uneven letters, a slight rotation, paper texture.

The bytes are equal on every platform: letters are the pixels of Pillow's bitmap font, coordinates are integers before
anything is drawn, and averaging is integer arithmetic.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

from llavactl_sketches.layout import FRAMES, PAGE, Placed, place
from llavactl_sketches.pages import Page

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

DRAWING_VERSION = 1
"""Part of every stamp: increment it with any change that changes a pixel."""

SUPERSAMPLING = 4
MAX_TURN = 1.5
"""Degrees."""

WOBBLE = 0.9
"""Standard deviation of the points of a line, in CSS pixels."""

GRAIN = 6
GLYPH = (6, 11)
"""Width and height of a letter of the bitmap font in its pixels."""

Point = tuple[float, float]


@dataclass(frozen=True)
class SketchImage:
    """The sketch of ``page``, ``size`` pixels wide and high; see ``llavactl.ImageRef``."""

    name: str
    page: Page
    seed: str
    size: int

    def read(self) -> bytes:
        """The image as PNG, deterministic."""
        buffer = io.BytesIO()
        # Not compressed: the bytes aren't stored, and compressed ones depend on the version of zlib.
        draw(self.page, self.seed, self.size).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    def stamp(self) -> str:
        """All that the image depends on, as text."""
        return f"sketch v{DRAWING_VERSION} {self.size}px {self.seed} {self.page.html}"


def draw(page: Page, seed: str, size: int) -> Image.Image:
    """The sketch of ``page`` as an RGB image of ``size`` x ``size`` pixels."""
    from PIL import Image, ImageChops, ImageDraw

    rng = Random(f"llavactl sketches/hand/{seed}")
    ink = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    hand = _Hand(ImageDraw.Draw(ink), rng, size * SUPERSAMPLING / PAGE, math.radians(rng.uniform(-MAX_TURN, MAX_TURN)))
    for item in place(page.body):
        hand.element(item)
    light = rng.randint(228, 252)
    paper = (light, light - rng.randint(0, 6), light - rng.randint(4, 22))
    pen = rng.choice(((30, 30, 36), (24, 40, 110), (70, 62, 58)))
    image = Image.new("RGB", (size, size), paper)
    image.paste(pen, (0, 0), ink.reduce(SUPERSAMPLING))
    noise = rng.randbytes(size * size)
    grain = Image.frombytes("L", (size, size), noise).point([value * (2 * GRAIN + 1) // 256 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (grain, grain, grain)), offset=-GRAIN)


@dataclass(frozen=True)
class _Hand:
    """Draws on a canvas of ``scale`` pixels per CSS pixel that is turned by ``angle`` around the center of the page."""

    canvas: ImageDraw.ImageDraw
    rng: Random
    scale: float
    angle: float

    def element(self, item: Placed) -> None:
        left, top, right, bottom = item.box
        x, y = left + 8, (top + bottom) / 2
        if item.tag in FRAMES:
            self.rectangle((left - 2, top - 4, right + 2, bottom - 6), 1.6)
        elif item.tag == "p":
            for row in range(3):
                self.wave(left + 2, right - self.rng.uniform(4, 30 + 40 * (row == 2)), top + 7 + 13 * row)
        elif item.tag in ("h1", "h2"):
            self.text(item.text, left + 2, y, 2.9 if item.tag == "h1" else 2.6, right - left - 4, bold=True)
        elif item.tag == "li":
            self.rectangle((left + 2, y - 3, left + 8, y + 3), 3)
            self.text(item.text, left + 16, y, 2, right - left - 18)
        elif item.tag == "label":
            self.text(item.text, left, y, 2, right - left)
        else:
            self.rectangle(item.box, 3 if item.tag == "button" else 2)
            if item.tag == "button":
                self.rectangle((left + 3, top + 3, right - 3, bottom - 3), 1.4)
            if item.tag == "img":
                self.line((left, top), (right, bottom), 1.6)
                self.line((left, bottom), (right, top), 1.6)
            elif item.tag == "input":
                self.line((x, top + 9), (x, bottom - 9), 2)
            elif item.tag == "button":
                # A letter is 6 by 11: the text is centered.
                size = min(2.0, (right - left - 14) / (GLYPH[0] * len(item.text)))
                x = (left + right - GLYPH[0] * size * len(item.text)) / 2
                self.text(item.text, x, y, size, right - x)
            else:
                self.text(item.text, x, y, 2, right - left - 16)

    def rectangle(self, box: tuple[float, float, float, float], width: float) -> None:
        left, top, right, bottom = box
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
            self.line(start, end, width)

    def line(self, start: Point, end: Point, width: float) -> None:
        """A line that wobbles, of varying width, and may end a little early or late."""
        length = math.dist(start, end)
        steps = max(1, round(length / 14))
        over = self.rng.uniform(-1, 2.5) / max(length, 1)
        shares = [step / steps * (1 + over) for step in range(steps + 1)]
        points = [tuple(a + (b - a) * share for a, b in zip(start, end, strict=True)) for share in shares]
        self.stroke([(x + self.rng.gauss(0, WOBBLE), y + self.rng.gauss(0, WOBBLE)) for x, y in points], width)

    def wave(self, left: float, right: float, y: float) -> None:
        """A wavy line, which stands for text."""
        steps = max(2, round((right - left) / 5))
        points = [(left + (right - left) * step / steps, y + (2.4 if step % 2 else -2.4)) for step in range(steps + 1)]
        self.stroke([(x, y + self.rng.gauss(0, WOBBLE)) for x, y in points], 1.6)

    def stroke(self, points: list[Point], width: float) -> None:
        previous = self.pixel(points[0])
        for point in points[1:]:
            current = self.pixel(point)
            thick = round(width * self.rng.uniform(0.7, 1.3) * self.scale)
            self.canvas.line([previous, current], fill=self.rng.randint(200, 255), width=max(thick, 1))
            previous = current

    def text(self, text: str, x: float, y: float, size: float, width: float, *, bold: bool = False) -> None:
        """``text`` from ``x``, centered at ``y``, in letters of at most ``size`` that fit into ``width``."""
        size = min(size, width / (GLYPH[0] * len(text)))
        for letter in text:
            dx, dy = self.rng.gauss(0, 0.5), self.rng.gauss(0, 0.9)
            for column, row in _letter(letter):
                corner = (x + dx + column * size, y + dy + (row - GLYPH[1] / 2) * size)
                dot = (corner[0] + size * (1.5 if bold else 1.1), corner[1] + size * 1.1)
                (left, top), (right, bottom) = self.pixel(corner), self.pixel(dot)
                self.canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=235)
            x += GLYPH[0] * size

    def pixel(self, point: Point) -> tuple[int, int]:
        """The pixel of the turned canvas at a point of the page."""
        x, y = point[0] - PAGE / 2, point[1] - PAGE / 2
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = (x * cos - y * sin + PAGE / 2, x * sin + y * cos + PAGE / 2)
        return round(turned[0] * self.scale), round(turned[1] * self.scale)


@lru_cache(maxsize=256)
def _letter(letter: str) -> tuple[tuple[int, int], ...]:
    """The pixels (column, row) of a letter in Pillow's bitmap font."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("1", GLYPH)
    ImageDraw.Draw(image).text((0, 0), letter, fill=1, font=ImageFont.load_default_imagefont())
    return tuple(_set_pixels(image))


def _set_pixels(image: Image.Image) -> Iterator[tuple[int, int]]:
    for y in range(image.height):
        for x in range(image.width):
            if image.getpixel((x, y)):
                yield x, y
