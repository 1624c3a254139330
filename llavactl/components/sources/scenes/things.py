"""The colored shapes of a scene: names, positions, outlines and relations.

Only arithmetic on a canvas of CANVAS x CANVAS units; nothing is drawn here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from llavactl.core.schema import Box

Split = Literal["train", "test"]
Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLORS: dict[str, Rgb] = {
    "red": (216, 38, 42),
    "green": (34, 152, 66),
    "blue": (38, 88, 216),
    "yellow": (246, 212, 24),
    "purple": (142, 56, 184),
    "orange": (250, 130, 14),
}
"""The colors by name, distinct enough for unambiguous names."""

SHAPES = ("square", "circle", "star", "triangle", "heart", "cross")
"""The shapes, distinguishable by their silhouettes."""

CANVAS = 224
"""Side of the square in which positions and radii are measured, independent of the image size."""

CLEAR = 40
"""Minimum distance of two centers along an axis for a question about their order."""


def held_out(color: str, shape: str) -> bool:
    """Whether no scene of the train split shows or mentions a ``color`` ``shape``.

    These are the diagonal of the table of colors and shapes, so every color and every shape lacks exactly one partner,
    and neither makes an answer likelier. The order of SHAPES keeps pairs that language models expect (a red heart, a
    yellow star) off the diagonal.
    """
    return list(COLORS).index(color) == SHAPES.index(shape)


@dataclass(frozen=True)
class DrawnShape:
    """One colored shape: inside the circle of ``radius`` around (``x``, ``y``), turned by ``angle`` degrees."""

    color: str
    shape: str
    x: int
    y: int
    radius: int
    angle: int
    rgb: Rgb

    @property
    def pair(self) -> tuple[str, str]:
        return self.color, self.shape

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def held_out(self) -> bool:
        return held_out(self.color, self.shape)

    def outline(self) -> tuple[Point, ...]:
        """The corners of the shape on the canvas, y downwards."""
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn) * self.radius, math.sin(turn) * self.radius
        return tuple((self.x + x * cos - y * sin, self.y + x * sin + y * cos) for x, y in _unit_outline(self.shape))

    def box(self) -> Box:
        """The bounding box of the shape, as shares of the canvas."""
        xs, ys = zip(*self.outline(), strict=True)
        return Box(self.name, (min(xs) / CANVAS, min(ys) / CANVAS, max(xs) / CANVAS, max(ys) / CANVAS))


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image: the ``things``, the ``background`` and the seed of its ``grain``."""

    things: tuple[DrawnShape, ...]
    background: Rgb
    grain: int


AXES: dict[str, tuple[str, str]] = {"x": ("left", "right"), "y": ("above", "below")}
"""The words for positions before and after another one along each axis."""


def clear_axes(one: DrawnShape, other: DrawnShape) -> tuple[str, ...]:
    """The axes along which the order of the two is unambiguous."""
    dx, dy = abs(one.x - other.x), abs(one.y - other.y)
    return tuple(axis for axis, along, across in (("x", dx, dy), ("y", dy, dx)) if along >= max(CLEAR, across / 2))


def side(one: DrawnShape, other: DrawnShape, axis: str) -> str:
    """The position of ``one`` relative to ``other``: left, right, above or below."""
    before = one.x < other.x if axis == "x" else one.y < other.y
    return AXES[axis][0 if before else 1]


def exchange_places(one: DrawnShape, other: DrawnShape) -> tuple[DrawnShape, DrawnShape]:
    """Both shapes with exchanged positions."""
    return replace(one, x=other.x, y=other.y), replace(other, x=one.x, y=one.y)


def exchange_colors(one: DrawnShape, other: DrawnShape) -> tuple[DrawnShape, DrawnShape]:
    """Both shapes with exchanged colors."""
    return replace(one, color=other.color, rgb=other.rgb), replace(other, color=one.color, rgb=one.rgb)


@cache
def _unit_outline(shape: str) -> tuple[Point, ...]:
    """``shape`` inside the unit circle, upright; scaled so that all shapes appear about equally large."""
    if shape == "circle":
        return _ring(64, 0.86)
    if shape == "square":
        return _ring(4, 1.0, start=-45)
    if shape == "triangle":
        return _ring(3, 1.0, start=-90)
    if shape == "star":
        points = zip(_ring(5, 1.0, start=-90), _ring(5, 0.43, start=-54), strict=True)
        return tuple(point for both in points for point in both)
    if shape == "cross":
        a, b = 0.94, 0.31
        corner = ((b, -a), (b, -b), (a, -b))
        turned = ((corner, 1, 0), (corner, 0, 1), (corner, -1, 0), (corner, 0, -1))
        return tuple((x * cos - y * sin, x * sin + y * cos) for points, cos, sin in turned for x, y in points)
    return _heart()


def _ring(corners: int, radius: float, *, start: float = 0) -> tuple[Point, ...]:
    """The corners of a regular polygon, the first at ``start`` degrees."""
    angles = [math.radians(start + 360 * corner / corners) for corner in range(corners)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _heart() -> tuple[Point, ...]:
    """The heart curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, centered."""
    curve = []
    for step in range(64):
        t = math.tau * step / 64
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((16 * math.sin(t) ** 3 / 18.3, (-y - 2.5) / 18.3))
    return tuple(curve)
