"""Images of scenes, drawn when they are read, without files."""

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
"""Part of every stamp: increment it with any change that changes a pixel, also of an outline."""

SUPERSAMPLING = 4
GRAIN = 4
EDGE = 1.6
"""Width of the darker edge in canvas units, which makes yellow shapes visible on a light background."""


@dataclass(frozen=True)
class SceneImage:
    """An image of ``scene``, ``size`` pixels wide and high; see ``llavactl.core.schema.ImageRef``."""

    name: str
    scene: Scene
    size: int = CANVAS

    def read(self) -> bytes:
        """The image as PNG, deterministic."""
        buffer = io.BytesIO()
        # Not compressed: the bytes aren't stored, and compressing the grain took longer than drawing.
        draw(self.scene, self.size).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    def stamp(self) -> str:
        """Everything the image depends on, as text."""
        things = ";".join(
            f"{thing.shape} {thing.x},{thing.y} r{thing.radius} a{thing.angle} {thing.rgb}"
            for thing in self.scene.things
        )
        return f"scene v{DRAWING_VERSION} {self.size}px {self.scene.background} g{self.scene.grain} {things}"


def draw(scene: Scene, size: int) -> Image.Image:
    """``scene`` as an RGB image of ``size`` x ``size`` pixels."""
    from PIL import Image, ImageChops

    image = Image.new("RGB", (size, size), scene.background)
    for thing in scene.things:
        _paint(image, thing, size / CANVAS)
    noise = Random(scene.grain).randbytes(size * size)
    grain = Image.frombytes("L", (size, size), noise).point([value * (2 * GRAIN + 1) // 256 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (grain, grain, grain)), offset=-GRAIN)


def _paint(image: Image.Image, thing: DrawnShape, scale: float) -> None:
    """Draws one shape with an antialiased edge, by drawing its mask larger and averaging."""
    from PIL import Image, ImageChops, ImageDraw

    reach = thing.radius + 1
    left, top = round((thing.x - reach) * scale), round((thing.y - reach) * scale)
    side = round(2 * reach * scale) + 1
    # Pillow needs integer corners: the pixel that contains each point.
    fine = [
        (math.floor((x * scale - left) * SUPERSAMPLING), math.floor((y * scale - top) * SUPERSAMPLING))
        for x, y in thing.outline()
    ]
    large = (side * SUPERSAMPLING, side * SUPERSAMPLING)
    body, edge = Image.new("L", large), Image.new("L", large)
    ImageDraw.Draw(body).polygon(fine, fill=255)
    width = round(2 * EDGE * scale * SUPERSAMPLING)
    ImageDraw.Draw(edge).line([*fine, *fine[:2]], fill=255, width=width)
    # The dark shape first, then the color inside the line, half of which is outside the shape.
    red, green, blue = thing.rgb
    image.paste((red * 7 // 10, green * 7 // 10, blue * 7 // 10), (left, top), body.reduce(SUPERSAMPLING))
    image.paste(thing.rgb, (left, top), ImageChops.subtract(body, edge).reduce(SUPERSAMPLING))
