"""Draws a scene when it is read, so that a thousand pictures need no file."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from llavactl.components.sources.scenes.things import CANVAS, DrawnShape, Scene

if TYPE_CHECKING:
    from PIL import Image

DRAWING_VERSION = 1
"""Part of every stamp: raise it with any change here or in an outline that changes a pixel."""

SUPERSAMPLING = 4
GRAIN = 4
EDGE = 1.6
"""Width of the darker edge, in canvas units: a yellow shape needs it on a light background."""


@dataclass(frozen=True)
class SceneImage:
    """A picture of ``scene``, ``size`` pixels wide and high; see ``llavactl.core.schema.ImageRef``."""

    name: str
    scene: Scene
    size: int = CANVAS

    def read(self) -> bytes:
        """The picture as PNG, the same bytes every time."""
        buffer = io.BytesIO()
        # Not compressed, for the bytes are not kept: packing and unpacking the grain took longer than the drawing.
        draw(self.scene, self.size).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    def stamp(self) -> str:
        """Everything the picture depends on, in words."""
        things = ";".join(
            f"{thing.shape} {thing.x},{thing.y} r{thing.radius} a{thing.angle} {thing.rgb}"
            for thing in self.scene.things
        )
        return f"scene v{DRAWING_VERSION} {self.size}px {self.scene.background} g{self.scene.grain} {things}"


def draw(scene: Scene, size: int) -> Image.Image:
    """``scene`` as an RGB picture of ``size`` x ``size`` pixels."""
    from PIL import Image, ImageChops

    image = Image.new("RGB", (size, size), scene.background)
    for thing in scene.things:
        _paint(image, thing, size / CANVAS)
    noise = Random(scene.grain).randbytes(size * size)
    grain = Image.frombytes("L", (size, size), noise).point([value * (2 * GRAIN + 1) // 256 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (grain, grain, grain)), offset=-GRAIN)


def _paint(image: Image.Image, thing: DrawnShape, scale: float) -> None:
    """Paints one thing, smooth at its edge: its mask is drawn larger and averaged down."""
    from PIL import Image, ImageChops, ImageDraw

    reach = thing.radius + 1
    left, top = round((thing.x - reach) * scale), round((thing.y - reach) * scale)
    side = round(2 * reach * scale) + 1
    # Pillow's corners are whole pixels, so a place is the pixel that it lies in.
    fine = [
        (math.floor((x * scale - left) * SUPERSAMPLING), math.floor((y * scale - top) * SUPERSAMPLING))
        for x, y in thing.outline()
    ]
    large = (side * SUPERSAMPLING, side * SUPERSAMPLING)
    body, edge = Image.new("L", large), Image.new("L", large)
    ImageDraw.Draw(body).polygon(fine, fill=255)
    width = round(2 * EDGE * scale * SUPERSAMPLING)
    ImageDraw.Draw(edge).line([*fine, *fine[:2]], fill=255, width=width)
    # The dark shape first, then the color on what the line leaves free: half of the line lies outside anyway.
    red, green, blue = thing.rgb
    image.paste((red * 7 // 10, green * 7 // 10, blue * 7 // 10), (left, top), body.reduce(SUPERSAMPLING))
    image.paste(thing.rgb, (left, top), ImageChops.subtract(body, edge).reduce(SUPERSAMPLING))
